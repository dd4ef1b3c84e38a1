"""How many bytes of tensors live at once while something runs."""

import gc
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, ref


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that storages made inside lived at once, after any operation; `made`: of all that were
    made. What was there before is not counted; neither are tensors of the shapes `apart`.

    Storages, so that views cost nothing; asked for their size after every operation, so that those which FSDP empties
    and fills again are counted as they are. What a kernel takes and gives back inside of one operation is not seen:
    see `allocated_peak`. The garbage collector does not run inside, since what a collection leaves for the next one
    depends on what ran before.
    """

    def __init__(self, apart: Collection[torch.Size] = ()) -> None:
        super().__init__()
        self.peak = self.made = 0
        self._apart = {tuple(shape) for shape in apart}
        self._living = WeakIdKeyDictionary(ref_type=ref)

    def __enter__(self) -> "LiveBytes":
        self._collects = gc.isenabled()
        gc.disable()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._collects:
            gc.enable()

    @property
    def now(self) -> int:
        """Bytes of what was made inside and lives now."""
        return sum(storage.nbytes() for storage in self._living)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again, for the local tensors
        kwargs = kwargs or {}
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in known and tuple(tensor.shape) not in self._apart:
                self.made += 0 if storage in self._living else storage.nbytes()
                self._living[storage] = None
        self.peak = max(self.peak, self.now)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor))


def allocated_peak(function: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once while `function` ran, above those before it:
    temporaries inside of an operation too.
    """
    return allocated(function)[0]


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """`allocated_peak`, and the bytes that were not given back when `function` had ended.

    What a thread of gloo gives back after its collective, the profiler does not see: it counts as held from then on.
    Whether the main thread or that one gives the copy back is chance, so a peak is true only where all was given back.
    Garbage of earlier measurements is freed before: freed meanwhile, it would be counted against what `function` takes.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
        del result
        gc.collect()
    kineto = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak, now
