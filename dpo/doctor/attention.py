"""Compares attention, forward and backward, on a small packed row, with a plain implementation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo.batch.block_mask import Span, host_mask
from dpo.batch.layout import make_layout
from dpo.distributed.world import World
from dpo.doctor.parts import Failure, Finding, Part, Subject, attempt, with_remedy
from dpo.machine.toolchain import needs_of
from dpo.model.attention import block_attention, segment_attention
from dpo.model.parallelize import is_compiled

SPANS = (Span(0, 150, (70, 40)), Span(260, 90, (100,)))
"""Two trees. The second completion of the first does not follow its prompt directly."""

NUM_TOKENS = 512
"""Tokens of the row: 450 of the trees, then padding."""

HEADS, KV_HEADS, USUAL_WIDTH = 4, 2, 128

BOUNDS = {"bfloat16": 2e-2, "tf32": 4e-3, "float32": 2e-5, "float64": 1e-10}
"""Maximum relative L2 error by precision. A rounding is 2^-9 in bfloat16, 2^-11 in TF32, 2^-24 in float32 and 2^-53 in
float64; a handful of them add up in each element (scores, probabilities, their gradients).
"""


@dataclass(frozen=True)
class Attention:
    """The measurements of a rank."""

    path: str
    """The implementation that a run uses on this rank."""
    precision: str
    error: float
    """The largest relative L2 error among the output and the gradients of queries, keys and values."""
    seconds: float
    """Including compilation."""
    compiled: "tuple[float, float] | Failure | None"
    """On a CPU whose run compiles its layers: (error, seconds) of FlexAttention's forward pass compiled for it, or why
    it does not compile. None on another CPU, whose run compiles nothing, and on a GPU, where `path` is compiled.
    """


def measure_attention(subject: Subject, world: World) -> Attention:
    """Returns the error of a run's attention on this rank against `plain_attention`. Sends nothing."""
    device, dtype = world.device, subject.compute_dtype(world.device)
    width = max(needs_of(dtype, subject.models).head_widths, default=USUAL_WIDTH)
    rows = make_rows(width, dtype, device)
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        error, seconds = compare(segment_rows, rows)
        forward = None
        if is_compiled(subject.parallel, device):
            forward = attempt(lambda: compare(block_rows, make_rows(width, torch.float32, device), gradients=False))
        return Attention("segment loop", precision, error, seconds, forward)
    precision = "tf32" if precision == "float32" and subject.parallel.tf32 else precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return Attention("FlexAttention", precision, *compare(block_rows, rows), None)


def make_rows(width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Returns queries, keys and values of shape (1, heads, NUM_TOKENS, width), and the gradient of the output. They are
    the same on every rank.

    Args:
        width: the head size, in elements.
        dtype: the dtype of the tensors.
        device: their device.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, NUM_TOKENS, width) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def segment_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends as a run on a CPU does.

    Args:
        query: (1, HEADS, NUM_TOKENS, width).
        key, value: (1, KV_HEADS, NUM_TOKENS, width).

    Returns:
        (1, HEADS, NUM_TOKENS, width).
    """
    layout = make_layout(SPANS, [None], NUM_TOKENS, torch.device("cpu"))
    return segment_attention(query, key, value, layout, None, None)


def block_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends as a run on CUDA does: FlexAttention, compiled at the first call.

    Args:
        query: (1, HEADS, NUM_TOKENS, width).
        key, value: (1, KV_HEADS, NUM_TOKENS, width).

    Returns:
        (1, HEADS, NUM_TOKENS, width).
    """
    spans = make_layout(SPANS, [], NUM_TOKENS, torch.device("cpu")).spans
    mask = host_mask(spans, None, pin=query.is_cuda).to(query.device)
    return block_attention(query, key, value, mask, None)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns softmax attention in float64 with a dense mask: a query sees a key of its own tree that is not later than
    the query and belongs to the prompt or to the query's own completion.

    Args:
        query: (1, HEADS, NUM_TOKENS, width).
        key, value: (1, KV_HEADS, NUM_TOKENS, width).

    Returns:
        (1, HEADS, NUM_TOKENS, width) float64.
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
    """Compares an attention with `plain_attention`.

    Args:
        attend: (query, key, value) -> output, as `segment_rows`.
        rows: queries, keys, values and the gradient of the output, from `make_rows`.
        gradients: whether the gradients of queries, keys and values are compared too.

    Returns:
        The largest relative L2 error (inf for a NaN), and the seconds of both computations.
    """
    started = time.perf_counter()
    tensors, expected = _run(attend, rows, gradients), _run(plain_attention, rows, gradients)
    errors = [_error(tensor, exact) for tensor, exact in zip(tensors, expected, strict=True)]
    worst = max(error if error == error else float("inf") for error in errors)  # max() would skip a NaN
    return worst, time.perf_counter() - started


