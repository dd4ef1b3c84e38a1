"""Tab completion: shtab's script in a real bash, and the flags that it knows against those that the programs have."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import shtab

from dpo.config.keys import KEYS
from dpo.front import completion
from dpo.front.main import answer
from dpo.front.names import COMMANDS
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


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_are_those_that_help_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No more and no less; beside them the keys of the config, where the program reads one."""
    with pytest.raises(SystemExit) as end:
        answer(name, ["--help"])
    assert end.value.code in (0, None)
    told = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    script = shtab.complete(completion.parser_of_dpo(), "bash")
    listed = re.search(rf"^_shtab_dpo_{name}_option_strings=\((.*)\)$", script, re.MULTILINE)
    assert listed is not None
    known = set(re.findall(r"--[\w.-]+", listed[1]))
    keys = {f"--{key}" for key in KEYS} if COMMANDS[name].has_config else set()
    assert told and known - keys == told and keys <= known
