"""Which bytes live at once while a step runs, told apart by what they are for and when.

Storages are counted, so that views cost nothing, and asked for their size after every operation, so that those which
FSDP empties and fills again are counted as they are. What a kernel takes and gives back inside of one operation is not
seen.
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

from dpo.estimate.compiled import in_registers
from dpo.model.parallelize import fsdp_modules

WEIGHTS = "weights"
GRADIENTS = "gradients"
GATHERED = "gathered weights"
WHOLE = "whole gradients"
REDUCED = "reduce buffers"
LOGITS = "logits"
COPIED = "gloo's own copy"
ACTIVATIONS = "activations"
UNWRITTEN = "never written"
"""What a fused kernel does not write to memory; it is not counted."""

Bytes = Counter[str]
"""Bytes by kind."""


HEAD = -1


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
"""The whole tensor of a collective, of its arguments."""


class Timeline(TorchDispatchMode):
    """`peaks`: of each moment the bytes by kind when their sum was the greatest. What was there before is not counted.

    What is made before `watch` are weights. `offloaded`: weights and gradients lie in another memory, and are
    left out of the sum that is compared; they stay in what is recorded. `by_gloo`: collectives are those of gloo, which
    copies all that it gathers and all that it scatters.
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
        """Tells torch.compile to trace what runs in this mode; it would else refuse to."""
        return True

    def watch(self, model: nn.Module) -> None:
        """Names the model whose weights have been made."""
        self._model = model
        self._weight_shapes = {tuple(parameter.shape) for parameter in model.parameters()}

    def enter(self, moment: Moment) -> None:
        """A part of the step begins."""
        self._moment = moment
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again, for the local tensors
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor for its device, and that often
            return func(*args, **kwargs)
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        # torch 2.11's fake tensors take this product's out_dtype for its beta; it makes no tensor.
        result = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        for tensor in _tensors(result):
            if id(tensor.untyped_storage()) not in known and (kind := self._kind(tensor)) != UNWRITTEN:
                self._kinds[tensor.untyped_storage()] = kind
        self._look(_WHOLE_OF[func._schema.name](args).nbytes if self._copies(func) else 0)
        return result

    def _copies(self, func: Any) -> bool:
        return self._by_gloo and func._schema.name in _WHOLE_OF

    def _look(self, copied: int = 0) -> None:
        """`copied`: bytes that were there during the operation, beside what is there after it."""
        if self._moment is None:
            return
        if self._offloaded:
            found = self._by_kind()
            now = found.total() - found[WEIGHTS] - found[GRADIENTS] + copied
        else:
            found, now = None, sum(storage.nbytes() for storage in self._kinds) + copied
        if now > self._greatest.get(self._moment, -1):
            self._greatest[self._moment] = now
            self.peaks[self._moment] = (found or self._by_kind()) + Counter({COPIED: copied})

    def _by_kind(self) -> Bytes:
        gradients = {id(storage) for storage in _gradient_storages(self._model)}
        found: Bytes = Counter()
        for storage, kind in self._kinds.items():
            found[GRADIENTS if id(storage) in gradients else kind] += storage.nbytes()
        if self._offloaded:
            # Here a gradient on the host is the very tensor that was added up over the copies; there it is a copy of
            # it, and FSDP2 keeps the tensor itself up to the end of the last backward pass that reduces.
            added_up = {id(storage): storage for storage in _added_up_storages(self._model)}
            found[REDUCED] += sum(added_up[i].nbytes() for i in added_up.keys() & gradients)
        return found

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
"""What functions make tensors for: FSDP2's, and that of `compiled`."""


def _kind_by_function() -> str | None:
    """The kind of what these functions make; None for what the model makes."""
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


def _added_up_storages(model: nn.Module | None) -> Iterator[Any]:
    """What was summed over the copies (HSDP) and is not let go yet."""
    for module in fsdp_modules(model) if model is not None else ():
        for group in _parameter_groups(module):
            if group._all_reduce_state is not None:
                yield group._all_reduce_state.all_reduce_input.untyped_storage()


def _parameter_groups(module: FSDPModule) -> Sequence[Any]:
    """What one module gathers and reduces at once: one group until torch 2.12, a list of them since."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor))
