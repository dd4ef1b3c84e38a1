"""The tensors that compiled layers keep and need, found without a compiler and without a GPU.

Inductor's partitioner decides which tensors a layer keeps between its forward and its backward pass. It works on a
graph of operations alone, so the same partitioner is called here. In each of the two graphs that it returns, the result
of an elementwise operation takes no memory where only elementwise operations or sums read it: a fused kernel holds it
in registers. Every other result is counted as memory.
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
    """Returns a backend of torch.compile that partitions a graph as inductor does and generates no kernels.

    It returns the same backend each time, so that a layer that was traced for one rehearsal is not traced again for the
    next.
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
    """Returns a function that runs the graph operation by operation. It takes its arguments as a list and empties the
    list.
    """
    kernels = _Kernels(graph)

    def run(arguments: list[Any]) -> Any:
        outputs = kernels.boxed_run(arguments)
        kernels.env.clear()  # it would hold them up to the next call
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]  # an attribute of a function
    return run


class _Kernels(Interpreter):
    """Runs a graph. A result that never leaves a kernel is made inside `in_registers`, which `Timeline` looks for."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._unwritten, self.user_to_last_uses = in_kernels(list(graph.graph.nodes))

    def run_node(self, n: Node) -> Any:
        return in_registers(super().run_node, n) if n in self._unwritten else super().run_node(n)


def in_registers(work: Callable[[Node], Tensor], node: Node) -> Tensor:
    """Runs `work`. `Timeline` does not count the tensors that are made while this function runs."""
    return work(node)


def in_kernels(nodes: Sequence[Node]) -> tuple[set[Node], dict[Node, list[Node]]]:
    """Returns the nodes whose results stay in a kernel, and the last uses of all nodes.

    Returns:
        The nodes whose results only fused operations read; and by node, the nodes that are read there for the last
        time: a tensor that a kernel reads stays in memory until the kernel has written its results.
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
