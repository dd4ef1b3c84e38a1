"""What a start does that compiles a layer."""

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from dpo.model.kernels import compile_layers, keep_kernels


class Layer(nn.Module):
    """A norm, whose fusion with a reduction over the tokens guards their number on CUDA, and a product."""

    def __init__(self, window: int | None, size: int = 8):
        super().__init__()
        self.norm, self.product, self.sliding_window = nn.RMSNorm(size), nn.Linear(size, size), window

    def forward(self, rows: Tensor) -> Tensor:
        """(1, L, size) to the same shape."""
        return rows + self.product(self.norm(rows)) * (self.sliding_window or 1)


def run_lengths(layers: list[Layer], lengths: tuple[int, ...], with_gradients: bool) -> None:
    """Rows of these lengths, whose gradient is wanted as that of embeddings is."""
    for length in lengths:
        with torch.set_grad_enabled(with_gradients):
            rows = torch.randn(1, length, layers[0].norm.weight.shape[0], requires_grad=with_gradients)
            for layer in layers:
                rows = layer(rows)
        if with_gradients:
            rows.sum().backward()


def compile_once() -> dict[str, int]:
    """How many graphs were found compiled, and how many not: forward and backward, for any length.
    Without probes of the CPU's vectors and without a precompiled header, which take longer than the layer.
    """
    inductor.cpp_cache_precompile_headers = False
    inductor.cpp.vec_isa_ok = False
    inductor.compile_threads = 1
    keep_kernels()
    layer = Layer(None)
    compile_layers([layer])
    rows = torch.randn(1, 256, 8, requires_grad=True)
    torch._dynamo.mark_dynamic(rows, 1)
    layer(rows).sum().backward()
    return {name: counters["inductor"]["fxgraph_cache_" + name] for name in ("hit", "miss", "bypass")}
