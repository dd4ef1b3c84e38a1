"""Checks of a config beyond its types: bounds of single keys (the table `_BOUNDS`), and rules between keys."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dpo.base.errors import UserError
from dpo.config.fields import Config, DataConfig, LossConfig, OptimConfig, ParallelConfig, SourceConfig
from dpo.config.lora_rules import RANKS, lora_problems
from dpo.config.loss_facts import LOSS_FACTS, LossFacts, losses_that
from dpo.config.problem import Problem


@dataclass(frozen=True)
class Bound:
    """Limits of the numbers under `keys`. None always passes: the types decide whether a key may be null."""

    noun: str
    keys: tuple[str, ...]
    least: int | None = None
    """The smallest number that is valid."""
    above: int | None = None
    """All valid numbers are above it."""
    below: float | None = None
    """All valid numbers are below it."""

    def fits(self, number: float) -> bool:
        """Returns whether a number is within the limits."""
        is_low = (self.least is not None and number < self.least) or (self.above is not None and number <= self.above)
        return not is_low and (self.below is None or number < self.below)

    @property
    def limits(self) -> dict[str, float]:
        """Returns the limits in the words of a JSON schema."""
        found = {"minimum": self.least, "exclusiveMinimum": self.above, "exclusiveMaximum": self.below}
        return {word: limit for word, limit in found.items() if limit is not None}

    @property
    def condition(self) -> str:
        """Returns the limits, for the user."""
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
        return " and ".join(f"{signs[word]} {_shown(limit)}" for word, limit in self.limits.items())

    @property
    def valid(self) -> str:
        """Returns the valid values, for the user."""
        return f"{self.noun} {self.condition}"


def _shown(limit: float) -> str:
    return "2^63" if limit == _SEEDS else str(limit)


_SEEDS = 2**63
"""Number of seeds."""
_COUNTS = ("batch.pairs_per_step", "batch.tokens_per_micro_batch", "parallel.replicate", "parallel.head_memory_mib")
_OPTIONAL_COUNTS = ("data.num_proc", "data.max_prompt_length", "parallel.shard")
_LENGTHS = ("train.steps", "train.epochs")
_CADENCES = ("train.eval_every", "checkpoint.save_every", "checkpoint.keep")
_OTHER_COUNTS = ("parallel.setup_timeout_seconds", "parallel.timeout_seconds", "train.log_every", "train.max_skipped")
_WEIGHTS = ("loss.sft_weight", "loss.gamma", "loss.dpop_lambda", "optim.weight_decay", "eval.temperature")
_BOUNDS = (
    Bound("an integer", (*_COUNTS, *_OTHER_COUNTS, "eval.max_new_tokens"), least=1),
    Bound("null or an integer", (*_OPTIONAL_COUNTS, *_LENGTHS, *_CADENCES), least=1),
    Bound("null or an integer", ("data.max_length",), least=2),
    Bound("null or an integer", ("lora.rank",), least=1, below=RANKS),
    Bound("null or two integers, each", ("train.profile_steps",), least=1),
    Bound("an integer", ("eval.samples",), least=0),
    Bound("an integer", ("train.seed",), least=0, below=_SEEDS),
    Bound("a number", ("loss.beta", "optim.lr", "optim.eps"), above=0),
    Bound("null or a number", ("optim.max_grad_norm", "lora.alpha"), above=0),
    Bound("a number", _WEIGHTS, least=0),
    Bound("a number", ("loss.label_smoothing",), least=0, below=0.5),
    Bound("a number", ("optim.alpha", "optim.momentum", "optim.min_lr_ratio"), least=0, below=1),
    Bound("two numbers, each", ("optim.betas",), least=0, below=1),
)


def bound_of(key: str) -> Bound | None:
    """Returns the limits of a key's numbers; None where it has none, or they depend on other keys."""
    return next((bound for bound in _BOUNDS if key in bound.keys), None)


def decided(parallel: ParallelConfig) -> ParallelConfig:
    """Returns the parallel section for a policy that is not trained: undecided keys get the values that keep nothing
    for a backward pass. `dpo.estimate.choice` decides them for a policy that is trained.
    """
    plain = {"activation_checkpointing": "none", "sync_gradients": "every_micro_batch"}
    return replace(parallel, **{key: plain[key] for key in parallel.undecided})  # type: ignore[arg-type]  # one of its words


