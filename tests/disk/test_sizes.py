"""The bytes that a run keeps on disk, against what a run writes."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.base.units import shown_bytes
from dpo.config import Config
from dpo.disk.sizes import Sizes, disk_words, evaluations_after, num_saves, saves_after, sizes_of
from dpo.model import weights
from dpo.model.model_config import read_model_config
from dpo.run.schedule import is_time
from dpo.run_folder.evaluations import BYTES_PER_PAIR, evaluation_path, write_evaluation
from tests.estimate.test_estimate import LLAMA_70B
from tests.support.runs import make_config, run, save_six_steps, six_steps

SIZES = Sizes(num_parameters=10, state=120, checkpoint=80, final=40, keep=2, num_saves=None)
"""10 weights in float32 with RMSprop: 3 and 2 numbers each, 1 of it exported."""


@pytest.mark.parametrize(
    ("keep", "num_saves", "present", "needed"),
    [
        (2, None, 0, 240),  # a third is written before the first is removed
        (2, 9, 0, 240),
        (2, None, 1, 160),
        (2, None, 2, 80),
        (2, None, 5, 80),
        (2, 2, 0, 240),  # two, and the exported model with its shards
        (2, 1, 0, 160),
        (None, 3, 0, 320),
        (None, 3, 2, 160),
        (None, None, 0, 160),  # at least
    ],
)
def test_the_disk_that_a_run_needs(keep: int | None, num_saves: int | None, present: int, needed: int) -> None:
    sizes = replace(SIZES, keep=keep, num_saves=num_saves)
    assert sizes.disk_bytes(present) == needed
    assert replace(sizes, evaluations=7).disk_bytes(present) == needed + 7


def test_the_sizes_are_those_that_a_run_writes(tmp_path: Path) -> None:
    """Three steps, each saved; torch and safetensors add names to the numbers."""
    facts = {"train__steps": 3, "train__eval_every": None, "checkpoint__save_every": 1, "checkpoint__keep": None}
    config = six_steps(save_six_steps(tmp_path), tmp_path / "run", **facts)
    large = LlamaConfig(vocab_size=16_384, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    LlamaForCausalLM(large).save_pretrained(tmp_path / "model")  # 2 million weights
    found = sizes_of(config, read_model_config(tmp_path / "model", False))
    peak = exported_at_once(config)
    written = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert found.num_saves == len(written) == 3
    assert (
        found.checkpoint <= sum(file.stat().st_size for file in written[0].glob("*.distcp")) < 1.02 * found.checkpoint
    )
    assert found.final <= (tmp_path / "run" / "final" / "model.safetensors").stat().st_size < 1.02 * found.final
    assert found.export <= peak < 1.02 * found.export
    assert found.state == found.checkpoint + 4 * found.num_parameters


def test_a_checkpoint_of_adapters_is_small() -> None:
    """Llama 3 70B at rank 16 on all linear layers, with AdamW. A product of n inputs and m outputs has 16 (n + m)
    elements: q and o 16 x 16,384, k and v 16 x 9,216, gate, up and down 16 x 36,864, in 80 layers 207 million. Of them
    4 bytes each in the export, and 12 in a checkpoint: 2.3 GiB.
    """
    facts = {"lora__rank": 16, "optim__name": "adamw", "parallel__compute_dtype": "bfloat16"}
    found = sizes_of(make_config("m", "d", "r", **facts), LlamaConfig(**LLAMA_70B))
    elements = 80 * 16 * (2 * 16_384 + 2 * 9_216 + 3 * 36_864)
    assert (found.final, found.checkpoint, found.export) == (4 * elements, 12 * elements, 4 * elements)
    assert shown_bytes(found.checkpoint) == "2.3 GiB"
    assert found.num_parameters == 70_553_706_496
    assert found.state == 2 * found.num_parameters + 16 * elements  # of an adapter its gradient too


def test_a_quantized_base_keeps_its_parameters_in_fewer_bytes() -> None:
    """Llama 3 70B: the products of a layer have 2 x 8192^2 + 2 x 8192 x 1024 + 3 x 8192 x 28672 weights, each 4 bits,
    and 32 for a block of 64: 0.5625 bytes. The rest is bfloat16.
    """
    facts = {"lora__rank": 16, "lora__quantize": "nf4", "optim__name": "adamw", "parallel__compute_dtype": "bfloat16"}
    found = sizes_of(make_config("m", "d", "r", **facts), LlamaConfig(**LLAMA_70B))
    products = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    elements = 80 * 16 * (2 * 16_384 + 2 * 9_216 + 3 * 36_864)
    assert found.num_parameters == 70_553_706_496
    assert found.state == products * 9 // 16 + 2 * (found.num_parameters - products) + 16 * elements
    assert (found.final, found.checkpoint) == (4 * elements, 12 * elements)


def test_the_sizes_of_adapters_are_those_that_a_run_writes(tmp_path: Path) -> None:
    """Two steps; torch and safetensors add names to the numbers."""
    facts = {"train__steps": 2, "train__eval_every": None, "checkpoint__save_every": 2, "lora__rank": 64}
    config = six_steps(save_six_steps(tmp_path), tmp_path / "run", **facts)
    large = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    LlamaForCausalLM(large).save_pretrained(tmp_path / "model")
    found = sizes_of(config, read_model_config(tmp_path / "model", False))
    run(config)
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    saved = sum(file.stat().st_size for file in written.glob("*.distcp"))
    assert found.checkpoint <= saved < 1.1 * found.checkpoint
    adapters = (tmp_path / "run" / "final" / "adapter_model.safetensors").stat().st_size
    assert found.final <= adapters < 1.02 * found.final


def exported_at_once(config: Config) -> int:
    """Runs; the bytes that its export had on disk before it removed its shards."""
    tidy, sizes = weights._tidy, []

    def look(folder: Path) -> None:
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))
        tidy(folder)

    with patch.object(weights, "_tidy", look):
        run(config)
    (size,) = sizes
    return size


def test_the_bytes_in_words() -> None:
    gib = {"checkpoint": 60 * 2**30, "final": 15 * 2**30}
    assert disk_words(replace(SIZES, **gib), 1) == (
        "1 checkpoint of 60.0 GiB (checkpoint.keep 2; 1 there already) and 60.0 GiB for a further one, written before "
        "the oldest is removed"
    )
    assert disk_words(replace(SIZES, **gib, keep=None, num_saves=3), 0) == (
        "3 checkpoints of 60.0 GiB (checkpoint.keep null, which keeps all) and 30.0 GiB for the export, "
        "twice the exported model"
    )
    assert disk_words(replace(SIZES, **gib, evaluations=3 * 2**20, records=2**20, num_saves=1), 0) == (
        "1 checkpoint of 60.0 GiB (checkpoint.keep 2), 4.0 MiB for metrics and the values of evaluated pairs and 30.0 "
        "GiB for the export, twice the exported model"
    )


def test_the_number_of_checkpoints_that_are_left() -> None:
    for steps, every in ((6, 2), (7, 2), (1, 100), (6, None), (7, 7)):
        config = make_config("m", "d", "r", checkpoint__save_every=every)
        for start in range(steps + 1):
            written = sum(is_time(step, every, steps) for step in range(start + 1, steps + 1))
            assert saves_after(config, start, steps) == written


def test_the_number_of_evaluations_that_are_left() -> None:
    for steps, every in ((6, 2), (7, 2), (1, 100), (6, None), (7, 7)):
        config = make_config("m", "d", "r", train__eval_every=every)
        for start in range(steps + 1):
            first = 0 if start == 0 else start + 1
            assert evaluations_after(config, start, steps) == sum(
                is_time(s, every, steps) for s in range(first, steps + 1)
            )


def test_the_bytes_of_an_evaluation_are_those_of_its_file(tmp_path: Path) -> None:
    """2,000 pairs with all arrays; the names and the heads of the arrays add to them."""
    names = ("rewards", "logratios", "logps", "tokens")
    arrays = {f"{name}_{side}": np.zeros(2000, np.float32) for name in names for side in ("chosen", "rejected")}
    write_evaluation(tmp_path, 3, {**arrays, "source": np.zeros(2000, np.int32), "sources": np.array(["data.eval[0]"])})
    size = evaluation_path(tmp_path, 3).stat().st_size
    assert 2000 * BYTES_PER_PAIR <= size < 1.05 * 2000 * BYTES_PER_PAIR


def test_the_number_of_checkpoints_is_that_of_the_steps_with_one() -> None:
    for steps, every in ((6, 2), (7, 2), (1, 100), (6, None)):
        config = make_config("m", "d", "r", train__steps=steps, checkpoint__save_every=every)
        written = sum(is_time(step, every, steps) for step in range(1, steps + 1))
        assert num_saves(config) == written
        epochs = make_config("m", "d", "r", train__epochs=3, checkpoint__save_every=every)
        assert num_saves(epochs, last_step=steps) == written
    assert num_saves(make_config("m", "d", "r", train__epochs=3)) is None
