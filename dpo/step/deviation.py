"""The deviation of a policy from its reference before its first update, and its limits: pure functions.

A log-probability depends, in its last digits, on where its tree lies in the packed row, and reference pass and training
pack one tree at different places. In exact float32 these digits do not matter, and every completion is held to its
reference. In bfloat16 and TF32 they do, and how much depends on the model; so the model measures its own rounding: the
step's log-probabilities are computed twice, in different packings. Over all completions of all ranks, n tokens each,

    noise  = rms(|pi - pi'| / sqrt(n))      pi' in the second packing
    spread = rms(|pi - ref| / sqrt(n))      <= min(0.25, max(3 noise, 0.01))
    drift  = |sum(pi - ref)| / sum(n)       <= min(0.02, max(6 noise / sqrt(sum(n)), 0.002))

The minimized loss is checked as well. No formula is repeated:

1. each pair's loss must equal the entry of `LOSSES`, applied to the measured log-probabilities of this pair's own
   completions. An error in packing, indices, reference, lengths or configuration makes them differ;
2. the entry itself, applied to log-ratios of 0, must give its `at_zero`.

A loss that is convex in the margin h then lies between `at_zero` and its values at h = +-(|winner's log-ratio| +
|loser's log-ratio|). That bound alone would let a loss pass whose winner and loser are exchanged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from dpo.config import LossConfig
from dpo.step.losses import LOSSES, PairTerms

FEW_COMPLETIONS = 32
"""Below so many completions the measured noise is itself uncertain."""

# --- measurements ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completions:
    """The N completions of a step, of all ranks, in an order that does not depend on the layout."""

    pi_logps: np.ndarray
    """(N,) log-probabilities under the policy, nats, float64."""
    repacked_logps: np.ndarray
    """(N,) the same, computed in the second packing."""
    ref_logps: np.ndarray
    """(N,) the reference's, from the cache."""
    lengths: np.ndarray
    """(N,) tokens of each completion."""
    first_ids: Sequence[Sequence[int]]
    """The first token ids of each completion, which error messages show."""

    @property
    def differences(self) -> np.ndarray:
        """(N,) pi_logp - ref_logp, nats."""
        differences: np.ndarray = self.pi_logps - self.ref_logps
        return differences


@dataclass(frozen=True)
class Deviation:
    """The deviation of the policy from its reference, and from itself in another packing; the head of this file has the
    formulas.
    """

    spread: float
    """Nats per square root of a token."""
    drift: float
    """Nats per token."""
    noise: float
    """Nats per square root of a token."""

    def __str__(self) -> str:
        return f"spread {self.spread:.3g}, drift {self.drift:.3g}, noise {self.noise:.3g}"


def measure(completions: Completions) -> Deviation:
    """Returns the spread, drift and noise of the completions of a step."""
    return Deviation(
        _spread(completions.differences, completions.lengths),
        float(abs(completions.differences.sum()) / completions.lengths.sum()),
        _spread(completions.pi_logps - completions.repacked_logps, completions.lengths),
    )


def _spread(differences: np.ndarray, lengths: np.ndarray) -> float:
    """Returns rms(|difference| / sqrt(tokens)): independent errors of tokens add up with the square root of their
    number.
    """
    return float(np.sqrt(np.mean(differences**2 / lengths)))


# --- limits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The maximum spread and drift, in the units of `Deviation`."""

    spread: float
    drift: float


_CAPS, _FLOORS = Limits(spread=0.25, drift=0.02), Limits(spread=0.01, drift=0.002)
"""Bounds in bfloat16: a deviation above a cap always fails, and a deviation below a floor always passes."""


def rounding_scale(compute: torch.dtype, tf32: bool) -> float | None:
    """Returns the factor of the caps and floors: 1 in bfloat16, 1/8 in TF32, whose mantissa has 3 bits more. Returns
    None in exact float32 and float64, where `exact_bounds` holds for every completion.
    """
    if compute == torch.bfloat16:
        return 1.0
    return 1 / 8 if tf32 and compute == torch.float32 else None


def caps(scale: float) -> Limits:
    """Returns the limits that hold for any noise."""
    return Limits(scale * _CAPS.spread, scale * _CAPS.drift)


def limits(noise: float, lengths: np.ndarray, scale: float) -> Limits:
    """Returns the limits of the deviation over N completions, from the measured noise.

    Args:
        noise: the measured noise, nats per square root of a token.
        lengths: (N,) integers, tokens of each completion.
        scale: the factor of caps and floors, from `rounding_scale`.
    """
    sigmas = 6 if len(lengths) < FEW_COMPLETIONS else 3
    return Limits(
        min(scale * _CAPS.spread, max(sigmas * noise, scale * _FLOORS.spread)),
        min(scale * _CAPS.drift, max(6 * noise / math.sqrt(lengths.sum()), scale * _FLOORS.drift)),
    )


