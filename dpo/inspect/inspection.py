"""Gathers everything that `python -m dpo.inspect` shows in one value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from dpo.batch.order import make_order
from dpo.config import Config
from dpo.encode.encoder import Encoder, ids_encoder, text_encoder
from dpo.encode.stops import model_stop_ids
from dpo.inspect.shown_pairs import ShownPair, make_speller, show_pairs
from dpo.inspect.statistics import EndIds, SetStatistics, shared_pairs, summarize
from dpo.inspect.step_tokens import StepTokens, step_tokens
from dpo.pairs.prepare import PreferenceData
from dpo.pairs.report import DataReport
from dpo.sources.formats.examples import holds_ids


@dataclass(frozen=True)
class TokenizerFacts:
    """How texts begin and end. `bos` and `eos` (all stop tokens) are tokens as text with their ids, or "none"."""

    bos: str
    eos: str
    adds_bos: bool
    """Whether the tokenizer puts BOS before a text by itself."""
    adds_eos: bool
    """Whether the tokenizer puts EOS after a text by itself; it is removed from prompts."""
    has_template: bool
    eos_id: int | None
    """The tokenizer's EOS, which is appended to texts; None where all data came as tokens."""
    model_stop_ids: tuple[int, ...]
    """Ids at which the model's generation stops, by its config.json and generation_config.json."""


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown of a run's data."""

    config: Config
    report: DataReport
    tokenizer: TokenizerFacts
    train: SetStatistics
    eval: SetStatistics | None
    """None where nothing is evaluated."""
    eval_pairs_in_training: int
    """Evaluation pairs whose prompt is also in the training set."""
    steps: StepTokens
    last_step: int
    examples: tuple[ShownPair, ...]
    """The first pairs of step 1."""


def inspect_data(
    config: Config, model_config: PretrainedConfig, tokenizer: Any, data: PreferenceData, num_examples: int
) -> Inspection:
    """Returns the inspection of the data.

    Args:
        config: the run's config.
        model_config: the model's config.
        tokenizer: None where all data came as tokens and the model has no tokenizer.
        data: the prepared pairs.
        num_examples: pairs of step 1 that are shown token by token.
    """
    order, last_step, _ = make_order(config, data)
    formats = {source.format for source in data.report.sources}
    encoders = encoders_of(config, formats, tokenizer, model_config)
    ends = replace(end_ids(encoders), unknown=unknown_ids(encoders))
    speller = make_speller(tokenizer, (*ends.bos, *ends.eos))
    first = order.items(1)[:num_examples]
    sources = [source for source in data.report.sources if source.key.startswith("data.train")]
    return Inspection(
        config=config,
        report=data.report,
        tokenizer=tokenizer_facts(encoders, tokenizer, model_stop_ids(model_config, config.model.path)),
        train=summarize(data.train, ends),
        eval=summarize(data.eval, ends) if len(data.eval) else None,
        eval_pairs_in_training=shared_pairs(data.train, data.eval),
        steps=step_tokens(data.train, order, last_step),
        last_step=last_step,
        examples=tuple(show_pairs(data.train, first, speller, ends.eos, sources)),
    )


def encoders_of(config: Config, formats: set[str], tokenizer: Any, model_config: Any) -> list[Encoder]:
    """Returns the encoders of the sources: the model's BOS and stop tokens for rows of tokens, then the tokenizer's.

    Args:
        config: the run's config, for the model's folder.
        formats: the formats of all sources.
        tokenizer: a transformers tokenizer; None where all data came as tokens.
        model_config: the transformers config of the model.
    """
    stops = model_stop_ids(model_config, config.model.path)
    encoders = [ids_encoder(model_config, stops)] if any(map(holds_ids, formats)) else []
    return encoders + ([text_encoder(tokenizer, stops)] if not all(map(holds_ids, formats)) else [])


def end_ids(encoders: Sequence[Encoder]) -> EndIds:
    """Returns the BOS and stop tokens of all encoders, each once."""
    bos = dict.fromkeys(encoder.bos_id for encoder in encoders if encoder.bos_id is not None)
    return EndIds(tuple(bos), tuple(dict.fromkeys(i for encoder in encoders for i in encoder.stop_ids)))


def unknown_ids(encoders: Sequence[Encoder]) -> tuple[int, ...]:
    """Returns the tokenizer's token for characters that it lacks; none where that is a token with another use too."""
    ends, tokenizer = end_ids(encoders), encoders[-1].tokenizer
    found = None if tokenizer is None else tokenizer.unk_token_id
    return () if found is None or found in (*ends.bos, *ends.eos) else (int(found),)


def tokenizer_facts(encoders: Sequence[Encoder], tokenizer: Any, model_stops: tuple[int, ...]) -> TokenizerFacts:
    """Returns how texts begin and end.

    Args:
        encoders: the encoders of the sources; the last one has the tokenizer, where one is used.
        tokenizer: a transformers tokenizer; None where all data came as tokens.
        model_stops: the stop tokens of the model.
    """
    ends, encoder = end_ids(encoders), encoders[-1]
    bos, eos = (_named(tokenizer, ids) for ids in (ends.bos, ends.eos))
    if encoder.tokenizer is None:
        return TokenizerFacts(bos, eos, False, False, False, None, model_stops)
    has_template = bool(tokenizer.chat_template)
    return TokenizerFacts(bos, eos, encoder.adds_bos, encoder.adds_eos, has_template, encoder.stop_ids[0], model_stops)


def _named(tokenizer: Any, ids: tuple[int, ...]) -> str:
    texts = [f"id {i}" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(i)} (id {i})" for i in ids]
    return ", ".join(texts) or "none"
