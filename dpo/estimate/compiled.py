"""What compiled layers keep and need, without a compiler and without a GPU.

What a layer keeps between forward and backward is decided by inductor's partitioner, on a graph of operations alone:
it is asked here as it is there. Of the two graphs that it gives, those elementwise results are left out that only other
elementwise operations or sums take: a fused kernel has them in registers. All other results are memory.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


@functools.cache
def compiled_backend() -> Callable[..., Any]:
    """A backend of torch.compile that divides a graph as inductor does, and makes no kernels of it.

    The same one each time, so that a layer traced for one rehearsal is not traced again for the next.
    """
    # Imported here: it takes seconds, for which every program would wait.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    return aot_autograd(
        fw_compiler=_graph_runner,
        bw_compiler=_graph_runner,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table,
    )


def _graph_runner(graph: GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """A function that runs the graph operation by operation; it takes its arguments as a list, which it empties."""
    kernels = _Kernels(graph)

    def run(arguments: list[Any]) -> Any:
        outputs = kernels.boxed_run(arguments)
        kernels.env.clear()  # it would hold them up to the next call
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]  # an attribute of a function
    return run


class _Kernels(Interpreter):
    """Runs a graph; what never leaves a kernel is made by `in_registers`, which `Timeline` looks for."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._unwritten, self.user_to_last_uses = in_kernels(list(graph.graph.nodes))

    def run_node(self, n: Node) -> Any:
        return in_registers(super().run_node, n) if n in self._unwritten else super().run_node(n)


def in_registers(work: Callable[[Node], Tensor], node: Node) -> Tensor:
    """Runs `work`. What is made while this function runs takes no memory."""
    return work(node)


def in_kernels(nodes: Sequence[Node]) -> tuple[set[Node], dict[Node, list[Node]]]:
    """The nodes whose results stay in a kernel, taken by fused operations alone; and by node what is needed there for
    the last time: what a kernel reads is in memory until it has written its results.
    """
    from torch._functorch.partitioners import get_default_op_list

    operations, places = get_default_op_list(), {node: place for place, node in enumerate(nodes)}
    fused = {node for node in nodes if operations.is_fusible(node) or node.target is torch.ops.aten.cat.default}
    views = {node for node in nodes if operations.is_view(node)}
    stay: set[Node] = set()
    ends: dict[Node, Node] = {}
    last_uses: dict[Node, list[Node]] = defaultdict(list)
    for node in reversed(nodes):
        if node in fused and all(user in (stay if user in views else fused) for user in node.users):
            stay.add(node)
        kernels = [ends[user] if user in stay or user in views else user for user in node.users]
        ends[node] = max(kernels, key=places.__getitem__, default=node)
        if node.users:
            last_uses[ends[node]].append(node)
    return stay, last_uses
