"""What auto becomes: the choice by hand-made numbers, the bound against the rehearsal, and a run's own choice."""

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo.base import spawned
from dpo.base.errors import UserError
from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.state import RunState
from dpo.config import Config, load_config
from dpo.config.rules import decided
from dpo.estimate import at_start, choice
from dpo.estimate.choice import (
    Case,
    Option,
    bound_bytes,
    choose,
    decide_by_bound,
    decide_by_rehearsal,
    options,
)
from dpo.estimate.devices import DEVICES, GIB, Device, steady
from dpo.estimate.lengths import Lengths
from dpo.estimate.needs import Trial, memory_of, needed_bytes
from dpo.estimate.parameters import groups_of
from dpo.estimate.speed import Cluster, Part, Speed
from dpo.estimate.timeline import ACTIVATIONS, WEIGHTS
from dpo.run.folder import Start
from dpo.run.layout import earlier_choice, layout_of
from tests.base.test_spawned import USERS, fail
from tests.estimate.test_estimate import PLAIN, tree
from tests.support.models import family_config
from tests.support.ranks import Ranks
from tests.support.runs import changed, make_config, run, run_until, same_weights, save_six_steps, six_steps

KINDS = ("none", "selective", "full")
DEVICE = Device("H100", 4 * GIB, link=1e6, node_link=1e6, host_link=1e6)


def case_of(family: str = "llama", num_ranks: int = 4, device: Device = DEVICE, **keys: Any) -> Case:
    """Two trees of 96 tokens a rank, in two micro-batches."""
    facts = {"parallel__compute_dtype": "float32" if device.is_cpu else "bfloat16", "batch__tokens_per_micro_batch": 96}
    trees = (tree(32, 32),) * (2 * num_ranks)
    cluster = Cluster(device, num_ranks, num_ranks, 0.4)
    lengths = Lengths((trees,), trees, "made up")
    return Case(make_config("m", "d", "r", **(facts | keys)), family_config(family), lengths, cluster)


# --- the choice, by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "chosen", "fits"),
    [
        (100.0, "none", True),
        (87.0, "none", True),
        (86.9, "selective", True),
        (44.0, "full", True),
        (43.0, "full", False),
    ],
)
def test_the_fastest_that_leaves_8_per_cent_free(memory: float, chosen: str, fits: bool) -> None:
    """80, 60 and 40 bytes, which fit within 0.92 of 86.96, 65.2 and 43.5; where nothing does, the leanest."""
    sizes = {"none": 80.0, "selective": 60.0, "full": 40.0}
    some = [Option({"activation_checkpointing": kind}, seconds) for seconds, kind in enumerate(KINDS, start=1)]
    found = choose(some, lambda values: sizes[values["activation_checkpointing"]], memory)
    assert (found.values, found.fits) == ({"activation_checkpointing": chosen}, fits)


@pytest.mark.parametrize(("link", "chosen"), [(1e6, "last_micro_batch"), (1e15, "every_micro_batch")])
def test_gradients_are_reduced_once_where_that_saves_3_per_cent(link: float, chosen: str) -> None:
    """Two micro-batches: over slow links a step is traffic, of which one reduction of two is a good part; over fast
    ones it is arithmetic, and nothing is saved."""
    case = case_of(device=replace(DEVICE, link=link, node_link=link))
    found = decide_by_bound(case)
    assert found is not None and found.values == {"activation_checkpointing": "none", "sync_gradients": chosen}


