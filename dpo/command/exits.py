"""How a program begins and ends: its exit code, and the one line of its error.

`dpo.distributed.program` does the same for ranks, which end together.
"""

import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from dpo.base.errors import FolderLost, Preempted, RunError, UserError, one_line
from dpo.base.files import naming
from dpo.base.full_disk import full_code
from dpo.base.space import describe_full
from dpo.command.line import split_options
from dpo.command.rank import is_main, is_rank
from dpo.terminal.console import set_quiet, tell

EXIT_CODES: Mapping[type[BaseException], int] = {
    Preempted: 0,
    RunError: 1,
    OSError: 1,
    UserError: 2,
    KeyboardInterrupt: 130,
}
"""Exit codes by the exception that ends a program; any other exception is a bug, and keeps its traceback."""


def exit_code_of(failure: BaseException) -> int:
    """Returns the exit code of a program that this exception ends: 1 for a bug."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(failure, kind)), 1)


def line_of(failure: BaseException) -> str:
    """Returns the error line of an exception: its message, after the exception's name if it is not ours; of a full disk
    `the disk is full`, with the file.
    """
    full = describe_full(failure)
    if full:
        return one_line(full)
    is_ours = isinstance(failure, (UserError, RunError, FolderLost))
    return one_line(str(failure) if is_ours else f"{type(failure).__name__}: {failure}")


def tell_error(line: str) -> None:
    """Prints the line that says why a program ends."""
    tell(f"error: {one_line(line)}")


def tell_stop(advice: str) -> None:
    """Prints the line of a program that Ctrl-C ends; `advice` says how to go on, empty: nothing to say."""
    tell(f"stopped; {advice}" if advice else "stopped")


def obey_quiet(argv: Sequence[str]) -> None:
    """Silences `say` and progress bars if the command line has --quiet."""
    set_quiet(any(option.key == "quiet" and option.value is None for option in split_options(argv)))


def run_program(main: Callable[[], object], after_stop: str = "") -> int:
    """Runs a program that is one process, prints its error line, and returns its exit code; see EXIT_CODES. Ctrl-C
    prints `stopped`, and `after_stop`.

    `dpo.distributed.program.run_program` does the same for ranks.
    """
    obey_quiet(sys.argv[1:])
    show_any_text()
    try:
        with_results_written(main)
    except KeyboardInterrupt as stop:
        tell_stop(after_stop)
        return exit_code_of(stop)
    except Exception as failure:
        if is_reader_gone(failure):
            return READER_GONE
        if not is_told(failure):
            raise
        tell_error(line_of(failure))
        return exit_code_of(failure)
    return 0


def is_told(failure: Exception) -> bool:
    """Returns whether an exception ends a program by one line: that of the user's input, of a run, of the system, or of
    a library to which the disk is full. Any other one is a bug.
    """
    return isinstance(failure, (UserError, RunError, OSError)) or full_code(failure) is not None


def show_any_text() -> None:
    """Has stdout show characters that its encoding lacks as escapes, as stderr does, where it would raise."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def with_results_written(main: Callable[[], object]) -> None:
    """Runs `main`, and writes what it printed, so that a failure to do so is known before Python shuts down."""
    try:
        main()
    except SystemExit:  # after --help and the like
        _write_results()
        raise
    _write_results()


def _write_results() -> None:
    if sys.stdout is not None:  # None: the process was started with a closed stdout
        try:
            with naming(_stdout_file()):
                sys.stdout.flush()
        except OSError as failure:
            if full_code(failure) is not None:
                _discard_results()
            raise


def _stdout_file() -> Path:
    """Returns the file to which stdout goes, or the name of a pipe or terminal."""
    try:
        return Path("/proc/self/fd/1").readlink()
    except OSError:
        return Path("stdout")


READER_GONE = 128 + signal.SIGPIPE
"""The exit code of a program whose results nobody reads any more, as in `dpo estimate my.yaml | head -1`."""


def is_reader_gone(failure: BaseException) -> bool:
    """Returns whether a program ended because the reader of stdout, a pipe, is gone; then discards what is left for it,
    so that Python says nothing of it either.
    """
    if not isinstance(failure, BrokenPipeError) or sys.stdout is None:
        return False
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    is_gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if is_gone:
        _discard_results()
    return is_gone


def _discard_results() -> None:
    """Discards what is left for stdout: Python would try once more as it ends, and fail with words of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_words(read: Callable[[], object]) -> None:
    """Reads the command line of a program before its libraries are imported, which takes seconds; ends this process
    where the words are wrong. The ranks of torchrun read them later, when they can end together.
    """
    if not is_rank(os.environ) and (code := run_program(read)):
        sys.exit(code)


@contextmanager
def late_imports() -> Iterator[None]:
    """Imports libraries in a with-block of a program that runs; Ctrl-C comes after it, see `slow_imports`. The kernel
    may give the signal to any thread, so that it cannot be blocked here; Python handles it in the main thread alone.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def slow_imports() -> Iterator[None]:
    """Imports libraries in a with-block, which takes seconds; after it ends this process where Ctrl-C came meanwhile.

    Ctrl-C waits until then: torch imports numpy in a way that swallows KeyboardInterrupt, and the program would go on.
    The garbage collector waits too, and never looks at what was imported: it would take a quarter of the time of the
    imports, and finds nothing in modules.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()
    try:
        yield
        came = signal.SIGINT in signal.sigpending()
        if came and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # takes it from those that wait
            if is_main(os.environ):
                tell_stop("")
            sys.exit(EXIT_CODES[KeyboardInterrupt])
    finally:
        gc.freeze()
        gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
