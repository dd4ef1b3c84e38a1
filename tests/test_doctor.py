"""`python -m dpo.doctor`: alone, on two ranks, and with each part made to fail on one of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dpo.attention import segment_attention
from dpo.config import ParallelConfig
from dpo.distributed import World, open_world
from dpo.doctor import attention, machine, program, speed, storage
from dpo.doctor.parts import Failure, Finding, Part, Subject, examine
from dpo.doctor.words import COLUMNS, lines_of
from dpo.estimate.devices import DEVICES, GIB
from tests.models import save_model, save_pairs
from tests.ranks import Ranks
from tests.runs import exit_code_of
from tests.test_toolchain import facts

QUICK = "torch.compile of FlexAttention takes a CPU ten seconds; one test does it"


def _not_compiled(*rows: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(QUICK)


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "block_rows", _not_compiled)


@pytest.fixture
def world() -> Iterator[World]:
    """A group of one."""
    with open_world(60) as world:
        yield world


def subject(folder: Path, **changes: Any) -> Subject:
    """The defaults, with the run folder in `folder`."""
    return replace(Subject(ParallelConfig(), "float32", folder / "run", ()), **changes)


def doctor(tmp_path: Path, *words: str) -> int:
    """The exit code of the program in this process, on a config whose run folder is in `tmp_path`."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 2)
    given = {"model.path": tmp_path / "model", "data.train": f"[{{path: {tmp_path / 'pairs.jsonl'}}}]"}
    keys = [f"--{key}={value}" for key, value in (given | {"train.run_dir": tmp_path / "run"}).items()]
    return exit_code_of(program.main, "dpo.doctor", *keys, *words)


# --- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_uncompiled")
def test_alone_it_fits_on_a_screen_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= COLUMNS
    assert lines[0] == "1 rank on 1 node, gloo" and lines[-1] == "a run works here"
    for name in ("devices", "versions", "toolchain", "products", "all-gather", "run folder", "attention"):
        assert any(line.startswith(name) for line in lines), name
    assert not list(tmp_path.glob("**/*.doctor")) and not (tmp_path / "run").exists()


@pytest.mark.timeout(200)
def test_under_torchrun_two_ranks_measure_their_axis(tmp_path: Path) -> None:
    """Real processes, and FlexAttention compiled where there is a compiler."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(program.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "dpo.doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 ranks on 1 node, gloo") and "shard, 2 ranks within a node" in done.stdout
    assert "(n-1)/n x 16 MiB" in " ".join(done.stdout.split()) and done.stdout.count("a run works here") == 1


# --- each part made to fail ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"compiler": None}, "apt-get install gcc, or module load gcc"),
        ({"has_python_h": False}, "-dev (Debian: python3-dev)"),
        ({"gpu": None, "cuda_error": "driver on your system is too old"}, "driver 580.65 or newer"),
    ],
)
def test_what_the_toolchain_lacks_ends_with_1_and_what_helps(
    changes: dict[str, Any],
    helps: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "gather_facts", lambda device: facts(**changes))
    assert doctor(tmp_path) == 1
    out, err = capsys.readouterr()
    assert helps in " ".join(out.split()) and "FAIL" in out
    assert err.splitlines()[-1] == "error: a run would fail here: toolchain"


def test_no_compiler_in_path_fails_where_layers_are_compiled(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "block_rows", _not_compiled)
    part, compiled = attention.ATTENTION, ParallelConfig(compile=True)
    found = examine(part, subject(tmp_path, parallel=compiled), world)
    assert "apt-get install g++, or module load gcc" in found.problems[0]
    assert not examine(part, subject(tmp_path), world).problems


@pytest.mark.usefixtures("_uncompiled")
def test_a_wrong_attention_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part in a thousand, fifty times what float32 rounds."""

    def wrong(*args: Any) -> torch.Tensor:
        return segment_attention(*args) * 1.001

    monkeypatch.setattr(attention, "segment_attention", wrong)
    assert doctor(tmp_path) == 1
    assert "1.0e-03 from plain attention" in " ".join(capsys.readouterr().out.split())


