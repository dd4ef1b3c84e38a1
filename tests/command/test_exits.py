"""How a program begins and ends where a signal, or a closed stream, comes at an unusual moment."""

import os
import signal
import subprocess
import sys

import pytest

SIGNALLED = """
import os, signal, sys
from dpo.command.exits import slow_imports
signal.signal(signal.SIGINT, {handler})
with slow_imports():
    os.kill(os.getpid(), signal.SIGINT)
    import numpy
print("went on")
"""


@pytest.mark.parametrize(
    ("handler", "ends"),
    [
        ("signal.default_int_handler", (130, "", "stopped\n")),
        ("signal.SIG_IGN", (0, "went on\n", "")),
        ("lambda *_: print('noted')", (0, "noted\nwent on\n", "")),
    ],
)
def test_ctrl_c_while_libraries_are_imported(handler: str, ends: tuple[int, str, str]) -> None:
    """It ends the program, unless it is ignored, as behind a shell's `&`, or a handler takes it, as in a rank."""
    done = run_python(SIGNALLED.format(handler=handler))
    assert (done.returncode, done.stdout, done.stderr) == ends


COLLECTED = """
import gc
from dpo.command.exits import slow_imports
try:
    with slow_imports():
        print(gc.isenabled())
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_the_collector_waits_for_imports() -> None:
    """It is on after them, also where they fail, and no longer looks at what they made."""
    assert run_python(COLLECTED).stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize(("rank", "told"), [("0", "stopped\n"), ("1", "")])
def test_one_rank_alone_says_that_ctrl_c_came(rank: str, told: str) -> None:
    """Under torchrun, which a terminal's Ctrl-C reaches with all its ranks."""
    done = run_python(SIGNALLED.format(handler="signal.default_int_handler"), {"RANK": rank})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)


LATE = """
import os, signal, sys, threading
from dpo.command.exits import late_imports
threading.Thread(target=threading.Event().wait, daemon=True).start()  # may get the signal
try:
    with late_imports():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            import decimal
        except BaseException:
            pass  # as libraries do while they are imported
        print("imported")
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_while_a_running_program_imports_a_library_comes_after_it() -> None:
    assert run_python(LATE).stdout.split() == ["imported", "stopped"]


BEFORE_ALL = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "dpo.front.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from dpo.__main__ import main
sys.argv = ["dpo", "--version"]
main()
"""


def test_ctrl_c_while_the_first_modules_are_imported() -> None:
    """No traceback; a shell makes 130 of the signal."""
    done = run_python(BEFORE_ALL)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    ignored = run_python("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + BEFORE_ALL)
    assert ignored.returncode == 0 and ignored.stdout


PRINTS = """
import sys
from {module} import run_program
def main():
    print({text})
    {then}
sys.exit(run_program(main))
"""


@pytest.mark.parametrize("then", ["pass", "raise SystemExit(0)"], ids=["returns", "as --help"])
@pytest.mark.parametrize("text", ["'x'", "'x' * 10**6"], ids=["buffered", "long"])
@pytest.mark.parametrize("module", ["dpo.command.exits", "dpo.distributed.program"])
def test_a_reader_of_results_that_is_gone_is_no_error(module: str, text: str, then: str) -> None:
    """As of `dpo --help | head -1`: the exit code is 128 + SIGPIPE, as of other programs, and nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(module=module, text=text, then=then)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_characters_that_the_encoding_of_stdout_lacks_are_shown_as_escapes() -> None:
    done = run_python(
        PRINTS.format(module="dpo.command.exits", text="'a\\u00e9\\u2588'", then="pass"), {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\\xe9\\u2588\n", "")


@pytest.mark.parametrize("module", ["dpo.command.exits", "dpo.distributed.program"])
def test_a_program_may_begin_with_closed_streams(module: str) -> None:
    """`dpo train >&- 2>&-`: Python has no stdout and no stderr then."""
    code = f"import sys\nfrom {module} import run_program\nsys.exit(run_program(lambda: print('x')))"
    assert subprocess.run(["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code]).returncode == 0


def test_a_rank_may_end_with_closed_streams() -> None:
    code = "from dpo.distributed.program import exit_program\nexit_program(lambda: None)"
    assert subprocess.run(["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code]).returncode == 0


def run_python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python, with signals as a terminal's processes have them."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
