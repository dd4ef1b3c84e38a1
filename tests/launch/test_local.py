"""The same without SLURM: a real run of a tiny model in the background, preempted, and in this process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo.base.errors import RunError
from dpo.checkpoint.folders import checkpoint_path
from dpo.reference import program as reference
from dpo.train import program as train
from launch import submit, supervise
from launch.follow import Followed, follow
from launch.reports import history, read_outcome, submissions
from launch.supervise import Ended
from tests.support.checkpoints import newest_checkpoint
from tests.support.models import save_model, save_pairs
from tests.support.runs import exit_code_of, reference_line, train_lines

CONFIG = """
model: {path: model}
data: {train: [{path: pairs.jsonl}], num_proc: 1}
batch: {pairs_per_step: 4}
train: {steps: 6, eval_every: null}
eval: {samples: 0}
checkpoint: {save_every: null}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with tiny.yaml and what it needs; what still runs in it afterwards is ended."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 40)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGUSR2)
    yield tmp_path
    signal.signal(signal.SIGUSR2, before)
    for _, submission in submissions(tmp_path / "runs/tiny"):
        with suppress(ProcessLookupError):
            os.killpg(int(submission.job), signal.SIGTERM)


def launch(*words: str) -> subprocess.Popen[str]:
    """The program with a run on CPU ranks of this machine."""
    argv = [sys.executable, "-m", "launch.submit", "--config", "tiny.yaml", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_steps(run: Path, steps: int, job: int) -> None:
    """Until a run has made more steps than `steps`."""
    while len(train_lines(run)) <= steps:
        os.killpg(job, 0)  # it must be alive
        time.sleep(0.02)


def test_a_run_in_the_background(work: Path) -> None:
    """Ctrl-C ends the follower alone; SIGUSR2 has the run save and start again, no step missing or twice; the command
    that is printed ends it with its last step saved, and leaves no process.
    """
    program = launch("--cluster", "local", "--ranks-per-node", "1", "--train.steps", "100000", "--follow")
    run = work / "runs/tiny"
    wait_for_steps(run, 5, program.pid)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all in its group
    out, err = program.communicate(timeout=30)
    ((reports, submission),) = submissions(run)
    assert program.returncode == 130 and "pairs to train on" in err
    assert f"the job keeps running; to cancel it: kill -- -{submission.job}" in err
    os.kill(int(submission.job), signal.SIGUSR2)
    while not history(reports):
        time.sleep(0.02)
    wait_for_steps(run, len(train_lines(run)) + 5, int(submission.job))
    cancel = out.splitlines()[-1]
    assert cancel == f"cancel  kill -- -{submission.job}"
    subprocess.run(cancel.split()[1:], check=True)
    told = r"has ended without a report; before that: stopped, saved at step (\d+); ended by SIGTERM"
    with pytest.raises(RunError, match=told) as end:
        follow([Followed("tiny", submission, reports)])
    steps = [line["step"] for line in train_lines(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert f"saved at step {len(steps)};" in str(end.value)
    assert checkpoint_path(run, len(steps)) == newest_checkpoint(run)
    assert str(work) not in subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout


def test_ctrl_c_of_a_run_in_the_terminal(work: Path) -> None:
    """The first saves the step and tells its number; no process is left. The exit code says that it was Ctrl-C."""
    program = launch("--cluster", "debug", "--ranks-per-node", "2", "--train.steps", "100000")
    run = work / "runs/tiny"
    wait_for_steps(run, 3, program.pid)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all in its group
    _, err = program.communicate(timeout=60)
    steps = [line["step"] for line in train_lines(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert program.returncode == 130
    assert err.endswith(f"stopped: saved at step {len(steps)}; ended by SIGINT (Ctrl-C)\n"), err
    assert checkpoint_path(run, len(steps)) == newest_checkpoint(run)
    assert str(work) not in subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout


def test_the_line_of_the_readme_saves_a_run_of_torchrun(work: Path) -> None:
    """And leaves torchrun and the shell around it alone, whose words have the same program and config."""
    readme = Path(__file__).parents[2] / "dpo" / "README.md"
    (line,) = [line.strip() for line in readme.read_text().splitlines() if line.strip().startswith("pkill")]
    own = f"{work.name}.yaml"
    (work / own).write_text(CONFIG)
    run = work / "runs" / work.name
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m dpo.train"
    words = ["bash", "-c", f"{torchrun} --config {own} --train.steps 100000; exit $?"]
    program = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_steps(run, 3, program.pid)
    subprocess.run(["bash", "-c", f"{line.replace('my.yaml', own)}; exit $?"], check=True)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 0, err
    assert f"stopped after step {len(train_lines(run))}; the same command resumes from here" in err
    assert checkpoint_path(run, len(train_lines(run))) == newest_checkpoint(run)


def in_this_process(words: Sequence[str], env: Mapping[str, str], *rest: Any) -> Ended:
    """A torchrun without processes of its own: its program is one rank here."""
    first = words.index("-m", words.index("--nproc-per-node")) + 1
    main = {"dpo.train": train.main, "dpo.reference": reference.main}[words[first]]
    with patch.dict(os.environ, env):
        return Ended(exit_code_of(main, *words[first:]), "")


def test_a_sweep_in_this_process(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference pass first, once, then one run after the other, which find all of it."""
    monkeypatch.setattr(supervise, "run", in_this_process)
    words = ("--config", "tiny.yaml", "--cluster", "debug", "--ranks-per-node", "1", "--train.steps", "2")
    assert exit_code_of(submit.main, "launch.submit", *words, "--sweep", "loss.beta=0.1,0.5") == 0
    assert capsys.readouterr().err.count("80 log-probabilities computed, 0 from the cache") == 1
    for beta in ("0.1", "0.5"):
        folder = work / f"runs/tiny/beta={beta}"
        assert len(train_lines(folder)) == 2 and reference_line(folder) == (0, 80)
    outcomes = [read_outcome(path.parent) for path in (work / "runs/tiny/jobs").glob("*/outcome.json")]
    assert [outcome.state for outcome in outcomes if outcome] == ["done", "done"]  # the reference pass, and the sweep
