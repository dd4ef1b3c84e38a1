"""What `dpo.estimate` advises where a step is bound by traffic, on seconds derived by hand."""

from typing import Any

from dpo.batch.costs import cost_model
from dpo.batch.plan import plan_step
from dpo.estimate.advice import advice
from dpo.estimate.devices import GIB, Device
from dpo.estimate.needs import Trial
from dpo.estimate.speed import Cluster, Speed, step_speed
from dpo.estimate.traffic import Groups
from tests.estimate.test_estimate import config_with, llama, tree

LINK = 100.0


def lines(flops: float, fits: bool = True, **keys: Any) -> list[str]:
    """16 ranks on one node, one tree each, 3 layers of 100 numbers and a root of 60, links of 100 bytes a second."""
    config = config_with(**keys)
    groups = Groups((100,) * 3, 60)

    def speed(trial: Trial) -> Speed:
        plans = [plan_step([tree(32, 32)] * 16, trial.num_ranks, 96, cost_model(llama()))]
        device = Device("H100", GIB, LINK, LINK, LINK, flops=flops)
        return step_speed(trial.config, llama(), plans, groups, Cluster(device, trial.num_ranks, 16, 1.0))

    return advice(Trial(config, 16), speed, lambda trial: fits)


def test_changes_that_lessen_traffic() -> None:
    """As configured a rank of 16 sends 15/16 of 1,320 gathered and 1,440 scattered bytes: 25.875 s. Kept weights are
    gathered once, 720 bytes: 20.25 s; bfloat16 halves the gradients: 19.125 s. Half the ranks have two micro-batches:
    7/8 of 2 x 1,320 and of 1,440 bytes, 35.7 s, 69 % of the GPU time."""
    found = lines(flops=1e30)
    assert found[0] == "bound by traffic: 25.9 s of traffic, 0.0 ms of arithmetic"
    assert found[1].startswith(
        "  --parallel.reshard_after_forward false: 20.2 s per step; weights are all-gathered once per step"
    )
    assert found[2].startswith("  --parallel.reduce_dtype bfloat16: 19.1 s per step; gradients take half the bytes")
    assert found[3] == "  --ranks 8: 35.7 s per step; half the GPUs, 69% of the GPU time per step"
    assert len(found) == 4


def test_no_advice_where_arithmetic_takes_longer_or_nothing_fits() -> None:
    assert lines(flops=1.0) == []
    assert len(lines(flops=1e30, fits=False)) == 1


def test_what_is_set_already_is_not_advised() -> None:
    """Kept weights and gradients in bfloat16: 15/16 of 720 and of 720 bytes, 13.5 s. Half the ranks gather and reduce
    once for their two micro-batches: 7/8 of as many, 12.6 s, 47 % of the GPU time.
    """
    found = lines(flops=1e30, parallel__reshard_after_forward=False, parallel__reduce_dtype="bfloat16")
    assert found == [
        "bound by traffic: 13.5 s of traffic, 0.0 ms of arithmetic",
        "  --ranks 8: 12.6 s per step; half the GPUs, 47% of the GPU time per step",
    ]