def validate(config: Config, places: Mapping[str, str] | None = None, default_place: str = "config") -> None:
    """Raises UserError for the first wrong value.

    Args:
        config: the config to check.
        places: SECTION.KEY -> the file, or `command line`, that set it.
        default_place: the place that the error names where none of its keys was set.
    """
    for problem in _problems(config):
        key = problem.keys[0]
        place = _place(problem.keys, places or {}, default_place)
        raise UserError(f"{place}: {key}", problem.what, problem.valid)


def _place(keys: Sequence[str], places: Mapping[str, str], default: str) -> str:
    """Returns the place that set the first of `keys` that was set at all: not the default is wrong, but the value that
    conflicts with it.
    """
    plain = [key.split("[")[0] for key in keys]
    return next((places[key] for key in plain if key in places), default)


def _problems(config: Config) -> Iterator[Problem]:
    for bound in _BOUNDS:
        yield from _out_of_bounds(config, bound)
    yield from _data_problems(config.data)
    yield from _loss_problems(config.loss)
    yield from _margin_problems(config.data, config.loss)
    yield from _optim_problems(config.optim)
    yield from _dtype_problems(config)
    yield from lora_problems(config)
    if config.train.steps is not None and config.train.epochs is not None:
        yield Problem(("train.epochs", "train.steps"), "train.steps is given too", "one of the two, the other null")
    if config.train.profile_steps is not None and config.train.profile_steps[0] > config.train.profile_steps[1]:
        what = f"ends before it begins, got {list(config.train.profile_steps)}"
        yield Problem(("train.profile_steps",), what, "[FIRST, LAST], the last not before the first")
    if len(set(config.train.report_to)) < len(config.train.report_to):
        what = f"names a sink twice, got [{', '.join(config.train.report_to)}]"
        yield Problem(("train.report_to",), what, "each name once")


def _out_of_bounds(config: Config, bound: Bound) -> Iterator[Problem]:
    for key in bound.keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number is None or bound.fits(number) for number in numbers):
            what = f"must be {bound.condition}, got {', '.join(str(number) for number in numbers)}"
            yield Problem((key,), what, bound.valid)


def _data_problems(data: DataConfig) -> Iterator[Problem]:
    if not data.train:
        yield Problem(("data.train",), "must name at least one source, got an empty list", "[{path: FILE}, ...]")
    longest, longest_prompt = data.max_length, data.max_prompt_length
    if longest is not None and longest_prompt is not None and longest_prompt >= longest:
        what = f"must be < data.max_length, got {longest_prompt} and {longest}"
        valid = f"null or an integer from 1 to {longest - 1}"
        yield Problem(("data.max_prompt_length", "data.max_length"), what, valid)
    for i, source in enumerate(data.train):
        if source.holdout is not None and not _is_holdout(source.holdout):
            valid = "null, a number of prompts (an integer >= 1), or a fraction of them (> 0 and < 1)"
            yield Problem((f"data.train[{i}].holdout",), f"holds out none or all, got {source.holdout}", valid)
        yield from _share_problems(source, f"data.train[{i}]")
    for i, source in enumerate(data.eval):
        if source.holdout is not None:
            what = f"prompts are held out of training sources only, got {source.holdout}"
            yield Problem((f"data.eval[{i}].holdout",), what, "null, or holdout at an item of data.train")
        for name in ("weight", "count"):
            if getattr(source, name) is not None:
                what = f"the pairs of data.eval are all evaluated, once each, got {getattr(source, name)}"
                yield Problem((f"data.eval[{i}].{name}",), what, f"null, or {name} at an item of data.train")
        if "weight" in source.columns:
            what = f"in evaluation every pair has weight 1, got weight: {source.columns['weight']}"
            yield Problem((f"data.eval[{i}].columns",), what, "no weight, or weight at an item of data.train")


def _share_problems(source: SourceConfig, key: str) -> Iterator[Problem]:
    """Yields what is wrong with a source's share of an epoch."""
    if source.weight is not None and source.count is not None:
        what = f"weight and count are both given, {source.weight} and {source.count}"
        yield Problem((f"{key}.count", f"{key}.weight"), what, "one of the two")
    elif source.weight is not None and source.weight <= 0:
        yield Problem((f"{key}.weight",), f"must be > 0, got {source.weight}", "null or a number > 0")
    elif source.count is not None and source.count < 1:
        yield Problem((f"{key}.count",), f"must be >= 1, got {source.count}", "null or an integer >= 1")


