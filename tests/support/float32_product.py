"""The head's float32 product of narrow factors, which torch has on CUDA alone, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

BLOCK = 4096


@torch.library.custom_op("dpo_tests::float32_product", mutates_args=("total",))
def _product(left: Tensor, right: Tensor, total: Tensor, keep: bool) -> None:
    """One operation, so that what counts tensors does not see its wide copies of the factors; and by blocks of the
    result, so that the allocator sees small ones.
    """
    for first in range(0, total.shape[0], BLOCK):
        for start in range(0, total.shape[1], BLOCK):
            rows, columns = slice(first, first + BLOCK), slice(start, start + BLOCK)
            part = total[rows, columns]
            part.copy_(torch.addmm(part, left[rows].float(), right[:, columns].float(), beta=int(keep)))


@contextmanager
def float32_products() -> Iterator[None]:
    """Heads narrower than float32 get their logits as on CUDA inside."""
    with (
        patch("dpo.model.log_probs.has_float32_product", lambda device_type, dtype: dtype.itemsize < 4),
        patch("dpo.model.log_probs._float32_product", _product),
    ):
        yield
