"""A run that meets all that a cluster does to runs ends as one that nobody disturbed."""

import gzip
import itertools
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpo.checkpoint.folders import checkpoint_path
from dpo.config import Config, SourceConfig, to_yaml
from tests.slurm.cluster import FREEZER
from tests.slurm.jobs import (
    Job,
    command,
    endings,
    last_step,
    rank_processes,
    resumed_from,
    submit,
    wait_for,
    wait_for_steps,
)
from tests.support.boards import points_of
from tests.support.checkpoints import newest_checkpoint
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, eval_lines, make_config, run, train_lines, without_clock

pytestmark = pytest.mark.timeout(900)

SAVE_EVERY = 3
FOR_EVER = 10**6
"""More steps than a job can make before it is disturbed."""


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Steps of real pairs on real weights, or of more pairs on a tiny model where there is no data; without an end.

    In float64, so that rounding says nothing about layouts.
    """
    root = tmp_path_factory.mktemp("slurm")
    try:
        data = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        model, rows, pairs = save_model(root / "model", "llama"), save_pairs(root / "rows.jsonl", 200), 128
    else:
        model, rows, pairs = data / "stories260K", save_first_rows(data, root / "rows.jsonl"), 16
    return make_config(
        model,
        rows,
        root / "run",
        model__dtype="float64",
        parallel__reduce_dtype="float64",
        data__train=[SourceConfig(str(rows), holdout=8)],
        reference__cache_dir=str(root / "cache"),
        batch__pairs_per_step=pairs,
        optim__lr=1e-4,
        optim__warmup_steps=5,
        eval__samples=1,
        eval__max_new_tokens=4,
        train__steps=FOR_EVER,
        train__eval_every=4,
        checkpoint__save_every=SAVE_EVERY,
    )


def save_first_rows(data: Path, path: Path) -> Path:
    """A hundred pairs of HH."""
    with gzip.open(data / "hh" / "public-0000-1799.jsonl.gz", "rt") as rows:
        path.write_text("".join(itertools.islice(rows, 100)))
    return path


@pytest.fixture(scope="module")
def disturbed(config: Config) -> Config:
    """The config of a run that is finished after all this, each proven to have happened."""
    run_dir = Path(str(config.train.run_dir))
    file = run_dir.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    job = submit(file, "--time", "2", "--signal-delay", "85", "--max-timeouts", "1")
    is_out_of_time(job)
    is_out_of_time_once_too_often(job)
    job = submit(file, "--time", "60", "--max-timeouts", "0")
    is_requeued_by_hand(job)
    is_preempted(job)
    loses_a_worker(job)
    loses_a_node(job)
    is_cancelled(job)
    last = last_step(run_dir) + 4
    finishes(submit(file, "--time", "60", "--train.steps", str(last)))
    return changed(config, train__steps=last)


def is_out_of_time(job: Job) -> None:
    """SLURM sends SIGUSR2 by itself, between 5 and 35 seconds after the start, as it looks every 30 seconds."""
    wait_for(job, "its time is up", lambda: job.restarts == 1)
    command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")  # once is enough
    assert "this job is timed-out" in job.log
    goes_on_where_it_was_saved(job)


def is_out_of_time_once_too_often(job: Job) -> None:
    """The second time, after --max-timeouts 1; with the limit of two minutes that it asked for, any SIGUSR2 is one."""
    command("scancel", "--signal=USR2", job.id)
    wait_for(job, "it is given up", lambda: job.state not in ("RUNNING", "COMPLETING"))
    assert job.state == "FAILED"
    state, message = endings(job.run_dir)[-1]
    assert state == "failed"
    assert "(--max-timeouts)" in message


def is_requeued_by_hand(job: Job) -> None:
    """As soon as it has begun. SLURM sends SIGTERM alone, and SIGKILL half a minute later."""
    wait_for(job, "it has begun", lambda: "node 0 of 2" in job.log)
    command("scontrol", "requeue", job.id)
    wait_for(job, "it has ended", lambda: endings(job.run_dir)[-1][0] == "stopped")
    assert job.restarts == 1


def is_preempted(job: Job) -> None:
    """As by a cluster that wants its nodes back: that is no time-out, of which --max-timeouts 0 allows none."""
    wait_for_steps(job, 2)
    has_its_gpus(job)
    command("scancel", "--signal=USR2", job.id)
    wait_for(job, "it is preempted", lambda: job.restarts == 2)
    assert "this job is preempted" in job.log
    goes_on_where_it_was_saved(job)


def has_its_gpus(job: Job) -> None:
    """gres gives both ranks of a node its two GPUs, which --env hides from the ranks, so that they run on CPUs."""
    variables = [environment for _, environment in rank_processes().values()]
    assert len(variables) == 4
    assert all({"SLURM_GPUS_ON_NODE=2", "CUDA_VISIBLE_DEVICES="} <= {*environment} for environment in variables)
    assert "gres:gpu:2" in job.field("TresPerNode")


def goes_on_where_it_was_saved(job: Job) -> None:
    """No step is made again after SIGUSR2; where it came before the first one there is nothing to go on from."""
    state, message = endings(job.run_dir)[-1]
    kept = re.fullmatch(r"saved at step (\d+)|before its first step; resumes from step (\d+)", message)
    assert state == "preempted" and (kept or message == "before the first step; starts again"), (state, message)
    checkpoint = [int(kept[1] or kept[2])] if kept else []
    wait_for(job, "it goes on", lambda: resumed_from(job)[-1:] == checkpoint)


def loses_a_worker(job: Job) -> None:
    """kill -9, as by a node that is out of memory; the other three would wait for it for ever."""
    loses_few_steps(job, lambda: os.kill(rank_processes()[2][0], signal.SIGKILL))
    state, message = endings(job.run_dir)[-1]
    assert state == "crashed"
    assert message.startswith("rank 2 on node2: killed by SIGKILL"), message


def loses_few_steps(job: Job, disturb: Callable[[], object]) -> None:
    """The job starts again by itself, and goes on from the newest checkpoint."""
    before = wait_for_steps(job, 2)
    restarts, resumed = job.restarts, len(resumed_from(job))
    disturb()
    wait_for(job, "it starts again", lambda: job.restarts == restarts + 1)
    wait_for(job, "it goes on", lambda: len(resumed_from(job)) == resumed + 1)
    assert resumed_from(job)[-1] >= before - SAVE_EVERY


def loses_a_node(job: Job) -> None:
    """The second one is taken for dead, as SLURM takes one that does not answer, and comes back."""

    die = ("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=dead")
    loses_few_steps(job, lambda: command(*die))
    assert "DUE TO NODE FAILURE" in job.log


def is_cancelled(job: Job) -> None:
    """By a person, in the middle of a step, which is saved; nothing of it stays on the nodes.

    Without cgroups SLURM sends SIGTERM to the ranks too, which die of it.
    """
    wait_for_steps(job, 1)
    command("scancel", job.id)
    wait_for(job, "it is cancelled", lambda: job.state == "CANCELLED")
    state, message = endings(job.run_dir)[-1]
    assert state == "stopped"
    if (FREEZER / "cgroup.procs").is_file():
        assert message.startswith(f"saved at step {last_step(job.run_dir)}; ended by SIGTERM"), message
        assert newest_checkpoint(job.run_dir) == checkpoint_path(job.run_dir, last_step(job.run_dir))
    assert not rank_processes()


def finishes(job: Job) -> None:
    """Goes on from what the job that was cancelled had saved, to an end."""
    before = last_step(job.run_dir)
    wait_for(job, "it is done", lambda: job.state == "COMPLETED")
    assert endings(job.run_dir)[-1][0] == "done"
    assert resumed_from(job)[0] >= before - SAVE_EVERY


@pytest.fixture(scope="module")
def undisturbed(disturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in this one process, with a reference cache of its own."""
    root = tmp_path_factory.mktemp("undisturbed")
    return run(changed(disturbed, train__run_dir=str(root / "run"), reference__cache_dir=str(root / "cache")))


