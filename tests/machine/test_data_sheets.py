"""The one table of GPUs: found by the names that CUDA gives, taken by `dpo.estimate`, never one card for another."""

from pathlib import Path

import pytest

from dpo.estimate.devices import DEVICES, device_like
from dpo.estimate.program import read_arguments
from dpo.machine.data_sheets import GIB, SHEETS, find_sheet, nearest_sheet
from dpo.machine.peaks import device_peak
from dpo.watch.failures import estimate_name
from tests.support.models import save_model, save_pairs

NAMES = (
    ("NVIDIA GB300", 276, "gb300"),
    ("NVIDIA GB200", 184, "gb200"),
    ("NVIDIA B300 SXM6 AC", 267, "b300"),
    ("NVIDIA B200", 178, "b200"),
    ("NVIDIA GH200 480GB", 94.5, "gh200"),
    ("NVIDIA H200", 139.8, "h200"),
    ("NVIDIA H200 NVL", 139.8, "h200-nvl"),
    ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
    ("NVIDIA H100 NVL", 93.1, "h100-nvl"),
    ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
    ("NVIDIA H20", 95, "h20"),
    ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
    ("NVIDIA A100 80GB PCIe", 79.2, "a100-pcie"),
    ("NVIDIA A100-PCIE-40GB", 39.4, "a100-pcie-40gb"),
    ("NVIDIA A30", 23.5, "a30"),
    ("NVIDIA A40", 44.4, "a40"),
    ("NVIDIA A10", 22, "a10"),
    ("NVIDIA A10G", 22, "a10g"),
    ("NVIDIA RTX A6000", 47.4, "rtx-a6000"),
    ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA L40", 44.4, "l40"),
    ("NVIDIA L4", 22, "l4"),
    ("NVIDIA RTX 6000 Ada Generation", 47.4, "rtx-6000-ada"),
    ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95, "rtx-pro-6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95, "rtx-pro-6000"),
    ("NVIDIA GeForce RTX 5090", 31.4, "rtx-5090"),
    ("AMD Instinct MI300X", 191.5, "mi300x"),
)
"""(name that CUDA gives, GiB, key)."""


@pytest.mark.parametrize(("name", "memory", "key"), NAMES)
def test_each_name_of_cuda_finds_its_row(name: str, memory: float, key: str) -> None:
    """In the peaks, in the estimate and in the line that names it, alike."""
    sheet = find_sheet(name, memory * GIB)
    assert sheet is not None and sheet.key == key
    assert estimate_name(name, memory * GIB) == key
    assert device_like(name, memory * GIB, (0, 0)) == (DEVICES[key], True)
    for precision in ("bfloat16", "tf32", "float32"):
        assert device_peak(name, precision) == sheet.peak(precision) == device_peak(DEVICES[key].name, precision)


def test_every_row_has_a_name_that_finds_it() -> None:
    assert {key for *_, key in NAMES} == {sheet.key for sheet in SHEETS} == set(DEVICES)
    assert len({sheet.key for sheet in SHEETS}) == len(SHEETS)


def test_the_estimate_takes_every_row(tmp_path: Path) -> None:
    model, pairs = save_model(tmp_path / "m", "llama"), save_pairs(tmp_path / "p.jsonl", 2)
    words = ["--model.path", str(model), "--data.train", f"[{{path: {pairs}, format: tokens}}]", "--ranks", "8"]
    for sheet in SHEETS:
        assert read_arguments([*words, "--device", sheet.key]).cluster.device == DEVICES[sheet.key]


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.key)
def test_rows_are_of_one_kind(sheet) -> None:  # type: ignore[no-untyped-def]
    """Dense figures: twice as many FLOPs in bfloat16 as in TF32 (within rounding), and where they come from."""
    bfloat16, tf32, float32 = sheet.peaks
    assert bfloat16 == pytest.approx(2 * tf32, rel=0.02) and float32 < bfloat16
    link, node_link, host_link = sheet.links
    assert link >= node_link > 0 and host_link > 0
    assert sheet.source.startswith("https://")


@pytest.mark.parametrize(
    ("name", "capability", "memory", "like"),
    [
        ("NVIDIA L20", (8, 9), 44.5, "l40s"),
        ("NVIDIA A16", (8, 6), 14.6, "a10"),
        ("NVIDIA H800", (9, 0), 79.1, "h100"),
        ("NVIDIA GeForce RTX 5080", (12, 0), 15.5, "rtx-5090"),
        ("of the same generation", (10, 1), 178, "b200"),
        ("of a later one", (15, 0), 139, "h200"),
    ],
)
def test_an_unknown_gpu_is_like_one_of_its_capability(
    name: str, capability: tuple[int, int], memory: float, like: str
) -> None:
    """Not like one that happens to have its memory: an RTX 5080 is no L4, a B300 no MI300X."""
    assert find_sheet(name) is None and device_peak(name, "bfloat16") is None
    assert device_like(name, memory * GIB, capability) == (DEVICES[like], False)


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A2", "Tesla T4"])
def test_a_card_that_is_not_in_the_table_is_not_taken_for_another(name: str) -> None:
    assert find_sheet(name) is None


def test_the_nearest_has_the_capability_even_where_another_has_the_memory() -> None:
    assert nearest_sheet(24 * GIB, (9, 0)).capability == (9, 0)
