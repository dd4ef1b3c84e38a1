"""A report written by hand -> the seconds of a step, by hand."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from dpo.batch.costs import cost_model
from dpo.batch.plan import plan_step
from dpo.estimate import program
from dpo.estimate import report as fields
from dpo.estimate.devices import DEVICES, GIB
from dpo.estimate.measured import (
    arithmetic,
    link_rate,
    measured_device,
    node_link_rate,
    sources,
    unmeasured_device,
    write_rate,
)
from dpo.estimate.report_file import plain_version, read_report, write_report
from dpo.estimate.speed import Cluster, step_speed
from dpo.estimate.traffic import Groups
from tests.estimate.test_estimate import config_with, llama, save_config, tree
from tests.support.runs import error_lines, exit_code_of

FIVE = [1.0] * 5
SPREAD = fields.Percentiles(1.0, 1.0, 1.0, 1.0, 1.0)

REPORT = fields.Report(
    format=fields.FORMAT,
    version=fields.VERSION,
    failed=[],
    versions=fields.Versions("3.11.7", "2.13.0+cpu", "5.23.0", None, None, None, None),
    ranks=fields.Ranks("cpu", 2, 1, 2),
    devices=[fields.Device("EPYC", None, 2, 8 * GIB, 6 * GIB, 1)],
    products=[fields.Products("float32", [120e9, 100e9])],
    collectives=[
        fields.Collective("all_gather", "shard", 2, False, 10**9, [0.4, 0.5]),
        fields.Collective("reduce_scatter", "shard", 2, False, 10**9, [1.0, 0.9]),
    ],
    storage=fields.Storage(10**8, [0.5, 1.0], [0.1, 0.1], 10**10, 10**11),
    host_copies=None,
    attention=None,
    model=fields.Model("llama", 1000, 2, 64, 4, 4, 96, 512),
    layout=fields.Layout(
        shard=2,
        replicate=1,
        master_dtype="float32",
        compute_dtype="float32",
        tf32=False,
        reduce_dtype="float32",
        activation_checkpointing="none",
        reshard_after_forward=True,
        sync_gradients="every_micro_batch",
        cpu_offload=False,
        compile=False,
        head_memory_mib=256,
        tokens_per_micro_batch=96,
        pairs_per_step=64,
        optimizer="rmsprop",
        momentum=False,
    ),
    lengths=fields.Lengths("assumed", 1, SPREAD, SPREAD, SPREAD, SPREAD, SPREAD),
    outcome="measured",
    steps=fields.Steps(
        seconds=[2.0, 1.6, 1.7, 1.9, 2.0],
        tokens=[1] * 5,
        flops=[120e9] * 5,
        slowest_flops=[60e9] * 5,
        slowest_activations=[6e8] * 5,
        model_flops=[120e9] * 5,
        micro_batches=[2] * 5,
        all_gather_bytes=1.0,
        reduce_scatter_bytes=1.0,
        all_reduce_bytes=0.0,
        elements_per_rank=40_000_000,
        peak_memory_bytes=[1, 1],
        mfu_of_products=None,
        forward_seconds=[0.3] * 3,
        forward_flops=1e9,
        gathered_bytes=1e8,
        reduced_bytes=2.5e7,
        gathering_seconds=0.1,
        reducing_seconds=0.05,
    ),
    updates=[
        fields.Update("rmsprop", False, [10**8, 10**8], [0.2, 0.25]),
        fields.Update("sgd", False, [10**8, 10**8], [0.1, 0.05]),
    ],
)
"""Two ranks. The slowest makes 100 GFLOP/s of products, all-gathers 0.5e9 bytes in 0.5 s and reduce-scatters as many in
1 s, and updates a parameter in 2.5 ns by RMSprop and in 1 ns by SGD."""


def save(report: fields.Report, folder: Path) -> Path:
    write_report(folder / "report.json", report)
    return folder / "report.json"


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_seconds_beside_products() -> None:
    """The fastest step takes 1.6 s: 2 x 0.1 s to gather, 2 x 0.05 s to reduce, 4e7 updates of 2.5 ns. Of the other 1.2
    s, products of 60 GFLOP take 0.6 s; the rest is 1 ns for each of 6e8 activations. With one reduction 0.05 s more
    are left, and on CUDA, where traffic overlaps, 0.3 s.
    """
    assert arithmetic(REPORT) == pytest.approx((1.0, 1e-9))
    timed: Any = REPORT.steps
    on_cuda = replace(REPORT, steps=replace(timed, gathering_seconds=None, reducing_seconds=None))
    assert arithmetic(on_cuda) == pytest.approx((1.0, 0.9 / 6e8))
    layout: Any = REPORT.layout
    once = replace(REPORT, layout=replace(layout, sync_gradients="last_micro_batch"))
    assert arithmetic(once) == pytest.approx((1.0, 0.65 / 6e8))


def test_steps_that_say_nothing_of_arithmetic() -> None:
    """None were timed; gathering takes longer than a step. Steps that are faster than products take no time beside
    them: 60 GFLOP in 1.2 s are five times 10 GFLOP/s.
    """
    timed: Any = REPORT.steps
    assert arithmetic(replace(REPORT, steps=None)) is None
    assert arithmetic(replace(REPORT, steps=replace(timed, gathering_seconds=2.0))) is None
    slow = replace(REPORT, products=[fields.Products("float32", [10e9, 10e9])])
    assert arithmetic(slow) == pytest.approx((5.0, 0.0))


def speed_on(num_ranks: int, **keys: Any) -> dict[str, float]:
    """Seconds of two trees of 96 tokens, one a micro-batch, by part."""
    config = config_with(parallel__compute_dtype="float32", parallel__sync_gradients="every_micro_batch", **keys)
    device = measured_device(REPORT, config, 2, "report.json")
    plans = [plan_step([tree(32, 32)] * 2, num_ranks, 96, cost_model(llama()))]
    speed = step_speed(config, llama(), plans, Groups((100,) * 3, 60), Cluster(device, num_ranks, num_ranks, 1.0))
    assert speed.overlapped <= speed.serial == pytest.approx(sum(part.seconds for part in speed.parts))
    return {part.name: part.seconds for part in speed.parts}


PRODUCTS = 2 * 4 * (4 * 64 * 64 + 3 * 64 * 96) * 96  # FLOPs: of 4 layers, 96 tokens
PAIRS = 4 * 4 * 64 * (528 + 2 * (32 * 32 + 528))  # of 4 layers, 64 wide: the prompt's pairs, and two completions'
ROWS = 2 * 64 * 512 * 64  # of the head: 64 scored tokens
ONE_TREE = (3 * PRODUCTS + 3.5 * PAIRS + 3 * ROWS) / 100e9 + (96 * 4 * (64 + 96) + 64 * 512) * 1e-9
"""Seconds at 100 GFLOP/s, and 1 ns for each activation: of 96 tokens in 4 layers, and of the head's 64 rows."""


