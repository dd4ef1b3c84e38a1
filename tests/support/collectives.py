"""What a program sends, counted as it is sent."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


class CollectiveBytes(TorchDispatchMode):
    """Adds up, by kind, the bytes of the whole tensor of every collective that runs under it: of what is gathered, of
    what is scattered, of what is reduced everywhere. Any other collective is counted under its own name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = tree_leaves(args[0])  # of objects that are gathered, a list of lists
            whole = [args[1]] if name == "_reduce_scatter_base_" else tensors
            self.bytes[KINDS.get(name, name)] += sum(tensor.nbytes for tensor in whole)
            self.calls[KINDS.get(name, name)] += 1
        return func(*args, **kwargs or {})
