"""FlexAttention's kernel options: what the table may hold, and who gets what."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

from dpo.batch.block_mask import BLOCK, Span, key_runs
from dpo.model.attention import block_attention
from dpo.model.flex_options import ALWAYS, TABLE, Row, flex_options
from tests.model.test_attention import CPU, host_mask

SAFE = {"ROWS_GUARANTEED_SAFE": True}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sm_{row.capability[0]}{row.capability[1]}-{row.widths.start}")
def test_tiles_divide_the_mask_s_blocks(row: Row) -> None:
    """torch refuses others; warps are a power of two, and a thread may have 255 of the 65,536 registers of a block."""
    for name, value in row.options.items():
        kind = name.partition("_")[2]
        assert kind in FlexKernelOptions.__annotations__
        if kind.startswith("BLOCK"):
            assert BLOCK % value == 0
        if kind == "num_warps":
            assert value in (4, 8) and 255 * 32 * value <= 65536


def test_rows_of_one_architecture_do_not_meet() -> None:
    for capability in {row.capability for row in TABLE}:
        widths = [width for row in TABLE if row.capability == capability for width in row.widths]
        assert len(widths) == len(set(widths))


@pytest.mark.parametrize(
    ("width", "itemsize", "capability", "wanted"),
    [
        (64, 2, (9, 0), {"fwd_num_warps": 8}),
        (63, 2, (9, 0), {}),
        (128, 2, (9, 0), {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 8}),
        (256, 2, (9, 0), {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}),
        (257, 2, (9, 0), {}),
        (128, 4, (9, 0), {}),
        (128, 2, (8, 9), {}),
        (128, 2, (12, 0), {}),
    ],
)
def test_who_gets_what(width: int, itemsize: int, capability: tuple[int, int], wanted: dict[str, int]) -> None:
    """Architectures with less shared memory, and float32, whose tiles are others, get torch's own."""
    found = flex_options(width, itemsize, capability)
    assert found.items() >= (SAFE | wanted).items()
    assert bool(wanted) == (found != SAFE)


def test_a_name_that_torch_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.model.flex_options._KNOWN", frozenset({"num_warps"}))
    assert flex_options(64, 2, (9, 0)) == {"fwd_num_warps": 8}
    assert flex_options(128, 2, (9, 0)) == {"bwd_num_warps": 8}


@pytest.mark.parametrize("window", [None, 1, 40])
def test_no_query_is_without_a_key(window: int | None) -> None:
    """What ROWS_GUARANTEED_SAFE promises: each query's own run of keys ends with itself, also in padding."""
    assert ALWAYS == SAFE
    rng = np.random.default_rng(0)
    spans, place = [], 0
    for _ in range(20):
        span = Span(place, int(rng.integers(1, 90)), tuple(rng.integers(1, 50, rng.integers(0, 4)).tolist()))
        spans.append(span)
        place += span.num_tokens
    own_from = key_runs(spans, window)[2]
    assert (own_from <= np.arange(place)).all()


def test_nothing_is_asked_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def attend(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        asked.append(options["kernel_options"])
        return query

    monkeypatch.setattr("dpo.model.attention._compiled_flex_attention", lambda: attend)
    rows = torch.zeros(1, 2, 256, 64)
    block_attention(rows, rows, rows, host_mask([Span(0, 256, ())], None, pin=False).to(CPU), None)
    assert asked == [None]