@pytest.mark.parametrize(("share", "chosen"), [(0.029, "every_micro_batch"), (0.031, "last_micro_batch")])
def test_3_per_cent_are_the_border(share: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1 s, and of so much less where gradients are reduced once."""

    def speed(config: Config, *others: Any) -> Speed:
        seconds = 1 - share if config.parallel.sync_gradients == "last_micro_batch" else 1.0
        return Speed(0.0, (Part("arithmetic", 0, seconds),), 0.0, 0.0)

    monkeypatch.setattr(choice, "step_speed", speed)
    found = decide_by_bound(case_of(parallel__activation_checkpointing="none"))
    assert found is not None and found.values == {"sync_gradients": chosen}


def test_nothing_is_saved_where_a_step_is_one_micro_batch_or_one_rank() -> None:
    for case in (case_of(batch__tokens_per_micro_batch=1000), case_of(num_ranks=1)):
        found = decide_by_bound(case)
        assert found is not None and found.values["sync_gradients"] == "every_micro_batch"


def test_a_key_that_the_user_set_stays() -> None:
    found = decide_by_bound(case_of(parallel__activation_checkpointing="full"))
    assert found is not None and set(found.values) == {"sync_gradients"}


def test_the_rehearsal_decides_where_the_bound_does_not_fit() -> None:
    """Where the memory is what the second fastest combination needs by `dpo.estimate`, and 8 % of it free, the fastest
    does not fit and the second is chosen."""
    facts = {"parallel__sync_gradients": "every_micro_batch", "parallel__compile": False}
    case = case_of(device=replace(DEVICE, memory=GIB), **facts)
    fastest, second = options(case, groups_of(case.config, case.model_config, case.cluster.num_ranks))[:2]
    needed = [
        needed_bytes(Trial(choice.with_values(case.config, option.values), 4), case.model_config, case.lengths, DEVICE)
        for option in (fastest, second)
    ]
    assert needed[0] > needed[1]
    enough = replace(case, cluster=replace(case.cluster, device=replace(DEVICE, memory=1.0001 * needed[1] / 0.92)))
    assert decide_by_bound(enough) is None
    found = decide_by_rehearsal(enough)
    assert (found.values, found.fits) == (second.values, True)


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox-tied", "qwen3", "mistral"])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_no_layout_exceeds_the_bound(family: str, is_cpu: bool) -> None:
    """Not the one that keeps the most: nothing checkpointed, gradients whole, weights gathered. Every family can be
    estimated, also on 3 ranks, which divide none of its shapes."""
    device = replace(DEVICE, name="cpu" if is_cpu else "H100")
    case = case_of(family, 3, device=device, parallel__reshard_after_forward=False)
    config = choice.with_values(case.config, {key.partition("__")[2]: value for key, value in PLAIN.items()})
    memory, _ = memory_of(Trial(config, 3), case.model_config, case.lengths, device)
    assert memory.device[WEIGHTS] > 0 and memory.device[ACTIVATIONS] > 0
    assert device.needed(*memory.totals) <= bound_bytes(
        case, groups_of(case.config, case.model_config, case.cluster.num_ranks)
    )


# --- devices ----------------------------------------------------------------------------------------------------------


def test_speeds_that_decide_are_the_same_at_every_start() -> None:
    """A CPU's is not measured; float64 of a GPU is half of float32: 67e12 of an H100."""
    cpu = replace(DEVICE, name="cpu")
    assert steady(cpu, "float32").peak("float32") == steady(cpu, "float32").peak("float32")
    assert steady(DEVICES["h100"], "float64").peak("float64") == 67e12 / 2


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is forked, which is quick; in the run of two ranks below it is spawned, as in a user's run."""
    monkeypatch.setattr(spawned, "get_context", lambda method: get_context("fork"))


# --- a run ------------------------------------------------------------------------------------------------------------


def test_what_is_not_trained_takes_the_plain_values() -> None:
    parallel = decided(make_config("m", "d", "r").parallel)
    assert (parallel.activation_checkpointing, parallel.sync_gradients) == ("none", "every_micro_batch")
    assert not parallel.undecided


def decided_run(root: Path, run_dir: Path, gib: float | None, **keys: Any) -> str:
    """A run of two ranks on CPUs, or on ones of so much memory: the config.yaml that it writes."""
    here = at_start.this_machine(1)
    small = here if gib is None else replace(here, memory=gib * GIB)
    facts = {"batch__tokens_per_micro_batch": 40, "train__steps": 2, "train__eval_every": None}
    with patch.object(at_start, "this_machine", lambda ranks_per_node: small):
        run(six_steps(root, run_dir, **facts, **keys))
    return (run_dir / "config.yaml").read_text()


@pytest.mark.xdist_group("ranks")
def test_two_ranks_train_what_rank_0_chose(tmp_path: Path, ranks: Ranks) -> None:
    """config.yaml holds values and no auto. With memory for nothing the leanest is chosen, by a rehearsal in a process
    of its own: the weights are those of the run in which the user gave these values, to the last bit."""
    root = save_six_steps(tmp_path)
    assert len(set(ranks(2, decided_run, root, tmp_path / "auto", None))) == 1
    config = load_config(["--config", str(tmp_path / "auto" / "config.yaml")], "dpo.train")
    assert not config.parallel.undecided and config.parallel.activation_checkpointing == "none"
    ranks(2, decided_run, root, tmp_path / "small", 0.1)
    config = load_config(["--config", str(tmp_path / "small" / "config.yaml")], "dpo.train")
    values = {key: getattr(config.parallel, key) for key in choice.VALUES}
    assert values == {"activation_checkpointing": "full", "sync_gradients": "every_micro_batch"}
    given = {f"parallel__{key}": value for key, value in values.items()}
    ranks(2, decided_run, root, tmp_path / "given", None, **given)
    assert same_weights(tmp_path / "small" / "final", tmp_path / "given" / "final")


def lack_a_kernel(*_: Any) -> None:
    raise NotImplementedError("aten::odd: no meta kernel")


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize(
    ("where", "given", "words"),
    [
        ("_rehearse", {}, "--parallel.activation_checkpointing full --parallel.sync_gradients every_micro_batch"),
        (
            "decide_by_bound",
            {"parallel__activation_checkpointing": "none"},
            "--parallel.sync_gradients every_micro_batch",
        ),
    ],
)
def test_a_run_goes_on_where_the_estimate_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    given: dict[str, str],
    words: str,
) -> None:
    """In the rehearsal's process, and in this one. With what needs the least memory, of which the line has the words to
    type; a key that the user set stays."""
    monkeypatch.setattr(at_start, "decide_by_bound", lambda case: None)
    monkeypatch.setattr(at_start, where, lack_a_kernel)
    folder = run(six_steps(save_six_steps(tmp_path), tmp_path / "run", train__steps=1, train__eval_every=None, **given))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the estimate failed" in line]
    what = "NotImplementedError: aten::odd: no meta kernel (estimate/test_choice.py:"
    assert line.startswith(f"WARNING: parallel (auto): the estimate failed: {what}")
    assert line.endswith(f"; the values that need the least memory are taken, as with {words}")
    config = load_config(["--config", str(folder / "config.yaml")], "dpo.train")
    assert config.parallel.activation_checkpointing == given.get("parallel__activation_checkpointing", "full")
    assert config.parallel.sync_gradients == "every_micro_batch"


