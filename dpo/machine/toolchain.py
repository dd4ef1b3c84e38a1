"""Checks that a machine meets the needs of training on its GPU, before any parameters are read.

On CUDA attention is compiled at first use: Triton builds a C module against `Python.h` with the machine's C compiler,
and kernels for the GPU's architecture. Without these checks a missing part would end the run after minutes, with a
traceback from inductor; and with a driver that is too old for torch the run would silently train on the CPU.
`facts.gather_facts` looks at a machine; the functions here are pure functions of its result.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from dpo.base.errors import UserError
from dpo.machine.driver import Problem, broken_driver, problem_of_job, unused_gpus
from dpo.machine.facts import Facts, Gpu

LOWEST_CAPABILITY = {"bfloat16": (8, 0)}
"""Lowest compute capability whose tensor cores support a dtype: https://docs.nvidia.com/cuda/cuda-c-programming-guide,
table of features by capability."""

LOWEST_OF_TRITON = (7, 0)
"""Lowest compute capability that Triton supports: https://github.com/triton-lang/triton#compatibility"""

_AMPERE_BFLOAT16 = {16: 13_568, 64: 51_200, 128: 98_304, 192: 136_448, 256: 151_552}
_AMPERE_FLOAT32 = {128: 133_120, 256: 135_680}
SHARED_BYTES: Mapping[tuple[str, tuple[int, int]], Mapping[int, int]] = {
    ("bfloat16", (8, 6)): _AMPERE_BFLOAT16,
    ("bfloat16", (8, 9)): _AMPERE_BFLOAT16,
    ("bfloat16", (12, 0)): {16: 13_568, 64: 36_096, 128: 90_112, 192: 172_032, 256: 114_688},
    ("float32", (8, 6)): _AMPERE_FLOAT32,
    ("float32", (8, 9)): _AMPERE_FLOAT32,
    ("float32", (12, 0)): {128: 100_352, 256: 102_912},
}
"""(compute dtype, compute capability) -> head width -> bytes of shared memory that FlexAttention's kernels need, the
larger of forward and backward pass. Read from the kernels that torch 2.13 and Triton 3.7 compile for `block_attention`.

`flex_options` chooses no tiles for these GPUs, so torch's own are used; torch has the same for (8, 9) as for (8, 6).
The GPUs for which `flex_options` chooses tiles (A100, H100, B200) have enough shared memory for them.
"""

TORCH_OF_SHARED_BYTES = "2.13."
"""Prefix of the versions of torch for which `SHARED_BYTES` holds; other versions may need more or less."""


@dataclass(frozen=True)
class Needs:
    """The needs of a run that a GPU must meet."""

    compute_dtype: str
    """bfloat16, float32 or float64."""
    head_widths: tuple[int, ...]
    """Widths of the attention heads of all models whose config gives one."""
    compiles: bool = True
    """Whether kernels are compiled at first use: true of training; generation uses torch's own kernels."""


def needs_of(compute_dtype: torch.dtype, models: Sequence[PretrainedConfig], compiles: bool = True) -> Needs:
    """Returns the needs of a run of these models in a compute dtype.

    Args:
        compute_dtype: the dtype of the forward pass.
        models: the transformers configs of all models.
        compiles: whether kernels are compiled at first use, as in training.
    """
    widths = {width for model in models if (width := head_width(model)) is not None}
    return Needs(str(compute_dtype).removeprefix("torch."), tuple(sorted(widths)), compiles)


