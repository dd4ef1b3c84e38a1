"""What an inspection says, as headings, sentences and rows of tables: the same on a terminal and on a page."""

from collections.abc import Iterator

from dpo.config import Config
from dpo.inspect.inspection import Inspection, TokenizerFacts
from dpo.inspect.lengths import PERCENTS, LengthBias, LengthGroup, Lengths, SetLengths
from dpo.inspect.shown_pairs import Part
from dpo.inspect.statistics import SetStatistics
from dpo.inspect.step_tokens import StepTokens

MUCH_CUT = 0.05
"""Share of prompts or completions whose truncation deserves a look."""
MUCH_BIAS = 0.1
"""How far from half the share of longer winners may be before it deserves a look."""
NAMES = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "total": "prompt + completion"}
"""The fields of SetLengths, for people."""


def sets_of(inspection: Inspection) -> dict[str, SetStatistics]:
    """Training and, where there is one, evaluation, by name."""
    return {"training": inspection.train} | ({"evaluation": inspection.eval} if inspection.eval else {})


# --- what deserves a second look -------------------------------------------------------------------------------------


def findings(inspection: Inspection) -> list[str]:
    """What is unusual, a line each; none where nothing is."""
    lines = [*_tokenizer_findings(inspection.tokenizer)]
    for name, those in sets_of(inspection).items():
        lines += [f"{name}: {line}" for line in _set_findings(those, inspection.config)]
    if inspection.eval_pairs_in_training:
        lines.append(
            f"evaluation: pairs whose prompt is in training too: {inspection.eval_pairs_in_training:,}"
            f" (prompts: {inspection.report.eval_prompts_in_training:,}); what is measured on them is not held out"
        )
    over = sum(source.over_positions for source in inspection.report.sources)
    if over:
        lines.append(f"completions that end after the model's max_position_embeddings: {over:,}")
    return lines


def _tokenizer_findings(facts: TokenizerFacts) -> Iterator[str]:
    if facts.eos_ids and facts.model_eos_ids and not set(facts.eos_ids) & set(facts.model_eos_ids):
        stops = ", ".join(map(str, facts.model_eos_ids))
        yield f"completions end with {facts.eos}, but the model's config stops generating at id {stops}"


def _set_findings(those: SetStatistics, config: Config) -> Iterator[str]:
    ends, repeats, bias = those.ends, those.repeats, those.bias
    prompts_cut, completions_cut = ends.prompts_cut / ends.rows, ends.completions_cut / ends.completions
    if prompts_cut > MUCH_CUT:
        limit = f"data.max_prompt_length {config.data.max_prompt_length}"
        yield f"{prompts_cut:.1%} of the prompts lose their beginning ({limit})"
    if completions_cut > MUCH_CUT:
        yield f"{completions_cut:.1%} of the completions lose their end (data.max_length {config.data.max_length})"
    if abs(bias.longer_share - 0.5) > MUCH_BIAS:
        yield f"the longer completion wins {bias.longer_share:.1%} of the pairs that differ in length"
    counts = (
        (ends.begin_with_two_bos, "prompts that begin with two BOS: one of them is of the text itself"),
        (ends.eos_inside, "completions with an EOS before their end"),
        (ends.end_without_eos - ends.completions_cut, "completions that end without EOS and were not cut"),
        (repeats.prompts_made_equal, "prompts that only truncation made equal to another"),
        (repeats.repeated_pairs, "pairs that stand there again"),
        (repeats.contradicted_pairs, "pairs whose opposite stands there too"),
    )
    yield from (f"{count:,} {what}" for count, what in counts if count > 0)


# --- lengths ---------------------------------------------------------------------------------------------------------


def parts_of(lengths: SetLengths) -> dict[str, Lengths]:
    """The four quantities by the names of NAMES."""
    return {name: getattr(lengths, name) for name in NAMES}


def length_headings() -> list[str]:
    """Of `length_cells`."""
    return ["mean", *({0: "least", 50: "median", 100: "most"}.get(percent, f"{percent} %") for percent in PERCENTS)]


def length_cells(those: Lengths) -> list[str]:
    """Mean and percentiles, tokens."""
    return [f"{those.mean:,.1f}", *(f"{value:,}" for value in those.percentiles)]


# --- ends, repeats ---------------------------------------------------------------------------------------------------


def tokenizer_lines(facts: TokenizerFacts) -> list[str]:
    """What stands at both ends of a text, and who puts it there."""
    if not facts.eos_ids:
        return [f"rows of tokens are used as they are; the model's BOS: {facts.bos}; its EOS: {facts.eos}"]
    bos = "the tokenizer adds it to a prompt" if facts.adds_bos else "the tokenizer does not add it"
    eos = "the tokenizer adds it too; it is taken from prompts" if facts.adds_eos else "the tokenizer does not add it"
    template = "has a chat template" if facts.has_template else "has no chat template"
    return [
        f"BOS: {facts.bos}; {bos}",
        f"EOS: {facts.eos}; every completion of a text gets one; {eos}",
        f"the tokenizer {template}",
    ]


