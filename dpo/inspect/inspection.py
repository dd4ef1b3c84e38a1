"""Everything that `python -m dpo.inspect` shows, in one value."""

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
    """How texts begin and end; `bos` and `eos` as people read them, with their ids, "none" where there is none."""

    bos: str
    eos: str
    adds_bos: bool
    """Whether the tokenizer puts BOS before a text by itself."""
    adds_eos: bool
    """Whether it puts EOS after it; on a prompt that is taken away."""
    has_template: bool
    eos_ids: tuple[int, ...]
    """The tokenizer's; empty where all data came as tokens."""
    model_eos_ids: tuple[int, ...]
    """Where the model's config says that generating stops."""


@dataclass(frozen=True)
class Inspection:
    """What a run will see."""

    config: Config
    report: DataReport
    tokenizer: TokenizerFacts
    train: SetStatistics
    eval: SetStatistics | None
    """None where nothing is evaluated."""
    eval_pairs_in_training: int
    """Pairs of evaluation whose prompt is in training too."""
    steps: StepTokens
    last_step: int
    examples: tuple[ShownPair, ...]
    """The first pairs of step 1."""


def inspect_data(
    config: Config, model_config: PretrainedConfig, tokenizer: Any, data: PreferenceData, num_examples: int
) -> Inspection:
    """Counts everything. `tokenizer`: None where all data came as tokens and the model has none."""
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
    """BOS and EOS of texts are the tokenizer's, of rows of tokens the model's."""
    encoders = [ids_encoder(model_config)] if any(map(holds_ids, formats)) else []
    encoders += [text_encoder(tokenizer)] if not all(map(holds_ids, formats)) else []
    bos = dict.fromkeys(encoder.bos_id for encoder in encoders if encoder.bos_id is not None)
    return EndIds(tuple(bos), tuple(dict.fromkeys(i for encoder in encoders for i in encoder.eos_ids)))


def tokenizer_facts(formats: set[str], tokenizer: Any, ends: EndIds, model_config: Any) -> TokenizerFacts:
    """`tokenizer`: may be None where all data came as tokens; it then encodes nothing."""
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
