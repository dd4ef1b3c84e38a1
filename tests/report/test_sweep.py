"""Several runs side by side: keys that differ, cells of heat maps, looks of runs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dpo.report.heat_maps import Cell, HeatMap, heat_map, heat_maps
from dpo.report.record import Record
from dpo.report.sweep import differing, look_of, names_of, run_curves, run_rows
from tests.report.folders import eval_line, nats, record_of

ACCURACY = "eval/rewards/accuracies"


def run_of(name: str, beta: Any, lr: float, accuracy: float | None, **more: Any) -> Record:
    config = {"loss.name": "dpo", "loss.beta": beta, "optim.lr": lr, "train.run_dir": name} | more
    lines = [] if accuracy is None else [eval_line(5, 0.3, 0.1, accuracy=accuracy, loss=1 - accuracy)]
    return record_of(lines, f"runs/{name}", config=config, is_done=True)


SWEEP = [
    run_of("a", 0.5, 1e-6, 0.6),
    run_of("b", 0.1, 1e-6, 0.7),
    run_of("c", 0.1, 1e-5, 0.8),
    run_of("d", 0.1, 1e-5, 0.9, **{"train.seed": 0}),
]


def test_a_heat_map_by_hand() -> None:
    """beta down, lr across, both rising; the two runs of a cell are averaged: 0.85, with a standard deviation of
    0.1 / sqrt(2) and a standard error of 0.05; no run has beta 0.5 and lr 1e-5. 0.6 is the worst and 0.85 the best: 0.7
    is 40 % of the way.
    """
    found = heat_map(SWEEP, ["loss.beta", "optim.lr"], ACCURACY, "accuracy")
    assert (found.row_key, found.column_key) == ("loss.beta", "optim.lr")
    assert (found.rows, found.columns) == (("0.1", "0.5"), ("1e-6", "1e-5"))
    (seven, best), (six, absent) = found.cells
    assert (seven.value, seven.error, seven.notes, seven.is_best) == (0.7, None, [], False)
    assert seven.share == pytest.approx(0.4)
    assert (best.value, best.error, best.share, best.is_best) == (pytest.approx(0.85), pytest.approx(0.05), 1.0, True)
    assert best.notes == ["2 runs"]
    assert (six.value, six.share) == (0.6, 0.0)
    assert absent == Cell()


def test_the_best_loss_is_the_lowest() -> None:
    """The loss of a run here is 1 - accuracy, so that the same cell is best."""
    found = heat_map(SWEEP, ["loss.beta", "optim.lr"], "eval/loss", "loss")
    assert [[cell.is_best for cell in row] for row in found.cells] == [[False, True], [False, False]]


def test_equal_cells_are_all_in_the_middle() -> None:
    runs = [run_of("a", 0.1, 1e-6, 0.7), run_of("b", 0.2, 1e-6, 0.7)]
    found = heat_map(runs, ["loss.beta"], ACCURACY, "accuracy")
    assert [(cell.share, cell.is_best) for cell in found.cells[0]] == [(0.5, False), (0.5, False)]
    assert found.rows == ("",)


def test_heat_maps_are_of_one_or_two_keys_and_of_metrics_that_runs_have() -> None:
    keys = ["loss.beta", "optim.lr"]
    assert [found.title for found in heat_maps(SWEEP, keys)] == ["held-out accuracy", "held-out margin"]
    assert [found.title for found in heat_maps(SWEEP, keys, "eval/loss")] == ["eval/loss"]
    assert heat_maps(SWEEP, [*keys, "optim.eps"]) == heat_maps(SWEEP, []) == []
    assert heat_maps([run_of("a", 0.1, 1e-6, None), run_of("b", 0.2, 1e-6, None)], keys[:1]) == []


def shape(found: HeatMap) -> tuple[str, str, list[list[int]]]:
    return found.row_key, found.column_key, [[cell.runs for cell in row] for row in found.cells]


def test_seeds_are_averaged_over() -> None:
    """Two betas, two learning rates, two seeds: a heat map of four cells, not an axis of seeds."""
    settings = [(beta, lr, seed) for beta in (0.1, 0.5) for lr in (1e-6, 1e-5) for seed in (0, 1)]
    runs = [run_of(str(setting), *setting[:2], 0.7, **{"train.seed": setting[2]}) for setting in settings]
    keys = differing(runs)
    assert keys == ["loss.beta", "optim.lr", "train.seed"]
    assert shape(heat_maps(runs, keys)[0]) == ("loss.beta", "optim.lr", [[2, 2], [2, 2]])
    one_rate = [run for run in runs if run.config["optim.lr"] == 1e-6]
    assert shape(heat_maps(one_rate, differing(one_rate))[0]) == ("", "loss.beta", [[2, 2]])
    one_setting = runs[:2]
    assert shape(heat_maps(one_setting, differing(one_setting))[0]) == ("", "train.seed", [[1, 1]])


def test_a_sweep_over_ranks_and_alphas() -> None:
    """The same loss and rate: what differs is the adapters."""
    keys = [
        {"lora.rank": rank, "lora.alpha": alpha, "lora.target_modules": None} for rank in (4, 8) for alpha in (8, 16)
    ]
    runs = [run_of(name, 0.1, 1e-6, 0.7, **values) for name, values in zip("abcd", keys, strict=True)]
    assert differing(runs) == ["lora.rank", "lora.alpha"]
    assert [row.values for row in run_rows(runs, differing(runs))] == [("4", "8"), ("4", "16"), ("8", "8"), ("8", "16")]
    assert shape(heat_maps(runs, differing(runs))[0]) == ("lora.rank", "lora.alpha", [[1, 1], [1, 1]])


def at_steps(*runs: tuple[int, float, bool]) -> Sequence[Cell]:
    """The cells of runs of 1,000 steps: their step, accuracy, and whether they are exported."""
    records = [
        record_of(
            [eval_line(step, 0.3, 0.1, accuracy=accuracy)],
            config={"loss.beta": 0.1 + number, "train.steps": 1000},
            is_done=is_done,
        )
        for number, (step, accuracy, is_done) in enumerate(runs)
    ]
    return heat_map(records, ["loss.beta"], ACCURACY, "accuracy").cells[0]


def test_a_run_that_is_going_on_is_marked_and_not_compared() -> None:
    """0.9 at step 50 is not better than 0.8 at the end; a run with all steps is done before its export is."""
    going, best, worst = at_steps((50, 0.9, False), (1000, 0.8, True), (1000, 0.7, False))
    assert (going.notes, going.share, going.is_best) == (["unfinished: step 50"], None, False)
    assert (best.notes, best.share, best.is_best) == ([], 1.0, True)
    assert (worst.notes, worst.share) == ([], 0.0)


def test_where_no_run_is_done_those_of_the_greatest_step_are_compared() -> None:
    early, best, worst = at_steps((50, 0.9, False), (100, 0.8, False), (100, 0.7, False))
    assert [cell.is_best for cell in (early, best, worst)] == [False, True, False]
    assert [cell.notes for cell in (early, best, worst)] == [
        ["unfinished: step 50"],
        ["unfinished: step 100"],
        ["unfinished: step 100"],
    ]


def test_a_cell_with_an_unfinished_seed_is_marked() -> None:
    runs = [dataclasses.replace(run_of(name, 0.1, 1e-6, 0.7), is_done=name == "a") for name in "ab"]
    (cell,) = heat_map(runs, ["loss.beta"], ACCURACY, "accuracy").cells[0]
    assert cell.notes == ["2 runs", "unfinished: step 5"] and not math.isnan(cell.error or 0.0)


def test_keys_that_do_not_change_the_result_are_left_out() -> None:
    """Every run has another folder, here also another sharding and a tracker; a key that one run lacks differs."""
    other = {"train.eval_every": 5, "checkpoint.keep": 9, "parallel.shard": 4, "train.report_to": ["wandb"]}
    runs = [run_of("a", 0.1, 1e-6, 0.6), run_of("b", 0.5, 1e-6, 0.6, **other, **{"loss.gamma": 0.5})]
    assert differing(runs) == ["loss.beta", "loss.gamma"]


def test_precisions_differ() -> None:
    runs = [run_of(name, 0.1, 1e-6, 0.6, **{"parallel.compute_dtype": name}) for name in ("bfloat16", "float32")]
    assert differing(runs) == ["parallel.compute_dtype"]


def test_values_that_are_no_numbers_stand_in_the_order_of_the_runs() -> None:
    runs = [run_of("a", True, 1e-6, 0.6), run_of("b", 1, 1e-6, 0.7), run_of("c", None, 1e-6, 0.8)]
    found = heat_map(runs, ["loss.beta"], ACCURACY, "accuracy")
    assert found.columns == ("true", "1", "null")
    assert [cell.value for cell in found.cells[0]] == [0.6, 0.7, 0.8]


def test_names_are_the_shortest_that_differ() -> None:
    assert names_of([record_of(folder="x/a/run"), record_of(folder="x/b/run")]) == ["a/run", "b/run"]
    assert names_of([record_of(folder="x/a"), record_of(folder="x/b")]) == ["a", "b"]


def test_thirty_runs_look_different() -> None:
    assert len({look_of(number) for number in range(30)}) == 30


def test_a_row_of_the_table_by_hand() -> None:
    """The last evaluation; winners at -0.6 nats per token are marked."""
    record = record_of([eval_line(0, 0, 0), eval_line(5, -0.6, -0.8, accuracy=0.7, **nats(-0.6, -0.8))])
    (row,) = run_rows([record], ["loss.name"])
    assert row.values == ("dpo",)
    assert row.cells == ("0.500", "0.700", "0.200", "−0.600", "+0.800", "−0.600", "0 s")
    assert row.has_fallen and row.state == "0, not finished"
    (row,) = run_rows([record_of()], [])
    assert row.cells[:6] == ("–",) * 6 and not row.has_fallen


def test_a_chart_has_a_line_per_run_that_has_the_metric() -> None:
    charts = run_curves([*SWEEP, record_of(folder="runs/e")])
    accuracy = next(chart for chart in charts if chart.title == "Held-out accuracy")
    assert [line.label for line in accuracy.legend] == ["a", "b", "c", "d"]
    assert len({(line.hue, line.dash) for line in accuracy.legend}) == 4
    assert np.all([chart.title.startswith("Held-out") for chart in charts])  # no run has training steps