def test_its_metrics_are_those_of_a_run_that_nobody_disturbed(disturbed: Config, undisturbed: Path) -> None:
    """Each step and each evaluation stands once, with the same metrics, to 1e-5 relative."""
    for lines_of in (train_lines, eval_lines):
        mine, theirs = (without_clock(lines_of(folder)) for folder in (str(disturbed.train.run_dir), undisturbed))
        assert [line["step"] for line in mine] == [line["step"] for line in theirs]
        assert not differences(mine, theirs)


DIFFERENCES = {"rewards", "logratios_per_token"}
"""Groups of metrics: log-probabilities under the policy minus those under the reference, times beta or per token."""


def differences(lines: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> list[str]:
    """What is not equal to 1e-5 relative.

    DIFFERENCES between policy and reference may be near 0; there Llama's norms, which round to float32, leave 1e-6
    nats, or nats per token. Until the first update they are all rounding, so accuracies are chance.
    """
    return [
        f"step {line['step']}: {name} {line[name]} {other[name]}"
        for line, other in zip(lines, others, strict=True)
        for name in sorted(line.keys() | other.keys())
        if not (name.endswith("accuracies") and line["step"] <= 1)
        and line[name] != pytest.approx(other[name], rel=1e-5, abs=1e-6 if DIFFERENCES & set(name.split("/")) else 0)
    ]


def test_tensorboard_shows_each_point_once(disturbed: Config) -> None:
    run_dir = Path(str(disturbed.train.run_dir))
    steps = {chart: [step for step, _ in points] for chart, points in points_of(run_dir / "tensorboard").items()}
    assert [chart for chart, found in steps.items() if found != sorted(set(found))] == []
    assert steps["train/loss"] == [line["step"] for line in train_lines(run_dir)]
    assert steps["eval/loss"] == [line["step"] for line in eval_lines(run_dir)]
