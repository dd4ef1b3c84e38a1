"""Tab completion: shtab's script in a real bash, and the flags that it knows against those that the programs have."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.front.names import COMMANDS, FLAGS

pytest.importorskip("shtab")
from dpo.front import completion
from tests.support.runs import exit_code_of

ASK = """
source {script}
words=({words})
COMP_WORDS=("${{words[@]}}") COMP_CWORD=$((${{#words[@]}} - 1)) COMPREPLY=()
"$(complete -p dpo | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("dpo tra", "train"),
        ("dpo train --loss.bet", "--loss.beta"),
        ("dpo train --gp", "--gpus"),
        ("dpo score --by", "--by-source"),
        ("dpo configs data/h", "data/hh"),
        ("dpo completion ba", "bash"),
    ],
)
def test_a_word_is_completed(words: str, completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "completion.bash"
    assert exit_code_of(completion.main, "dpo completion", "bash") == 0
    script.write_text(capsys.readouterr().out)
    done = subprocess.run(
        ["bash", "-c", ASK.format(script=script, words=words)], capture_output=True, text=True, check=False
    )
    assert completed in done.stdout.split(), done


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_are_those_of_the_programs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stands in the text of --help."""
    others = {key: module for key, module in sys.modules.items() if key != COMMANDS[name].module}
    with (
        patch.dict(sys.modules, others, clear=True),  # runpy warns of a module that a test has imported
        patch.object(sys, "argv", [name, "--help"]),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)
    told = set(re.findall(r"--[a-z][a-z-]*(?![\w.-])", capsys.readouterr().out))
    assert end.value.code in (0, None) and set(FLAGS[name].split()) <= told
