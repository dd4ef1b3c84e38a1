"""`dpo.estimate` of steps with adapters: the parts of the peak by hand, few layers drawn out, a 70B on one node."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo.estimate.few_layers import adapters_of_few
from dpo.estimate.memory import COPY, OPTIMIZER, step_memory
from dpo.estimate.parameters import groups_of
from dpo.estimate.rehearsal import rehearse
from dpo.estimate.timeline import GRADIENTS, REDUCED, WEIGHTS, WHOLE, Moment
from dpo.estimate.traffic import Groups
from tests.estimate.test_estimate import (
    DEEP,
    DEPTH,
    HIDDEN,
    LAYER,
    LLAMA_70B,
    MLP,
    ROOT,
    config_with,
    llama,
    run,
    save_config,
    step_of,
)

CONFIG = Path(__file__).parents[2] / "configs" / "llama-3-70b_lora.yaml"
RANK = 4
ADAPTERS = RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + MLP))
"""Elements of a layer's adapters: of q, k, v, o and gate, up, down."""


def with_adapters(**keys: Any) -> Any:
    return config_with(**({"lora__rank": RANK} | keys))


def test_only_adapters_have_gradients_and_an_optimizer() -> None:
    """Four ranks, bfloat16 over float32, gradients on every micro-batch; every size is divided by 4."""
    config = with_adapters(parallel__sync_gradients="every_micro_batch", optim__name="adamw")
    plan, trees = step_of(config, 4, 8)
    rehearsed = rehearse(config, llama(), 4, (plan, trees), True, adapters_of_few(config, llama()))
    frozen, trained = (DEPTH * LAYER + ROOT) // 4, DEPTH * ADAPTERS // 4
    assert rehearsed.weight_bytes == 2 * frozen + 4 * trained
    assert sum(rehearsed.trained_elements) == trained
    peak = rehearsed.peaks[Moment(1, "backward", 2)]
    assert peak[WEIGHTS] == pytest.approx(2 * frozen + 4 * trained, abs=256)  # and the rotary embedding's frequencies
    assert 4 * trained // 2 <= peak[GRADIENTS] + peak[REDUCED] <= 4 * trained + 4 * ADAPTERS
    assert peak[WHOLE] <= 2 * ADAPTERS
    memory = step_memory(config, llama(), 4, plan, trees, True)
    assert memory.device[OPTIMIZER] == 2 * 4 * trained
    assert 3 * 4 * trained <= memory.host[COPY] < 2 * 3 * 4 * trained  # rounded up to powers of two


def test_a_quantized_base_by_hand() -> None:
    """Four ranks, bfloat16 over float32. A block of 64 weights has 36 bytes; rows of 64 weights (q, k, v, o, gate, up)
    have one, the 64 rows of 96 (down) two.
    """
    config = with_adapters(lora__quantize="nf4", optim__name="adamw", parallel__compile=False)
    num_bytes = 36 * (4 * HIDDEN + 2 * MLP + 2 * HIDDEN)
    products = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP
    rehearsed = rehearse(config, llama(), 4, step_of(config, 4, 8), True, adapters_of_few(config, llama()))
    rest = DEPTH * (LAYER - products) + ROOT
    assert rehearsed.weight_bytes == (DEPTH * (num_bytes + 4 * ADAPTERS) + 2 * rest) // 4
    assert sum(rehearsed.trained_elements) == DEPTH * ADAPTERS // 4
    groups = groups_of(config, llama(), 4)
    assert groups.layers == (num_bytes // 2 + LAYER - products + ADAPTERS,) * DEPTH
    assert groups.num_parameters == DEPTH * (LAYER + ADAPTERS) + ROOT
    plain = groups_of(with_adapters(), llama(), 4)
    assert (groups.root, groups.reduced, groups.trained) == (plain.root, plain.reduced, plain.trained)
    assert plain.num_parameters == plain.elements == groups.num_parameters


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {"parallel__compile": False},
        {"parallel__activation_checkpointing": "full", "parallel__sync_gradients": "every_micro_batch"},
        {"parallel__cpu_offload": True, "parallel__replicate": 2, "parallel__compile": False},
        {"lora__quantize": "nf4", "parallel__compile": False},
        {"lora__quantize": "nf4", "parallel__activation_checkpointing": "full"},
    ],
)
def test_drawn_out_layers_with_adapters_are_the_layers_themselves(keys: dict[str, Any], on_cuda: bool) -> None:
    """The oracle: all layers of a deeper model rehearsed. To the byte, but for what counts as weights: copies of the
    rotary embedding's frequencies, 32 bytes each, may outlive their computation.
    """
    dtype = "bfloat16" if on_cuda else "float32"
    config = with_adapters(**{"optim__name": "sgd", "parallel__compute_dtype": dtype} | keys)
    away = (WEIGHTS, GRADIENTS) if config.parallel.cpu_offload and on_cuda else ()
    micro_batch = step_of(config, 4, 8)
    whole = rehearse(config, llama(DEEP), 4, micro_batch, on_cuda, adapters_of_few(config, llama(DEEP))).peaks.values()
    drawn = step_memory(config, llama(DEEP), 4, *micro_batch, on_cuda)
    kept = [Counter({kind: n for kind, n in peak.items() if kind not in away}) for peak in whole]
    most = max(kept, key=lambda peak: peak.total())
    assert drawn.peak - drawn.device[WEIGHTS] == most.total() - most[WEIGHTS]
    assert drawn.device[WEIGHTS] == pytest.approx(most[WEIGHTS], abs=128)
    groups = groups_of(config, llama(DEEP), 4)
    assert (groups.root, groups.reduced) == (ROOT, Groups((ADAPTERS,) * DEEP, 0))
    assert groups.num_parameters == DEEP * (LAYER + ADAPTERS) + ROOT