def _is_holdout(holdout: float) -> bool:
    """Returns whether a holdout is valid. An integer counts prompts, a float is a fraction: 1 is valid, 1.0 is not."""
    return holdout >= 1 if isinstance(holdout, int) else 0 < holdout < 1


def _loss_problems(loss: LossConfig) -> Iterator[Problem]:
    """Yields keys of `loss` that the loss does not take and that are not at their default."""
    name, facts = f"loss.name {loss.name}", loss.facts
    if loss.label_smoothing != 0 and not facts.smooths:
        what = f"{name} has no label smoothing, got {loss.label_smoothing}"
        yield Problem(("loss.label_smoothing", "loss.name"), what, f"0, {_or_a_loss_that(lambda f: f.smooths)}")
    if loss.length_normalized and not facts.normalizes:
        what = f"{name} is not divided by lengths, got true"
        yield Problem(
            ("loss.length_normalized", "loss.name"), what, f"false, {_or_a_loss_that(lambda f: f.normalizes)}"
        )
    if loss.sft_weight != 0 and facts.includes_sft:
        what = f"{name} has this term with weight 1, got {loss.sft_weight}"
        yield Problem(("loss.sft_weight", "loss.name"), what, f"0, {_or_a_loss_that(lambda f: not f.includes_sft)}")
    yield from _own_key_problems(loss)


def _own_key_problems(loss: LossConfig) -> Iterator[Problem]:
    """Yields keys that another loss alone takes and that are not at their default."""
    for owner, facts in LOSS_FACTS.items():
        if facts.own_key is None or owner == loss.name:
            continue
        value, default = getattr(loss, facts.own_key), getattr(LossConfig, facts.own_key)
        if value != default:
            what = f"loss.name {loss.name} does not take it, got {value}"
            yield Problem((f"loss.{facts.own_key}", "loss.name"), what, f"{default}, or loss.name {owner}")


def _margin_problems(data: DataConfig, loss: LossConfig) -> Iterator[Problem]:
    """Yields sources whose pairs have a margin, where the loss takes none."""
    for place, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if "margin" in source.columns and not loss.facts.offsets:
                what = f"loss.name {loss.name} takes no margin of a pair, got margin: {source.columns['margin']}"
                valid = f"no margin, {_or_a_loss_that(lambda f: f.offsets)}"
                yield Problem((f"data.{place}[{i}].columns", "loss.name"), what, valid)


def _or_a_loss_that(holds: Callable[[LossFacts], bool]) -> str:
    *others, last = losses_that(holds)
    return f"or loss.name {', '.join(others)} or {last}" if others else f"or loss.name {last}"


def _optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    """Yields what is wrong with the warm-up and the schedule."""
    if not _is_warmup(optim.warmup_steps):
        valid = "a number of steps (an integer >= 0), or a fraction of the run's steps (> 0 and < 1)"
        yield Problem(("optim.warmup_steps",), f"is neither steps nor a fraction, got {optim.warmup_steps}", valid)
    if optim.min_lr_ratio != 0 and optim.schedule == "constant":
        what = f"optim.schedule constant does not fall, got {optim.min_lr_ratio}"
        yield Problem(("optim.min_lr_ratio", "optim.schedule"), what, "0, or optim.schedule linear or cosine")


def _is_warmup(warmup: float) -> bool:
    """Returns whether a warm-up is valid. An integer counts steps, a float is a fraction: 1 is valid, 1.0 is not."""
    return warmup >= 0 if isinstance(warmup, int) else 0 < warmup < 1


def _dtype_problems(config: Config) -> Iterator[Problem]:
    """Yields conflicts of data types. float64 is for exact tests, which a lower precision in any part of the step would
    silently spoil.
    """
    master, parallel = config.model.dtype, config.parallel
    compute = "auto, float64" if master == "float64" else "auto, float32, bfloat16"
    reduce = "float64" if master == "float64" else "float32, bfloat16"
    for name, value, valid in (
        ("compute_dtype", parallel.compute_dtype, compute),
        ("reduce_dtype", parallel.reduce_dtype, reduce),
    ):
        if value not in valid.split(", "):
            what = f"model.dtype is {master}, got {value}"
            yield Problem((f"parallel.{name}", "model.dtype"), what, valid)
    if parallel.tf32 and parallel.compute_dtype != "float32":
        what = f"parallel.compute_dtype is {parallel.compute_dtype}, got true"
        yield Problem(("parallel.tf32", "parallel.compute_dtype"), what, "false, or parallel.compute_dtype float32")
