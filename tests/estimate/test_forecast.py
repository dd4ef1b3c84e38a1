"""What a run needs, from hand-derived numbers."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dpo.estimate.devices import DEVICES
from dpo.estimate.forecast import GIB, evaluation_passes, forecast, line_of_run, reference_passes
from dpo.estimate.lengths import Extent
from dpo.estimate.memory import COPY, WEIGHTS, Memory, copy_bytes
from dpo.estimate.speed import Cluster, Part, Speed
from dpo.estimate.traffic import Groups
from dpo.estimate.words import Estimate
from dpo.run.disk import Sizes
from dpo.run.forecast import read_forecast, write_forecast
from tests.support.runs import make_config

EXTENT = Extent(num_steps=100, num_pairs=6400, num_eval_pairs=640)
SIZES = Sizes(num_parameters=10, state=120, checkpoint=80, final=40, keep=2, num_saves=4)


def estimate(**changes: Any) -> Estimate:
    """A step of 12 s at half the peak, on two nodes of four GPUs: arithmetic 9 s, all-gathers 2 s, the rest 1 s.

    At the peak the model's FLOPs take 3 s, a forward pass 1 s: at half of it 2 s, and half of the all-gathers 1 s.
    """
    config = make_config("m", "d", "r", train__eval_every=50, **changes)
    cluster = Cluster(DEVICES["h100"], 8, 4, mfu=0.5)
    parts = (Part("arithmetic", 0, 9.0), Part("all-gather", 1, 2.0), Part("reduce-scatter", 1, 1.0))
    speed = Speed(1.0, parts, 3.0, mfu=0.5)
    memory = Memory(Counter(), Counter({COPY: 5, WEIGHTS: 2}), "", Groups((), 0))
    return Estimate(config, cast(Any, SimpleNamespace()), cluster, "made up", cast(Any, None), memory, speed)


def test_the_forecast_of_a_run() -> None:
    found = forecast(estimate(), SIZES, EXTENT)
    assert (found.num_steps, found.step_seconds) == (100, 12.0)
    assert found.reference_seconds == (100 + 10) * 3.0
    assert found.evaluation_seconds == 3 * 10 * 3.0  # after steps 0, 50 and 100
    assert (found.checkpoint_bytes, found.disk_bytes) == (80, 3 * 80)  # two are kept, and a third is written first
    assert (found.copy_bytes, found.step_bytes, found.process_bytes) == (20, 8, 4 * 6 * GIB)
    assert line_of_run(found, 8) == (
        "a run takes 27 min (100 steps 20 min, the reference 6 min, evaluations 90.0 s), times 8 devices 3.6 h;"
        " it needs 0.2 KiB in its run folder"
    )


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
    (tmp_path / "f.json").write_text(json.dumps(file | {"later": 1}))
    assert read_forecast(tmp_path / "f.json") == found


def test_a_pinned_copy_is_rounded_up_tensor_by_tensor() -> None:
    """Weights and RMSprop's state of 3, 4 and 5 elements in float32: 12, 16 and 20 bytes; pinned 16, 16 and 32."""
    config = make_config("m", "d", "r")
    assert copy_bytes(config, (3, 4, 5), pinned=False) == 2 * (12 + 16 + 20)
    assert copy_bytes(config, (3, 4, 5, 0), pinned=True) == 2 * (16 + 16 + 32)