def test_a_model_that_cannot_be_built_is_a_fault_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UserError of the estimate is no failure of the estimate."""
    monkeypatch.setattr(at_start, "decide_by_bound", lambda case: fail(USERS))
    with pytest.raises(UserError, match=r"^model\.path: so it is; valid: another$"):
        run(six_steps(save_six_steps(tmp_path), tmp_path / "run"))


# --- on a resume ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the memory of the later starts all would be checkpointed. So it is where the micro-batches are others, and not
    where the layout is that of the first start again.
    """

    def full(config: Config, *_: Any) -> choice.Choice:
        return choice.Choice(dict.fromkeys(config.parallel.undecided, "full"), True, None, "the estimate's line")

    facts = {"parallel__sync_gradients": "every_micro_batch", "train__eval_every": None}
    facts |= {"batch__tokens_per_micro_batch": 64}
    config = six_steps(save_six_steps(tmp_path), tmp_path / "run", **facts)
    run_until(config, 3)
    monkeypatch.setattr(at_start, "_choice", full)
    found = []
    for tokens, stop in ((64, 4), (100, 5), (64, 6)):
        capsys.readouterr()
        run_until(changed(config, batch__tokens_per_micro_batch=tokens), stop)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("parallel (auto): ")]
        written = load_config(["--config", str(tmp_path / "run" / "config.yaml")], "dpo.train")
        found.append((line, written.parallel.activation_checkpointing))
    kept = ("parallel (auto): activation_checkpointing none: kept from the last start on the same devices", "none")
    anew = ("parallel (auto): decided again: tokens_per_micro_batch 64 -> 100", "full")
    assert found == [kept, anew, kept]


def resumed(tmp_path: Path, *starts: dict[str, Any]) -> Start:
    """A resume of a run with these starts in its history."""
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(starts))
    return Start(checkpoint_path(tmp_path / "run", 2), RunState(2, {}))


def test_other_devices_are_another_layout(tmp_path: Path) -> None:
    """The number of ranks and the kinds of their devices; a timeout is none of it, nor is a value that the user gives
    now."""
    config = make_config("m", "d", tmp_path / "run")
    before = choice.with_values(config, {"activation_checkpointing": "selective", "sync_gradients": "last_micro_batch"})
    start = resumed(tmp_path, {"layout": layout_of(before, ["H100"] * 2)})
    for devices, values in (
        (["H100"] * 2, ("selective", "last_micro_batch")),
        (["H100"], ("auto", "auto")),
        (["H100", "H200"], ("auto", "auto")),
    ):
        now = changed(config, parallel__timeout_seconds=7)
        found = earlier_choice(now, start, layout_of(now, devices)).parallel
        assert (found.activation_checkpointing, found.sync_gradients) == values
    given = changed(config, parallel__activation_checkpointing="none")
    assert earlier_choice(given, start, layout_of(given, ["H100"] * 2)).parallel.undecided == ("sync_gradients",)
    other = changed(config, parallel__cpu_offload=True)
    assert earlier_choice(other, start, layout_of(other, ["H100"] * 2)).parallel.undecided


@pytest.mark.parametrize("starts", [[], [{}], [{"layout": None}], [{"layout": {}}]])
def test_a_history_that_says_nothing_decides_nothing(tmp_path: Path, starts: list[dict[str, Any]]) -> None:
    config = make_config("m", "d", tmp_path / "run")
    assert earlier_choice(config, resumed(tmp_path, *starts), layout_of(config, ["cpu"])) == config
    (tmp_path / "run" / "provenance.json").write_text("no JSON")
    assert earlier_choice(config, Start(checkpoint_path(tmp_path / "run", 2)), layout_of(config, ["cpu"])) == config


def test_a_fresh_start_takes_nothing_from_a_history(tmp_path: Path) -> None:
    config = make_config("m", "d", tmp_path / "run")
    before = choice.with_values(config, {"activation_checkpointing": "full", "sync_gradients": "last_micro_batch"})
    resumed(tmp_path, {"layout": layout_of(before, ["cpu"])})
    assert earlier_choice(config, Start(), layout_of(config, ["cpu"])) == config