def test_seconds_on_two_ranks() -> None:
    """A tree a rank. 2 x 300 + 60 weights are gathered, 2,640 bytes, half of them from the other
    rank at 1 GB/s; 360 gradients are reduced, 1,440 bytes, at half that speed.

    copies   a gathered byte took 0.1 s / 1e8 in all, of which 0.5 s / 1e9 on the link: 0.5 ns are left; a reduced byte
             0.05 s / 2.5e7 less 1 s / 1e9: 1 ns
    update   180 parameters a rank, of 2.5 ns; by SGD of 1 ns
    """
    found = speed_on(2)
    assert found == pytest.approx(
        {
            "arithmetic": ONE_TREE,
            "all-gather": 1320 / 1e9,
            "reduce-scatter": 720 / 0.5e9,
            "copies": 2640 * 0.5e-9 + 1440 * 1e-9,
            "update": 180 * 2.5e-9,
        }
    )
    assert speed_on(2, optim__name="sgd")["update"] == pytest.approx(180 * 1e-9)
    assert "update" not in speed_on(2, optim__name="adamw")  # it was not measured


def test_seconds_on_one_rank() -> None:
    """Two micro-batches, which send nothing; weights are copied as on two ranks."""
    assert speed_on(1) == pytest.approx(
        {
            "arithmetic": 2 * ONE_TREE,
            "copies": 5280 * 0.5e-9 + 2880 * 1e-9,
            "update": 360 * 2.5e-9,
        }
    )


def test_links_within_and_between_nodes() -> None:
    """16 ranks on 2 nodes of 8: 15/16 of 1.6 GB in 0.1 s are 15 GB/s, of 8 cards; two copies, each on a node of its
    own, send over one card."""
    across = fields.Collective("all_gather", "shard", 16, True, 1_600_000_000, [0.1] * 16)
    ranks = fields.Ranks("cuda", 16, 2, 8)
    one = replace(REPORT, ranks=ranks, collectives=[across])
    assert node_link_rate(one) == pytest.approx(15e9 / 8) and link_rate(one) is None
    replicas = fields.Collective("all_gather", "replicate", 2, True, 1_000_000_000, [0.1] * 16)
    inside = fields.Collective("all_gather", "shard", 8, False, 800_000_000, [0.01] * 16)
    two = replace(one, collectives=[replicas, inside])
    assert node_link_rate(two) == pytest.approx(5e9) and link_rate(two) == pytest.approx(70e9)


