"""`python -m dpo.score` against the plain models, one completion at a time, and against what a run logs itself."""

import contextlib
import io
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dpo.adapters.base import NamedModel
from dpo.config import Config, LoraConfig, LossConfig, SourceConfig, to_yaml
from dpo.distributed.startup import open_world
from dpo.model.build import load_policy
from dpo.model.policy import Policy
from dpo.score import program as score
from dpo.score.arguments import reference_adapter, with_model
from dpo.step.evaluation import Evaluation
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.peft_folders import adapted_model, save_adapter
from tests.support.ranks import Ranks
from tests.support.runs import cache_folders, changed, eval_lines, exit_code_of, make_config
from tests.support.runs import run as run_training

BETA = 0.5
LORA: list[tuple[str, dict[str, Any]]] = [("dpo", {"lora__rank": 4, "lora__dora": True}), ("sft", {"lora__rank": 4})]
"""Losses and keys of runs of adapters."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and other/, of two families; sft/ and trained/, adapters of model/; pairs.jsonl (12 pairs), eval.jsonl (5)
    and more.jsonl (8).
    """
    root = tmp_path_factory.mktemp("score")
    save_model(root / "model", "llama")
    save_model(root / "other", "gpt-neox", seed=1)
    save_adapter(root / "sft", root / "model", seed=1)
    save_adapter(root / "trained", root / "model", seed=2, use_dora=True, use_rslora=True)
    save_pairs(root / "pairs.jsonl", 6, completions=3, pairs_each=2)
    save_pairs(root / "eval.jsonl", 5, seed=1)
    save_pairs(root / "more.jsonl", 8, seed=2)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return make_config(
        root / "model",
        root / "pairs.jsonl",
        tmp_path / "run",
        data__eval=[SourceConfig(str(root / "eval.jsonl"))],
        loss__beta=BETA,
    )


def words_of(config: Config, folder: Path, model: Path, *more: str) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    return ["--model", str(model), "--config", str(file), *more]


def run(*argv: str) -> int:
    return exit_code_of(score.main, "dpo.score", *argv)