def _run(attend: Callable[..., Tensor], rows: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    *inputs, upstream = (row.detach() for row in rows)
    inputs = [row.requires_grad_(gradients) for row in inputs]
    with torch.set_grad_enabled(gradients):
        output = attend(*inputs)
    grads: list[Any] = list(torch.autograd.grad(output, inputs, upstream.to(output.dtype))) if gradients else []
    return [output.detach(), *grads]


def _error(tensor: Tensor, exact: Tensor) -> float:
    return float((tensor.double() - exact.double()).norm() / exact.double().norm())


def describe_attention(subject: Subject, results: Sequence[Attention]) -> Finding:
    """Returns the error of the worst rank beside the bound, and the seconds of the slowest."""
    worst = max(results, key=lambda result: result.error)
    bound = BOUNDS[worst.precision]
    seconds = max(result.seconds for result in results)
    line = f"{worst.path}, {worst.precision}, with gradients: {worst.error:.1e} from plain attention"
    lines = [f"{line}, {seconds:.1f} s"]
    problems = []
    if not worst.error <= bound:
        deviation = (
            f"rank {results.index(worst)}: {worst.path} is {worst.error:.1e} from plain attention, {bound:g} allowed"
        )
        problems.append(with_remedy(deviation, WRONG))
    compiled, problem = _compiled(results)
    return Finding(ATTENTION.name, (*lines, *compiled), problems=(*problems, *problem))


def _compiled(results: Sequence[Attention]) -> tuple[list[str], list[str]]:
    """Returns the lines about FlexAttention compiled on a CPU, and the problems."""
    failed = next((result.compiled for result in results if isinstance(result.compiled, Failure)), None)
    if failed is not None:
        reason = f"nothing compiles on this CPU: {failed.reason}"
        return [], [with_remedy(reason, "apt-get install g++, or module load gcc; or parallel.compile false")]
    compiled = [result.compiled for result in results if isinstance(result.compiled, tuple)]
    if not compiled:
        return [], []
    error, seconds = (max(values) for values in zip(*compiled, strict=True))
    line = f"FlexAttention compiled, float32, forward: {error:.1e} from plain attention, {seconds:.1f} s"
    wrong = [with_remedy(f"FlexAttention compiled is {error:.1e} from plain attention", WRONG)]
    return [line], [] if error <= BOUNDS["float32"] else wrong


WRONG = "another version of torch (constraints.txt has the tested ones); a GPU that nvidia-smi -q lists without errors"


def compiling_notice(subject: Subject, world: World) -> str:
    """Returns the message before FlexAttention is compiled; empty where it is not."""
    compiles = world.device.type == "cuda" or is_compiled(subject.parallel, world.device)
    return "compiling FlexAttention, up to a minute the first time" if compiles else ""


ATTENTION = Part(
    "attention",
    measure_attention,
    describe_attention,
    remedy="the remedy of toolchain; TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR in a folder to write in",
    in_turns=True,
    notice=compiling_notice,
)
