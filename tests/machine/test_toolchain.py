"""What stops a run before weights are read: each fact of a machine made wrong, one at a time."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from dpo.base.errors import UserError
from dpo.machine import facts as machine
from dpo.machine import toolchain
from dpo.machine.driver import check_asked
from dpo.machine.facts import Facts, Gpu, gather_facts
from dpo.machine.toolchain import Needs, check_toolchain, find_problems, find_warnings, has_kernels
from dpo.model import flex_options

CPU = torch.device("cpu")
NEEDS = Needs("bfloat16", (128,))
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 232_448)
A10 = Gpu("NVIDIA A10G", (8, 6), 101_376)
"""Shared memory by capability: CUDA C++ Programming Guide, technical specifications."""


def facts(**changes: Any) -> Facts:
    """A machine with an H100 on which nothing is missing."""
    whole = Facts(
        host="n1",
        torch="2.13.0+cu130",
        cuda="13.0",
        archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
        driver="580.95.05",
        is_hidden=False,
        asked=None,
        num_gpus=8,
        gpu_index=0,
        cuda_error=None,
        gpu=H100,
        cc=None,
        compiler="/usr/bin/gcc",
        python_h="/usr/include/python3.11/Python.h",
        has_python_h=True,
        compile_error=None,
    )
    return dataclasses.replace(whole, **changes)


NO_GPU = {"gpu": None, "gpu_index": None, "num_gpus": 0}
CPU_JOB = {**NO_GPU, "asked": "SLURM_GPUS_ON_NODE=8"}
"""A job that asked for GPUs, where torch finds none."""
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)"


@pytest.mark.parametrize(
    ("changes", "what", "helps"),
    [
        ({"gpu": None, "cuda_error": TOO_OLD, "driver": "550.54"}, "12040", "driver 580.65 or newer"),
        ({"gpu": None, "gpu_index": 5, "num_gpus": 4}, "rank 5 of this node has no GPU", "--nproc-per-node 4"),
        ({"gpu": None, "cuda_error": "No CUDA GPUs are available"}, "CUDA does not start", "--gpus-per-node"),
        (
            {**CPU_JOB, "torch": "2.13.0+cpu", "cuda": None},
            "2.13.0+cpu is a build without CUDA",
            "a CUDA build of torch",
        ),
        ({**CPU_JOB, "driver": None}, "no NVIDIA driver is loaded, torch 2.13.0+cu130", "a node with GPUs"),
        ({**CPU_JOB, "cuda_error": TOO_OLD, "driver": None}, "(SLURM_GPUS_ON_NODE=8), and torch finds none", "a node"),
        ({"compiler": None}, "no C compiler", "apt-get install gcc, or module load gcc"),
        ({"compiler": None, "cc": "icc"}, "CC is 'icc'", "apt-get install gcc"),
        ({"has_python_h": False}, "python3.11/Python.h", "-dev (Debian: python3-dev), or module load python"),
        ({"compile_error": "stdlib.h: No such file"}, "stdlib.h", "libc6-dev"),
        ({"gpu": Gpu("Tesla T4", (7, 5), 65_536)}, "capability 7.5", "parallel.compute_dtype float32"),
        ({"gpu": Gpu("Tesla P100", (6, 0), 49_152), "archs": ()}, "capability 6.0", "8.0 or newer"),
        ({"archs": ("sm_80", "sm_100")}, "kernels for sm_80, sm_100 alone", "pytorch.org"),
    ],
)
def test_each_thing_that_is_missing_has_one_line_that_helps(changes: dict[str, Any], what: str, helps: str) -> None:
    problems = [str(problem) for problem in find_problems(facts(**changes), NEEDS) if what in problem.what]
    assert len(problems) == 1 and helps in problems[0] and "\n" not in problems[0], problems
    with pytest.raises(UserError, match=r"^n1: "):
        check_toolchain(facts(**changes), NEEDS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cuda": None, "archs": (), "gpu": Gpu("AMD Instinct MI300X", (9, 4), None), "driver": None},
        {**NO_GPU, "driver": None, "compiler": None, "has_python_h": False},  # a machine without a GPU
        {**NO_GPU, "is_hidden": True, "cuda_error": "No CUDA GPUs are available"},  # CUDA_VISIBLE_DEVICES is empty
        {**CPU_JOB, "is_hidden": True, "driver": None},  # the same in a job that asked for GPUs
        {"asked": "SLURM_GPUS_ON_NODE=8"},
    ],
)
def test_a_machine_that_has_all_it_needs_passes(changes: dict[str, Any]) -> None:
    check_toolchain(facts(**changes), NEEDS)
    assert not find_warnings(facts(**changes), NEEDS)


def test_a_driver_that_does_not_start_cuda_is_told_where_no_job_asked_for_gpus() -> None:
    """The rank computes on the CPU; a job that asked for GPUs is refused."""
    broken = {**NO_GPU, "cuda_error": TOO_OLD, "driver": "550.54"}
    assert not find_problems(facts(**broken), NEEDS)
    (warning,) = find_warnings(facts(**broken), NEEDS)
    assert warning.startswith("n1: there are NVIDIA GPUs, and torch uses the CPU: ") and "580.65 or newer" in warning
    asked = facts(**broken, asked="SLURM_GPUS_ON_NODE=8")
    with pytest.raises(UserError, match=r"^n1: the job asked for GPUs \(SLURM_GPUS_ON_NODE=8\).*580\.65 or newer"):
        check_asked(asked)
    assert len(find_problems(asked, NEEDS)) == 1 and not find_warnings(asked, NEEDS)


def test_a_job_with_a_gpu_is_not_refused() -> None:
    check_asked(facts(asked="SLURM_GPUS_ON_NODE=8"))
    check_asked(facts(**NO_GPU, driver=None))


def test_a_build_without_cuda_on_a_machine_with_gpus_is_told() -> None:
    cpu_build = {"torch": "2.13.0+cpu", "cuda": None, "archs": (), **NO_GPU}
    assert not find_problems(facts(**cpu_build), NEEDS)
    (warning,) = find_warnings(facts(**cpu_build), NEEDS)
    assert warning.startswith("n1: ") and "a build without CUDA" in warning
    assert not find_warnings(facts(**cpu_build, is_hidden=True), NEEDS)


@pytest.mark.parametrize("changes", [{"compiler": None}, {"has_python_h": False}, {"compile_error": "stdlib.h"}])
def test_what_compiles_nothing_needs_no_compiler(changes: dict[str, Any]) -> None:
    """Generation runs torch's own attention, uncompiled: a serving node has no gcc."""
    assert find_problems(facts(**changes), NEEDS)
    assert not find_problems(facts(**changes), Needs("bfloat16", (128,), compiles=False))


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": None, "cuda_error": "The NVIDIA driver on your system is too old (found version 12040)"},
        {"gpu": Gpu("Tesla P100", (6, 0), 49_152), "archs": ()},
        {"archs": ("sm_80", "sm_100")},
    ],
)
def test_what_compiles_nothing_needs_a_gpu_that_runs_it(changes: dict[str, Any]) -> None:
    """Driver, capability and architecture."""
    assert len(find_problems(facts(**changes), Needs("bfloat16", (128,), compiles=False))) == 1