def test_what_a_gpu_did_not_measure_is_its_data_sheets() -> None:
    gpu = fields.Device("NVIDIA H100 80GB HBM3", (9, 0), 1, 85_000_000_000, 84_000_000_000, None)
    products = [fields.Products("bfloat16", [700e12])]
    report = replace(
        REPORT, ranks=fields.Ranks("cuda", 1, 1, 1), devices=[gpu], collectives=[], products=products, steps=None
    )
    device, sheet = measured_device(report, config_with(), 1, "r"), DEVICES["h100"]
    assert device == replace(sheet, memory=85e9, flops=700e12, update=2.5e-9)
    told = " ".join(sources(report, config_with(), Cluster(device, 1, 1, 0.4)))
    assert "7e+14 FLOP/s in bfloat16 products, update by" in told
    assert "not from the report: 40% of them in steps, links within a node 360 GB/s, between nodes 40 GB/s" in told
    assert "the report has no timed steps" in told
    copies = fields.HostCopies([50e9], [40e9])
    assert measured_device(replace(report, host_copies=copies), config_with(), 1, "r").host_link == 50e9


def test_a_cpus_memory_is_shared_by_its_ranks_and_the_disk_by_all() -> None:
    """2 x 1e8 bytes in the 1.0 s of the slowest."""
    assert unmeasured_device(REPORT, 4).memory == 2 * GIB
    assert write_rate(REPORT) == pytest.approx(2e8) and write_rate(replace(REPORT, storage=None)) is None


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_report_reads_as_it_was_written(tmp_path: Path) -> None:
    assert read_report(str(save(REPORT, tmp_path))) == REPORT
    empty = replace(REPORT, versions=None, storage=None, layout=None, steps=None, updates=[], outcome="not_finished")
    assert read_report(str(save(empty, tmp_path))) == empty


def declared(hint: Any, name: str = "Report") -> Iterator[tuple[str, Any]]:
    """The types of all values that a report may hold, by the name of their field."""
    inner = get_args(hint)
    if dataclasses.is_dataclass(hint):
        for field, kind in get_type_hints(hint).items():
            yield from declared(kind, f"{hint.__name__}.{field}")  # type: ignore[attr-defined]
    elif inner and all(isinstance(word, str) for word in inner):
        yield name, "one of a list"
    elif inner:
        for kind in inner:
            yield from declared(kind, name)
    else:
        yield name, hint


def test_only_versions_and_devices_are_free_texts() -> None:
    """Everything else is a number, or a word of a list: no field has room for a name, a path or data."""
    kinds = list(declared(fields.Report))
    texts = {name for name, kind in kinds if kind is str}
    assert texts == {"Report.format", "Device.name", "Model.family"} | {
        f"Versions.{name}" for name in get_type_hints(fields.Versions)
    }
    assert {kind for _, kind in kinds} <= {str, int, float, bool, type(None), "one of a list"}


def test_a_field_that_is_not_declared_is_refused(tmp_path: Path) -> None:
    layout: Any = REPORT.layout
    with pytest.raises(ValueError, match=r"layout\.optimizer"):
        write_report(tmp_path / "r.json", replace(REPORT, layout=replace(layout, optimizer="ours")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("2.13.0+cpu", "2.13.0+cpu"),
        ("2.13.0+cu130", "2.13.0+cu130"),
        ("2.3.0a0+40ec155e58.nv24.03", "2.3.0a0"),
        ("2.13.0+zebra", "2.13.0"),
        ("2.13.0+cpu.zebra", "2.13.0"),
        ("5.23.0.dev0", "5.23.0.dev0"),
        ("570.86.15", "570.86.15"),
        ("none", "unknown"),
    ],
)
def test_labels_of_builders_are_left_out(text: str, plain: str) -> None:
    assert plain_version(text) == plain