def output_of(*argv: str) -> tuple[int, str]:
    """The exit code, and what went to stdout; on a rank too."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        return run(*argv), stdout.getvalue()


@pytest.fixture
def scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Scores a model as JSON: scored(config, model, *words)."""

    def call(config: Config, model: Path, *more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run(*words_of(config, tmp_path, model, "--json", *more)) == 0
        return json.loads(capsys.readouterr().out)

    return call


def table_of(path: Path, policy: Path, reference: Path) -> np.ndarray:
    """The oracle, a row a pair: pi_w, pi_l, ref_w, ref_l in nats, then the lengths of winner and loser."""
    return table_of_models(path, plain_model(policy), plain_model(reference))


def table_of_models(path: Path, *models: Any) -> np.ndarray:
    """The same of the loaded policy and reference."""
    table = []
    for row in map(json.loads, path.read_text().splitlines()):
        for pair in row["pairs"]:
            sides = [row["completion_ids"][i] for i in pair]
            logps = [plain_logp(model, row["prompt_ids"], side).item() for model in models for side in sides]
            table.append([*logps, *map(len, sides)])
    return np.array(table)


def figures_of(table: np.ndarray) -> dict[str, float]:
    """Every metric, from its formula."""
    pi_w, pi_l, ref_w, ref_l, len_w, len_l = table.T
    h = (pi_w - ref_w) - (pi_l - ref_l)
    return {
        "loss": np.log1p(np.exp(-BETA * h)).mean(),
        "loss_sft": -pi_w.sum() / len_w.sum(),
        "logps/chosen": pi_w.mean(),
        "logps/rejected": pi_l.mean(),
        "logratios_per_token/chosen": ((pi_w - ref_w) / len_w).mean(),
        "logratios_per_token/rejected": ((pi_l - ref_l) / len_l).mean(),
        "rewards/chosen": BETA * (pi_w - ref_w).mean(),
        "rewards/rejected": BETA * (pi_l - ref_l).mean(),
        "rewards/margins": BETA * h.mean(),
        "rewards/accuracies": (h > 0).mean(),
        "pairs": len(h),
        "tokens/chosen": len_w.mean(),
        "tokens/rejected": len_l.mean(),
        "nats/margins": h.mean(),
        "nats/margins_per_token": h.mean() / np.concatenate([len_w, len_l]).mean(),
        "wins": (h > 0).sum(),
        "ties": 0,
        "losses": (h < 0).sum(),
        "shares/ties": 0.0,
    }


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_every_figure_is_that_of_the_plain_models(config: Config, root: Path, scored: Any) -> None:
    """1e-4 relative: margins are differences of sums of some tens of nats, each exact to 1e-6 relative."""
    found = scored(config, root / "other")
    expected = figures_of(table_of(root / "eval.jsonl", root / "other", root / "model"))
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert 0 < expected["wins"] < expected["pairs"]
    rest = {name: fact for name, fact in found.items() if name != "metrics"}
    where = {"model": str(root / "other"), "reference": str(root / "model")}
    assert rest == where | {"loss": "dpo", "beta": BETA, "pairs_of": "evaluation", "sources": {}}


def test_another_reference(config: Config, root: Path, scored: Any) -> None:
    """reference.path, in YAML or here on the command line; model.path then matters no more."""
    found = scored(config, root / "model", "--reference.path", str(root / "other"), "--model.path", "/nowhere")
    expected = figures_of(table_of(root / "eval.jsonl", root / "model", root / "other"))
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    assert found["reference"] == str(root / "other")


def test_training_pairs_where_there_are_no_others(
    config: Config, root: Path, scored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they are fewer than the 64 of a training step; it is said which pairs they are."""
    config = changed(config, data__eval=[])
    found = scored(config, root / "other")
    assert found["pairs_of"] == "training"
    assert found["metrics"] == pytest.approx(
        figures_of(table_of(root / "pairs.jsonl", root / "other", root / "model")), rel=1e-4
    )
    assert run(*words_of(config, tmp_path, root / "other")) == 0
    captured = capsys.readouterr()
    assert f"scores {root / 'other'} on the 12 training pairs" in captured.err
    assert f"{root / 'other'} on training pairs, dpo: against {root / 'model'}, beta 0.5" in captured.out


def with_margins(margins: list[float]) -> Evaluation:
    """An evaluation of pairs with these margins, whose losers have a reward of 1; the mean margin is 1."""
    rewards = {"rewards_chosen": np.array(margins, np.float32) + 1, "rewards_rejected": np.ones(len(margins))}
    return Evaluation({"rewards/margins": 1.0}, rewards)


def test_wins_ties_and_losses_by_hand() -> None:
    """Margins 2, -1, 0, 0, 4: two wins, two ties, one loss; mean 1, at beta 1/2 2 nats. Winners have 1 to 5 tokens, in
    the mean 3, losers 3 to 7, in the mean 5: 1/2 nat a token.
    """
    result = with_margins([2, -1, 0, 0, 4])
    lengths = np.array([[9, tokens, tokens + 2] for tokens in range(1, 6)], np.int32)
    assert score.further_metrics(result, lengths, LossConfig(beta=BETA)) == {
        "tokens/chosen": 3.0,
        "tokens/rejected": 5.0,
        "nats/margins": 2.0,
        "nats/margins_per_token": 0.5,
        "wins": 2,
        "ties": 2,
        "losses": 1,
        "shares/ties": 0.4,
    }


def test_rewards_per_token_by_hand() -> None:
    """A mean margin of 1 at beta 1/2 is 2 nats per token; there is no sum over tokens to tell."""
    result = with_margins([3, -1])
    further = score.further_metrics(result, np.array([[9, 2, 4]] * 2), LossConfig("simpo", beta=BETA))
    assert further["nats/margins_per_token"] == 2 and "nats/margins" not in further
    assert (further["wins"], further["ties"], further["losses"]) == (1, 0, 1)


def test_no_losers_are_told_where_none_are_computed() -> None:
    result = Evaluation({"loss": 1.0}, {"logps_chosen": np.zeros(2)})
    assert score.further_metrics(result, np.array([[9, 2, 2], [9, 4, 4]]), LossConfig("sft")) == {"tokens/chosen": 3.0}


@pytest.mark.parametrize(("loss", "lora"), [("dpo", {}), ("ipo", {}), ("simpo", {}), ("sft", {}), *LORA])
def test_the_final_model_scores_what_its_run_logged(loss: str, lora: dict[str, Any], config: Config) -> None:
    """To the last bit; `config.yaml` of the run is config enough. simpo has no reference, sft no rewards either. A run
    of adapters leaves a folder of them.
    """
    steps = {"batch__pairs_per_step": 4, "train__steps": 2, "optim__lr": 1e-3, "optim__warmup_steps": 0}
    folder = run_training(changed(config, loss__name=loss, **steps, **lora))
    assert (folder / "final" / "adapter_config.json").exists() == bool(lora)
    logged = {name.removeprefix("eval/"): value for name, value in eval_lines(folder)[-1].items()}
    assert logged.pop("step") == 2
    code, out = output_of("--model", str(folder / "final"), "--config", str(folder / "config.yaml"), "--json")
    found = json.loads(out)
    assert code == 0
    assert {name: found["metrics"][name] for name in logged} == logged
    assert ("rewards/margins" in logged) == ("wins" in found["metrics"]) == (loss != "sft")
    assert (found["reference"] is None) == (loss in ("simpo", "sft"))


def test_a_model_that_is_not_finite_has_no_score(
    config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(root / "model" / "model.safetensors")
    shutil.copytree(root / "model", tmp_path / "broken")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    assert run(*words_of(config, tmp_path, tmp_path / "broken", "--json")) == 1
    captured = capsys.readouterr()
    assert f"error: the loss of {tmp_path / 'broken'} is nan; its weights are at fault" in captured.err
    assert not captured.out


def test_the_model_takes_the_place_of_the_configs_own(config: Config) -> None:
    """model.path stays the reference and the tokenizer, unless others are named; sft has no reference. The adapters
    that the config would train are not those of the model.
    """
    it = NamedModel("it")
    own = with_model(changed(config, lora__rank=3), it)
    assert (own.model.path, own.model.tokenizer, own.reference.path) == ("it", *[config.model.path] * 2)
    assert own.lora == LoraConfig()
    named = with_model(changed(config, model__tokenizer="words", reference__path="other"), it)
    assert (named.model.path, named.model.tokenizer, named.reference.path) == ("it", "words", "other")
    assert with_model(changed(config, loss__name="sft"), it).reference.path is None
    assert with_model(config, NamedModel("it", "on it")).lora == LoraConfig(path="on it")


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--adapter", "trained"], ["--model", "trained"]])
def test_adapters_score_as_peft_computes_them(words: list[str], config: Config, root: Path, tmp_path: Path) -> None:
    """Against the base, by default; log-probabilities to 1e-5, margins, which are differences of them, to 1e-4. The
    rows of the reference are those that a whole model reads.
    """
    (_, table), names = words_run(config, tmp_path, "--model", str(root / "other")), (words[0], str(root / words[1]))
    code, found = words_run(config, tmp_path, *names)
    models = adapted_model(root / "model", root / "trained"), plain_model(root / "model")
    expected = figures_of(table_of_models(root / "eval.jsonl", *models))
    assert code == 0 and found["metrics"] == pytest.approx(expected, rel=1e-4)
    for name in ("logps/chosen", "logps/rejected"):
        assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-5)
        assert found["metrics"][name] != pytest.approx(table["metrics"][name], rel=1e-2)
    assert (found["model"], found["reference"]) == (f"{root / 'trained'} on {root / 'model'}", str(root / "model"))
    assert len(cache_folders(tmp_path)) == 1


def words_run(config: Config, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a score."""
    code, out = output_of(*words_of(config, folder, folder, "--json")[2:], *words)
    return code, json.loads(out)


@pytest.mark.parametrize("adapter", ["start", "base"])
def test_the_reference_of_a_run_from_adapters(adapter: Any, config: Config, root: Path, tmp_path: Path) -> None:
    """The model with the adapters from which the run starts, or the base where the config says so."""
    config = changed(config, lora__path=str(root / "sft"), reference__adapter=adapter)
    _, found = words_run(config, tmp_path, "--model", str(root / "trained"))
    models = {"start": adapted_model(root / "model", root / "sft"), "base": plain_model(root / "model")}
    policy = adapted_model(root / "model", root / "trained")
    expected = figures_of(table_of_models(root / "eval.jsonl", policy, models[adapter]))
    assert found["metrics"] == pytest.approx(expected, rel=1e-4)
    shown = {"start": f"{root / 'sft'} on {root / 'model'}", "base": str(root / "model")}
    assert found["reference"] == shown[adapter]
    assert (reference_adapter(config) is None) == (adapter == "base")


def test_adapters_without_effect_leave_the_reference(config: Config, root: Path, tmp_path: Path) -> None:
    """A start whose B is 0 is the base: its rows are those of the base."""
    without = save_adapter(tmp_path / "zero", root / "model", has_effect=False)
    _, alone = words_run(config, tmp_path, "--model", str(root / "other"))
    _, found = words_run(changed(config, lora__path=str(without)), tmp_path, "--model", str(root / "other"))
    assert found["metrics"] == alone["metrics"]
    assert len(cache_folders(tmp_path)) == 1


@pytest.mark.xdist_group("ranks")
def test_adapters_on_ranks(ranks: Ranks, config: Config, root: Path, tmp_path: Path) -> None:
    words = words_of(changed(config, lora__path=str(root / "sft")), tmp_path, root / "trained", "--json")
    ((code, alone),) = ranks(1, output_of, *words)
    ((_, together), *_) = ranks(2, output_of, *words)
    assert code == 0
    assert json.loads(together)["metrics"] == pytest.approx(json.loads(alone)["metrics"], rel=1e-5)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_only_rows_that_are_needed_and_missing_are_computed(
    config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 pairs have 10 completions; none of the training pairs; the same again computes none, and no reference is loaded
    for it.
    """
    for computed in (10, 0):
        assert run(*words_of(config, tmp_path, root / "other")) == 0
        assert (
            f"reference: {computed} log-probabilities computed, {10 - computed} from the cache"
            in capsys.readouterr().err
        )
    assert len(cache_folders(tmp_path)) == 1


# --- sources ---------------------------------------------------------------------------------------------------------


def test_each_source_alone(config: Config, root: Path, tmp_path: Path, scored: Any) -> None:
    """Two sources of data.eval, and two prompts held out of training with their two pairs each: each scores what it
    scores alone, all together their mean over pairs.
    """
    shutil.copy(root / "pairs.jsonl", tmp_path / "held.jsonl")
    sources = [SourceConfig(str(root / name)) for name in ("eval.jsonl", "more.jsonl")]
    train = [SourceConfig(str(root / "more.jsonl")), replace(sources[0], path=str(tmp_path / "held.jsonl"), holdout=2)]
    config = changed(config, data__eval=sources, data__train=train)
    found = scored(config, root / "other", "--by-source")
    parts = found["sources"]
    assert {key: part["pairs"] for key, part in parts.items()} == {
        "data.eval[0]": 5,
        "data.eval[1]": 8,
        "data.train[1]": 4,
    }
    for number, source in enumerate(sources):
        alone = scored(changed(config, data__eval=[source], data__train=train[:1]), root / "other")["metrics"]
        assert parts[f"data.eval[{number}]"] == pytest.approx(alone, rel=1e-5)
    for name in ("loss", "rewards/margins", "tokens/chosen", "logps/rejected"):
        mean = sum(part["pairs"] * part[name] for part in parts.values()) / 17
        assert found["metrics"][name] == pytest.approx(mean, rel=1e-5)


# --- ranks, table, errors --------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
def test_on_ranks(ranks: Ranks, config: Config, root: Path, tmp_path: Path) -> None:
    """Three ranks, two sources, a layout of the config's own that these are too few for."""
    config = changed(config, parallel__shard=8, parallel__replicate=2)
    words = words_of(config, tmp_path, root / "other", "--json", "--by-source")
    ((code, alone),) = ranks(1, output_of, *words)
    (first, *others) = ranks(3, output_of, *words)
    assert (code, first[0], others) == (0, 0, [(0, "")] * 2)
    assert json.loads(first[1])["metrics"] == pytest.approx(json.loads(alone)["metrics"], rel=1e-5)


def test_a_table_for_people(config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a metric, counts as they are, a column for all and one for each source."""
    assert run(*words_of(config, tmp_path, root / "other", "--by-source")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{root / 'other'} on evaluation pairs, dpo: against {root / 'model'}, beta 0.5"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    rows = {name: values for name, *values in cells}
    margin = figures_of(table_of(root / "eval.jsonl", root / "other", root / "model"))["rewards/margins"]
    assert rows["pairs"] == ["5", "5"]
    assert rows["rewards/margins"] == [f"{margin:.4f}"] * 2
    header = next(line for line in lines if "data.eval[0]" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["", "all", "data.eval[0]"]


def test_help_names_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    out = capsys.readouterr().out
    assert all(word in out for word in ("--model DIR", "--by-source", "--json", "--help-config"))


TWICE = "command line: --adapter: --model {}/trained has adapters already; valid: --model with their base"
LOST = "command line: --model: {}/lost holds adapters, whose base /no/where is not here; valid: base_model_name_or_path"


def lost_base(tmp_path: Path) -> Path:
    """A folder of adapters whose base was moved."""
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no/where"}))
    return tmp_path / "lost"


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a program that refuses its input."""
    assert run(*argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line.removeprefix("error: ")


def test_errors_say_where(config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of this program hide neither the config's file nor the command line."""
    words = words_of(config, tmp_path, root / "other", "--json")
    cases: list[tuple[list[str], str]] = [
        (words[2:], "command line: --model: is missing; valid: --model DIR"),
        (["--model"], "command line: argument --model: expected one argument; valid: see "),
        (["--json=3", *words[:-1]], "command line: argument --json: ignored explicit argument '3'; valid: see "),
        ([*words, "--loss.bata", "1"], "command line: loss.bata: unknown key; did you mean loss.beta? valid: "),
        ([*words, "--model", "/nowhere"], "command line: --model: given twice, "),
        (["--model", "/nowhere", *words[2:]], "command line: --model: no such folder: /nowhere; valid: "),
        (["--adapter", str(root / "sft"), "--model", str(root / "trained"), *words[2:]], TWICE.format(root)),
        (["--model", str(lost_base(tmp_path)), *words[2:]], LOST.format(tmp_path)),
        ([*words, "--reference.path", "/nowhere"], "command line: reference.path: no such folder: /nowhere; valid: "),
    ]
    for argv, error in cases:
        assert error_of(capsys, *argv).startswith(error)
    words_of(changed(config, reference__path="/nowhere"), tmp_path, root / "other")
    assert error_of(capsys, *words).startswith(f"{tmp_path / 'config.yaml'}: reference.path: no such folder")


def test_one_model_is_in_memory_at_a_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty cache the reference computes first; it is gone when the model that is scored is loaded."""
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counted(*args: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        policy = load_policy(*args)
        models.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr("dpo.model.warm_up.load_policy", counted)
    with open_world(60) as world:
        score.score_model(with_model(config, NamedModel(config.model.path)), None, False, world)
    assert alive == [0, 0]


def test_both_models_are_warmed_up(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each when it is loaded, the reference first, for passes without gradients alone."""
    warmed: list[tuple[str, tuple[bool, ...]]] = []

    def record(policy: Policy, packer: Any, world: Any, passes: tuple[bool, ...]) -> None:
        warmed.append((policy.config.model_type, passes))

    monkeypatch.setattr("dpo.model.warm_up.warm_up", record)
    other = with_model(changed(config, reference__path=str(root / "other")), NamedModel(config.model.path))
    with open_world(60) as world:
        score.score_model(other, None, False, world)
    assert warmed == [("gpt_neox", (False,)), ("llama", (False,))]
