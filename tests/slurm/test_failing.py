"""A run that fails says why: what its machine lacks, or the exception of the rank that failed first."""

import subprocess
from pathlib import Path

from dpo.config import to_yaml
from tests.slurm.jobs import ON_GPUS, SECONDS, SUBMIT
from tests.support.models import save_model, save_pairs
from tests.support.runs import six_steps

FAULT = """
import os
if os.environ.get("RANK") == "3":
    from dpo.step import optim
    lr_at = optim.lr_at
    optim.lr_at = lambda step, *rest: lr_at(step // (step < 2), *rest)
"""
"""Python runs it as it starts: from step 2 on rank 3 divides by zero."""


def test_the_exception_of_the_rank_that_failed_is_shown(tmp_path: Path) -> None:
    """Rank 3, the last one of the second node, which no other node sees but as a connection that is closed."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    save_pairs(tmp_path / "eval.jsonl", 2, seed=1)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(six_steps(tmp_path, tmp_path / "run", eval__samples=0)))
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    flags = ["--time", "60", "--follow", "--env", f"PYTHONPATH={tmp_path / 'fault'}"]
    followed = subprocess.run([*SUBMIT, "--config", str(file), *flags], capture_output=True, text=True, timeout=SECONDS)
    assert followed.returncode == 1
    why = "rank 3 on node2: ZeroDivisionError: integer division or modulo by zero"
    assert followed.stderr.splitlines()[-1] == f"error: job {last_job()}: {why}", followed.stderr
    assert "lr_at(step // (step < 2)" in followed.stderr  # the line, in its traceback


def test_gpus_that_torch_cannot_use_are_an_error_of_the_job(tmp_path: Path) -> None:
    """A run on CPUs of nodes that were rented for their GPUs would be slower by orders of magnitude, in silence."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    save_pairs(tmp_path / "eval.jsonl", 2, seed=1)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(six_steps(tmp_path, tmp_path / "run", eval__samples=0)))
    words = [*ON_GPUS, "--config", str(file), "--time", "60", "--follow"]
    followed = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert followed.returncode == 2
    last = followed.stderr.splitlines()[-1]
    assert "the job asked for GPUs (SLURM_GPUS_ON_NODE=2), and torch finds none" in last, followed.stderr
    assert last.endswith("CUDA_VISIBLE_DEVICES= (empty) trains on the CPU")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def last_job() -> str:
    """The id of the job that was submitted last."""
    listed = subprocess.run(["squeue", "--noheader", "--states=all", "--format=%i"], capture_output=True, text=True)
    return max(listed.stdout.split(), key=int)