def counts_of(those: SetStatistics) -> list[tuple[str, int, int]]:
    """(what, how many, of how many) of the ends and repeats of a set; parts of a row above begin with spaces."""
    ends, repeats, pairs = those.ends, those.repeats, those.pairs
    return [
        ("rows with a pair", ends.rows, ends.rows),
        ("  prompts cut at their beginning", ends.prompts_cut, ends.rows),
        ("  prompts that begin with one BOS", ends.begin_with_bos, ends.rows),
        ("  prompts that begin with two BOS", ends.begin_with_two_bos, ends.rows),
        ("  prompts that begin without BOS", ends.begin_without_bos, ends.rows),
        ("  different prompts", repeats.prompts, ends.rows),
        ("  prompts that an earlier row has too", repeats.repeated_rows, ends.rows),
        ("  prompts made equal by truncation", repeats.prompts_made_equal, ends.rows),
        ("completions in a pair", ends.completions, ends.completions),
        ("  cut at their end", ends.completions_cut, ends.completions),
        ("  that end with EOS", ends.end_with_eos, ends.completions),
        ("  that end without EOS", ends.end_without_eos, ends.completions),
        ("  with an EOS before their end", ends.eos_inside, ends.completions),
        ("pairs", pairs, pairs),
        ("  that stand there again", repeats.repeated_pairs, pairs),
        ("  whose opposite stands there too", repeats.contradicted_pairs, pairs),
    ]


def count_rows(inspection: Inspection) -> list[tuple[str, list[str]]]:
    """(what, number and share of each set) of every row of the table of ends and repeats."""
    columns = [counts_of(those) for those in sets_of(inspection).values()]
    rows = [(row[0][0], [cell for _, *counts in row for cell in _cells(*counts)]) for row in zip(*columns, strict=True)]
    if inspection.eval:
        cells = _cells(inspection.eval_pairs_in_training, inspection.eval.pairs)
        rows.append(("  whose prompt is in training too", ["", "", *cells]))
    return rows


def _cells(count: int, total: int) -> list[str]:
    return [f"{count:,}", "" if count in (0, total) else f"{count / total:.1%}"]


# --- length bias -----------------------------------------------------------------------------------------------------


def bias_line(bias: LengthBias) -> str:
    """The balance of the labels against length, in words."""
    counts = (bias.winner_longer, bias.equal, bias.winner_shorter)
    longer, equal, shorter = (f"{count / bias.pairs:.1%}" for count in counts)
    return (
        f"The winner is longer in {longer} of the pairs, as long in {equal}, shorter in {shorter}; on average it has "
        f"{bias.mean_difference:+,.1f} tokens. The rule “the longer one wins” has accuracy {bias.accuracy:.3f} "
        f"(a tie counts as wrong), {bias.longer_share:.3f} where lengths differ."
    )


def span(group: LengthGroup) -> str:
    """The differences of a group, tokens."""
    return f"{group.least:,}" if group.least == group.most else f"{group.least:,} to {group.most:,}"


# --- steps -----------------------------------------------------------------------------------------------------------


def steps_line(inspection: Inspection) -> str:
    """How many steps a run has, and what was found in those that were looked at."""
    steps, batch = inspection.steps, inspection.config.batch
    order = inspection.config.data.order + (", grouped by prompt" if batch.group_by_prompt else "")
    return (
        f"{inspection.last_step:,} steps of {batch.pairs_per_step} pairs, {order}; {steps.steps:,} of the first epoch "
        f"looked at. Each has {steps.least:,} to {steps.most:,} tokens of {steps.trees:,.1f} different prompts; the "
        f"largest prompt with its completions has {steps.largest_tree:,}, and batch.tokens_per_micro_batch is "
        f"{batch.tokens_per_micro_batch:,}."
    )


def step_rows(steps: StepTokens) -> list[tuple[str, float]]:
    """(way of computing a step, mean tokens), this trainer's way last."""
    return [
        ("every completion with its prompt, padded to the step's longest", steps.padded),
        ("the same without padding", steps.unpadded),
        ("here: a prompt once, a completion once", steps.shared),
    ]


# --- examples --------------------------------------------------------------------------------------------------------


def cut_words(name: str, part: Part) -> str:
    """What the prompt (`name`), or a completion, has lost."""
    if not part.is_cut:
        return ""
    return ", its beginning cut off" if name == "prompt" else ", its end cut off"
