"""Attention forward and backward on a small packed row, compared with attention written plainly."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo.batch.block_mask import Span, host_mask
from dpo.batch.layout import make_layout
from dpo.distributed.world import World
from dpo.doctor.parts import Failure, Finding, Part, Subject, attempt
from dpo.machine.toolchain import needs_of
from dpo.model.attention import block_attention, segment_attention

SPANS = (Span(0, 150, (70, 40)), Span(260, 90, (100,)))
"""Two trees, the first with a completion that stands apart from its prompt."""

NUM_TOKENS = 512
"""Of the row: 450 of the trees, the rest padding."""

HEADS, KV_HEADS, USUAL_WIDTH = 4, 2, 128

BOUNDS = {"bfloat16": 2e-2, "tf32": 4e-3, "float32": 2e-5, "float64": 1e-10}
"""Relative L2 error that is allowed. A rounding is 2^-9 in bfloat16, 2^-11 in TF32, 2^-24 in float32 and 2^-53 in
float64; a handful of them meet in each number (scores, probabilities, their gradients)."""


@dataclass(frozen=True)
class Attention:
    """What a rank found."""

    path: str
    """What a run uses here."""
    precision: str
    error: float
    """The largest relative L2 error among the output and the gradients of queries, keys and values."""
    seconds: float
    """Compilation included."""
    compiled: "tuple[float, float] | Failure | None"
    """On a CPU: (error, seconds) of FlexAttention's forward pass compiled for it, or why it does not compile; None on
    a GPU, where `path` is that.
    """


def measure_attention(subject: Subject, world: World) -> Attention:
    """What a run does here, against `plain_attention`; nothing is sent."""
    device, dtype = world.device, subject.compute_dtype(world.device)
    width = max(needs_of(dtype, subject.models).head_widths, default=USUAL_WIDTH)
    rows = make_rows(width, dtype, device)
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        error, seconds = compare(segment_rows, rows)
        forward = attempt(lambda: compare(block_rows, make_rows(width, torch.float32, device), gradients=False))
        return Attention("segment loop", precision, error, seconds, forward)
    precision = "tf32" if precision == "float32" and subject.parallel.tf32 else precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return Attention("FlexAttention", precision, *compare(block_rows, rows), None)


def make_rows(width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries, keys and values, (1, heads, NUM_TOKENS, width), and the gradient of the output; the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, NUM_TOKENS, width) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def segment_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What runs on a CPU."""
    layout = make_layout(SPANS, [None], NUM_TOKENS, torch.device("cpu"))
    return segment_attention(query, key, value, layout, None, None)


def block_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What runs on CUDA: FlexAttention, compiled at the first call."""
    spans = make_layout(SPANS, [], NUM_TOKENS, torch.device("cpu")).spans
    mask = host_mask(spans, None, pin=query.is_cuda).to(query.device)
    return block_attention(query, key, value, mask, None)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in float64 with a mask of all (query, key): keys of the same tree, not later than the query,
    of its prompt or of the query's own completion.
    """
    tree, part = torch.zeros(2, NUM_TOKENS, dtype=torch.long, device=query.device)
    for number, span in enumerate(make_layout(SPANS, [], NUM_TOKENS, torch.device("cpu")).spans):
        tree[span.start :] = number
        for completion, length in enumerate(span.completion_lens):
            start = span.start + span.prompt_len + sum(span.completion_lens[:completion])
            part[start : start + length] = completion + 1
    place = torch.arange(NUM_TOKENS, device=query.device)
    seen = (place[:, None] >= place) & (tree[:, None] == tree) & ((part == 0) | (part[:, None] == part))
    key, value = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return torch.matmul(scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def compare(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Sequence[Tensor], gradients: bool = True
) -> tuple[float, float]:
    """(largest relative L2 error, seconds) of `attend` against `plain_attention`, its gradients too."""
    started = time.perf_counter()
    found = _run(attend, rows, gradients)
    errors = [_error(mine, true) for mine, true in zip(found, _run(plain_attention, rows, gradients), strict=True)]
    worst = max(error if error == error else float("inf") for error in errors)  # NaN compares with nothing
    return worst, time.perf_counter() - started


def _run(attend: Callable[..., Tensor], rows: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    *inputs, upstream = (row.detach() for row in rows)
    inputs = [row.requires_grad_(gradients) for row in inputs]
    with torch.set_grad_enabled(gradients):
        output = attend(*inputs)
    found: list[Any] = list(torch.autograd.grad(output, inputs, upstream.to(output.dtype))) if gradients else []
    return [output.detach(), *found]


def _error(mine: Tensor, true: Tensor) -> float:
    return float((mine.double() - true.double()).norm() / true.double().norm())


def describe_attention(subject: Subject, found: Sequence[Attention]) -> Finding:
    """The worst rank's error against the bound, and the seconds of the slowest."""
    worst = max(found, key=lambda one: one.error)
    bound = BOUNDS[worst.precision]
    seconds = max(one.seconds for one in found)
    line = f"{worst.path}, {worst.precision}, with gradients: {worst.error:.1e} from plain attention"
    lines = [f"{line}, {seconds:.1f} s"]
    problems = []
    if not worst.error <= bound:
        what = f"rank {found.index(worst)}: {worst.path} is {worst.error:.1e} from plain attention, {bound:g} allowed"
        problems.append(f"{what}; what helps: {WRONG}")
    compiled, problem = _compiled(subject, found)
    return Finding(ATTENTION.name, (*lines, *compiled), problems=(*problems, *problem))


def _compiled(subject: Subject, found: Sequence[Attention]) -> tuple[list[str], list[str]]:
    """What is said of FlexAttention compiled on a CPU, and the problem where a run compiles its layers."""
    failed = next((one.compiled for one in found if isinstance(one.compiled, Failure)), None)
    if failed is not None:
        what = f"nothing compiles on this CPU: {failed.reason}"
        is_needed = str(subject.parallel.compile).lower() == "true"
        helps = "apt-get install g++, or module load gcc; or parallel.compile false"
        return ([], [f"{what}; what helps: {helps}"]) if is_needed else ([f"{what} (a run here does without)"], [])
    compiled = [one.compiled for one in found if isinstance(one.compiled, tuple)]
    if not compiled:
        return [], []
    error, seconds = max(one[0] for one in compiled), max(one[1] for one in compiled)
    line = f"FlexAttention compiled, float32, forward: {error:.1e} from plain attention, {seconds:.1f} s"
    wrong = [f"FlexAttention compiled is {error:.1e} from plain attention; what helps: {WRONG}"]
    return [line], [] if error <= BOUNDS["float32"] else wrong


WRONG = "another version of torch (constraints.txt has the tested ones); a GPU that nvidia-smi -q lists without errors"

ATTENTION = Part(
    "attention",
    measure_attention,
    describe_attention,
    remedy="what toolchain says; TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR in a folder to write in",
    in_turns=True,
    notice="compiling FlexAttention, up to a minute at the first time",
)