@pytest.mark.parametrize(
    ("gpu", "dtype", "width", "fits"),
    [
        (H100, "bfloat16", 128, True),
        (H100, "bfloat16", 192, True),
        (A10, "bfloat16", 128, True),
        (A10, "bfloat16", 80, True),
        (A10, "bfloat16", 256, False),  # gemma's heads
        (A10, "bfloat16", 160, False),  # compiled for 256
        (A10, "float32", 128, False),
        (A10, "float32", 64, True),
        (Gpu("NVIDIA L4", (8, 9), 101_376), "bfloat16", 256, False),
        (Gpu("NVIDIA A100", (8, 0), 166_912), "bfloat16", 256, True),
        (Gpu("NVIDIA RTX 5090", (12, 0), 101_376), "bfloat16", 256, False),
        (Gpu("of a later generation", (15, 0), 1), "bfloat16", 256, True),  # nothing is known of it
    ],
)
def test_shared_memory_must_hold_the_tiles_of_the_head(gpu: Gpu, dtype: str, width: int, fits: bool) -> None:
    problems = find_problems(facts(gpu=gpu, archs=()), Needs(dtype, (64, width)))
    assert problems == [] if fits else f"heads of width {width}" in problems[0].what


@pytest.mark.parametrize(("version", "stops"), [("2.13.0+cu130", True), ("2.13.1", True), ("2.11.0", False)])
def test_figures_of_one_torch_stop_no_other(version: str, stops: bool) -> None:
    """The bytes were read from kernels of torch 2.13: under another one the run may work, and is warned."""
    found, needs = facts(gpu=A10, archs=(), torch=version), Needs("bfloat16", (256,))
    problems, warnings = find_problems(found, needs), find_warnings(found, needs)
    assert (len(problems), len(warnings)) == ((1, 0) if stops else (0, 1))
    assert "FlexAttention takes 151,552 for heads of width 256" in str((problems or warnings)[0])
    assert not find_warnings(found, Needs("bfloat16", (256,), compiles=False))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [row.capability for row in flex_options.TABLE] + [(10, 3)])
