"""`dpo train --ranks 2` with the trainer itself: Ctrl-C and SIGTERM during training, the resume, and wrong input."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dpo.config import Config, to_yaml
from tests.front.test_stops import END_WITH_TESTS, SECONDS, wait_for
from tests.support.checkpoints import newest_checkpoint
from tests.support.processes import start_program
from tests.support.runs import changed, logged, run, save_six_steps, six_steps, train_lines

MAIN = (
    END_WITH_TESTS
    + """
from dpo.front.main import main
main()
"""
)


TIMEOUT = 10 * SECONDS
"""Of a test that waits several times."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl."""
    return save_six_steps(tmp_path_factory.mktemp("front"))


def disturbed(config: Config, stderr: Path, disturb: Callable[[int], None]) -> int | None:
    """The exit code of a run that is disturbed after two more steps; `disturb` gets the process id of the parent."""
    file = stderr.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    before = len(train_lines(str(config.train.run_dir)))
    process = start_program(MAIN, ["train", "--config", str(file), "--ranks", "2"], stderr)
    try:
        wait_for(lambda: len(train_lines(str(config.train.run_dir))) > before + 1 or not process.is_alive())
        assert process.is_alive(), stderr.read_text()[-2000:]
        assert process.pid is not None
        disturb(process.pid)
        process.join(SECONDS)
        assert not process.is_alive(), stderr.read_text()[-2000:]
    finally:
        process.kill()
        process.join()
    return process.exitcode


def send_to_group(number: int, pid: int) -> None:
    """Sends a signal as a terminal does."""
    os.killpg(pid, number)


def ranks_of(parent: int) -> dict[str, int]:
    """RANK -> process id of the ranks."""
    found: dict[str, int] = {}
    for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found |= {variable.removeprefix("RANK="): pid for variable in variables if variable.startswith("RANK=")}
    return found


def send_to_all(number: int, pid: int) -> None:
    """Sends a signal to all processes, as it reaches a cgroup: the ranks first."""
    for process in (*ranks_of(pid).values(), pid):
        os.kill(process, number)


def kill_rank_1(pid: int) -> None:
    """Kills a rank, as the kernel does where memory runs out."""
    os.kill(ranks_of(pid)["1"], signal.SIGKILL)


@pytest.mark.timeout(TIMEOUT)
def test_a_stopped_run_names_its_step_and_goes_on_from_it(root: Path, tmp_path: Path) -> None:
    """Ctrl-C, the same command again, SIGTERM to all processes, then a start to the end: each step is made once."""
    endless = {"train__steps": 20_000, "train__eval_every": None, "checkpoint__save_every": None}
    config = six_steps(root, tmp_path / "run", **endless)
    steps = []
    for send, number, code in ((send_to_group, signal.SIGINT, 130), (send_to_all, signal.SIGTERM, 0)):
        stderr = tmp_path / f"{number}.stderr"
        assert disturbed(config, stderr, partial(send, number)) == code
        steps.append(train_lines(tmp_path / "run")[-1]["step"])
        checkpoint = newest_checkpoint(tmp_path / "run")
        assert checkpoint is not None and checkpoint.name == f"step-{steps[-1]:06d}"
        last = stderr.read_text().splitlines()[-1]
        assert last == f"stopped; step {steps[-1]} is saved: the same command goes on from there"
        assert logged(tmp_path / "run")[-1] == last
    assert steps[1] > steps[0]
    last_step = int(steps[-1]) + 1
    run(changed(config, train__steps=last_step))
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, last_step + 1))


@pytest.mark.timeout(TIMEOUT)
def test_the_log_of_a_run_whose_rank_is_killed_says_so(root: Path, tmp_path: Path) -> None:
    """Rank 0, whose log it is, cannot know."""
    endless = {"train__steps": 20_000, "train__eval_every": None, "checkpoint__save_every": None}
    assert disturbed(six_steps(root, tmp_path / "run", **endless), tmp_path / "stderr", kill_rank_1) == 1
    last = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert last.startswith("error: rank 1 on ") and "killed by SIGKILL" in last
    assert logged(tmp_path / "run")[-1] == last


def test_wrong_data_is_the_last_line(root: Path, tmp_path: Path) -> None:
    """The ranks find it together; the line stands once and last, and the exit code is ours, where torchrun's is 1."""
    (tmp_path / "run.yaml").write_text(to_yaml(six_steps(root, tmp_path / "run")))
    words = ["train", "--config", "run.yaml", "--ranks", "2", "--data.train=[{path: missing.jsonl}]"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[-1].startswith("error: command line: data.train[0].path: "), done.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1


def test_adapters_as_the_model_are_told_once(root: Path, tmp_path: Path) -> None:
    """`dpo` reads the words, and so do the ranks."""
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(root / "model")}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "run.yaml").write_text(to_yaml(six_steps(root, tmp_path / "run")))
    words = ["train", "run.yaml", "--ranks", "2", "model.path=sft", "data.train=[{path: missing.jsonl}]"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    line = f"model.path sft holds adapters: taken as lora.path sft, model.path {root / 'model'}"
    assert done.returncode == 2 and done.stderr.splitlines().count(line) == 1, done.stderr


TYPO = """
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [["dpo", "train"], ["dpo", "reference"], ["dpo.train"], ["dpo"]], ids=" ".join)
def test_a_typo_is_answered_before_torch_is_imported(words: list[str], root: Path, tmp_path: Path) -> None:
    """Also of the name of the program: `dpo --loss.beto=1`."""
    command = [sys.executable, "-c", TYPO, *words, "--loss.beto=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "loss.beto" in done.stderr
    assert done.stdout == "False\n"


def test_the_check_of_the_last_test_sees_torch() -> None:
    """It would be of no use if it always said False."""
    code = "import sys, runpy\nsys.argv = ['x', 'dpo.distributed.world']\n" + TYPO
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