def test_a_gradient_that_is_not_a_number_is_found() -> None:
    """Of the values alone: the output is right, its gradient is 0 * inf."""
    rows = attention.make_rows(64, torch.float32, torch.device("cpu"))

    def broken(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention.segment_rows(query, key, value + 0 * torch.sqrt(value * 0))

    assert attention.compare(broken, rows)[0] == float("inf")


def test_an_answer_that_sees_its_neighbour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal attention over each whole tree, which `plain_attention` must not be."""
    rows = attention.make_rows(64, torch.float32, torch.device("cpu"))
    assert attention.compare(attention.segment_rows, rows)[0] < attention.BOUNDS["float32"]
    one = [replace(span, completion_lens=(sum(span.completion_lens),)) for span in attention.SPANS]

    def leaking(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layout = attention.make_layout(one, [None], attention.NUM_TOKENS, torch.device("cpu"))
        return segment_attention(query, key, value, layout, None, None)

    assert attention.compare(leaking, rows)[0] > 0.01


def test_a_folder_that_is_a_file(tmp_path: Path, world: World) -> None:
    (tmp_path / "run").touch()
    found = examine(storage.STORAGE, subject(tmp_path), world)
    assert "is a file" in found.problems[0] and "train.run_dir" in found.problems[0]


@pytest.mark.parametrize("error", ["No space left on device", "Read-only file system"])
def test_a_folder_that_takes_nothing(error: str, tmp_path: Path, world: World) -> None:
    with patch("os.fsync", side_effect=OSError(28, error)):
        found = examine(storage.STORAGE, subject(tmp_path), world)
    assert error in found.problems[0] and "room for checkpoint.keep + 1" in found.problems[0]
    assert not list(tmp_path.iterdir())


# --- on one rank alone: the others are not held up -------------------------------------------------------------------


def broken_on_rank_1(name: str, folder: str) -> tuple[Finding, int]:
    """A part whose own work fails on rank 1, then a collective that all must still come to."""
    parts = {
        "products": (speed.PRODUCTS, "dpo.doctor.speed.measured_peak"),
        "all-gather": (speed.LINKS, "dpo.doctor.speed.make_buffers"),
        "run folder": (storage.STORAGE, "dpo.doctor.storage.write_file"),
        "attention": (attention.ATTENTION, "dpo.doctor.attention.make_rows"),
        "devices": (machine.DEVICES, "dpo.doctor.machine.host_memory"),
        "toolchain": (machine.TOOLCHAIN, "dpo.doctor.machine.gather_facts"),
    }
    part, target = parts[name]
    with open_world(60) as world:
        fails = {"side_effect": MemoryError("this rank alone")} if world.rank == 1 else {"wraps": _named(target)}
        with patch(target, **fails), patch("dpo.doctor.attention.block_rows", _not_compiled):
            found = examine(part, subject(Path(folder)), world)
        total = torch.ones(1)
        dist.all_reduce(total)
        return found, int(total)


def _named(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(sys.modules[module], name)


@pytest.mark.parametrize("name", ["products", "all-gather", "run folder", "attention", "devices", "toolchain"])
def test_what_fails_on_one_rank_is_told_by_all(name: str, ranks: Ranks, tmp_path: Path) -> None:
    for found, total in ranks(2, broken_on_rank_1, name, str(tmp_path)):
        assert total == 2
        assert "this rank alone" in found.problems[0] and "what helps: " in found.problems[0]
    assert not list(tmp_path.iterdir())


def gather_over_two_axes() -> Finding:
    """2 copies over 2 ranks each."""
    with open_world(60) as world:
        return examine(speed.LINKS, subject(Path(), parallel=ParallelConfig(replicate=2)), world)


def test_every_axis_of_the_mesh_has_its_line(ranks: Ranks) -> None:
    found = ranks(4, gather_over_two_axes)
    assert all(one == found[0] for one in found) and not found[0].problems
    assert [line.split(",")[0] for line in found[0].lines] == ["replicate", "shard"]


# --- what is made of numbers -----------------------------------------------------------------------------------------


def test_the_rate_of_an_all_gather() -> None:
    """8 ranks, 256 MiB in 1 ms: a rank receives 7/8 of it, 234.9 GB/s."""
    assert speed.Axis("shard", 8, False, 256 * 2**20, 1e-3).rate == pytest.approx(7 / 8 * 268_435_456 / 1e-3)


def test_the_link_between_nodes_is_that_of_all_cards_that_the_axis_has_on_a_node() -> None:
    links = speed.Links((), DEVICES["h100"], 8)
    assert speed.link_of(speed.Axis("shard", 8, False, 1, 1.0), links) == 0.8 * 450e9
    assert speed.link_of(speed.Axis("shard", 16, True, 1, 1.0), links) == 0.8 * 400e9  # 8 cards of 50
    assert speed.link_of(speed.Axis("replicate", 2, True, 1, 1.0), links) == 0.8 * 50e9


def test_slow_is_said_with_what_helps(tmp_path: Path) -> None:
    axis = speed.Axis("shard", 16, True, 256 * 2**20, 0.1)
    found = speed.describe_links(subject(tmp_path), [speed.Links((axis,), DEVICES["h100"], 8)])
    assert "NCCL_DEBUG=INFO must name IB" in found.advice[0] and not found.problems
    slow, fast = speed.Products("bfloat16", 300e12, 989e12), speed.Products("bfloat16", 700e12, 989e12)
    found = speed.describe_products(subject(tmp_path), [fast, slow])
    assert "30% of the data sheet's 989 TFLOP/s" in found.lines[0]
    assert len(found.advice) == 2 and "rank 1 is the slowest" in found.advice[1]


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 3090", 24, None),
    ],
)
def test_the_device_of_a_name(name: str, memory: float, key: str | None) -> None:
    assert speed.named_device(name, memory * GIB) == (DEVICES[key] if key else None)


def test_a_gpu_in_use_and_different_versions_are_told(tmp_path: Path) -> None:
    here = machine.Devices("n1", "NVIDIA H100 (capability 9.0)", 20 * GIB, 80 * GIB, None)
    found = machine.describe_devices(subject(tmp_path), [here, replace(here, free=79 * GIB)])
    assert found.lines == ("2 x NVIDIA H100 (capability 9.0); 20.0 of 80.0 GiB free",)
    assert "60.0 GiB of rank 0's GPU are in use" in found.advice[0]
    versions = [{"torch": "2.13.0", "host": "n1"}, {"torch": "2.11.0", "host": "n2"}]
    found = machine.describe_versions(subject(tmp_path), versions)
    assert found.problems == ("torch is 2.11.0 on n2 and 2.13.0 on n1; what helps: the same environment on every node",)


def test_any_exception_of_a_part_is_told(tmp_path: Path, world: World) -> None:
    def measure(subject: Subject, world: World) -> None:
        raise ZeroDivisionError("\n  why\n  and a long story")

    part = Part("part", measure, lambda subject, found: Finding("part"), remedy="patience")
    assert examine(part, subject(tmp_path), world).problems == (
        "every rank: ZeroDivisionError: why; what helps: patience",
    )
    assert isinstance(attention.attempt(lambda: 1 / 0), Failure)
    lines = lines_of([Finding("part", ("x " * 90,), ("y " * 90,))], world, 1)
    assert max(map(len, lines)) <= COLUMNS and lines[-1] == "a run would fail here: part"


def test_a_layout_that_does_not_fit_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, "--parallel.shard", "3") == 2
    assert "parallel.shard: replicate 1 x shard 3" in capsys.readouterr().err
