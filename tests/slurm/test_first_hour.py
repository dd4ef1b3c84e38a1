"""The first hour: a job prepares models and data, the run starts after it, and saves within the derived delay."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.config import to_yaml
from tests.slurm.jobs import ON_CPUS, SUBMIT, Job, command, endings, resumed_from, wait_for, wait_for_steps
from tests.support.models import save_model, save_pairs
from tests.support.runs import six_steps


def test_a_run_that_a_job_prepares_is_preempted_and_resumes(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    save_pairs(tmp_path / "eval.jsonl", 2, seed=1)
    config = six_steps(tmp_path, tmp_path / "run", eval__samples=0, train__steps=10**6, checkpoint__keep=2)
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
    (message,) = [message for state, message in endings(job.run_dir) if state == "preempted"]
    saved = re.fullmatch(r"saved at step (\d+)", message)  # after three quarters of the delay the ranks are killed
    assert saved
    wait_for(job, "it goes on", lambda: resumed_from(job)[-1:] == [int(saved[1])])
    command("scancel", job.id)
    wait_for(job, "it is cancelled", lambda: job.state == "CANCELLED")


def settings(printed: str) -> dict[str, str]:
    """The settings that the launcher prints, by their first word."""
    return dict(re.findall(r"^(signal|memory|cpus|time) +(\S.*)$", printed, re.MULTILINE))


README = Path(__file__).parents[2] / "launch" / "README.md"
HERE = {
    "--partition P": "--partition tests",
    "submit my.yaml": f"submit my.yaml {ON_CPUS}",
    "-node 8": "-node 2",
    "--gpus 8": "--ranks 2",
    "--ranks 16": "--ranks 4",
    "dpo ": f"{sys.executable} -m dpo ",
}
"""What is otherwise here than in the README: nodes of two GPUs, which torch cannot use."""


def commands_of_the_section() -> list[str]:
    """The commands of the README's section, in their order."""
    section = README.read_text().split("## Your first hour on a cluster")[1].split("\n## ")[0]
    found = re.findall(r"^    (\S.*)$", section, re.MULTILINE)
    assert len(found) >= 5
    return found


def test_every_command_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, in one folder; the run is done at the end."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    save_pairs(tmp_path / "eval.jsonl", 2, seed=1)
    (tmp_path / "my.yaml").write_text(to_yaml(six_steps(tmp_path, "runs/my", eval__samples=0)))
    monkeypatch.chdir(tmp_path)
    for line in commands_of_the_section():
        words = line
        for there, here in HERE.items():
            words = words.replace(there, here)
        done = subprocess.run(shlex.split(words), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "node.json").is_file()
    assert (tmp_path / "runs" / "my" / "final" / "model.safetensors").is_file()
