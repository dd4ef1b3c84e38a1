"""Before the first step everything is compiled, and nothing of the policy is changed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo.batch.costs import CostModel
from dpo.batch.packer import Packer
from dpo.batch.packing import padded_length
from dpo.config import ParallelConfig
from dpo.distributed.world import World
from dpo.model.kernels import num_graphs
from dpo.model.policy import completion_logps
from dpo.model.warm_up import warm_up
from tests.gpu.test_step import random_batches, run_micro_batches
from tests.model.test_policy import load
from tests.support.models import save_model


@pytest.mark.parametrize(("family", "is_gradient_first"), [("mistral", True), ("gpt2", False)])
def test_nothing_is_compiled_after(
    family: str, is_gradient_first: bool, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of at least four lengths, the longest first, with and without gradients; gpt2 has few positions."""
    policy = load(world, save_model(tmp_path, family), compute_dtype="float32", compile=True)
    packer = Packer(0, 1, 640, CostModel(), replace(policy.row_format, row_length=padded_length))
    weights = [parameter.full_tensor().clone() for parameter in policy.model.parameters()]
    warm_up(policy, packer, world, (True, False))
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert all(map(torch.equal, weights, [parameter.full_tensor() for parameter in policy.model.parameters()]))
    told = capsys.readouterr().err
    assert "compiling layers and attention" in told
    assert f"compiled {sum(policy.graphs.values())} graphs" in told
    if hasattr(torch.compiler.config, "dynamic_values"):  # not in torch 2.11, which compiles the first length, too
        assert set(policy.graphs.values()) == {1}
    batches = [batch for budget in (640, 128, 512, 256, 384) for batch in random_batches(policy, 8, budget)]
    assert len({len(batch.tokens) for batch in batches}) >= 4
    before = num_graphs()
    for with_gradients in (is_gradient_first, not is_gradient_first):
        if with_gradients:
            run_micro_batches(policy, batches)
        with torch.no_grad():
            for batch in () if with_gradients else batches:
                completion_logps(policy, batch.to(policy.device))
    assert num_graphs() == before


def test_an_uncompiled_policy_on_a_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: a CPU's steps are bitwise what they were."""
    monkeypatch.setattr("dpo.model.warm_up.completion_logps", lambda *_: pytest.fail("was run"))
    policy = SimpleNamespace(parallel=ParallelConfig(), device=torch.device("cpu"))
    warm_up(policy, None, None, (True, False))  # type: ignore[arg-type]