def exact_bounds(ref_logps: np.ndarray) -> np.ndarray:
    """Returns the nats, (N,), by which two exact float32 computations of a log-probability may differ."""
    bounds: np.ndarray = 1e-4 + 1e-5 * np.abs(ref_logps)
    return bounds


class Verdict(IntEnum):
    """The verdict of the check, from good to bad."""

    PASSES = 0
    BEYOND_NOISE = 1
    """More than the model's own rounding explains, within the caps."""
    BEYOND_BOUNDS = 2
    """Beyond the caps, the bounds of exact float32, or the bounds of the loss."""
    NOT_FINITE = 3


def judge(completions: Completions, scale: float | None) -> Verdict:
    """Returns the verdict on a step's log-probabilities; `scale` comes from `rounding_scale`."""
    if not (np.isfinite(completions.differences).all() and np.isfinite(completions.repacked_logps).all()):
        return Verdict.NOT_FINITE
    if scale is None:
        is_within = (np.abs(completions.differences) <= exact_bounds(completions.ref_logps)).all()
        return Verdict.PASSES if is_within else Verdict.BEYOND_BOUNDS
    deviation = measure(completions)
    if _exceeds(deviation, caps(scale)):
        return Verdict.BEYOND_BOUNDS
    exceeds = _exceeds(deviation, limits(deviation.noise, completions.lengths, scale))
    return Verdict.BEYOND_NOISE if exceeds else Verdict.PASSES


def _exceeds(deviation: Deviation, maximum: Limits) -> bool:
    return deviation.spread > maximum.spread or deviation.drift > maximum.drift


def worst(completions: Completions, scale: float | None) -> str:
    """Describes the completion that is furthest from its reference."""
    allowed = exact_bounds(completions.ref_logps) if scale is None else np.sqrt(completions.lengths)
    with np.errstate(invalid="ignore"):  # a reference that is NaN
        ratios = np.abs(completions.differences) / allowed
    row = int(np.nan_to_num(ratios, nan=math.inf).argmax())
    what = f"pi_logp {completions.pi_logps[row]:.6g}, ref_logp {completions.ref_logps[row]:.6g} nats"
    which = f"{completions.lengths[row]} tokens that begins with the ids {list(completions.first_ids[row])}"
    return f"{what} for the completion of {which}"


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairLosses:
    """The preference losses of some pairs, (T,) float64 each."""

    found: np.ndarray
    """The losses that training minimizes, computed from the packed batch."""
    expected: np.ndarray
    """The right values (`expected_losses`)."""


_ROUNDING = 1e-9
"""Part of a loss by which its two computations in float64 may differ."""


def expected_losses(
    pi_logps: np.ndarray,
    ref_logps: np.ndarray,
    lengths: np.ndarray,
    loss: LossConfig,
    margins: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the preference losses of T pairs, (T,), by the values of their own completions.

    Args:
        pi_logps: (2, T) nats under the policy: of the winners, of the losers.
        ref_logps: (2, T) nats under the reference.
        lengths: (2, T) tokens.
        loss: its function in `LOSSES` is applied to each pair alone.
        margins: (T,) the margin of each pair; None: all 0.
    """
    log_ratios = (pi_logps - ref_logps) / (lengths if loss.length_normalized else 1)
    ratios, pis, tokens = (torch.as_tensor(array.reshape(-1)).double() for array in (log_ratios, pi_logps, lengths))
    winners = torch.arange(pi_logps.shape[1])
    offsets = None if margins is None else torch.as_tensor(margins).double()
    terms = PairTerms(ratios, pis, tokens, winners, winners + len(winners), offsets)
    return LOSSES[loss.name].losses(terms, loss).numpy()


def losses_at_zero(loss: LossConfig) -> tuple[float, float]:
    """Returns the loss of a pair whose log-ratios are 0: by its function in `LOSSES`, and by the entry's `at_zero`."""
    at_zero = LOSSES[loss.name].at_zero
    assert at_zero is not None, f"{loss.name} uses no reference"
    logps, lengths = np.full((2, 1), -1.0), np.ones((2, 1))
    return float(expected_losses(logps, logps, lengths, loss)[0]), at_zero(loss)


def wrong_loss(losses: PairLosses) -> tuple[float, float] | None:
    """Returns the loss that is furthest from its expected value, and that value; None where all losses are right."""
    with np.errstate(invalid="ignore"):  # a loss that is NaN or infinite is wrong: its excess is NaN
        excess = np.abs(losses.found - losses.expected) - _ROUNDING * (1 + np.abs(losses.expected))
    if (excess <= 0).all():
        return None
    pair = int(np.nan_to_num(excess, nan=math.inf).argmax())
    return float(losses.found[pair]), float(losses.expected[pair])
