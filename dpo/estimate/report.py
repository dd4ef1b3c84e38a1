"""The file that `python -m dpo.doctor --report FILE` writes and `python -m dpo.estimate --measured FILE` reads.

It holds numbers, words of fixed lists, versions of libraries and names of devices: no name of a host, user, folder,
model or data set, and no text of an error. The dataclasses here are the list of what it may hold: a field that is not
declared cannot be written, and is refused when it is read (`report_file.py`). Where every rank has its own number,
lists are by rank.
"""

from dataclasses import dataclass
from typing import Literal

FORMAT = "dpo.doctor report"
VERSION = 1
"""Raised by one where a file of before can no longer be read."""

Precision = Literal["bfloat16", "tf32", "float32", "float64"]
Optimizer = Literal["rmsprop", "adamw", "sgd"]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Axis = Literal["shard", "replicate"]
PartName = Literal[
    "versions",
    "toolchain",
    "run folder",
    "cache",
    "devices",
    "products",
    "all-gather",
    "model",
    "attention",
    "rates",
    "steps",
]
Outcome = Literal["measured", "does_not_fit", "out_of_memory", "failed", "not_finished"]


@dataclass(frozen=True)
class Versions:
    """Versions of rank 0; null where there is none."""

    python: str
    torch: str
    transformers: str
    triton: str | None
    nccl: str | None
    driver: str | None
    cuda: str | None


@dataclass(frozen=True)
class Ranks:
    """The ranks and what they compute on."""

    device_type: Literal["cpu", "cuda"]
    ranks: int
    nodes: int
    ranks_per_node: int


@dataclass(frozen=True)
class Device:
    """Devices with the same name."""

    name: str
    """As CUDA gives it; of a CPU the processor's."""
    capability: tuple[int, int] | None
    """Of a GPU."""
    count: int
    memory_bytes: int
    """Of a GPU; of a CPU the host's, which its ranks share."""
    free_bytes: int
    """The least of these devices."""
    threads_per_rank: int | None
    """Of a CPU."""


@dataclass(frozen=True)
class Products:
    """Square matrix products, on all ranks at once."""

    precision: Precision
    flops_per_second: list[float]


@dataclass(frozen=True)
class Collective:
    """Collectives along an axis of the mesh, each the fastest of several."""

    kind: Kind
    axis: Axis
    ranks: int
    """Ranks of the axis."""
    spans_nodes: bool
    tensor_bytes: int
    """Of the gathered, scattered or reduced tensor."""
    seconds: list[float]


@dataclass(frozen=True)
class Storage:
    """A file per rank in the run folder, written and synced, and read, on all ranks at once."""

    bytes_per_rank: int
    write_seconds: list[float]
    read_seconds: list[float]
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class HostCopies:
    """Copies between a GPU and pinned host memory, on all ranks at once."""

    to_host_bytes_per_second: list[float]
    to_device_bytes_per_second: list[float]


@dataclass(frozen=True)
class Attention:
    """A run's attention against plain attention in float64."""

    path: Literal["segment loop", "FlexAttention"]
    precision: Precision
    relative_error: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Model:
    """The sizes of the model."""

    family: str
    """transformers' name of the architecture; `other` where it is not one of transformers' own."""
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class Layout:
    """The keys of the config that decide what a step computes and sends, with nothing on auto."""

    shard: int
    replicate: int
    master_dtype: Literal["float32", "float64"]
    compute_dtype: Literal["bfloat16", "float32", "float64"]
    tf32: bool
    reduce_dtype: Literal["float32", "bfloat16", "float64"]
    activation_checkpointing: Literal["none", "selective", "full"]
    reshard_after_forward: bool
    sync_gradients: Literal["every_micro_batch", "last_micro_batch"]
    cpu_offload: bool
    compile: bool
    head_memory_mib: int
    tokens_per_micro_batch: int
    pairs_per_step: int
    optimizer: Optimizer
    momentum: bool


@dataclass(frozen=True)
class Percentiles:
    """The 0th, 50th, 90th, 99th and 100th percentile."""

    p0: float
    p50: float
    p90: float
    p99: float
    p100: float


@dataclass(frozen=True)
class Lengths:
    """The trees of the planned steps."""

    source: Literal["data", "assumed"]
    steps: int
    tokens_per_step: Percentiles
    trees_per_step: Percentiles
    completions_per_step: Percentiles
    prompt_tokens: Percentiles
    completion_tokens: Percentiles


@dataclass(frozen=True)
class Update:
    """Updates of some of the model's parameters by an optimizer, each the fastest of several."""

    optimizer: Optimizer
    momentum: bool
    elements: list[int]
    seconds: list[float]


@dataclass(frozen=True)
class Steps:
    """The timed steps. Seconds are those of the slowest rank."""

    seconds: list[float]
    tokens: list[int]
    """Of all ranks."""
    flops: list[float]
    """Of all ranks; recomputed operations count twice."""
    slowest_flops: list[float]
    """Of the ranks for which the others wait: the sum over micro-batches of the largest."""
    slowest_activations: list[float]
    """Elements of the activations of these ranks."""
    model_flops: list[float]
    """Of all ranks, without recomputation, as MFU counts them."""
    micro_batches: list[int]
    all_gather_bytes: float
    """Of the unsharded tensors, per step; 0 on one rank."""
    reduce_scatter_bytes: float
    all_reduce_bytes: float
    elements_per_rank: int
    """Parameters in the shard of a rank."""
    peak_memory_bytes: list[int]
    mfu_of_products: float | None
    """model_flops / seconds, as a share of the product rate of all ranks."""
    forward_seconds: list[float]
    """Passes without gradient over the first of the steps."""
    forward_flops: float
    """Of the ranks for which the others wait."""
    gathered_bytes: float
    """All-gathered in one micro-batch, as if there were several ranks."""
    reduced_bytes: float
    """Reduced in one micro-batch, as if there were several ranks."""
    gathering_seconds: float | None
    """Of a micro-batch of two tokens without a reduction; null where parts of a step overlap (CUDA)."""
    reducing_seconds: float | None
    """Of a reduction of gradients."""


@dataclass(frozen=True)
class Report:
    """The whole file."""

    format: str
    version: int
    failed: list[PartName]
    """Parts of the examination that failed."""
    versions: Versions | None
    ranks: Ranks
    devices: list[Device]
    products: list[Products]
    collectives: list[Collective]
    storage: Storage | None
    host_copies: HostCopies | None
    attention: Attention | None
    model: Model
    layout: Layout | None
    lengths: Lengths
    outcome: Outcome
    """Of the steps."""
    steps: Steps | None
    updates: list[Update]
