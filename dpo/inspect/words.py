"""An inspection as headings, sentences and rows of tables, for the terminal and the page alike."""

from dpo.inspect.inspection import Inspection, TokenizerFacts
from dpo.inspect.lengths import PERCENTS, LengthBias, LengthGroup, Lengths, SetLengths
from dpo.inspect.shown_pairs import Part
from dpo.inspect.statistics import SetStatistics
from dpo.inspect.step_tokens import StepTokens

NAMES = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "total": "prompt + completion"}
"""The fields of SetLengths, as shown to the user."""


def sets_of(inspection: Inspection) -> dict[str, SetStatistics]:
    """Returns the statistics of training and, if there is one, of evaluation, by name."""
    return {"training": inspection.train} | ({"evaluation": inspection.eval} if inspection.eval else {})


# --- lengths ---------------------------------------------------------------------------------------------------------


def parts_of(lengths: SetLengths) -> dict[str, Lengths]:
    """Returns the lengths by the keys of NAMES, without those of losers where there are none."""
    return {name: part for name in NAMES if (part := getattr(lengths, name)) is not None}


def length_headings() -> list[str]:
    """Returns the headings of `length_cells`."""
    return ["mean", *({0: "min", 50: "median", 100: "max"}.get(percent, f"{percent} %") for percent in PERCENTS)]


def length_cells(lengths: Lengths) -> list[str]:
    """Returns mean and percentiles, in tokens."""
    return [f"{lengths.mean:,.1f}", *(f"{value:,}" for value in lengths.percentiles)]


# --- ends, repeats ---------------------------------------------------------------------------------------------------


def tokenizer_lines(facts: TokenizerFacts) -> list[str]:
    """Returns how texts begin and end, and whether the tokenizer or the trainer adds these tokens."""
    if facts.eos_id is None:
        return [f"rows of tokens are used as they are; the model's BOS: {facts.bos}; its EOS: {facts.eos}"]
    bos = "the tokenizer adds it to a prompt" if facts.adds_bos else "the tokenizer does not add it"
    eos = (
        "the tokenizer adds one too, which is removed from prompts"
        if facts.adds_eos
        else "the tokenizer does not add it"
    )
    template = "has a chat template" if facts.has_template else "has no chat template"
    return [
        f"BOS: {facts.bos}; {bos}",
        f"stop tokens: {facts.eos}; every completion ends with one; {eos}",
        f"the tokenizer {template}",
    ]


def counts_of(statistics: SetStatistics) -> list[tuple[str, int, int]]:
    """Returns (name, count, total) of the ends and repeats of a set. Names of parts of a row above begin with
    spaces.
    """
    ends, repeats, pairs = statistics.ends, statistics.repeats, statistics.pairs
    return [
        ("rows with a pair", ends.rows, ends.rows),
        ("  prompts cut at their beginning", ends.prompts_cut, ends.rows),
        ("  prompts that begin with one BOS", ends.begin_with_bos, ends.rows),
        ("  prompts that begin with two BOS", ends.begin_with_two_bos, ends.rows),
        ("  prompts that begin without BOS", ends.begin_without_bos, ends.rows),
        ("  different prompts", repeats.prompts, ends.rows),
        ("  prompts that an earlier row also has", repeats.repeated_rows, ends.rows),
        ("  prompts made equal by truncation", repeats.prompts_made_equal, ends.rows),
        ("completions in a pair", ends.completions, ends.completions),
        ("  cut at their end", ends.completions_cut, ends.completions),
        ("  that end with EOS", ends.end_with_eos, ends.completions),
        ("  that end without EOS", ends.end_without_eos, ends.completions),
        ("  with an EOS before their end", ends.eos_inside, ends.completions),
        ("pairs", pairs, pairs),
        ("  that repeat an earlier pair", repeats.repeated_pairs, pairs),
        ("  that another pair contradicts", repeats.contradicted_pairs, pairs),
    ]


def count_rows(inspection: Inspection) -> list[tuple[str, list[str]]]:
    """Returns every row of the table of ends and repeats: its name, and the number and share of each set."""
    columns = [counts_of(statistics) for statistics in sets_of(inspection).values()]
    rows = [(row[0][0], [cell for _, *counts in row for cell in _cells(*counts)]) for row in zip(*columns, strict=True)]
    if inspection.eval:
        cells = _cells(inspection.eval_pairs_in_training, inspection.eval.pairs)
        rows.append(("  whose prompt is also in the training set", ["", "", *cells]))
    return rows


def _cells(count: int, total: int) -> list[str]:
    return [f"{count:,}", "" if count in (0, total) else f"{count / total:.1%}"]


# --- length bias -----------------------------------------------------------------------------------------------------


def bias_line(bias: LengthBias) -> str:
    """Returns a sentence about the length bias."""
    counts = (bias.winner_longer, bias.equal, bias.winner_shorter)
    longer, equal, shorter = (f"{count / bias.pairs:.1%}" for count in counts)
    return (
        f"The winner is longer in {longer} of the pairs, of equal length in {equal}, shorter in {shorter}; the mean "
        f"difference is {bias.mean_difference:+,.1f} tokens. The rule “the longer completion wins” has accuracy "
        f"{bias.accuracy:.3f} (a tie counts as wrong), and {bias.longer_share:.3f} where lengths differ."
    )


def span(group: LengthGroup) -> str:
    """Returns the differences of a group, in tokens."""
    return f"{group.minimum:,}" if group.minimum == group.maximum else f"{group.minimum:,} to {group.maximum:,}"


# --- steps -----------------------------------------------------------------------------------------------------------


def steps_line(inspection: Inspection) -> str:
    """Returns a sentence about the steps of a run and the tokens of the steps that were counted."""
    steps, batch = inspection.steps, inspection.config.batch
    order = inspection.config.data.order + (", grouped by prompt" if batch.group_by_prompt else "")
    return (
        f"{inspection.last_step:,} steps of {batch.pairs_per_step} pairs, {order}; {steps.steps:,} of the first epoch "
        f"counted. Each has {steps.minimum:,} to {steps.maximum:,} tokens of {steps.trees:,.1f} different prompts; the"
        f" largest prompt with its completions has {steps.largest_tree:,}, and batch.tokens_per_micro_batch is "
        f"{batch.tokens_per_micro_batch:,}."
    )


def step_rows(steps: StepTokens) -> list[tuple[str, float]]:
    """Returns (way of computing a step, mean tokens), this trainer's way last."""
    return [
        ("every completion after its prompt, padded to the longest of the step", steps.padded),
        ("the same without padding", steps.unpadded),
        ("here: each prompt once, each completion once", steps.shared),
    ]


# --- examples --------------------------------------------------------------------------------------------------------


def cut_words(name: str, part: Part) -> str:
    """Returns the end that the prompt (`name` is "prompt") or a completion has lost, as text; empty where it is
    whole.
    """
    if not part.is_cut:
        return ""
    return ", its beginning cut off" if name == "prompt" else ", its end cut off"