def changed(path: Path, *keys: Any, value: Any) -> None:
    """Sets a value of a JSON file."""
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), "other", "format: is not dpo.doctor report; valid: a file that python -m dpo.doctor --report"),
        (("version",), 0, "version: this is version 1 of the program's format, the file has 0"),
        (("hosts",), ["a"], "hosts: unknown key; valid: format, version"),
        (("devices",), [], "devices: is empty; valid: a report of dpo.doctor that found no problem"),
        (("devices", 0, "host"), "a", "devices[0].host: unknown key; valid: name, capability"),
        (("products", 0, "flops_per_second", 1), 0, "products[0].flops_per_second[1]: got 0; valid: a number > 0"),
        (("products", 0, "flops_per_second"), [], "products[0].flops_per_second: is an empty list"),
        (("steps", "seconds", 2), -1.0, "steps.seconds[2]: got -1.0; valid: a number > 0"),
        (("steps", "seconds"), 3.0, "steps.seconds: got the number 3.0"),
        (("products", 0, "precision"), "int8", "products[0].precision: 'int8' is not a precision; valid: bfloat16"),
    ],
)
def test_a_foreign_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: tuple[Any, ...], value: Any, message: str
) -> None:
    report, config = save(REPORT, tmp_path), save_config(tmp_path / "small", llama(2))
    changed(report, *keys, value=value)
    assert estimate(config, "--measured", str(report)) == 2
    assert error_lines(capsys.readouterr().err)[-1].startswith(f"error: {report}: {message}")


def estimate(config: Path, *words: str) -> int:
    lengths = ("--completion-tokens", "8", "--prompt-tokens", "8")
    return exit_code_of(program.main, "dpo.estimate", "--config", str(config), *words, *lengths)


def test_what_is_no_report_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = save_config(tmp_path / "small", llama(2))
    assert estimate(config, "--measured", str(tmp_path / "none.json")) == 2
    assert "error: command line: --measured: cannot read" in capsys.readouterr().err
    (tmp_path / "text.json").write_text("words")
    assert estimate(config, "--measured", str(tmp_path / "text.json")) == 2
    assert "text.json: is not JSON" in capsys.readouterr().err
    report = save(REPORT, tmp_path)
    assert estimate(config, "--measured", str(report), "--device", "h100") == 2
    assert "command line: --device: --measured gives the device" in capsys.readouterr().err
    words = ["--model.dtype", "float64", "--parallel.reduce_dtype", "float64"]
    assert estimate(config, "--measured", str(report), *words) == 2
    assert f"error: {report}: products: has no products in float64" in capsys.readouterr().err


def test_the_estimate_says_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks are the report's unless they are given; options win over the file."""
    report, config = save(REPORT, tmp_path), save_config(tmp_path / "small", llama(2))
    assert estimate(config, "--measured", str(report), "--json", str(tmp_path / "forecast.json")) == 0
    assert json.loads((tmp_path / "forecast.json").read_text())["write_rate"] == pytest.approx(2e8)
    told = " ".join(capsys.readouterr().out.split())
    assert "one copy over 2 cpu, 2 per node" in told
    assert "measured on 2 ranks (EPYC): 1e+11 FLOP/s in float32 products, 1 ns per element of the activations" in told
    assert "links within a node 1 GB/s" in told.split("not from the report: ")[0]
    assert "not from the report: between nodes 1 GB/s, to the host 1 GB/s" in told and "more exact" not in told
    assert re.search(r"a checkpoint of [1-9][\d.]* [KM]iB: ", told) and "at the measured 0.2 GB/s of all ranks" in told
    words = ["--ranks", "4", "--mfu", "0.25", "--link-gb-s", "3"]
    assert estimate(config, "--measured", str(report), *words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "over 4 cpu, 2 per node" in told and "at 25% of the device's peak" in told and "links 3 GB/s" in told
    assert "not from the report: 25% of them in steps, links within a node 3 GB/s" in told


def test_a_report_of_a_model_that_is_too_small_is_told() -> None:
    """Five steps of 9.2 s in all; each gathers for 2 x 0.45 s, reduces and updates for 0.1 s each: 3.7 s are left."""
    timed: Any = REPORT.steps
    report = replace(REPORT, steps=replace(timed, gathering_seconds=0.45))
    (line,) = [line for line in sources(report, CPU_CONFIG, CPU_CLUSTER) if "more exact" in line]
    assert line.startswith("only 40% of the timed steps is arithmetic")
    assert len(sources(REPORT, CPU_CONFIG, CPU_CLUSTER)) == 2


CPU_CONFIG = config_with(parallel__compute_dtype="float32")
CPU_CLUSTER = Cluster(measured_device(REPORT, CPU_CONFIG, 2, "r"), 2, 2, 1.0)
