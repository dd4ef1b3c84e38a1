"""Extrapolates the peak memory of a rank from a model of few layers to the whole model, by kind.

Memory is linear in depth: at the first two and the last two layers, in the head and at the update, each kind grows by
the same bytes with every layer in between. At a layer in between, memory is between these values, because it changes by
the same bytes from each layer to the next. So a model of any depth above 4 needs two rehearsals, of 3 and of 4 layers.

For example, a rank whose shard of a layer is 10 MiB and of the root 40 MiB, and which holds two layers unsharded:

                         3 layers   4 layers   80 layers
    weights              70 MiB     80 MiB     80 + 76 (80 - 70) = 840 MiB
    unsharded weights    20 MiB     20 MiB     20 + 76 (20 - 20) =  20 MiB

The optimizer is added by formula. Elements that it keeps per trained parameter: RMSprop 1, and 1 more with momentum;
AdamW 2; SGD 0, and 1 with momentum. The update needs temporary tensors besides:

    CUDA, all tensors at once   RMSprop 1 element per parameter (the root of the mean square); AdamW, fused, none
    CPU, tensor by tensor       of the largest tensor RMSprop 2, its own and that of the tensor before; AdamW 3
    weight_decay                1 more, the gradient with the decay added, but in AdamW, where it is decoupled
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config, OptimConfig
from dpo.estimate.few_layers import adapters_of_few, with_layers
from dpo.estimate.rehearsal import Rehearsal, rehearse
from dpo.estimate.timeline import GRADIENTS, HEAD, WEIGHTS, Bytes, Moment
from dpo.estimate.traffic import ITEMSIZES
from dpo.step.optim import optimizer_elements

OPTIMIZER = "optimizer"
UPDATE_MOMENT = "optimizer update"
UPDATE = "temporary tensors of the update"
COPY = "host copy for a checkpoint"
ON_HOST = (WEIGHTS, GRADIENTS, OPTIMIZER, UPDATE)
"""The kinds that `parallel.cpu_offload` keeps in host memory, where the device has its own."""
FEW = 3
"""Layers of the first rehearsal of a deep model; the second has one more."""


@dataclass(frozen=True)
class Memory:
    """The memory of a rank: bytes by kind at the moment of the peak."""

    device: Bytes
    host: Bytes
    """A rank's share of host memory: the tensors that `parallel.cpu_offload` keeps there, and the copy of trained
    weights and optimizer from which a checkpoint is written (`dpo.checkpoint.host_copies`).
    """
    moment: str

    @property
    def peak(self) -> int:
        """Returns the bytes of tensors on the device: without the process's own and, on a CPU, without a checkpoint's
        copy.
        """
        return self.device.total()

    @property
    def totals(self) -> tuple[int, int]:
        """Returns the bytes on the device and on the host."""
        return self.peak, self.host.total()


def step_memory(
    config: Config, model_config: PretrainedConfig, num_ranks: int, plan: StepPlan, trees: Sequence[Tree], on_cuda: bool
) -> Memory:
    """Returns the memory of rank 0 in a step.

    Args:
        config: `parallel.compute_dtype` must not be auto, and no key of `parallel` undecided.
        model_config: of the whole model.
        num_ranks: ranks over which the model is sharded and replicated.
        plan: the plan of the step.
        trees: the trees of its largest micro-batch.
        on_cuda: whether the step runs on CUDA; else on a CPU.
    """
    depth = model_config.num_hidden_layers
    depths = (depth,) if depth <= FEW + 1 else (FEW, FEW + 1)
    adapters = adapters_of_few(config, model_config)
    few = [
        rehearse(config, with_layers(model_config, d), num_ranks, (plan, tuple(trees)), on_cuda, adapters)
        for d in depths
    ]
    peaks = [_by_place(rehearsal, d) for rehearsal, d in zip(few, depths, strict=True)]
    further = depth - depths[-1]
    moments = {m: _extrapolated([p[m] for p in peaks], further) for m in peaks[0]}
    held = Held(
        weight_bytes=_linear([rehearsal.weight_bytes for rehearsal in few], further),
        trained=_linear([sum(rehearsal.trained_elements) for rehearsal in few], further),
        largest=max(few[0].trained_elements),
    )
    memory = _at_peak(config, moments, held, on_cuda)
    copied = _linear([copy_bytes(config, rehearsal.trained_elements, on_cuda) for rehearsal in few], further)
    return replace(memory, host=memory.host + Counter({COPY: copied}))


@dataclass(frozen=True)
class Held:
    """The parameters of which a rank holds a shard."""

    weight_bytes: int
    """Bytes of all of them."""
    trained: int
    """Elements of those that are trained."""
    largest: int
    """Elements of the largest of these."""


def copy_bytes(config: Config, trained_elements: Sequence[int], pinned: bool) -> int:
    """Returns the bytes of a rank's host copy of trained weights and optimizer.

    Args:
        config: gives the dtype of the weights and the optimizer.
        trained_elements: elements of this rank's shard of each trained parameter.
        pinned: whether the copy is in pinned memory, for which torch rounds the bytes of each tensor up to a power of
            two.
    """
    sizes = [elements * ITEMSIZES[config.model.dtype] for elements in trained_elements]
    kept = [1 << (size - 1).bit_length() if pinned and size else size for size in sizes]
    return (1 + optimizer_elements(config.optim)) * sum(kept)


def _by_place(rehearsal: Rehearsal, depth: int) -> dict[Moment, Bytes]:
    """Returns the peaks with layers counted from both ends: layers 0 and 1 as they are, layers depth - 2 and depth - 1
    as -3 and -2. The head stays HEAD, which is -1.
    """
    peaks = {}
    for moment, peak in rehearsal.peaks.items():
        if moment.layer == HEAD or moment.layer < 2:
            peaks[moment] = peak
        if moment.layer != HEAD and moment.layer >= depth - 2:
            peaks[moment._replace(layer=moment.layer - depth - 1)] = peak
    return peaks


def _extrapolated(peaks: Sequence[Bytes], further: int) -> Bytes:
    """Returns the peak of a model with `further` layers more than the second of two depths, from the peaks at both."""
    return Counter(
        {kind: _linear([peak[kind] for peak in peaks], further) for kind in peaks[0].keys() | peaks[-1].keys()}
    )


def _linear(sizes: Sequence[int], further: int) -> int:
    """Returns what a size at two depths is with `further` layers more than the second."""
    return sizes[-1] + further * (sizes[-1] - sizes[0])


def _at_peak(config: Config, moments: dict[Moment, Bytes], held: Held, on_cuda: bool) -> Memory:
    """Returns the memory at the moment with the most bytes on the device, without a checkpoint's copy.

    Args:
        config: the run's config.
        moments: the peak of each moment, without the optimizer.
        held: the parameters of this rank.
        on_cuda: whether the step runs on CUDA.
    """
    itemsize = ITEMSIZES[config.model.dtype]
    state = Counter({OPTIMIZER: optimizer_elements(config.optim) * held.trained * itemsize})
    at_once = held.trained if on_cuda and not config.parallel.cpu_offload else held.largest
    update = Counter({WEIGHTS: held.weight_bytes, GRADIENTS: held.trained * itemsize})
    update[UPDATE] = update_elements(config.optim, on_cuda and not config.parallel.cpu_offload) * at_once * itemsize
    several = any(moment.micro_batch > 0 for moment in moments)
    named = {_name(moment, several): peak + state for moment, peak in moments.items()} | {UPDATE_MOMENT: update + state}
    away = ON_HOST if config.parallel.cpu_offload and on_cuda else ()
    device = {name: Counter({k: n for k, n in peak.items() if k not in away}) for name, peak in named.items()}
    moment = max(device, key=lambda name: device[name].total())
    host = max((Counter({k: peak[k] for k in away}) for peak in named.values()), key=lambda peak: peak.total())
    return Memory(device[moment], host, moment)


def _name(moment: Moment, several: bool) -> str:
    """Returns the moment in words. `several`: whether the step has more than one micro-batch."""
    places = {0: "the first layer", 1: "the second layer", -3: "the last layer but one", -2: "the last layer"}
    batch = f" in the {'first' if moment.micro_batch == 0 else 'last'} micro-batch" if several else ""
    return f"{moment.stage} pass of {places.get(moment.layer, 'the head')}{batch}"


def update_elements(optim: OptimConfig, on_cuda: bool) -> int:
    """Returns the temporary elements per parameter that an update needs: of all parameters on CUDA, of one tensor on a
    CPU.
    """
    root = {"rmsprop": 1 if on_cuda else 2, "adamw": 0 if on_cuda else 3, "sgd": 0}[optim.name]
    return root + int(optim.weight_decay > 0 and optim.name != "adamw")
