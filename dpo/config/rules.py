"""What values a config may hold beyond their types: bounds of single keys, and keys that must fit each other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dpo.base.errors import UserError
from dpo.config.fields import Config, DataConfig, LossConfig, ParallelConfig
from dpo.config.loss_facts import LossFacts, losses_that


@dataclass(frozen=True)
class Problem:
    """A value that cannot be right: one line for the user."""

    keys: tuple[str, ...]
    """The key that is wrong, then those that make it wrong."""
    what: str
    valid: str


@dataclass(frozen=True)
class Bound:
    """What a number under each of `keys` must fulfil; null is the business of the types."""

    noun: str
    condition: str
    fits: Callable[[float], bool]
    keys: tuple[str, ...]


_COUNTS = ("batch.pairs_per_step", "batch.tokens_per_micro_batch", "parallel.replicate", "parallel.head_memory_mib")
_OPTIONAL_COUNTS = ("data.num_proc", "data.max_prompt_length", "parallel.shard", "train.steps", "train.epochs")
_CADENCES = ("train.eval_every", "checkpoint.save_every", "checkpoint.keep")
_OTHER_COUNTS = ("parallel.setup_timeout_seconds", "parallel.timeout_seconds", "train.log_every", "eval.max_new_tokens")
_BOUNDS = (
    Bound("an integer", ">= 1", lambda x: x >= 1, (*_COUNTS, *_OTHER_COUNTS)),
    Bound("null or an integer", ">= 1", lambda x: x >= 1, (*_OPTIONAL_COUNTS, *_CADENCES)),
    Bound("null or an integer", ">= 2", lambda x: x >= 2, ("data.max_length",)),
    Bound("null or two integers, each", ">= 1", lambda x: x >= 1, ("train.profile_steps",)),
    Bound("an integer", ">= 0", lambda x: x >= 0, ("optim.warmup_steps", "eval.samples")),
    Bound("an integer", ">= 0 and < 2^63", lambda x: 0 <= x < 2**63, ("train.seed",)),
    Bound("a number", "> 0", lambda x: x > 0, ("loss.beta", "optim.lr", "optim.eps")),
    Bound("null or a number", "> 0", lambda x: x > 0, ("optim.max_grad_norm",)),
    Bound("a number", ">= 0", lambda x: x >= 0, ("loss.sft_weight", "optim.weight_decay", "eval.temperature")),
    Bound("a number", ">= 0 and < 0.5", lambda x: 0 <= x < 0.5, ("loss.label_smoothing",)),
    Bound("a number", ">= 0 and < 1", lambda x: 0 <= x < 1, ("optim.alpha", "optim.momentum")),
    Bound("two numbers, each", ">= 0 and < 1", lambda x: 0 <= x < 1, ("optim.betas",)),
)


def decided(parallel: ParallelConfig) -> ParallelConfig:
    """The layout of a policy that is not trained: what is auto and undecided saves nothing for a backward pass.

    What is trained is decided by `dpo.estimate.choice`.
    """
    plain = {"activation_checkpointing": "none", "sync_gradients": "every_micro_batch"}
    return replace(parallel, **{key: plain[key] for key in parallel.undecided})  # type: ignore[arg-type]  # one of its words


def validate(config: Config, places: Mapping[str, str] | None = None, default_place: str = "config") -> None:
    """Raise UserError for the first value that cannot be right.

    places: which file, or `command line`, gave a key; what nobody gave is said to stand in `default_place`.
    """
    for problem in _problems(config):
        key = problem.keys[0]
        place = _place(problem.keys, places or {}, default_place)
        raise UserError(f"{place}: {key}", problem.what, problem.valid)


def _place(keys: Sequence[str], places: Mapping[str, str], default: str) -> str:
    """Who gave the first of the keys that anybody gave: a default is not to blame, what does not fit it is."""
    plain = [key.split("[")[0] for key in keys]
    return next((places[key] for key in plain if key in places), default)


def _problems(config: Config) -> Iterator[Problem]:
    for bound in _BOUNDS:
        yield from _out_of_bounds(config, bound)
    yield from _data_problems(config.data)
    yield from _loss_problems(config.loss)
    yield from _dtype_problems(config)
    if config.train.steps is not None and config.train.epochs is not None:
        yield Problem(("train.epochs", "train.steps"), "train.steps is given too", "one of the two, the other null")
    if config.train.profile_steps is not None and config.train.profile_steps[0] > config.train.profile_steps[1]:
        what = f"ends before it begins, got {list(config.train.profile_steps)}"
        yield Problem(("train.profile_steps",), what, "[FIRST, LAST], the last not before the first")


def _out_of_bounds(config: Config, bound: Bound) -> Iterator[Problem]:
    for key in bound.keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number is None or bound.fits(number) for number in numbers):
            what = f"must be {bound.condition}, got {', '.join(str(number) for number in numbers)}"
            yield Problem((key,), what, f"{bound.noun} {bound.condition}")


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
    for i, source in enumerate(data.eval):
        if source.holdout is not None:
            what = f"prompts are held out of training sources only, got {source.holdout}"
            yield Problem((f"data.eval[{i}].holdout",), what, "null, or holdout at an item of data.train")


def _is_holdout(holdout: float) -> bool:
    """1 prompt and the fraction 1.0 differ: what was written as an integer counts prompts."""
    return holdout >= 1 if isinstance(holdout, int) else 0 < holdout < 1


def _loss_problems(loss: LossConfig) -> Iterator[Problem]:
    """A key of `loss` that the loss does not take must stand at its default."""
    name, facts = f"loss.name {loss.name}", loss.facts
    if loss.label_smoothing != 0 and not facts.smooths:
        what = f"{name} has no label smoothing, got {loss.label_smoothing}"
        yield Problem(("loss.label_smoothing", "loss.name"), what, f"0, {_or_a_loss_that(lambda f: f.smooths)}")
    if loss.length_normalized and not facts.normalizes:
        what = f"{name} is a mean per token already, got true"
        yield Problem(
            ("loss.length_normalized", "loss.name"), what, f"false, {_or_a_loss_that(lambda f: f.normalizes)}"
        )
    if loss.sft_weight != 0 and facts.includes_sft:
        what = f"{name} has this term with weight 1, got {loss.sft_weight}"
        yield Problem(("loss.sft_weight", "loss.name"), what, f"0, {_or_a_loss_that(lambda f: not f.includes_sft)}")


def _or_a_loss_that(holds: Callable[[LossFacts], bool]) -> str:
    *others, last = losses_that(holds)
    return f"or loss.name {', '.join(others)} or {last}" if others else f"or loss.name {last}"


def _dtype_problems(config: Config) -> Iterator[Problem]:
    """float64 is for exact tests: a lower precision anywhere on the way would undo it in silence."""
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
