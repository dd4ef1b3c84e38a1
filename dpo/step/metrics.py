"""The metrics of a step or an evaluation: sums on the device, then one exchange per step, then means.

The mean over all pairs is not the mean of the ranks' means, because ranks have different numbers of pairs. So the ranks
exchange sums, and each rank divides the totals. A step of 4 pairs on two ranks:

              losses   pairs   accurate
    rank 0     2.1       3        2
    rank 1     0.5       1        1
    sums       2.6       4        3         -> loss 2.6 / 4 = 0.65, rewards/accuracies 3 / 4 = 0.75
"""

import resource
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo.batch.packing import PackedBatch
from dpo.config.loss_facts import LossFacts
from dpo.distributed.collectives import ONE_OF_EACH_LANE

MEASURED = (
    "losses",
    "winner_nll",
    "chosen_rewards",
    "rejected_rewards",
    "accurate",
    "chosen_logps",
    "rejected_logps",
    "chosen_per_token",
    "rejected_per_token",
    "winner_tokens",
)
"""Sums that are accumulated on the device."""
COUNTED = ("pairs", "tokens", "body_tokens")
"""Sums that the host knows without waiting for the device."""
LANE_SUMS = (*MEASURED, *COUNTED)
"""Sums of the data, of which each lane has a part."""
SUMS = (*LANE_SUMS, "square_norm")
"""The sums, the last of which is over the shards of all ranks."""
MAXIMA = ("peak_memory_bytes", "stop_requested")


