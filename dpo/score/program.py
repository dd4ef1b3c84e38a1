"""Scores any model on any preference set: reward margins and accuracy against the config's reference.

    python -m dpo.score --model RUN/final --config RUN/config.yaml [--data.eval '[{path: FILE}]'] [--json]
    python -m dpo.score --adapter DIR --config FILE

The pairs are the evaluation pairs of the config, or its training pairs where it has no evaluation pairs. The
reference's log-probabilities come from the cache; missing rows are computed and added to it.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.adapters.base import NamedModel
from dpo.adapters.choice import find_adapters
from dpo.adapters.start import start_hash
from dpo.base.errors import RunError, renamed_places
from dpo.batch.packer import Packer, make_packer
from dpo.config import Config, LoraConfig, LossConfig
from dpo.disk.storage import check_cache
from dpo.distributed.collectives import first_on_each_node
from dpo.distributed.preemption import never
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World
from dpo.model.build import read_start
from dpo.model.policy import Policy
from dpo.model.source import SourceModel
from dpo.model.warm_up import load_and_warm
from dpo.pairs.pair_set import PairSet
from dpo.pairs.prepare import PreferenceData
from dpo.ref_logps.cache import open_cache
from dpo.ref_logps.fill import fill, lookup
from dpo.run.inputs import read_inputs
from dpo.score.arguments import MODEL, read_arguments
from dpo.step.evaluation import Evaluation, evaluate
from dpo.terminal.console import in_one_line, say

COLUMNS = 120
"""Width of the table where the output is not a terminal."""


@dataclass(frozen=True)
class Scores:
    """The metrics of a model on pairs (see `score_pairs`), with the names of model, reference and loss."""

    model: str
    reference: str | None
    """None where the loss has no reference."""
    loss: str
    beta: float
    pairs_of: str
    """"evaluation" or "training"."""
    metrics: dict[str, float]
    sources: dict[str, dict[str, float]]
    """The metrics of each source by its config key; empty without --by-source."""


# --- scores ----------------------------------------------------------------------------------------------------------


def score_model(config: Config, reference_adapter: str | None, by_source: bool, world: World) -> Scores:
    """Scores the model in model.path, with the adapters in lora.path, on the pairs of the config. Every rank must get
    here, or the rest hang.

    Args:
        config: the config, with the model to score (`with_model`).
        reference_adapter: folder or hub id of the adapters of the reference; None: it has none.
        by_source: whether to score the pairs of each source as well, in another pass.
        world: the ranks, before `start_devices`.

    Raises:
        UserError: on every rank, where any input is wrong.
        RunError: on every rank, where a loss is not finite.
    """
    check_cache(config, world)
    inputs = read_inputs(config, world)
    is_eval = len(inputs.data.eval) > 0
    pairs_of, pairs = ("evaluation", inputs.data.eval) if is_eval else ("training", inputs.data.train)
    name = str(scored_model(config))
    if world.is_main:
        say(f"scores {name} on the {len(pairs):,} {pairs_of} pairs")
    reference = inputs.reference
    if reference_adapter:
        reference = first_on_each_node(world, lambda: _adapted(config, inputs.reference, reference_adapter))
    start_devices(world, config.parallel.timeout_seconds)
    packer = make_packer(config, world, inputs.model.config)
    if config.loss.facts.uses_reference:
        packer = _with_reference(packer, reference, pairs, config, world)
    policy = load_and_warm(config, world, inputs.model, packer, (False,))
    read_start(policy)
    parts = split_by_source(inputs.data, pairs, len(config.data.train), is_eval) if by_source else {}
    metrics = score_pairs(policy, pairs, packer, config, world)
    sources = {key: score_pairs(policy, part, packer, config, world) for key, part in parts.items()}
    against = config.reference.path and str(NamedModel(config.reference.path, reference_adapter))
    return Scores(name, against, config.loss.name, config.loss.beta, pairs_of, metrics, sources)


def scored_model(config: Config) -> NamedModel:
    """Returns the names of the model to score."""
    return NamedModel(config.model.path, config.lora.path)


def _adapted(config: Config, base: SourceModel, adapter: str) -> SourceModel:
    """Returns the reference with its adapters; it has the base's hash where they change nothing."""
    with renamed_places({"lora.path": "lora.path of the config"}):  # not the model's, from a flag
        adapters = find_adapters(replace(config, lora=LoraConfig(path=adapter)))
    assert adapters is not None
    return replace(base, adapters=adapters, hash=start_hash(base.base_hash, adapters))


def _with_reference(packer: Packer, source: SourceModel, pairs: PairSet, config: Config, world: World) -> Packer:
    """Returns the packer with the reference's log-probabilities of `pairs` alone."""

    def reference() -> Policy:
        policy = load_and_warm(config, world, source, packer, (False,))
        read_start(policy)
        return policy

    cache = open_cache(config, source.hash, world)
    rows, _ = fill(cache, [pairs], reference, packer, world, never)
    return replace(packer, ref_logps=lookup(rows))


