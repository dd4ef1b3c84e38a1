"""What a run measures: sums on the device, one exchange a step, then metrics.jsonl and TensorBoard on rank 0."""

import resource
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.batch.packing import PackedBatch

MEASURED = (
    "losses",
    "winner_nll",
    "chosen_rewards",
    "rejected_rewards",
    "accurate",
    "chosen_logps",
    "rejected_logps",
    "winner_tokens",
)
"""Sums that the device adds up."""
COUNTED = ("pairs", "tokens", "body_tokens")
"""Sums that the host knows without asking the device."""
SUMS = (*MEASURED, *COUNTED, "square_norm")
MAXIMA = ("peak_memory_bytes", "stop_requested")


class StepMetrics:
    """Sums over the micro-batches of a step (or of an evaluation) of one rank; `reduce` alone waits for the device."""

    def __init__(self, device: torch.device):
        self.measured = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)
        self.counted = dict.fromkeys(COUNTED, 0)

    def add(self, losses: Tensor, rewards: Tensor | None, pi_logps: Tensor, batch: PackedBatch) -> None:
        """Adds one micro-batch: losses (T,), rewards (B,) or None without a reference, pi_logps (B,)."""
        known = pi_logps.new_zeros(len(pi_logps)) if rewards is None else rewards
        chosen, rejected = known[batch.yw_idxs], known[batch.yl_idxs]
        sums = [
            losses.sum(),
            -pi_logps[batch.yw_idxs].sum(),
            chosen.sum(),
            rejected.sum(),
            (chosen > rejected).sum(),  # a tie counts as wrong
            pi_logps[batch.yw_idxs].sum(),
            pi_logps[batch.yl_idxs].sum(),
            batch.lengths[batch.yw_idxs].sum(),
        ]
        self.measured += torch.stack([s.detach().to(self.measured) for s in sums])
        self.counted["pairs"] += len(batch.yw_idxs)
        self.counted["tokens"] += batch.num_tokens
        self.counted["body_tokens"] += len(batch.tokens)

    def reduce(self, square_norm: Tensor | None = None, stop_requested: bool = False) -> dict[str, float]:
        """The sums over all ranks by name of SUMS, the maxima by name of MAXIMA.

        `square_norm`: of this rank's part of the gradient. One exchange, and the one time in a step that the host
        waits for the device; every rank must get here. Added up by rank in the same order everywhere, so equal to the
        last bit.
        """
        maxima = [peak_memory_bytes(self.measured.device), stop_requested]
        values = [*map(float, self.counted.values()), *map(float, maxima)]
        pinned = self.measured.is_cuda  # else the copy would wait
        known = torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(self.measured, non_blocking=True)
        norm = self.measured.new_zeros(1) if square_norm is None else square_norm.to(self.measured).reshape(1)
        mine = torch.cat([self.measured, known[: len(COUNTED)], norm, known[len(COUNTED) :]])
        every = mine.new_empty(dist.get_world_size(), len(mine))
        dist.all_gather(list(every.unbind()), mine)  # into one tensor: other names in torch 2.11 and 2.13
        table = every.cpu()
        sums, peaks = table[:, : len(SUMS)].sum(0), table[:, len(SUMS) :].amax(0)
        return dict(zip(SUMS, sums.tolist(), strict=True)) | dict(zip(MAXIMA, peaks.tolist(), strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has held so far, bytes: the CUDA allocator's, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pair_means(sums: Mapping[str, float], has_reference: bool) -> dict[str, float]:
    """The metrics that training and evaluation share, each a mean over all P pairs of the step or of the evaluation
    set.

    loss             sum of the pairs' losses / P: what is minimized, the SFT term included
    loss_sft         sum over pairs of -pi_logp[winner] / sum over pairs of len(winner), nats a token
    logps/chosen     mean of the winners' summed log-probabilities, nats; logps/rejected of the losers'
    rewards/chosen   mean of beta (pi_logp - ref_logp) of the winners; rewards/rejected of the losers
    rewards/margins  rewards/chosen - rewards/rejected
    rewards/accuracies  share of pairs whose winner has the strictly greater reward
    pairs            P

    The rewards are left out where the loss has no reference.
    """
    pairs = max(sums["pairs"], 1)
    means = {
        "loss": sums["losses"] / pairs,
        "loss_sft": sums["winner_nll"] / max(sums["winner_tokens"], 1),
        "logps/chosen": sums["chosen_logps"] / pairs,
        "logps/rejected": sums["rejected_logps"] / pairs,
    }
    if has_reference:
        chosen, rejected = sums["chosen_rewards"] / pairs, sums["rejected_rewards"] / pairs
        means |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        means["rewards/accuracies"] = sums["accurate"] / pairs
    return means | {"pairs": int(sums["pairs"])}


def step_metrics(sums: Mapping[str, float], seconds: float, best_seconds: float | None = None) -> dict[str, float]:
    """The metrics of a training step beside `pair_means`.

    tokens             prompt and completion tokens that the body ran, all ranks, without padding and fillers
    padding_fraction   1 - tokens / tokens given to the body
    step_seconds       from asking for the data to the end of the update, on rank 0
    pairs_per_second, tokens_per_second   the step's pairs and tokens / step_seconds
    peak_memory_bytes  the greatest of the ranks' peaks so far
    mfu                FLOPs that the step needs (`costs.step_flops`: 3 units of body and head, nothing twice) /
                       step_seconds / what the ranks could do at best (`costs.peak_flops`); `best_seconds` is the step
                       at that best; left out where it is None: a device that is not in the table
    """
    metrics = {
        "tokens": int(sums["tokens"]),
        "padding_fraction": 1 - sums["tokens"] / max(sums["body_tokens"], 1),
        "step_seconds": seconds,
        "pairs_per_second": sums["pairs"] / seconds,
        "tokens_per_second": sums["tokens"] / seconds,
        "peak_memory_bytes": int(sums["peak_memory_bytes"]),
    }
    return metrics if best_seconds is None else metrics | {"mfu": best_seconds / seconds}


def prefixed(group: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics under `group/`."""
    return {f"{group}/{name}": value for name, value in metrics.items()}
