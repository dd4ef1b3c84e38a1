"""Gathers everything that `python -m dpo.inspect` shows in one value."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from dpo.batch.order import make_order
from dpo.config import Config
from dpo.data.formats.examples import holds_ids
from dpo.data.prepare import PreferenceData
from dpo.data.report import DataReport
from dpo.data.tokenizer import ids_encoder, text_encoder
from dpo.inspect.shown_pairs import ShownPair, make_speller, show_pairs
from dpo.inspect.statistics import EndIds, SetStatistics, shared_pairs, summarize
from dpo.inspect.step_tokens import StepTokens, step_tokens


@dataclass(frozen=True)
class TokenizerFacts:
    """How texts begin and end. `bos` and `eos` are the tokens as text with their ids, or "none"."""

    bos: str
    eos: str
    adds_bos: bool
    """Whether the tokenizer puts BOS before a text by itself."""
    adds_eos: bool
    """Whether the tokenizer puts EOS after a text by itself; it is removed from prompts."""
    has_template: bool
    eos_ids: tuple[int, ...]
    """EOS ids of the tokenizer; empty where all data came as tokens."""
    model_eos_ids: tuple[int, ...]
    """Ids at which generation stops, by the model's config."""


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
    ends = end_ids(formats, tokenizer, model_config)
    speller = make_speller(tokenizer, (*ends.bos, *ends.eos))
    first = order.items(1)[:num_examples]
    sources = [source for source in data.report.sources if source.key.startswith("data.train")]
    return Inspection(
        config=config,
        report=data.report,
        tokenizer=tokenizer_facts(formats, tokenizer, ends, model_config),
        train=summarize(data.train, ends),
        eval=summarize(data.eval, ends) if len(data.eval) else None,
        eval_pairs_in_training=shared_pairs(data.train, data.eval),
        steps=step_tokens(data.train, order, last_step),
        last_step=last_step,
        examples=tuple(show_pairs(data.train, first, speller, ends.eos, sources)),
    )


def end_ids(formats: set[str], tokenizer: Any, model_config: Any) -> EndIds:
    """Returns the BOS and EOS ids: the tokenizer's for texts, the model's for rows of tokens.

    Args:
        formats: the formats of all sources.
        tokenizer: a transformers tokenizer; None where all data came as tokens.
        model_config: the transformers config of the model.
    """
    encoders = [ids_encoder(model_config)] if any(map(holds_ids, formats)) else []
    encoders += [text_encoder(tokenizer)] if not all(map(holds_ids, formats)) else []
    bos = dict.fromkeys(encoder.bos_id for encoder in encoders if encoder.bos_id is not None)
    return EndIds(tuple(bos), tuple(dict.fromkeys(i for encoder in encoders for i in encoder.eos_ids)))


def tokenizer_facts(formats: set[str], tokenizer: Any, ends: EndIds, model_config: Any) -> TokenizerFacts:
    """Returns how texts begin and end.

    Args:
        formats: the formats of all sources.
        tokenizer: a transformers tokenizer; None where all data came as tokens.
        ends: the BOS and EOS ids, from `end_ids`.
        model_config: the transformers config of the model.
    """
    model_eos = ids_encoder(model_config).eos_ids
    bos, eos = (_named(tokenizer, ids) for ids in (ends.bos, ends.eos))
    if all(map(holds_ids, formats)):
        return TokenizerFacts(bos, eos, False, False, False, (), model_eos)
    encoder = text_encoder(tokenizer)
    with_special, without = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    adds_bos = with_special[0] == encoder.bos_id != without[0]
    has_template = bool(tokenizer.chat_template)
    return TokenizerFacts(bos, eos, adds_bos, encoder.adds_eos, has_template, encoder.eos_ids, model_eos)


def _named(tokenizer: Any, ids: tuple[int, ...]) -> str:
    texts = [f"id {i}" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(i)} (id {i})" for i in ids]
    return ", ".join(texts) or "none"
