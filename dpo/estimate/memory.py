"""The most that a rank holds at once in a step, by kind.

Few layers are drawn out to many: at the first two and the last two layers, in the head and at the update, what lives
grows by the same bytes with every layer between them. In the layers between, it lies between: from one to the next it
changes by the same bytes. So a model of 80 layers needs two rehearsals, of 3 and of 4.

The optimizer is added by formula. Numbers a weight that it keeps: RMSprop 1, and 1 more with momentum; AdamW 2; SGD 0,
and 1 with momentum. For the update it needs room besides:

    CUDA, all tensors at once   RMSprop 1 number a weight (the root of the mean square); AdamW, fused, none
    CPU, tensor by tensor       of the largest tensor RMSprop 2, its own and that of the tensor before; AdamW 3
    weight_decay                1 more, the gradient with it added, but in AdamW, where it is decoupled
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config, OptimConfig
from dpo.estimate.rehearsal import Rehearsal, rehearse
from dpo.estimate.timeline import GRADIENTS, HEAD, WEIGHTS, Bytes, Moment
from dpo.estimate.traffic import ITEMSIZES, Groups
from dpo.step.optim import optimizer_elements

OPTIMIZER = "optimizer"
UPDATE_MOMENT = "update of the weights"
UPDATE = "the update's own"
COPY = "a checkpoint's copy"
ON_HOST = (WEIGHTS, GRADIENTS, OPTIMIZER, UPDATE)
"""What parallel.cpu_offload keeps in the memory of the host, where the device has another."""
FEW = 3


@dataclass(frozen=True)
class Memory:
    """A rank's memory, bytes by kind at the moment of the peak."""

    device: Bytes
    host: Bytes
    """A rank's share of the host's memory: what parallel.cpu_offload keeps there, and the copy of weights and optimizer
    that a checkpoint is written from (`dpo.checkpoint.host_copies`).
    """
    moment: str
    groups: Groups
    """What is gathered together in the whole model, see `traffic`."""

    @property
    def peak(self) -> int:
        """Bytes on the device, without what the process itself has and, on a CPU, without a checkpoint's copy."""
        return self.device.total()

    @property
    def totals(self) -> tuple[int, int]:
        """Bytes on the device and on the host."""
        return self.peak, self.host.total()


def step_memory(
    config: Config, model_config: PretrainedConfig, num_ranks: int, plan: StepPlan, trees: Sequence[Tree], on_cuda: bool
) -> Memory:
    """The memory of a step whose largest micro-batch has these trees; parallel.compute_dtype must not be auto."""
    depth = model_config.num_hidden_layers
    depths = (depth,) if depth <= FEW + 1 else (FEW, FEW + 1)
    few = [rehearse(config, with_layers(model_config, d), num_ranks, plan, trees, on_cuda) for d in depths]
    peaks = [_by_place(rehearsal, d) for rehearsal, d in zip(few, depths, strict=True)]
    numbers = [sum(rehearsal.local_numbers) for rehearsal in few]
    further = depth - depths[-1]
    moments = {m: _drawn_out([p[m] for p in peaks], further) for m in peaks[0]}
    local = numbers[-1] + further * (numbers[-1] - numbers[0])
    return _at_peak(config, moments, local, max(few[0].local_numbers), on_cuda, all_groups(few[-1].groups, depth))


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with fewer layers."""
    if num_layers == config.num_hidden_layers:
        return config
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        changed.layer_types = config.layer_types[:num_layers]
    return changed


def _by_place(rehearsal: Rehearsal, depth: int) -> dict[Moment, Bytes]:
    """The peaks with layers counted from both ends: 0, 1 and depth - 2, depth - 1 as -3, -2; HEAD stays -1."""
    found = {}
    for moment, peak in rehearsal.peaks.items():
        if moment.layer == HEAD or moment.layer < 2:
            found[moment] = peak
        if moment.layer != HEAD and moment.layer >= depth - 2:
            found[moment._replace(layer=moment.layer - depth - 1)] = peak
    return found


def _drawn_out(peaks: Sequence[Bytes], further: int) -> Bytes:
    """Peaks at two depths -> that of a model with `further` layers more than the second."""
    first, last = peaks[0], peaks[-1]
    return Counter({kind: last[kind] + further * (last[kind] - first[kind]) for kind in first.keys() | last.keys()})


def all_groups(groups: Groups, depth: int) -> Groups:
    """The groups of a model of `depth` layers from those of few."""
    return Groups((groups.layers[-1],) * depth, groups.root)


def _at_peak(
    config: Config, moments: dict[Moment, Bytes], local: int, largest: int, on_cuda: bool, groups: Groups
) -> Memory:
    """`local`: numbers of all parameters that this rank holds; `largest`: of the largest of them."""
    itemsize = ITEMSIZES[config.model.dtype]
    state = Counter({OPTIMIZER: optimizer_elements(config.optim) * local * itemsize})
    at_once = local if on_cuda and not config.parallel.cpu_offload else largest
    update = Counter({WEIGHTS: local * itemsize, GRADIENTS: local * itemsize})
    update[UPDATE] = update_numbers(config.optim, on_cuda and not config.parallel.cpu_offload) * at_once * itemsize
    several = any(moment.micro_batch > 0 for moment in moments)
    named = {_name(moment, several): peak + state for moment, peak in moments.items()} | {UPDATE_MOMENT: update + state}
    away = ON_HOST if config.parallel.cpu_offload and on_cuda else ()
    device = {name: Counter({k: n for k, n in peak.items() if k not in away}) for name, peak in named.items()}
    moment = max(device, key=lambda name: device[name].total())
    host = max((Counter({k: peak[k] for k in away}) for peak in named.values()), key=lambda peak: peak.total())
    host[COPY] = local * itemsize + state[OPTIMIZER]
    return Memory(device[moment], host, moment, groups)


def _name(moment: Moment, several: bool) -> str:
    """`several`: whether the step has more than one micro-batch."""
    places = {0: "the first layer", 1: "the second layer", -3: "the last layer but one", -2: "the last layer"}
    batch = f" in the {'first' if moment.micro_batch == 0 else 'last'} micro-batch" if several else ""
    return f"{moment.stage} pass of {places.get(moment.layer, 'the head')}{batch}"


def update_numbers(optim: OptimConfig, on_cuda: bool) -> int:
    """Numbers of each weight that an update needs for a while: of all weights on CUDA, of one tensor on a CPU."""
    root = {"rmsprop": 1 if on_cuda else 2, "adamw": 0 if on_cuda else 3, "sgd": 0}[optim.name]
    return root + int(optim.weight_decay > 0 and optim.name != "adamw")
