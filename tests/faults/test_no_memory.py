"""Memory that runs out ends a run with one line of the rank that it happened to, which says what would help."""

import copy
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.config import SourceConfig, to_yaml
from dpo.distributed.program import run_program
from dpo.estimate import program as estimate
from dpo.estimate.program import read_arguments
from dpo.watch.failures import remembered_need
from tests.support.models import save_pairs
from tests.support.runs import exit_code_of, make_config

ON_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.03 GiB is free."
)
FAILURES: dict[str, Exception] = {
    "GPU": torch.OutOfMemoryError(ON_GPU),
    "CUDA's own words": RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "Python": MemoryError(),
    "torch on the host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        " allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
LINES = {
    "GPU": "error: rank 0: out of GPU memory: 2.50 GiB were asked for; ",
    "CUDA's own words": "error: rank 0: out of GPU memory: CUDA error: out of memory Compile with ",
    "cuBLAS": "error: rank 0: out of GPU memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ",
    "NCCL": "error: rank 0: out of GPU memory: NCCL error in: ",
    "Python": "error: rank 0: out of host memory: its size is not known; the peak of this process was ",
    "torch on the host": "error: rank 0: out of host memory: 3.00 GiB were asked for; the peak of this process was ",
    "the system": "error: rank 0: out of host memory: [Errno 12] Cannot allocate memory; the peak of this process was ",
}


def failing(failure: Exception, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a program prints to stderr that ends by `failure`; its exit code is 1."""

    def main() -> None:
        raise failure

    assert run_program(main) == 1
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("kind", FAILURES)
def test_no_memory_is_one_line(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.yaml", "--quiet", "--loss.beta", "0.5"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    (line,) = failing(FAILURES[kind], capsys)
    assert line.startswith(LINES[kind])
    keys = ("batch.tokens_per_micro_batch", "parallel.activation_checkpointing", "parallel.sync_gradients")
    assert all(key in line for key in (*keys, "parallel.cpu_offload"))
    assert line.endswith(": python -m dpo.estimate --config run.yaml --loss.beta 0.5 --ranks 8 --device cpu")


@pytest.mark.parametrize("kind", FAILURES)
def test_the_line_has_what_the_estimate_said_at_the_start(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.yaml"])
    with pytest.raises(type(FAILURES[kind])) as raised, remembered_need("71.2 GiB"):
        raise copy.copy(FAILURES[kind])
    (line,) = failing(raised.value, capsys)
    assert "; by the estimate a step needs 71.2 GiB; what helps: a smaller batch.tokens_per_micro_batch" in line


def test_an_unknown_need_and_other_failures_say_nothing_of_it() -> None:
    for failure, need in ((ValueError("a bug"), "71.2 GiB"), (MemoryError(), None)):
        with pytest.raises(type(failure)) as raised, remembered_need(need):
            raise failure
        assert not hasattr(raised.value, "__notes__")


def test_a_failure_inside_another_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Of what compiles a layer, for one."""
    failure = ValueError("a layer cannot be compiled")
    failure.__cause__ = torch.OutOfMemoryError(ON_GPU)
    (line,) = failing(failure, capsys)
    assert "out of GPU memory: 2.50 GiB were asked for" in line


@pytest.mark.parametrize("number", [1, 201, 719])
def test_other_failures_of_cuda_in_nccl_are_bugs(number: int) -> None:
    def main() -> None:
        raise RuntimeError(f"ncclUnhandledCudaError: Cuda failure {number} 'another one'")

    with pytest.raises(RuntimeError, match="another one"):
        run_program(main)


def test_other_failures_are_bugs_still() -> None:
    def main() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_program(main)


def test_programs_without_a_config_name_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "m", "--prompts", "p.txt"])
    (line,) = failing(MemoryError(), capsys)
    assert line.endswith("what helps: more ranks, each of which then holds less of the model")


def test_a_gpu_that_is_not_in_the_table_is_a_name_to_fill_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.yaml"])
    monkeypatch.setattr("dpo.watch.failures._this_device", lambda: None)
    (line,) = failing(MemoryError(), capsys)
    assert line.endswith(" --device NAME (NAME: the nearest of python -m dpo.estimate --help)")


def test_the_estimate_takes_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model.path", "m", "--data.train", "[{path: a b.jsonl}]", "--parallel.replicate=2"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--quiet", *words])
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    (line,) = failing(MemoryError(), capsys)
    command = line.partition("python -m dpo.estimate ")[2]
    arguments = read_arguments(shlex.split(command))
    cluster = arguments.cluster
    assert (arguments.config.data.train[0].path, cluster.num_ranks, cluster.ranks_per_node) == ("a b.jsonl", 12, 6)


# --- one rank of two -------------------------------------------------------------------------------------------------

MAIN = """
import os, sys
from dataclasses import replace
import torch
from dpo.train import program as train
from dpo.step import update
from dpo.distributed.program import exit_program
from dpo.estimate import at_start

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has no more.")
        return gradient

def without_memory(*args):
    values, rewards = losses(*args)
    return Backward.apply(values), rewards

losses, calls = update.pair_losses, []
if os.environ["RANK"] == "1":
    update.pair_losses = without_memory
small = replace(at_start.this_machine(2), memory=2**20)
at_start.this_machine = lambda ranks_per_node: small
if __name__ == "__main__":  # a rehearsal's process imports this file
    exit_program(train.main)
"""
"""Rank 1 has no memory in the backward of the second step, in the middle of which rank 0 waits for it. At the start
there is said to be 1 MiB, so that a step is rehearsed."""


def test_a_rank_without_memory_says_so_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun ends the other one, which may tell by then that a connection is lost; no traceback is seen. What a step
    needs is what the named command says of it: the model is large enough to show in two decimals.
    """
    pairs, model = save_pairs(tmp_path / "pairs.jsonl", 8), tmp_path / "model"
    large = {"vocab_size": 16_384, "hidden_size": 256, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **large)).save_pretrained(model)
    decided = {"parallel__activation_checkpointing": "none", "parallel__sync_gradients": "every_micro_batch"}
    data = {"data__train": [SourceConfig(path=str(pairs), format="tokens")]}  # read by the estimate without a tokenizer
    facts = {"batch__pairs_per_step": 4, "train__steps": 3} | decided | data
    config = make_config(model, pairs, tmp_path / "run", **facts)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "main.py").write_text(MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(tmp_path / "main.py"), "--config", str(tmp_path / "config.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(estimate.__file__).parents[2])}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    (line,) = [
        line for line in errors if line.startswith("error: rank 1: out of GPU memory: 2.50 GiB were asked for; ")
    ]
    command = f"--config {tmp_path / 'config.yaml'} --ranks 2 --device cpu"
    assert line.endswith(f"dpo.estimate {command}")
    assert exit_code_of(estimate.main, "dpo.estimate", *shlex.split(command)) == 0
    (needs,) = re.findall(r"^fits: ([\d.]+) of ", capsys.readouterr().out, re.MULTILINE)
    assert f"by the estimate a step needs {needs} GiB; " in line and float(needs) > 0.75 + 0.1  # Python, and tensors
    lost = ("error: rank 0: the connection to another rank was lost (", "error: rank 0: lost rank 1 on ")
    assert [other for other in errors if other != line and not other.startswith(lost)] == []
    assert "run_training" not in done.stderr  # torchrun shows where its own code is, the program nothing of it
