"""A frozen base of four bits on 1 to 4 real processes: bytes, gradients against peft, whole runs, resumed runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo.adapters.nf4 import VALUES, num_bytes, quantize
from dpo.adapters.nf4_linear import own_bytes
from dpo.adapters.quantized import quantized_layers
from dpo.adapters.spec import AdapterSpec
from dpo.config import Config, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.export.program import main as export_main
from dpo.model.build import build_policy, load_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.reference.program import fill_alone
from dpo.train.program import run_training
from tests.faults.worlds import SECONDS, dies_in_step_4, start_world
from tests.layouts.test_lora import FIGURES, LAYOUTS, assert_step, plain_step, steps
from tests.support.models import FAMILIES, plain_logp, plain_model, save_model, save_pairs
from tests.support.nf4 import dequantized_base
from tests.support.peft_models import plain_peft, save_adapter, spec_of
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    exit_code_of,
    make_config,
    reference_line,
    run,
    run_until,
    save_six_steps,
    six_steps,
    train_lines,
    without_clock,
    worst_relative,
)

pytestmark = pytest.mark.xdist_group("ranks")


# --- bytes -----------------------------------------------------------------------------------------------------------


def loaded(folder: Path, spec: AdapterSpec, keys: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """The bytes of the quantized weights, whole, and those that this rank holds."""
    parallel = ParallelConfig(**keys)
    with open_world(60) as world:
        mesh = make_mesh(world, parallel)
        policy = build_policy(read_model_config(folder, False), parallel, "float32", mesh, adapters=spec)
        load_weights(policy, folder)
        layers: Mapping[str, Any] = quantized_layers(policy.model)
        held = sum(own_bytes(layer).numel() for layer in layers.values())
        whole = {name: layer.packed.full_tensor().view(torch.uint8) for name, layer in layers.items()}
        return {name: packed.numpy() for name, packed in whole.items()}, held


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_are_those_of_the_whole_tensor(ranks: Ranks, family: str, tmp_path: Path) -> None:
    """On every layout, to the last bit; GPT-2's rows are inputs. A rank holds ceil(rows / ranks) rows at most, of 36
    bytes for each 64 weights begun; the first rank as many.
    """
    base = save_model(tmp_path, family)
    spec, stored = spec_of(None, quantize="nf4"), load_file(base / "model.safetensors")
    for size, keys in LAYOUTS:
        results = ranks(size, loaded, base, spec, keys)
        shards = keys.get("shard", size)
        for found, held in results:
            assert len(found) == (14 if family == "llama" else 8)
            for name, packed in found.items():
                weight = stored[name]
                whole = torch.empty(len(weight), num_bytes(weight.shape[1]), dtype=torch.uint8)
                quantize(weight, whole)
                assert packed.tobytes() == whole.numpy().tobytes(), (size, keys, name)
            shapes = [stored[name].shape for name in found]
            assert held <= sum(-(-rows // shards) * -(-columns // 64) * 36 for rows, columns in shapes)
        assert results[0][1] == sum(-(-rows // shards) * -(-columns // 64) * 36 for rows, columns in shapes)


# --- gradients -------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2, dora": ("gpt2", {"dora": True}),
    "gpt-neox": ("gpt-neox", {}),
}
"""The model's family, and the trainer's keys of the adapters."""


def prepare(root: Path, family: str, **keys: Any) -> tuple[Path, AdapterSpec, Any]:
    """A base, the spec of adapters with an effect in a folder, and the step of peft on the dequantized base."""
    base = save_model(root / "base", family)
    adapter = save_adapter(root / "adapter", base, **{f"use_{name}": value for name, value in keys.items()})
    other = dequantized_base(base, root / "other", VALUES.numpy())
    return base, spec_of(adapter, quantize="nf4", **keys), plain_step(other, adapter, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_pefts_on_every_layout(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """Over 1, 2, 3, 4 ranks and 2 x 2, in micro-batches of two sizes: 1e-5."""
    family, keys = KINDS[kind]
    base, spec, expected = prepare(tmp_path, family, **keys)
    for size, parallel in LAYOUTS:
        for of_rank in ranks(size, steps, base, spec, parallel, (60, 10_000), 12):
            for found in of_rank:
                assert_step(found, expected, 1e-5)


OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "parameters kept after forward": ({"reshard_after_forward": False}, 1e-5),
    "full checkpointing": ({"activation_checkpointing": "full"}, 1e-5),
    "selective checkpointing": ({"activation_checkpointing": "selective"}, 1e-5),
    "offloaded to the CPU": ({"cpu_offload": True}, 1e-5),
    "computed in bfloat16": ({"compute_dtype": "bfloat16"}, 0.05),  # as without adapters, see test_parallel.py
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_pefts_with_every_option(ranks: Ranks, name: str, tmp_path: Path) -> None:
    keys, tolerance = OPTIONS[name]
    base, spec, expected = prepare(tmp_path, "llama")
    for of_rank in ranks(2, steps, base, spec, keys, (60,), 12):
        assert_step(of_rank[0], expected, tolerance)


def test_the_gradient_is_pefts_where_layers_are_compiled(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks; one layer and one micro-batch, since each graph is compiled for seconds."""
    monkeypatch.setitem(FAMILIES["llama"], "num_hidden_layers", 1)
    base, spec, expected = prepare(tmp_path, "llama")
    for of_rank in ranks(2, steps, base, spec, {"compile": True}, (10_000,), 12):
        assert_step(of_rank[0], expected, 1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------

FACTS = {"train__steps": 4, "batch__pairs_per_step": 16, "optim__lr": 1e-3, "optim__warmup_steps": 0}
ADAPTERS = {"lora__rank": 3, "lora__quantize": "nf4"}


def start(ranks: Ranks, root: Path, size: int, **changes: Any) -> Path:
    """Trains on `size` ranks in a new run folder, with the cache that all runs in `root` share."""
    run_dir = root / f"run-{len(list(root.glob('run-*')))}"
    facts = FACTS | {"reference__cache_dir": str(root / "cache")} | changes
    ranks(size, run_training, make_config(root / "base", root / "pairs.jsonl", run_dir, **facts))
    return run_dir


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 12, 0, 3, 2)
    return tmp_path