def test_nothing_is_said_where_other_options_run(capability: tuple[int, int], dtype: str) -> None:
    """`flex_options` chooses tiles of its own there, of which each fits."""
    found = facts(gpu=Gpu("a GPU", capability, 1), archs=())
    assert not find_problems(found, Needs(dtype, (64, 128, 256)))


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),
        (("compute_80",), (12, 0), True),
        ((), (9, 0), True),
    ],
)
def test_which_code_runs_on_which_gpu(archs: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    """https://docs.nvidia.com/cuda/blackwell-compatibility-guide: cubins within a generation, PTX forward."""
    assert has_kernels(archs, capability) == runs


def test_the_needs_are_those_of_all_models() -> None:
    models = [LlamaConfig(hidden_size=64, num_attention_heads=4), LlamaConfig(hidden_size=64, head_dim=128)]
    assert toolchain.needs_of(torch.bfloat16, models) == Needs("bfloat16", (16, 128))


WIDTHS = {
    "llama": 128,
    "qwen3": 128,
    "qwen2": 128,
    "mistral": 128,
    "gemma": 256,
    "gemma2": 256,
    "gemma3": 256,
    "gemma3_text": 256,
    "phi3": 96,
    "gpt2": 64,
    "gpt_neox": 96,
    "gpt_neo": 128,
    "gptj": 256,
    "opt": 64,
    "bloom": 8,
    "falcon": 64,
    "mpt": 128,
    "deepseek_v3": 192,
    "olmo2": 128,
    "mixtral": 128,
    "starcoder2": 128,
    "cohere": 128,
    "stablelm": 80,
    "rwkv": None,
    "mamba": None,
}
"""Width of a head in each family's default config, as transformers' documentation of the class gives the sizes."""


@pytest.mark.parametrize("family", WIDTHS)
def test_the_width_of_a_head_in_each_family(family: str) -> None:
    """None where there is no attention, or the config does not tell: nothing is then asked of the shared memory."""
    config = AutoConfig.for_model(family)
    assert toolchain.head_width(config) == WIDTHS[family]
    assert not find_problems(facts(), toolchain.needs_of(torch.bfloat16, [config]))


# --- what is looked for ----------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> Path:
    """An executable file."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_compiler_is_the_one_that_triton_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`triton/runtime/build.py`: CC, else gcc, else clang."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.find_compiler() is None
    clang = program(tmp_path, "clang")
    assert machine.find_compiler() == str(clang)
    gcc = program(tmp_path, "gcc")
    assert machine.find_compiler() == str(gcc)
    monkeypatch.setenv("CC", "icc")
    assert machine.find_compiler() is None and gather_facts(CPU).cc == "icc"


def test_the_compiler_is_tried_on_what_triton_compiles(tmp_path: Path) -> None:
    broken = program(
        tmp_path, "cc", "#!/bin/sh\necho '/x/module.c:1: fatal error: dlfcn.h: No such file' >&2\nexit 1\n"
    )
    assert "dlfcn.h" in str(machine.try_compiler(str(broken), Path("/usr/include/Python.h")))
    assert "FileNotFoundError" in str(machine.try_compiler(str(tmp_path / "none"), Path("/x/Python.h")))


@pytest.mark.skipif(machine.find_compiler() is None, reason="needs a C compiler: apt-get install gcc")
def test_a_real_compiler_with_and_without_the_header(tmp_path: Path) -> None:
    compiler = str(machine.find_compiler())
    if machine.find_header().is_file():
        assert machine.try_compiler(compiler, machine.find_header()) is None
    assert "Python.h" in str(machine.try_compiler(compiler, tmp_path / "Python.h"))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x@y)\n", "580.95.05"),
        ("something else\n", "unknown"),
    ],
)
def test_the_driver_is_read_from_the_kernel(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert machine.find_driver(tmp_path) == version


def test_devices_without_a_version_are_a_driver_too(tmp_path: Path) -> None:
    assert machine.find_driver(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert machine.find_driver(tmp_path) is None
    (tmp_path / "dev" / "nvidia0").touch()
    assert machine.find_driver(tmp_path) == "unknown"


def test_torchs_own_words_without_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver by downloading one")

    assert torch.version.cuda is not None or machine.find_cuda_error() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert machine.find_cuda_error() == TOO_OLD


@pytest.fixture
def another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the process that is asked for the GPU a shell script; NVML counts four GPUs."""

    def be(script: str) -> None:
        monkeypatch.setattr(sys, "executable", str(program(tmp_path, "python", f"#!/bin/sh\n{script}\n")))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return be


def test_a_gpu_is_what_another_process_says(another_python: Callable[[str], None]) -> None:
    another_python("""echo 'a warning'; echo '["NVIDIA H100 80GB HBM3", 9, 0, 232448]'""")
    found = gather_facts(torch.device("cuda", 3))
    assert (found.gpu, found.gpu_index, found.num_gpus, found.cuda_error) == (H100, 3, 4, None)


def test_a_driver_that_is_counted_and_too_old_is_told(another_python: Callable[[str], None]) -> None:
    """NVML counts GPUs under any driver, so the rank chooses CUDA; starting it fails in the process that is asked."""
    another_python(f"echo 'RuntimeError: {TOO_OLD}. Please update your GPU driver' >&2; exit 1")
    found = dataclasses.replace(gather_facts(torch.device("cuda", 0)), driver="535.54", cuda="13.0", is_hidden=False)
    assert (found.gpu, found.cuda_error) == (None, TOO_OLD)
    (problem,) = find_problems(found, NEEDS)
    assert "driver 535.54" in problem.what and "driver 580.65 or newer" in problem.remedy


def test_a_driver_that_hangs_is_told(another_python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ASK_SECONDS", 0.1)
    another_python("exec sleep 60")
    assert gather_facts(torch.device("cuda", 0)).cuda_error == "the driver did not answer in 0.1 s"


def test_a_rank_without_a_gpu_asks_nobody(another_python: Callable[[str], None]) -> None:
    another_python("exit 1")
    found = gather_facts(torch.device("cuda", 5))
    assert (found.gpu, found.gpu_index, found.num_gpus, found.cuda_error) == (None, 5, 4, None)


def test_what_is_gathered_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gather_facts(CPU)
    assert found.gpu is None and found.is_hidden and found.torch == torch.__version__ and found.compile_error is None
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in found.python_h
    assert found.has_python_h == os.path.isfile(found.python_h)  # noqa: PTH113