def test_adapters_in_few_of_many_layers_are_counted_in_all() -> None:
    """Layers 4 and 5 of six: few layers have neither. The bound is what adapters in all layers take."""
    some = with_adapters(lora__target_modules=r".*\.[45]\.mlp\.up_proj", parallel__compile=False)
    each = with_adapters(lora__target_modules=["up_proj"], parallel__compile=False)
    bound, same = (step_memory(config, llama(DEEP), 4, *step_of(config, 4, 8), True) for config in (some, each))
    assert bound == same
    assert groups_of(some, llama(DEEP), 4).reduced == Groups((0,) * 4 + (RANK * (HIDDEN + MLP),) * 2, 0)


def test_a_quantized_70b_fits_on_two_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """68.45 billion of 70.55 billion parameters have 0.5625 bytes, 35.9 GiB, the rest, embeddings, head and norms, 2:
    3.9 GiB. With 0.8 GiB of adapters in float32 a half is 20.3 GiB."""
    save_config(tmp_path / "llama", LLAMA_70B)
    words = ["--model.path", str(tmp_path / "llama"), "--ranks", "2", "--device", "h100", "--train.steps", "900"]
    words += ["--parallel.activation_checkpointing", "full", "--parallel.sync_gradients", "every_micro_batch"]
    words += ["--lora.quantize", "nf4", "--parallel.compile", "false"]
    assert run(CONFIG, *words, "--prompt-tokens", "512", "--completion-tokens", "512") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = " ".join(" ".join(lines).split())
    assert "llama, 70.55 billion parameters, one copy over 2 H100" in shown
    assert "adapters are trained, in float32, the others frozen, in nf4 and bfloat16" in shown
    (weights,) = [line.split()[1:] for line in lines if line.split()[0] == "weights"]
    assert weights == ["20.3", "GiB"]
    assert any(line.startswith("fits: ") and line.endswith(" of 79.1 GiB") for line in lines)


def test_a_70b_fits_on_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published: 70.6 billion parameters, 131.4 GiB in bfloat16, an eighth of which is 16.4 GiB. Adapters of rank 16
    have 207 million (`test_a_checkpoint_of_adapters_is_small`), 0.8 GiB of AdamW's state among them 0.2 a rank."""
    save_config(tmp_path / "llama", LLAMA_70B)
    words = ["--model.path", str(tmp_path / "llama"), "--ranks", "8", "--device", "h100", "--train.steps", "900"]
    words += ["--parallel.activation_checkpointing", "full", "--parallel.sync_gradients", "every_micro_batch"]
    assert run(CONFIG, *words, "--parallel.compile", "false") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = " ".join(" ".join(lines).split())
    assert "llama, 70.55 billion parameters, one copy over 8 H100" in shown
    assert "207.09 million parameters of adapters are trained, in float32, the others frozen, in bfloat16" in shown
    (weights,) = [line.split()[1:] for line in lines if line.split()[0] == "weights"]
    assert weights == ["16.5", "GiB"]
    assert any(line.startswith("fits: ") and line.endswith(" of 79.1 GiB") for line in lines)
    assert any(line.split()[:3] == ["checkpoint", "2.3", "GiB"] for line in lines)
