"""Counts the bytes that live at once while a step runs, by kind and by moment.

Storages are counted, so that views cost nothing. Their sizes are read after every operation, so that a storage that
FSDP2 frees and allocates again is counted as it is. Memory that a kernel allocates and frees within one operation is
not seen.

For example, one layer whose weights take 400 bytes on this rank and 800 unsharded, during its forward pass:

    operation    weights   unsharded weights   activations   sum     peak of the moment
    enter        400                                         400     400
    all-gather   400       800                               1,200   1,200
    product      400       800                 100           1,300   1,300
    reshard      400                           100           500     1,300
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, ref

from dpo.adapters.inject import trained
from dpo.estimate.compiled import in_registers
from dpo.model.parallelize import fsdp_modules

WEIGHTS = "weights"
GRADIENTS = "gradients"
GATHERED = "unsharded weights"
WHOLE = "unsharded gradients"
REDUCED = "reduce buffers"
LOGITS = "logits"
COPIED = "gloo's own copy"
ACTIVATIONS = "activations"
UNWRITTEN = "never written"
"""Tensors that a fused kernel does not write to memory; they are not counted."""

Bytes = Counter[str]
"""Bytes by kind."""


HEAD = -1
"""The layer of a moment in which the head works."""


class Moment(NamedTuple):
    """A part of a step."""

    micro_batch: int
    stage: Literal["forward", "backward"]
    layer: int
    """The decoder layer that works, until the next one begins; or HEAD."""


_WHOLE_OF = {
    "c10d::_allgather_base_": lambda args: args[0],
    "c10d::_reduce_scatter_base_": lambda args: args[1],
}
"""Returns, by collective, its unsharded tensor from its arguments."""


class Timeline(TorchDispatchMode):
    """Records the peak of each moment while it is active: in `peaks`, the bytes by kind when their sum was the
    greatest.

    Tensors that were made before it was entered are not counted. Tensors that are made before `watch` are weights.

    Args:
        vocab_size: the last dimension of logits.
        offloaded: whether weights and gradients are in another memory. Peaks are then compared without these kinds; the
            recorded bytes have them.
        by_gloo: whether collectives run on gloo, which copies the whole tensor that it gathers or scatters.
    """

    def __init__(self, vocab_size: int, offloaded: bool, by_gloo: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self.peaks: dict[Moment, Bytes] = {}
        self._moment: Moment | None = None
        self._vocab_size = vocab_size
        self._offloaded = offloaded
        self._by_gloo = by_gloo
        self._model: nn.Module | None = None
        self._weight_shapes: Collection[tuple[int, ...]] = ()
        self._kinds = WeakIdKeyDictionary(ref_type=ref)
        self._greatest: dict[Moment, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True: torch.compile else refuses to trace code that runs in this mode."""
        return True

    def watch(self, model: nn.Module) -> None:
        """Sets the model whose weights have been made."""
        self._model = model
        self._weight_shapes = {tuple(parameter.shape) for parameter in trained(model.parameters())}

    def enter(self, moment: Moment) -> None:
        """Begins the next moment of the step."""
        self._moment = moment
        self._record()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the operation is dispatched again on the local tensors
        kwargs = kwargs or {}
        if func.namespace == "prim":  # queries of a tensor's device, which are frequent
            return func(*args, **kwargs)
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        # Fake tensors of torch 2.11 mistake this product's out_dtype for its beta; the product allocates nothing.
        result = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        for tensor in _tensors(result):
            if id(tensor.untyped_storage()) not in known and (kind := self._kind(tensor)) != UNWRITTEN:
                self._kinds[tensor.untyped_storage()] = kind
        self._record(_WHOLE_OF[func._schema.name](args).nbytes if self._copies(func) else 0)
        return result

    def _copies(self, func: Any) -> bool:
        return self._by_gloo and func._schema.name in _WHOLE_OF

    def _record(self, copied: int = 0) -> None:
        """Records the bytes that live now where they exceed the moment's peak. `copied`: bytes that lived during the
        operation alone.
        """
        if self._moment is None:
            return
        if self._offloaded:
            by_kind = self._by_kind()
            total = by_kind.total() - by_kind[WEIGHTS] - by_kind[GRADIENTS] + copied
        else:
            by_kind, total = None, sum(storage.nbytes() for storage in self._kinds) + copied
        if total > self._greatest.get(self._moment, -1):
            self._greatest[self._moment] = total
            self.peaks[self._moment] = (by_kind or self._by_kind()) + Counter({COPIED: copied})

    def _by_kind(self) -> Bytes:
        gradients = {id(storage) for storage in _gradient_storages(self._model)}
        by_kind: Bytes = Counter()
        for storage, kind in self._kinds.items():
            by_kind[GRADIENTS if id(storage) in gradients else kind] += storage.nbytes()
        if self._offloaded:
            # In the rehearsal, a gradient on the host is the tensor that was all-reduced over the replicas. On CUDA it
            # is a copy of that tensor, which FSDP2 keeps until the end of the last backward pass that reduces.
            all_reduced = {id(storage): storage for storage in _all_reduced_storages(self._model)}
            by_kind[REDUCED] += sum(all_reduced[i].nbytes() for i in all_reduced.keys() & gradients)
        return by_kind

    def _kind(self, tensor: Tensor) -> str:
        if self._model is None:
            return WEIGHTS
        by_function = _kind_by_function()
        if by_function:
            return by_function
        shape = tuple(tensor.shape)
        if shape in self._weight_shapes and self._moment is not None and self._moment.stage == "backward":
            return WHOLE
        return LOGITS if shape[-1:] == (self._vocab_size,) else ACTIVATIONS


_KINDS_BY_FUNCTION = {
    "foreach_all_gather": GATHERED,
    "foreach_all_gather_copy_out": GATHERED,
    "wait_for_unshard": GATHERED,
    "foreach_reduce": REDUCED,
    "to_accumulated_grad_if_needed": WHOLE,
    in_registers.__name__: UNWRITTEN,
}
"""The kind of the tensors that a function makes: functions of FSDP2, and one of `compiled`."""


def _kind_by_function() -> str | None:
    """Returns the kind of the tensors that one of these functions makes, if the caller runs inside it; None for tensors
    of the model.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        kind = _KINDS_BY_FUNCTION.get(frame.f_code.co_name)
        if kind is not None:
            return kind
        frame = frame.f_back
    return None


def _gradient_storages(model: nn.Module | None) -> Iterator[Any]:
    for parameter in model.parameters() if model is not None else ():
        if isinstance(parameter.grad, DTensor):
            yield parameter.grad._local_tensor.untyped_storage()


def _all_reduced_storages(model: nn.Module | None) -> Iterator[Any]:
    """Yields the storages that were all-reduced over the replicas (HSDP) and that FSDP2 still keeps."""
    for module in fsdp_modules(model) if model is not None else ():
        for group in _parameter_groups(module):
            if group._all_reduce_state is not None:
                yield group._all_reduce_state.all_reduce_input.untyped_storage()


def _parameter_groups(module: FSDPModule) -> Sequence[Any]:
    """Returns the parameter groups of one FSDP module: one until torch 2.12, a list of them since."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor))
