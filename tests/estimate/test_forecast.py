"""What a run needs, from hand-derived numbers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dpo.disk.sizes import Sizes
from dpo.estimate.devices import DEVICES
from dpo.estimate.forecast import (
    GIB,
    checkpoint_seconds,
    evaluation_passes,
    forecast,
    generated_tokens,
    lines_of_run,
    reference_passes,
    token_seconds,
)
from dpo.estimate.lengths import Extent
from dpo.estimate.memory import COPY, WEIGHTS, Memory, copy_bytes
from dpo.estimate.speed import Cluster, Part, Speed
from dpo.estimate.traffic import Groups
from dpo.estimate.words import Estimate
from dpo.run_folder.forecast import read_forecast, write_forecast
from tests.support.runs import make_config

EXTENT = Extent(num_steps=100, num_pairs=6400, num_eval_pairs=640)
SIZES = Sizes(num_parameters=10, state=120, checkpoint=80, final=40, keep=2, num_saves=4)


def estimate(**changes: Any) -> Estimate:
    """A step of 12 s at half the peak, on two nodes of four GPUs: arithmetic 9 s, all-gathers 2 s, the rest 1 s.

    At the peak the model's FLOPs take 3 s, a forward pass 1 s: at half of it 2 s, and half of the all-gathers 1 s. The
    arithmetic of each GPU is 9e9 FLOPs, 1e9 per second.
    """
    usual = {"train__eval_every": 50, "checkpoint__save_every": 25, "parallel__compute_dtype": "bfloat16"}
    config = make_config("m", "d", "r", **(usual | changes))
    device = replace(DEVICES["h100"], link=100e6, node_link=7e6)
    cluster = Cluster(device, 8, 4, mfu=0.5)
    parts = (Part("arithmetic", 0, 9.0), Part("all-gather", 1, 2.0), Part("reduce-scatter", 1, 1.0))
    speed = Speed(8 * 9e9, parts, 3.0, 1.0, mfu=0.5)
    groups = Groups((4_000_000,) * 3, 2_000_000)
    memory = Memory(Counter(), Counter({COPY: 5, WEIGHTS: 2}), "")
    return Estimate(config, cast(Any, SimpleNamespace()), cluster, "made up", cast(Any, None), memory, groups, speed)


def test_the_forecast_of_a_run() -> None:
    found = forecast(estimate(), SIZES, EXTENT)
    assert (found.num_steps, found.step_seconds) == (100, 12.0)
    assert found.reference_seconds == (100 + 10) * 3.0
    assert found.evaluation_seconds == 3 * 10 * 3.0  # after steps 0, 50 and 100
    assert (found.checkpoint_bytes, found.disk_bytes) == (80, 3 * 80)  # two are kept, and a third is written first
    assert (found.copy_bytes, found.step_bytes, found.process_bytes) == (20, 8, 4 * 6 * GIB)
    assert (found.num_ranks, found.keep, found.final_bytes) == (8, 2, 40)
    assert found.cache_bytes == 2 * 24 * 2 * (6400 + 640)  # rows of 24 bytes, in a block and in the table


GIBS = replace(SIZES, checkpoint=60 * GIB, final=15 * GIB)


def test_the_hours_and_the_disk_of_a_run() -> None:
    """60 GiB at 0.5 GB/s take 128.85 s, within 25 steps of 12 s each; both copies of the model 64.42 s. Answers: see
    below. In all 1,200 + 330 + 90 + 422.02 + 193.27 = 2,235 s: 37 min, on 8 GPUs 4.97 hours.
    """
    assert lines_of_run(forecast(estimate(), GIBS, EXTENT), on_cpu=False) == [
        "a run of 100 steps takes 37 min, 5.0 GPU-hours on 8 GPUs:",
        "  steps               20 min   12.0 s each, if no parts overlap",
        "  reference pass       6 min   once: its log-probabilities are cached",
        "  evaluations         90.0 s",
        "  sampled answers      7 min   at most, eval.max_new_tokens each; 1 ms per layer assumed",
        "  checkpoints          3 min   the last, and final/, at 500 MB/s (assumed); others beside steps",
        "  not counted: downloads, tokenizing, start and compilation",
        "disk of a run: at most 180.0 GiB at once in train.run_dir:",
        "  checkpoint        60.0 GiB   each; checkpoint.keep 2",
        "  final/            15.0 GiB   at most as much again while it is written",
        "  cache            660.0 KiB   at most, of the reference pass, in reference.cache_dir",
    ]


def test_the_seconds_of_a_generated_token() -> None:
    """14 million parameters in bfloat16, 28 MB, of which a rank receives 7/8 at 4 * 7 MB/s from the other node: 0.875
    s. Each is multiplied with 8 answers: 224 MFLOP at 1 GFLOP/s, 0.224 s. Three layers: 0.003 s.
    """
    assert token_seconds(estimate()) == pytest.approx(0.875 + 0.224 + 0.003)
    offloaded = token_seconds(estimate(parallel__cpu_offload=True))  # each rank's eighth in float32: 7 MB
    assert offloaded - token_seconds(estimate()) == pytest.approx(7e6 / DEVICES["h100"].host_link)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 3 * 128),  # after steps 0, 50 and 100; the reference's are those of step 0
        ({"reference__path": "another"}, 4 * 128),
        ({"loss__name": "sft"}, 4 * 128),  # the model before training takes the place of the reference
        ({"eval__samples": 65}, 3 * 2 * 128),  # eight ranks answer 64 at a time
        ({"eval__samples": 10_000, "eval__max_new_tokens": 7}, 3 * 10 * 7),  # of 640 pairs
        ({"eval__samples": 0}, 0),
    ],
)
def test_the_tokens_of_sampled_answers(changes: dict[str, Any], tokens: int) -> None:
    found = estimate(**changes)
    assert generated_tokens(found.config, EXTENT, 8) == tokens
    assert generated_tokens(found.config, replace(EXTENT, num_eval_pairs=0), 8) == 0
    assert forecast(found, SIZES, EXTENT).answers_seconds == tokens * token_seconds(found)


def test_a_slow_disk_delays_the_steps() -> None:
    """At 100 MB/s a checkpoint of 64.42 GB takes 644.2 s; 25 steps take 300 s: three saves wait 344.2 s each, the last
    checkpoint 644.2 s, and the export of 2 x 16.11 GB 322.1 s.
    """
    config = estimate().config
    waited = 3 * 344.245 + 644.245 + 322.123
    assert checkpoint_seconds(config, GIBS, 100, 12.0, 1e8) == pytest.approx(waited, rel=1e-5)
    assert forecast(estimate(), GIBS, EXTENT, 1e8).checkpoint_seconds == pytest.approx(waited, rel=1e-5)


def test_the_last_checkpoint_may_follow_soon() -> None:
    """101 steps of 12 s, saved every 100: the last save, one step after the first, waits 128.849 - 12 s for it, and
    then for itself and the export, 128.849 + 64.425 s. With one save there is nothing to wait for but these.
    """
    config = estimate(checkpoint__save_every=100).config
    alone = 128.849 + 64.425
    assert checkpoint_seconds(config, GIBS, 101, 12.0, None) == pytest.approx(116.849 + alone, rel=1e-5)
    assert checkpoint_seconds(config, GIBS, 100, 12.0, None) == pytest.approx(alone, rel=1e-5)
    never = estimate(checkpoint__save_every=None).config
    assert checkpoint_seconds(never, GIBS, 101, 12.0, None) == pytest.approx(alone, rel=1e-5)


def test_without_data_the_steps_are_known_and_the_rest_is_named() -> None:
    lines = lines_of_run(forecast(estimate(train__steps=100), GIBS, None), on_cpu=False)
    assert lines[0] == "a run of 100 steps takes at least 23 min, 3.1 GPU-hours on 8 GPUs:"
    missing = "not known   the number of pairs is missing, since the data was not read"
    assert [line.split()[0] for line in lines if line.endswith(missing)] == [
        "reference",
        "evaluations",
        "sampled",
        "cache",
    ]


def test_without_data_and_steps_no_hours_are_known() -> None:
    sizes = replace(GIBS, keep=None, num_saves=None)
    lines = lines_of_run(forecast(estimate(train__steps=None, train__epochs=1), sizes, None), on_cpu=False)
    assert lines[0] == (
        "hours of a run: not known: the number of steps is not known, since the data was not read and train.steps is "
        "null; a step takes 12.0 s, if no parts overlap"
    )
    assert "disk of a run: at least 90.0 GiB at once in train.run_dir:" in lines  # a checkpoint and two copies


def test_a_cpu_has_ranks_and_no_overlap() -> None:
    lines = lines_of_run(forecast(estimate(loss__name="sft"), GIBS, EXTENT), on_cpu=True)
    assert lines[0].endswith(" rank-hours on 8 ranks:")
    assert "  steps               20 min   12.0 s each" in lines
    assert not any("reference" in line for line in lines)


def test_weights_that_stay_unsharded_are_gathered_once_for_both_passes() -> None:
    found = forecast(estimate(parallel__reshard_after_forward=False), SIZES, EXTENT)
    assert found.reference_seconds == 110 * (2.0 + 2.0)


def test_a_loss_without_a_reference_needs_no_pass() -> None:
    assert reference_passes(make_config("m", "d", "r", loss__name="sft"), EXTENT) == 0


@pytest.mark.parametrize(("every", "evaluations"), [(None, 2), (30, 5), (100, 2)])
def test_the_evaluations_are_those_of_the_loop(every: int | None, evaluations: int) -> None:
    """After step 0, every so many steps, and after the last."""
    assert evaluation_passes(make_config("m", "d", "r", train__eval_every=every), EXTENT) == 10 * evaluations


def test_without_data_the_time_is_not_known() -> None:
    found = forecast(estimate(train__steps=7), SIZES, None)
    assert (found.num_steps, found.reference_seconds, found.evaluation_seconds) == (7, None, None)
    assert forecast(estimate(train__steps=None, train__epochs=1), SIZES, None).num_steps is None


def test_the_launcher_reads_what_is_written(tmp_path: Path) -> None:
    """Also a file with keys of a later version."""
    found = forecast(estimate(), SIZES, EXTENT)
    write_forecast(tmp_path / "f.json", found)
    file = json.loads((tmp_path / "f.json").read_text())
    assert file["seconds"] == found.seconds and file["device_hours"] == pytest.approx(8 * found.seconds / 3600)
    (tmp_path / "f.json").write_text(json.dumps(file | {"later": 1}))
    assert read_forecast(tmp_path / "f.json") == found


def test_a_pinned_copy_is_rounded_up_tensor_by_tensor() -> None:
    """Weights and RMSprop's state of 3, 4 and 5 elements in float32: 12, 16 and 20 bytes; pinned 16, 16 and 32."""
    config = make_config("m", "d", "r")
    assert copy_bytes(config, (3, 4, 5), pinned=False) == 2 * (12 + 16 + 20)
    assert copy_bytes(config, (3, 4, 5, 0), pinned=True) == 2 * (16 + 16 + 32)