class StepMetrics:
    """Accumulates one rank's sums over the micro-batches of a step or an evaluation.

    `add` does not wait for the device; `reduce` does.
    """

    def __init__(self, device: torch.device):
        self.measured = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)
        self.counted = dict.fromkeys(COUNTED, 0)

    def add(self, losses: Tensor, rewards: Tensor | None, pi_logps: Tensor, batch: PackedBatch) -> None:
        """Adds the sums of one micro-batch. The host does not wait for the device.

        Args:
            losses: (T,), from `pair_losses`; their gradient is not used.
            rewards: (B,) nats times beta; None where the loss has none, which counts as rewards of 0.
            pi_logps: (B,) nats under the policy.
            batch: the micro-batch, on the same device; without `ref_logps` log-ratios count as 0.
        """
        known = pi_logps.new_zeros(len(pi_logps)) if rewards is None else rewards
        chosen, rejected = known[batch.yw_idxs], known[batch.yl_idxs]
        ref_logps = pi_logps if batch.ref_logps is None else batch.ref_logps
        per_token = (pi_logps - ref_logps) / batch.lengths
        sums = [
            losses.sum(),
            -pi_logps[batch.yw_idxs].sum(),
            chosen.sum(),
            rejected.sum(),
            (chosen > rejected).sum(),  # a tie counts as wrong
            pi_logps[batch.yw_idxs].sum(),
            pi_logps[batch.yl_idxs].sum(),
            per_token[batch.yw_idxs].sum(),
            per_token[batch.yl_idxs].sum(),
            batch.lengths[batch.yw_idxs].sum(),
        ]
        self.measured += torch.stack([s.detach().to(self.measured) for s in sums])
        self.counted["pairs"] += len(batch.yw_idxs)
        self.counted["tokens"] += batch.num_tokens
        self.counted["body_tokens"] += len(batch.tokens)

    def reduce(self, square_norm: Tensor | None = None, stop_requested: bool = False) -> dict[str, float]:
        """Exchanges the sums of all ranks: one all-gather, and the only time in a step that the host waits for the
        device. Every rank must get here, or the rest hang.

        Args:
            square_norm: the square of the L2 norm of this rank's part of the gradient, a scalar; None: 0.
            stop_requested: whether this rank was asked to stop.

        Returns:
            The sums over all ranks under the names of SUMS, and the maxima under the names of MAXIMA. Every rank adds
            up the ranks in the same order, so the result is bitwise the same on all of them.
        """
        maxima = [peak_memory_bytes(self.measured.device), stop_requested]
        values = [*map(float, self.counted.values()), *map(float, maxima)]
        pinned = self.measured.is_cuda  # a copy from pageable memory would wait for the device
        known = torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(self.measured, non_blocking=True)
        norm = self.measured.new_zeros(1) if square_norm is None else square_norm.to(self.measured).reshape(1)
        own = torch.cat([self.measured, known[: len(COUNTED)], norm, known[len(COUNTED) :]])
        gathered = own.new_empty(dist.get_world_size(), len(own))
        # Not all_gather_into_tensor: torch 2.13 deprecates it in favor of all_gather_single, which torch 2.11 lacks.
        dist.all_gather(list(gathered.unbind()), own)
        table = gathered.cpu()
        of_lanes, norms, of_ranks = table.split([len(LANE_SUMS), 1, len(MAXIMA)], dim=1)
        sums = torch.cat([of_lanes[ONE_OF_EACH_LANE].sum(0), norms.sum(0)])
        return dict(zip(SUMS, sums.tolist(), strict=True)) | dict(zip(MAXIMA, of_ranks.amax(0).tolist(), strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory of this rank so far, bytes: of the CUDA allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pair_means(sums: Mapping[str, float], facts: LossFacts) -> dict[str, float]:
    """Returns the metrics that training and evaluation share: means over all P pairs of the step or of the evaluation
    set.

    loss             sum of the pairs' losses / P: the objective, including the SFT term
    loss_sft         sum over pairs of -pi_logp[winner] / sum over pairs of len(winner), nats per token
    logps/chosen     mean of the winners' summed log-probabilities, nats; logps/rejected of the losers'
    logratios_per_token/chosen  mean over pairs of (pi_logp - ref_logp of the winner) / its tokens, nats;
                     logratios_per_token/rejected of the losers
    rewards/chosen   mean of the winners' rewards, from `completion_rewards`; rewards/rejected of the losers
    rewards/margins  rewards/chosen - rewards/rejected
    rewards/accuracies  share of pairs whose winner has the strictly greater reward
    pairs            P

    A loss without rewards compares no answers: there is no logps/rejected then. Without a reference there are no
    log-ratios.

    Args:
        sums: the sums over all ranks, from `StepMetrics.reduce`.
        facts: whether the loss has rewards and a reference.
    """
    pairs = max(sums["pairs"], 1)
    means = {
        "loss": sums["losses"] / pairs,
        "loss_sft": sums["winner_nll"] / max(sums["winner_tokens"], 1),
        "logps/chosen": sums["chosen_logps"] / pairs,
    }
    if facts.uses_reference:
        for side in ("chosen", "rejected"):
            means[f"logratios_per_token/{side}"] = sums[f"{side}_per_token"] / pairs
    if facts.rewards is not None:
        means["logps/rejected"] = sums["rejected_logps"] / pairs
        chosen, rejected = sums["chosen_rewards"] / pairs, sums["rejected_rewards"] / pairs
        means |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        means["rewards/accuracies"] = sums["accurate"] / pairs
    return means | {"pairs": int(sums["pairs"])}


def step_metrics(sums: Mapping[str, float], seconds: float, best_seconds: float | None = None) -> dict[str, float]:
    """Returns the metrics of a training step that `pair_means` does not give.

    tokens             prompt and completion tokens that the model's body computed, summed over ranks, without padding
                       and fillers
    padding_fraction   1 - tokens / all tokens that the body computed
    step_seconds       from the request for the data to the end of the update, on rank 0
    pairs_per_second, tokens_per_second   the step's pairs and tokens / step_seconds
    peak_memory_bytes  the maximum of the ranks' peaks so far
    mfu                best_seconds / step_seconds

    Args:
        sums: the sums over all ranks, from `StepMetrics.reduce`.
        seconds: `step_seconds`, above 0.
        best_seconds: seconds that the step's FLOPs (`costs.model_flops`: forward and backward once, no recomputation)
            take at the peak of all ranks' devices (`peaks.peak_flops`); None where that peak is unknown: there is no
            `mfu` then.
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