def head_width(model: PretrainedConfig) -> int | None:
    """Returns the width of a model's queries, per head; None if its config does not give it (a model without attention,
    for example).
    """
    text = model.get_text_config(decoder=True)
    for name in ("qk_head_dim", "head_dim"):
        if isinstance(width := getattr(text, name, None), int):
            return width
    hidden, heads = (getattr(text, name, None) for name in ("hidden_size", "num_attention_heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def check_toolchain(facts: Facts, needs: Needs) -> None:
    """Raises UserError, in one line, that names all problems that would stop a run on this machine."""
    problems = find_problems(facts, needs)
    if problems:
        raise UserError(facts.host, "; and ".join(map(str, problems)))


def find_problems(facts: Facts, needs: Needs) -> list[Problem]:
    """Returns the problems that would stop a run or keep it from the GPU."""
    checks = (*CHECKS, *CHECKS_OF_COMPILING) if needs.compiles else CHECKS
    return [problem for check in checks if (problem := check(facts, needs)) is not None]


def find_warnings(facts: Facts, needs: Needs) -> list[str]:
    """Returns warnings, one line each, about machines on which the run works, or may work."""
    warnings = (unused_gpus(facts), _shared_memory_in_doubt(facts, needs))
    return [f"{facts.host}: {warning}" for warning in warnings if warning is not None]


# --- the checks ------------------------------------------------------------------------------------------------------


def _check_driver(facts: Facts, needs: Needs) -> Problem | None:
    """Returns the problem of a driver that does not start CUDA on the GPU of this rank."""
    return None if facts.gpu_index is None else broken_driver(facts)


def _check_asked(facts: Facts, needs: Needs) -> Problem | None:
    return problem_of_job(facts)


def _check_ranks(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu_index is None or facts.gpu_index < facts.num_gpus:
        return None
    what = f"rank {facts.gpu_index} of this node has no GPU of its own: there are {facts.num_gpus}"
    fitting = f"--nproc-per-node {facts.num_gpus} of torchrun, --gpus {facts.num_gpus} of dpo train"
    return Problem(what, f"{fitting}, or CUDA_VISIBLE_DEVICES with a GPU for each rank")


def _check_capability(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.gpu.shared_bytes is None:
        return None
    lowest = LOWEST_CAPABILITY.get(needs.compute_dtype, LOWEST_OF_TRITON)
    if facts.gpu.capability >= lowest:
        return None
    what = f"{_named(facts.gpu)}; {needs.compute_dtype} attention needs {_dotted(lowest)}"
    other = ", or parallel.compute_dtype float32" if facts.gpu.capability >= LOWEST_OF_TRITON else ""
    return Problem(what, f"a GPU of capability {_dotted(lowest)} or newer{other}")


def _check_architecture(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.cuda is None or has_kernels(facts.archs, facts.gpu.capability):
        return None
    what = f"{_named(facts.gpu)}; torch {facts.torch} has kernels for {', '.join(facts.archs)} alone"
    return Problem(what, "a torch built for this GPU (https://pytorch.org/get-started/locally)")


def has_kernels(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Returns whether code for at least one of these architectures runs on a GPU.

    Args:
        archs: as `torch.cuda.get_arch_list` gives them. Machine code (sm_86) runs on GPUs of its major capability that
            are as new or newer; PTX (compute_86) on all that are as new or newer; code with the letter f stays within
            its major capability, code with the letter a (sm_90a) runs on its exact capability alone. No known
            architecture counts as True, since torch may not report any.
        capability: of the GPU, (major, minor).
    """
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    known = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in matches if m]
    return not known or any(
        capability == target
        if letter == "a"
        else capability >= target and (capability[0] == target[0] or (kind == "compute" and not letter))
        for kind, target, letter in known
    )


def _check_compiler(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.compiler:
        return None
    unset = "neither gcc nor clang is in PATH, and CC is not set"
    where = unset if facts.cc is None else f"CC is {facts.cc!r}, which is not found"
    return Problem(f"no C compiler, which Triton needs: {where}", "apt-get install gcc, or module load gcc")


def _check_header(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.has_python_h:
        return None
    what = f"no {facts.python_h}, which Triton compiles against"
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return Problem(what, f"apt-get install {package} (Debian: python3-dev), or module load python")


def _check_compiles(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.compile_error is None:
        return None
    what = f"{facts.compiler} cannot compile what Triton needs: {facts.compile_error}"
    return Problem(what, "apt-get install gcc libc6-dev, or module load gcc")


def _check_shared_memory(facts: Facts, needs: Needs) -> Problem | None:
    return _little_shared_memory(facts, needs) if facts.torch.startswith(TORCH_OF_SHARED_BYTES) else None


def _shared_memory_in_doubt(facts: Facts, needs: Needs) -> str | None:
    if facts.torch.startswith(TORCH_OF_SHARED_BYTES) or not needs.compiles:
        return None
    little = _little_shared_memory(facts, needs)
    if little is None:
        return None
    return f"with the kernels of torch {TORCH_OF_SHARED_BYTES}x this run would not start: {little}"


def _little_shared_memory(facts: Facts, needs: Needs) -> Problem | None:
    if facts.gpu is None or facts.gpu.shared_bytes is None:
        return None
    for width in needs.head_widths:
        wanted = shared_bytes(needs.compute_dtype, facts.gpu.capability, width)
        if wanted is not None and wanted > facts.gpu.shared_bytes:
            what = f"{facts.gpu.name} has {facts.gpu.shared_bytes:,} bytes of shared memory a block"
            why = f"FlexAttention takes {wanted:,} for heads of width {width} in {needs.compute_dtype}"
            return Problem(f"{what}; {why}", "a GPU with more of it (A100, H100), or a model with narrower heads")
    return None


def shared_bytes(compute_dtype: str, capability: tuple[int, int], head_width: int) -> int | None:
    """Returns the bytes of shared memory that attention needs per thread block, from `SHARED_BYTES`; None if the table
    has no entry. A width without an entry counts as the next power of two, for which kernels are compiled.

    Args:
        compute_dtype: bfloat16, float32 or float64.
        capability: the compute capability of the GPU, (major, minor).
        head_width: the head size, in elements.
    """
    widths = SHARED_BYTES.get((compute_dtype, capability), {})
    return widths.get(head_width) or widths.get(1 << (head_width - 1).bit_length())


CHECKS: tuple[Callable[[Facts, Needs], Problem | None], ...] = (
    _check_driver,
    _check_asked,
    _check_ranks,
    _check_capability,
    _check_architecture,
)
CHECKS_OF_COMPILING: tuple[Callable[[Facts, Needs], Problem | None], ...] = (
    _check_compiler,
    _check_header,
    _check_compiles,
    _check_shared_memory,
)


def _named(gpu: Gpu) -> str:
    return f"{gpu.name} has compute capability {_dotted(gpu.capability)}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
