"""`python -m dpo.doctor`: alone, on two ranks, and with each part made to fail on one of them."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from dpo.base import space
from dpo.config import ParallelConfig
from dpo.disk.sizes import Sizes
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.doctor import attention, host, model, program, speed, storage
from dpo.doctor.model import Memory, describe_memory, free_memory
from dpo.doctor.parts import Failure, Finding, Part, Subject, examine, measured
from dpo.doctor.words import COLUMNS, NAME, lines_of, verdict
from dpo.estimate import program as estimate
from dpo.estimate.devices import DEVICES, GIB
from dpo.model.attention import segment_attention
from dpo.model.kernels import VARIABLES
from tests.machine.test_toolchain import facts
from tests.support.models import family_config, save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import changed, exit_code_of, make_config


def _not_compiled(*rows: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no compiler")


@pytest.fixture
def world() -> Iterator[World]:
    """A group of one."""
    with open_world(60) as world:
        yield world


def subject(folder: Path, **changes: Any) -> Subject:
    """The defaults, with the run folder in `folder`."""
    return replace(Subject(ParallelConfig(), "float32", folder / "run", folder / "cache"), **changes)


def doctor(tmp_path: Path, *words: str) -> int:
    """The exit code of the program in this process, on a config whose run folder is in `tmp_path`."""
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 2)
    given = {"model.path": tmp_path / "model", "data.train": f"[{{path: {tmp_path / 'pairs.jsonl'}}}]"}
    keys = [f"--{key}={value}" for key, value in (given | {"train.run_dir": tmp_path / "run"}).items()]
    with patch.dict(os.environ):  # it says where kernels are kept
        return exit_code_of(program.main, "dpo.doctor", *keys, *words)


# --- whole -----------------------------------------------------------------------------------------------------------


def test_alone_it_fits_on_a_screen_told_part_by_part_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found is told at once, and what takes long before."""
    seen: list[tuple[str, str]] = []

    def watched(part: Part, *args: Any) -> list[Any]:
        seen.append(capsys.readouterr())
        return measured(part, *args)

    monkeypatch.setattr(program, "measured", watched)
    assert doctor(tmp_path) == 0
    seen.append(capsys.readouterr())
    lines = "".join(out for out, _ in seen).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= COLUMNS
    assert lines[0] == "1 rank on 1 node, gloo" and lines[-1] == "a run works here"
    parts = (*program.BEFORE_DEVICES, *program.ON_DEVICES)
    told = ["".join(both) for both in seen]
    assert len(told) == len(parts) + 1
    for part, before, after in zip(parts, told, told[1:], strict=False):
        assert after.startswith(part.name), after
        assert "compiling" not in before  # nothing that a run on a CPU needs
    assert not list(tmp_path.glob("**/*.doctor")) and not (tmp_path / "run").exists()


@pytest.mark.timeout(200)
def test_under_torchrun_two_ranks_measure_their_axis(tmp_path: Path) -> None:
    """Real processes, and FlexAttention compiled, as a run with compiled layers needs it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(program.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for variable in VARIABLES:  # of another test's run in this process
        environment.pop(variable, None)
    save_model(tmp_path / "model", "llama")
    keys = ["--model.path=model", "--data.train=[{path: pairs.jsonl}]", "--parallel.compile=true"]
    done = subprocess.run(
        [*torchrun, "-m", "dpo.doctor", *keys],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = tmp_path / "reference-cache" / "kernels" / "inductor"
    assert list(kept.glob("**/*.so"))  # the next one need not compile
    assert done.stdout.startswith("2 ranks on 1 node, gloo") and "shard, 2 ranks within a node" in done.stdout
    assert "(n-1)/n x 16 MiB" in " ".join(done.stdout.split()) and done.stdout.count("a run works here") == 1


# --- each part made to fail ------------------------------------------------------------------------------------------


def test_what_is_lacking_ends_with_1_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No compiler, and a full disk."""
    monkeypatch.setattr(host, "gather_facts", lambda device: facts(compiler=None))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
    assert doctor(tmp_path) == 1
    out, err = capsys.readouterr()
    told = " ".join(out.split())
    assert "apt-get install gcc, or module load gcc" in told and "FAIL" in out
    assert "what helps: a train.run_dir with more room, a smaller checkpoint.keep" in told
    assert err.splitlines()[-1] == "error: a run would fail here: toolchain, run folder"