def test_any_ranks_give_one_trajectory_from_the_quantized_reference(ranks: Ranks, root: Path) -> None:
    """Losses and norms to 1e-5. The first loss is ln 2, since the reference is quantized too."""
    one = train_lines(start(ranks, root, 1, **ADAPTERS))
    assert one[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(one[3]["train/loss"] - one[0]["train/loss"]) > 1e-3
    for size, keys in ((2, {}), (3, {}), (4, {"parallel__replicate": 2})):
        lines = train_lines(start(ranks, root, size, **ADAPTERS, **keys))
        assert len(lines) == 4 and worst_relative(one, lines, FIGURES) <= 1e-5, (size, keys)


def test_adapters_go_on_with_the_base_that_they_were_trained_on(
    ranks: Ranks, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What final/ says of its base counts where the config says nothing: the memory is estimated, though no adapter is
    in the upper layer, and the reference is the start, quantized too.
    """
    first = start(ranks, root, 1, lora__target_modules=r".*layers\.0\..*proj", **ADAPTERS)
    lines = train_lines(start(ranks, root, 1, lora__path=str(first / "final")))
    assert lines[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    told = train_lines(start(ranks, root, 1, lora__path=str(first / "final"), lora__quantize="nf4"))
    assert without_clock(lines) == without_clock(told)
    assert "the estimate failed" not in capfd.readouterr().err


def test_no_row_is_shared_with_the_base_that_is_not_quantized(ranks: Ranks, root: Path) -> None:
    """The first run of each kind computes all rows, also those of the other; the next ones of its kind none."""

    def rows(**keys: Any) -> int:
        return reference_line(start(ranks, root, 1, train__steps=1, **keys))[0]

    every = rows(**ADAPTERS)
    assert every > 0 and rows(lora__rank=3) == every
    assert rows(**ADAPTERS | {"lora__rank": 2}) == rows(lora__rank=2) == rows() == 0


def test_an_sft_adapter_against_the_quantized_base_loads_one_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With reference.adapter: base it reads the rows of a fresh run, and computes none by itself."""
    loaded = list[Path]()

    def count(config: Config, world: World, model_config: Any, folder: Path, adapters: Any) -> Policy:
        loaded.append(folder)
        return load_policy(config, world, model_config, folder, adapters)

    monkeypatch.setattr("dpo.model.warm_up.load_policy", count)
    facts = FACTS | {"train__steps": 1, "reference__cache_dir": str(root / "cache")}
    sft = {"lora__path": str(save_adapter(root / "adapter", root / "base")), "reference__adapter": "base"}
    first, second = (
        run(make_config(root / "base", root / "pairs.jsonl", root / f"run-{number}", **facts, **keys))
        for number, keys in enumerate((ADAPTERS, sft | {"lora__quantize": "nf4"}))
    )
    assert reference_line(first)[0] > 0 and reference_line(second)[0] == 0
    assert len(loaded) == 2
    assert abs(train_lines(second)[0]["train/loss"] - np.log(2)) > 1e-3


@pytest.mark.parametrize("effect", [False, True])
def test_the_rows_of_the_reference_program_are_those_of_a_run(ranks: Ranks, root: Path, effect: bool) -> None:
    """Of a start that is the quantized base, which the program loads without adapters, and of an SFT adapter."""
    keys: dict[str, Any] = dict(ADAPTERS)
    if effect:
        adapter = save_adapter(root / "adapter", root / "base")
        keys = {"lora__path": str(adapter), "lora__quantize": "nf4"}
    config = make_config(
        root / "base", root / "pairs.jsonl", root / "run", reference__cache_dir=str(root / "cache"), **FACTS, **keys
    )
    ranks(2, fill_alone, config)
    run_dir = start(ranks, root, 1, **keys)
    assert reference_line(run_dir)[0] == 0
    assert train_lines(run_dir)[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """One of two ranks is killed between two checkpoints; the base is quantized again."""
    root = save_six_steps(tmp_path)
    whole, parts = (six_steps(root, root / name, **ADAPTERS) for name in ("whole", "parts"))
    assert start_world(whole).wait() == [0, 0]
    world = start_world(parts, arrange=dies_in_step_4)
    world.ranks[1].join(SECONDS)
    world.end()
    assert len(train_lines(root / "parts")) == 3
    assert start_world(parts).wait() == [0, 0]
    one, two = (without_clock(train_lines(root / name)) for name in ("whole", "parts"))
    assert len(one) == 6 and one == two
    one, two = ((root / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two


def test_the_form_of_the_base_must_be_the_same_on_resume(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"train__steps": 2, "checkpoint__save_every": 1} | ADAPTERS
    config = make_config(root / "base", root / "pairs.jsonl", root / "run", **FACTS | changes)
    run_until(config, 2)
    capsys.readouterr()
    assert exit_code(changed(config, lora__quantize=None)) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith("error: CONFIG: lora.quantize: cannot resume from") and "'nf4' when" in line


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_is_the_function_that_was_trained(dora: bool, ranks: Ranks, root: Path) -> None:
    """The whole model of `dpo.export --merge` against peft with the adapters of `final/` on the dequantized base:
    summed log-probabilities in float32 to 1e-6, and a hundred times farther from the base that is not quantized.
    """
    run_dir, out = start(ranks, root, 2, **ADAPTERS, lora__dora=dora), root / "merged"
    assert exit_code_of(export_main, "dpo.export", "--checkpoint", str(run_dir), "--merge", "--out", str(out)) == 0
    other = dequantized_base(root / "base", root / "other", VALUES.numpy())
    adapter = run_dir / "final"
    models = [plain_model(out), *(plain_peft(base, adapter, torch.float32) for base in (other, root / "base"))]
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, 97, 12).tolist() for _ in range(8)]
    with torch.no_grad():
        merged, expected, stored = (torch.stack([plain_logp(m, i[:4], i[4:]) for i in ids]) for m in models)
    assert ((merged - expected) / expected).abs().max() <= 1e-6
    assert ((merged - stored) / stored).abs().max() >= 1e-4
