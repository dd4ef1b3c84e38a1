"""The unusual properties of a run's data, one line each, with advice."""

from collections.abc import Iterator

from dpo.config import Config
from dpo.inspect.inspection import Inspection, TokenizerFacts
from dpo.inspect.statistics import Ends, SetStatistics
from dpo.inspect.words import sets_of
from dpo.pairs.report import SourceReport

MUCH_CUT = 0.05
"""Share of prompts or completions above which their truncation is reported."""
MUCH_BIAS = 0.1
"""Distance of the share of longer winners from 0.5 above which it is reported."""


def findings(inspection: Inspection) -> list[str]:
    """Returns one line per unusual property of the data."""
    lines = [*_tokenizer_findings(inspection.tokenizer)]
    lines += [line for source in inspection.report.sources for line in _source_findings(source)]
    for name, statistics in sets_of(inspection).items():
        lines += [f"{name}: {line}" for line in _begin_findings(statistics.ends, inspection.tokenizer)]
        lines += [f"{name}: {line}" for line in _set_findings(statistics, inspection.config)]
    if inspection.eval_pairs_in_training:
        lines.append(
            f"evaluation: pairs whose prompt is also in the training set: {inspection.eval_pairs_in_training:,}"
            f" (prompts: {inspection.report.eval_prompts_in_training:,}); metrics of these pairs are not held out;"
            " data.train[i].holdout holds whole prompts out"
        )
    return lines


def _tokenizer_findings(facts: TokenizerFacts) -> Iterator[str]:
    if facts.eos_id is not None and facts.model_stop_ids and facts.eos_id not in facts.model_stop_ids:
        stops = ", ".join(map(str, facts.model_stop_ids))
        yield (
            f"texts end with the tokenizer's EOS, id {facts.eos_id}, but the model's config stops generating at id"
            f" {stops}; messages end as the chat template writes it, and so does a text that has that token at its end"
        )


def _source_findings(source: SourceReport) -> Iterator[str]:
    """Yields how the texts of a source were read where that may not be what its user expects, each with advice."""
    if source.lacks_template:
        yield (
            f"{source.key}: {source.texts:,} rows of texts do not go through the tokenizer's chat template; for a chat"
            f" model {source.key}.as_chat: true"
        )
    if source.over_positions:
        yield f"{source.key}: {source.over_positions_words()}"
    facts = (
        (
            source.boundary_merges,
            "completions would share a token with their prompt as one text, and are tokenized apart; a prompt that ends"
            " before its last space or line feed, which the completion then begins with, has no such boundary",
        ),
        (
            source.written_bos,
            "prompts bring their BOS, and the tokenizer's was left out; prompts without it give the same tokens",
        ),
        (source.two_bos, "prompts begin with two BOS; one is what models are trained on: remove it from the rows"),
        (
            source.rendered_chats,
            "prompts are texts that spell control tokens, as if a template had written them; rows of messages let"
            " the tokenizer's template do so",
        ),
        (
            source.control_texts,
            "rows spell a control token in a message or an answer, where it stays text; where it is left over from a"
            " template, remove it from the rows",
        ),
        (
            source.unwritten,
            "rows have a message or a tool call that the chat template leaves out; a model.tokenizer whose template"
            " knows these roles writes them",
        ),
        (
            source.dropped.get("control_token", 0),
            "pairs were dropped because an answer has a stop token inside; end it there, or leave the token out",
        ),
    )
    yield from (f"{source.key}: {count:,} {text}" for count, text in facts if count)


def _begin_findings(ends: Ends, facts: TokenizerFacts) -> Iterator[str]:
    """Yields prompts without the BOS that others have, and tokens for characters that the tokenizer lacks."""
    with_bos = ends.begin_with_bos + ends.begin_with_two_bos
    if ends.begin_without_bos and with_bos:
        what = f"{ends.begin_without_bos:,} prompts begin without BOS, and {with_bos:,} with it"
        yield f"{what}; a model is trained on one of the two: see how each source is read, above"
    elif ends.begin_without_bos and facts.adds_bos:
        what = f"{ends.begin_without_bos:,} prompts begin without BOS, which the tokenizer adds to texts"
        yield f"{what}; the chat template or the rows of tokens must write it, if the model was trained with it"
    if ends.unknown_tokens:
        what = f"{ends.unknown_tokens:,} tokens stand for characters that the tokenizer lacks"
        yield f"{what}: the model cannot read or write them; remove them from the rows, or check model.tokenizer"


def _set_findings(statistics: SetStatistics, config: Config) -> Iterator[str]:
    ends, repeats, bias = statistics.ends, statistics.repeats, statistics.bias
    prompts_cut, completions_cut = ends.prompts_cut / ends.rows, ends.completions_cut / ends.completions
    if prompts_cut > MUCH_CUT:
        limit = f"data.max_prompt_length {config.data.max_prompt_length}"
        yield f"{prompts_cut:.1%} of the prompts lose their beginning ({limit}); a larger one keeps it"
    if completions_cut > MUCH_CUT:
        limit = f"data.max_length {config.data.max_length}"
        yield f"{completions_cut:.1%} of the completions lose their end, and EOS ({limit}); a larger one keeps it"
    if bias and abs(bias.longer_share - 0.5) > MUCH_BIAS:
        advice = "loss.length_normalized keeps the policy from learning length"
        yield f"the longer completion wins {bias.longer_share:.1%} of the pairs that differ in length; {advice}"
    counts = (
        (ends.eos_inside, "completions with a stop token before their end: generation would end there"),
        (
            ends.end_without_eos - ends.completions_cut,
            "completions that end without a stop token and were not cut: add it to the rows of tokens",
        ),
        (
            repeats.prompts_made_equal,
            "prompts that became equal to another prompt by truncation: a larger data.max_prompt_length helps",
        ),
        (repeats.repeated_pairs, "pairs that repeat an earlier pair: each counts again"),
        (
            repeats.contradicted_pairs,
            "pairs that another pair contradicts: loss.label_smoothing expects them",
        ),
    )
    yield from (f"{count:,} {name}" for count, name in counts if count > 0)