def score_pairs(policy: Policy, pairs: PairSet, packer: Packer, config: Config, world: World) -> dict[str, float]:
    """Returns the metrics of `metrics.pair_means` and `further_metrics`. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model to score.
        pairs: the pairs, the same on every rank.
        packer: packs the pairs; its `ref_logps` must be set where the loss has a reference.
        config: gives the loss, and the model's name for errors.
        world: the ranks.

    Raises:
        RunError: the loss is not finite.
    """
    result = evaluate(policy, pairs, packer, config.loss, never)
    assert result is not None
    if not math.isfinite(result.metrics["loss"]):
        raise RunError(f"the loss of {scored_model(config)} is {result.metrics['loss']}; its weights are at fault")
    return result.metrics | further_metrics(result, pairs.lengths(), config.loss)


def further_metrics(result: Evaluation, lengths: np.ndarray, loss: LossConfig) -> dict[str, float]:
    """Returns the metrics of a score that `metrics.pair_means` does not give.

    tokens/chosen     mean number of tokens of the winners, EOS included; tokens/rejected of the losers
    nats/margins      mean of h = (pi_logp - ref_logp)[winner] - (pi_logp - ref_logp)[loser]: rewards/margins / beta
    nats/margins_per_token  nats/margins / the mean number of tokens per completion
    wins, ties, losses      numbers of pairs whose winner's reward is greater, equal, less
    shares/ties       ties / pairs; the share of wins is rewards/accuracies

    Where rewards are beta pi_logp / n, there is no nats/margins, and nats/margins_per_token is rewards/margins / beta.
    Where the loss has no rewards, there is only tokens/chosen.

    Args:
        result: the evaluation of N pairs.
        lengths: (N, 3) tokens of prompt, winner and loser of each pair.
        loss: gives the kind of the rewards, and `beta`, by which they are divided to get nats.
    """
    _, chosen, rejected = lengths.mean(0).tolist()
    metrics: dict[str, float] = {"tokens/chosen": chosen}
    if "rewards/margins" in result.metrics:
        metrics["tokens/rejected"] = rejected
        margin, signs = result.metrics["rewards/margins"] / loss.beta, np.sign(result.margins)
        wins, ties, losses = (int((signs == sign).sum()) for sign in (1, 0, -1))
        if loss.facts.rewards == "implicit":
            metrics |= {"nats/margins": margin, "nats/margins_per_token": margin / ((chosen + rejected) / 2)}
        else:
            metrics |= {"nats/margins_per_token": margin}
        metrics |= {"wins": wins, "ties": ties, "losses": losses, "shares/ties": ties / max(len(signs), 1)}
    return metrics


def split_by_source(data: PreferenceData, pairs: PairSet, num_train: int, is_eval: bool) -> dict[str, PairSet]:
    """Returns config key -> pairs of each source that has pairs in the set.

    The rows of an evaluation set are numbered across data.eval and then data.train, since data.train may hold out rows.

    Args:
        data: the data, with a report per source.
        pairs: the set to split, `data.train` or `data.eval`.
        num_train: number of sources in data.train.
        is_eval: whether `pairs` is the evaluation set.
    """
    sources = data.eval_sources if is_eval else data.report.sources[:num_train]
    number = pairs.source_of_pair([source.rows for source in sources])
    parts = {source.key: pairs.select(number == i) for i, source in enumerate(sources)}
    return {key: part for key, part in parts.items() if len(part)}


# --- output ----------------------------------------------------------------------------------------------------------


def show(scores: Scores) -> None:
    """Prints a table with a row per metric, a column for all pairs, and a column per source."""
    against = f"against {scores.reference}, beta {scores.beta:g}" if scores.reference else "no reference"
    table = Table("")
    for name in ("all", *scores.sources):
        table.add_column(Text(in_one_line(name)), justify="right")
    for name in scores.metrics:
        columns = (scores.metrics, *scores.sources.values())
        table.add_row(name, *(_shown(column[name]) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    heading = f"{scores.model} on {scores.pairs_of} pairs, {scores.loss}: {against}"
    console.print(Text(in_one_line(heading)), soft_wrap=True)
    console.print(table)


def _shown(metric: float) -> str:
    return f"{metric:,}" if isinstance(metric, int) else f"{metric:.4f}"


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs `python -m dpo.score`."""
    arguments = read_arguments()
    parallel = arguments.config.parallel
    with (
        renamed_places({"model.path": MODEL, "lora.path": arguments.adapter_place}),
        open_world(parallel.setup_timeout_seconds, parallel.replicate) as world,
    ):
        scores = score_model(arguments.config, arguments.reference_adapter, arguments.by_source, world)
        if world.is_main and arguments.as_json:
            print(json.dumps(asdict(scores), allow_nan=False))
        elif world.is_main:
            show(scores)