def test_gpus_without_a_toolchain_are_not_started(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """CUDA that does not start would end the program there, with a traceback."""
    toolchain = Finding("toolchain", problems=("CUDA does not start on cuda:3",))
    gpu, others = (
        replace(world, device=torch.device("cuda", 0)),
        [Finding("versions"), Finding("run folder", (), ("x",))],
    )
    assert not program.can_start_devices([*others, toolchain], gpu) and program.can_start_devices(others, gpu)
    assert program.can_start_devices([toolchain], world)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "the parts that need the GPUs were not tried" and "shows within 300 s" in told[1]


def test_no_compiler_in_path_fails_where_layers_are_compiled(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "block_rows", _not_compiled)
    part, compiled = attention.ATTENTION, ParallelConfig(compile=True)
    found = examine(part, subject(tmp_path, parallel=compiled), world)
    assert "apt-get install g++, or module load gcc" in found.problems[0]
    assert not examine(part, subject(tmp_path), world).problems


def test_a_wrong_attention_is_found(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a thousand, fifty times what float32 rounds."""

    def wrong(*args: Any) -> torch.Tensor:
        return segment_attention(*args) * 1.001

    monkeypatch.setattr(attention, "segment_attention", wrong)
    (problem,) = examine(attention.ATTENTION, subject(tmp_path), world).problems
    assert "1.0e-03 from plain attention" in problem


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


def test_a_cache_that_is_a_file(tmp_path: Path, world: World) -> None:
    (tmp_path / "cache").touch()
    (problem,) = examine(storage.CACHE, subject(tmp_path), world).problems
    assert "is a file" in problem and "a reference.cache_dir (or DPO_CACHE)" in problem
    assert examine(storage.CACHE, subject(tmp_path, cache_dir=None), world).lines == (
        "none: the loss has no reference",
    )


# --- the model of the config -----------------------------------------------------------------------------------------

SIZES = Sizes(num_parameters=10, state=120, checkpoint=80, final=40, keep=2, num_saves=None)
"""10 weights in float32 with RMSprop: 3 and 2 numbers each, 1 of it exported."""


def test_a_disk_that_is_too_small_for_the_checkpoints(tmp_path: Path) -> None:
    here = storage.Storage("/runs", 239, 1000, 0, 1.0, 1.0)
    (problem,) = storage.describe_storage(subject(tmp_path, sizes=SIZES), [replace(here, free=300), here]).problems
    assert "what helps: a train.run_dir with more room, a smaller checkpoint.keep" in problem
    assert not storage.describe_storage(subject(tmp_path, sizes=SIZES), [replace(here, free=240)]).problems
    assert not storage.describe_storage(subject(tmp_path, sizes=SIZES), [replace(here, num_checkpoints=1)]).problems
    assert not storage.describe_storage(subject(tmp_path), [here]).problems


def test_a_quota_that_is_too_small_for_the_checkpoints(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run needs 240 bytes, as above."""
    allowed = 240

    def reserve(folder: Path, num_bytes: int) -> None:
        if num_bytes > allowed:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(space, "_reserve", reserve)
    assert not examine(storage.STORAGE, subject(tmp_path, sizes=SIZES), world).problems
    allowed = 239
    (problem,) = examine(storage.STORAGE, subject(tmp_path, sizes=SIZES), world).problems
    assert "but a quota of the user, the group or the folder allows less; what helps: a train.run_dir" in problem


def test_memory_that_weights_gradients_and_optimizer_alone_exceed(tmp_path: Path) -> None:
    """120 GiB over 4 ranks are 30 each, in two copies 60."""
    llama = (family_config("llama"),)
    sizes, free = replace(SIZES, state=120 * GIB), Memory(50 * GIB, False)
    one = subject(tmp_path, sizes=sizes, models=llama)
    two = replace(one, parallel=ParallelConfig(replicate=2))
    assert not describe_memory(one, [free] * 4).problems
    assert "optimizer 30.0 GiB per rank; 50.0 GiB of GPU memory are free" in describe_memory(one, [free] * 4).lines[0]
    (problem,) = describe_memory(two, [free] * 4).problems
    assert "take 60.0 GiB per rank, 50.0 GiB of GPU memory are free" in problem
    assert "more ranks, parallel.replicate 1, a GPU that no other process uses" in problem
    (problem,) = describe_memory(one, [*[free] * 3, Memory(29 * GIB, True)]).problems
    assert problem.endswith("29.0 GiB of host memory are free; what helps: more ranks")


def test_the_state_lies_on_the_host_where_it_is_offloaded(world: World, tmp_path: Path) -> None:
    gpu = replace(world, device=torch.device("cuda", 0), local_size=4)
    with patch("dpo.doctor.model.host_memory", lambda: (100.0, 200.0)):
        assert free_memory(subject(tmp_path, parallel=ParallelConfig(cpu_offload=True)), gpu) == Memory(25.0, True)
        assert free_memory(subject(tmp_path), world) == Memory(100.0, True)
        with patch("torch.cuda.mem_get_info", lambda device: (7, 9)), patch("torch.cuda.memory_reserved", lambda d: 2):
            assert free_memory(subject(tmp_path), gpu) == Memory(9, False)


def test_a_step_of_the_longest_pairs_is_estimated_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts of 24 and completions of 40 tokens: what `dpo.estimate` says of them, in as much memory as is free."""
    monkeypatch.setattr(model, "host_memory", lambda: (0.5 * GIB, GIB))  # the rehearsal decides, and nothing fits
    words = ["--data.max_length", "64", "--data.max_prompt_length", "24", "--parallel.activation_checkpointing", "full"]
    words += ["--parallel.sync_gradients", "every_micro_batch"]
    assert doctor(tmp_path, *words) == 0
    told = " ".join(capsys.readouterr().out.split())
    (needs,) = re.findall(
        r"note: pairs of data.max_length tokens: does not fit: a step needs ([\d.]+) of 0.50 GiB by the", told
    )
    model_words = ["--model.path", str(tmp_path / "model"), "--data.train", "[{path: not-here.jsonl}]"]
    assert exit_code_of(estimate.main, "dpo.estimate", *model_words, *words, "--ranks", "1", "--device", "cpu") == 0
    assert f"fits: {needs} of " in capsys.readouterr().out


def test_pairs_without_a_bound_are_left_to_the_estimate(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo.doctor", "--config", "c.yaml"])
    config = make_config("m", "d", tmp_path / "run", data__max_length=None, data__max_prompt_length=None)
    mine = subject(tmp_path, config=config, sizes=SIZES, models=(family_config("llama"),))
    told = " ".join(examine(model.MODEL, mine, world).lines)
    assert (
        "the memory of a step is not known (data.max_length is null); for" in told
        and "for the lengths of the data: python -m dpo.estimate" in told
    )


def test_another_reference_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, f"--reference.path={tmp_path / 'other'}") == 2
    assert f"reference.path: no such folder: {tmp_path / 'other'}" in capsys.readouterr().err
    save_model(tmp_path / "other", "qwen3")
    config = make_config(tmp_path / "model", "d", "r", reference__path=str(tmp_path / "other"))
    assert [found.model_type for found in program.find_model_configs(config)] == ["llama", "qwen3"]
    alone = changed(config, loss__name="sft")
    assert [found.model_type for found in program.find_model_configs(alone)] == ["llama"]


# --- on one rank alone: the others are not held up -------------------------------------------------------------------


def broken_on_rank_1(name: str, folder: str) -> tuple[Finding, int]:
    """A part whose own work fails on rank 1, then a collective that all must still come to."""
    parts = {
        "products": (speed.PRODUCTS, "dpo.doctor.speed.measured_peak"),
        "all-gather": (speed.LINKS, "dpo.doctor.speed.make_buffers"),
        "run folder": (storage.STORAGE, "dpo.doctor.storage.timed_write"),
        "cache": (storage.CACHE, "dpo.doctor.storage.timed_write"),
        "model": (model.MODEL, "dpo.doctor.model.host_memory"),
        "attention": (attention.ATTENTION, "dpo.doctor.attention.make_rows"),
        "devices": (host.DEVICES, "dpo.doctor.host.host_memory"),
        "toolchain": (host.TOOLCHAIN, "dpo.doctor.host.gather_facts"),
    }
    part, target = parts[name]
    with open_world(60) as world:
        fails = {"side_effect": MemoryError("this rank alone")} if world.rank == 1 else {"wraps": _named(target)}
        with patch(target, **fails):
            found = examine(part, subject(Path(folder)), world)
        total = torch.ones(1)
        dist.all_reduce(total)
        return found, int(total)


def _named(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(sys.modules[module], name)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "name", ["products", "all-gather", "run folder", "cache", "model", "attention", "devices", "toolchain"]
)
def test_what_fails_on_one_rank_is_told_by_all(name: str, ranks: Ranks, tmp_path: Path) -> None:
    for found, total in ranks(2, broken_on_rank_1, name, str(tmp_path)):
        assert total == 2
        assert "this rank alone" in found.problems[0] and "what helps: " in found.problems[0]
    assert not list(tmp_path.iterdir())


def folders_of_their_own(root: str) -> tuple[Finding, Finding]:
    """Rank r writes in folder r, as on nodes whose disks have the same name."""
    with open_world(60) as world:
        mine = Path(root, str(world.rank))
        mine.mkdir()
        with chdir(mine), patch("dpo.doctor.storage.existing", lambda folder: Path()):
            return examine(storage.STORAGE, subject(Path()), world), examine(storage.CACHE, subject(Path()), world)


@pytest.mark.xdist_group("ranks")
def test_folders_that_the_ranks_do_not_share(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(2, folders_of_their_own, str(tmp_path)):
        for finding, key in zip(found, ("train.run_dir", "reference.cache_dir"), strict=True):
            assert "is not shared: not every rank sees a file that rank" in finding.problems[0]
            assert key in finding.problems[0]
    assert not list(tmp_path.glob("*/*"))


def gather_over_two_axes() -> Finding:
    """2 copies over 2 ranks each."""
    with open_world(60) as world:
        return examine(speed.LINKS, subject(Path(), parallel=ParallelConfig(replicate=2)), world)


@pytest.mark.xdist_group("ranks")
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
    here = host.Devices("n1", "NVIDIA H100 (capability 9.0)", 20 * GIB, 80 * GIB, None)
    found = host.describe_devices(subject(tmp_path), [here, replace(here, free=79 * GIB)])
    assert found.lines == ("2 x NVIDIA H100 (capability 9.0); 20.0 of 80.0 GiB free",)
    assert "60.0 GiB of rank 0's GPU are in use" in found.advice[0]
    versions = [{"torch": "2.13.0", "host": "n1"}, {"torch": "2.11.0", "host": "n2"}]
    found = host.describe_versions(subject(tmp_path), versions)
    assert found.problems == ("torch is 2.11.0 on n2 and 2.13.0 on n1; what helps: the same environment on every node",)


def test_any_exception_of_a_part_is_told(tmp_path: Path, world: World) -> None:
    def measure(subject: Subject, world: World) -> None:
        raise ZeroDivisionError("\n  why\n  and a long story")

    part = Part("part", measure, lambda subject, found: Finding("part"), remedy="patience")
    assert examine(part, subject(tmp_path), world).problems == (
        "every rank: ZeroDivisionError: why; what helps: patience",
    )
    assert isinstance(attention.attempt(lambda: 1 / 0), Failure)
    finding = Finding("part", ("x " * 90,), ("y --a-long-flag " * 20,))
    lines = lines_of(finding)
    assert max(map(len, lines)) <= COLUMNS and not any(line.endswith("-") for line in lines)
    assert verdict([finding]) == "a run would fail here: part"


def test_a_layout_that_does_not_fit_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, "--parallel.shard", "3") == 2
    assert "parallel.shard: replicate 1 x shard 3" in capsys.readouterr().err


def test_commands_break_at_spaces_alone() -> None:
    """A flag that was cut at one of its hyphens could not be copied."""
    lines = lines_of(Finding("model", ("x" * (COLUMNS - NAME - 12) + " --tokens-per-micro-batch",)))
    assert lines[1].split() == ["--tokens-per-micro-batch"]
