"""The first hour: a job prepares models and data, the run starts after it, and saves within the derived delay."""

import re
from pathlib import Path

from dpo.config import to_yaml
from tests.slurm.jobs import SUBMIT, Job, command, endings, resumed_from, wait_for, wait_for_steps
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, six_steps


def test_a_run_that_a_job_prepares_is_preempted_and_resumes(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    save_pairs(tmp_path / "eval.jsonl", 2, seed=1)
    config = changed(six_steps(tmp_path, tmp_path / "run", eval__samples=0), train__steps=10**6)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    printed = command(*SUBMIT, "--config", str(file), "--time", "60", "--prepare")
    first, second = re.findall(r"^job +(\d+)", printed, re.MULTILINE)
    preparation, job = Job(first, tmp_path / "run"), Job(second, tmp_path / "run")
    wait_for(preparation, "the input is prepared", lambda: preparation.state == "COMPLETED")
    assert preparation.field("NumNodes") == "1" and "gpu" not in preparation.field("TRES")
    wait_for_steps(job, 2)
    assert job.field("StartTime") >= preparation.field("EndTime")
    assert "rows that are not in the cache" in job.log
    script = command("scontrol", "write", "batch_script", job.id, "-")
    assert settings(printed)["signal"].startswith("120 s before the end of --time: two checkpoints of ")
    assert "#SBATCH --signal=USR2@120" in script and "#SBATCH --cpus-per-task=4" in script
    assert settings(printed)["cpus"].startswith("2 per rank: a node of partition tests has 4 for 2 ranks")
    assert "SLURM does not limit memory here" in settings(printed)["memory"] and "--mem" not in script
    command("scancel", "--signal=USR2", job.id)
    wait_for(job, "it is preempted", lambda: job.restarts == 1)
    state, message = endings(job.run_dir)[-1]  # after three quarters of the delay the ranks would be killed
    saved = re.fullmatch(r"saved at step (\d+)", message)
    assert state == "preempted" and saved
    wait_for(job, "it goes on", lambda: resumed_from(job)[-1:] == [int(saved[1])])
    command("scancel", job.id)
    wait_for(job, "it is cancelled", lambda: job.state == "CANCELLED")


def settings(printed: str) -> dict[str, str]:
    """The settings that the launcher prints, by their first word."""
    return dict(re.findall(r"^(signal|memory|cpus|time) +(\S.*)$", printed, re.MULTILINE))
