"""`dpo.estimate`: the parts of the peak against hand-derived bytes, few layers drawn out to many, traffic and time by
hand, and the program."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from dpo.base.errors import UserError
from dpo.batch.costs import CostModel, cost_model
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree
from dpo.config import OptimConfig
from dpo.estimate import program
from dpo.estimate.arguments import device_key
from dpo.estimate.changes import find_changes
from dpo.estimate.compiled import in_kernels
from dpo.estimate.devices import DEVICES, GIB, Device
from dpo.estimate.lengths import find_lengths, largest_micro_batches
from dpo.estimate.memory import COPY, OPTIMIZER, step_memory, update_elements
from dpo.estimate.needs import Trial
from dpo.estimate.parameters import groups_of
from dpo.estimate.rehearsal import Rehearsal, rehearse
from dpo.estimate.speed import Cluster, step_speed
from dpo.estimate.stand_in import flex_attention_stood_in_for, kept_attention
from dpo.estimate.timeline import (
    ACTIVATIONS,
    COPIED,
    GATHERED,
    GRADIENTS,
    HEAD,
    LOGITS,
    REDUCED,
    WEIGHTS,
    WHOLE,
    Moment,
)
from dpo.estimate.traffic import Groups
from dpo.machine.peaks import device_peak
from dpo.model.attention import ATTENTION, tree_attention
from dpo.step.optim import make_optimizer, optimizer_elements
from tests.support.live_bytes import LiveBytes
from tests.support.models import family_config, save_pairs
from tests.support.runs import changed, error_lines, exit_code_of, make_config

HIDDEN, MLP, VOCAB = 64, 96, 512
DEPTH, DEEP = 4, 6
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN  # q, k, v, o; gate, up, down; two norms
ROOT = 2 * VOCAB * HIDDEN + HIDDEN  # embeddings, head, norm
PLAIN = {"parallel__activation_checkpointing": "none", "parallel__sync_gradients": "last_micro_batch"}
ROW = 256  # tokens of a row on CUDA at least: two of FlexAttention's blocks
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def llama(depth: int = DEPTH) -> LlamaConfig:
    """Every size is divided by 4 ranks, so that nothing is padded."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def tree(prompt: int, completion: int) -> Tree:
    ids = np.zeros(max(prompt, completion), np.int32)
    return Tree(ids[:prompt], (ids[:completion], ids[:completion]), ((0, 1),))


def config_with(**keys: Any) -> Any:
    """A config for CUDA, one tree of 96 tokens a micro-batch unless `keys` say otherwise."""
    facts = {"parallel__compute_dtype": "bfloat16", "batch__tokens_per_micro_batch": 96}
    return make_config("no model", "no data", "no run", **(facts | PLAIN | keys))


def step_of(config: Any, num_ranks: int, num_trees: int) -> tuple[StepPlan, tuple[Tree, ...]]:
    trees = [tree(32, 32)] * num_trees
    plan = plan_step(trees, num_ranks, config.batch.tokens_per_micro_batch, CostModel())
    return largest_micro_batches([plan])[0]


def seen(config: Any, num_ranks: int, num_trees: int, depth: int = DEPTH, on_cuda: bool = True) -> Rehearsal:
    return rehearse(config, llama(depth), num_ranks, step_of(config, num_ranks, num_trees), on_cuda)


# --- the parts, by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_weights_gradients_and_what_is_gathered(compiled: bool) -> None:
    """Four ranks, bfloat16 over float32, gradients on every micro-batch, in the middle of the last backward pass:

    weights, gradients   a quarter of the numbers in float32; gradients of the first micro-batch, and at most those of
                         a layer whole, which are reduced
    gathered weights     in bfloat16: the root, the layer that works, and the next one, which is gathered already
    whole gradients      in bfloat16 the head's, which waits for the rest of the root, and at most those of the layer
                         that works
    """
    config = config_with(parallel__sync_gradients="every_micro_batch", parallel__compile=compiled)
    peak = seen(config, 4, 8).peaks[Moment(1, "backward", 2)]
    weights = 4 * (DEPTH * LAYER + ROOT) // 4
    assert peak[WEIGHTS] == pytest.approx(weights, abs=256)  # and the frequencies of the rotary embedding
    assert weights <= peak[GRADIENTS] + peak[REDUCED] <= weights + 4 * LAYER
    assert 2 * (ROOT + LAYER) <= peak[GATHERED] <= 2 * (ROOT + 4 * LAYER)
    assert 2 * VOCAB * HIDDEN < peak[WHOLE] <= 2 * (VOCAB * HIDDEN + LAYER)


@pytest.mark.parametrize("compiled", [True, False])
def test_no_layer_outlives_its_backward_pass(compiled: bool) -> None:
    """With a vocabulary 16 times the size the most is there when the root's gradients are reduced: these, in bfloat16,
    and their float32 copy."""
    config, wide = config_with(parallel__compile=compiled), llama(2)
    wide.vocab_size = 16 * VOCAB
    peak = rehearse(config, wide, 4, step_of(config, 4, 4), True).peaks[Moment(0, "backward", 0)]
    root = 2 * 16 * VOCAB * HIDDEN + HIDDEN
    assert peak[WHOLE] == pytest.approx(2 * root, abs=2 * HIDDEN)  # the norm's may be a view of an activation
    assert peak[REDUCED] == 4 * root


@pytest.mark.parametrize(("num_trees", "has_gradients"), [(8, True), (4, False)])
def test_unsharded_gradients_outlive_a_micro_batch_that_does_not_reduce(num_trees: int, has_gradients: bool) -> None:
    """last_micro_batch: all gradients, whole, in float32, while the second micro-batch begins; none where the step has
    one micro-batch."""
    peaks = seen(config_with(), 4, num_trees).peaks
    last = max(moment.micro_batch for moment in peaks)
    whole = peaks[Moment(last, "forward", 2)][WHOLE]
    assert whole == (4 * (DEPTH * LAYER + ROOT) if has_gradients else 0)


def test_attention_on_cuda_keeps_queries_keys_values_and_output() -> None:
    """Selective checkpointing keeps what attention's compiled region gives, which is what its backward pass needs: the
    output, rotated queries and keys, (L, H) in bfloat16 each, the values, which are the product below, and (heads, L)
    in float32; and every second of a layer's seven products (the 1st, 3rd, 5th and 7th: q, v, gate, down), beside the
    layer's input. On torch's CUDA allocator a Llama 8B kept 56.5 KB a token and layer: 46.2 and these 2 x 5,120."""
    peaks = seen(config_with(parallel__activation_checkpointing="selective", parallel__compile=False), 4, 4).peaks
    kept = [peaks[Moment(0, "forward", layer)][ACTIVATIONS] for layer in (1, 2)]
    attention, products, layer_input = (
        3 * 2 * ROW * HIDDEN + 4 * 4 * ROW,
        2 * ROW * (3 * HIDDEN + MLP),
        2 * ROW * HIDDEN,
    )
    assert kept[1] - kept[0] == attention + products + layer_input


@pytest.mark.parametrize(
    ("kind", "hidden", "mlp", "heads", "norms"),
    [("none", 8, 3, 4, 2), ("selective", 4, 1, 4, 0), ("full", 1, 0, 0, 0)],
)
def test_a_compiled_layer_keeps_what_the_partitioner_says(
    kind: str, hidden: int, mlp: int, heads: int, norms: int
) -> None:
    """From one layer to the next, of each of a row's tokens: vectors of the hidden size and of the MLP's in bfloat16,
    attention's logarithm of a head's sum and a norm's 1/rms in float32.

    none       the layer's input, the first norm's result (a factor of the products for q, k, v), rotated queries and
               keys, values, attention's output, the product of it (the residual sum is computed again), the second
               norm's result; gate, up and silu(gate) up
    selective  the layer's input, attention's output, and of the products with an odd number (q, v, gate, down) those
               that a gradient needs: not down, which is only added. Rotated queries and keys are computed again
    full       the layer's input
    """
    peaks = seen(config_with(parallel__activation_checkpointing=kind), 4, 4).peaks
    kept = [peaks[Moment(0, "forward", layer)][ACTIVATIONS] for layer in (1, 2, 3)]
    expected = ROW * (2 * (hidden * HIDDEN + mlp * MLP) + 4 * (heads + norms))
    assert kept[1] - kept[0] == kept[2] - kept[1] == expected


def test_tracing_a_layer_leaves_nothing_in_the_numbers() -> None:
    """The first rehearsal traces, the second finds what was traced."""
    torch.compiler.reset()
    first, second = (seen(config_with(), 4, 4, depth=2).peaks for _ in range(2))
    assert first == second


def test_what_stays_in_a_kernel_is_no_memory() -> None:
    """relu and its double go from one product to the next: the double is written, since a product reads it, and relu
    stays inside; the first product is needed until the double is written."""
    graph = torch.fx.Graph()
    left = graph.placeholder("left")
    product = graph.call_function(torch.ops.aten.mm.default, (left, left))
    relu = graph.call_function(torch.ops.aten.relu.default, (product,))
    double = graph.call_function(torch.ops.aten.add.Tensor, (relu, relu))
    view = graph.call_function(torch.ops.aten.permute.default, (double, [1, 0]))
    last = graph.call_function(torch.ops.aten.mm.default, (view, left))
    output = graph.output(last)
    stay, last_uses = in_kernels(list(graph.nodes))
    assert stay == {relu}
    assert {node: set(ended) for node, ended in last_uses.items()} == {
        double: {product, relu},
        last: {left, double, view},
        output: {last},
    }


def test_the_stand_in_gives_what_flex_attention_gives() -> None:
    """The output lies in memory as the queries do; keys and values stay in their own number of heads."""
    query = torch.zeros(1, 5, 4, 16).transpose(1, 2).requires_grad_()
    key, value = (torch.zeros(1, 2, 5, 16, requires_grad=True) for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, logsumexp = kept_attention(query, key, value)
    out.sum().backward()
    assert out.stride() == query.stride() and logsumexp.shape == (1, 4, 5)
    assert sorted(x.numel() for x in kept) == sorted([320, 160, 160, 320, 20])
    assert query.grad is not None and key.grad is not None and key.grad.shape == key.shape


def test_models_attend_as_before_afterwards() -> None:
    from transformers import AttentionInterface

    interface = AttentionInterface()
    with flex_attention_stood_in_for():
        assert interface[ATTENTION] is not tree_attention
    assert interface[ATTENTION] is tree_attention


def test_logits_are_those_of_the_device() -> None:
    """64 scored rows of 512 logits in bfloat16, in the head's forward pass: 4 bytes each on CUDA, where the product is
    float32; 2 more on a CPU, for the product's own. The budget holds all.
    """
    at_head = {on_cuda: seen(config_with(), 4, 4, 2, on_cuda).peaks for on_cuda in (True, False)}
    logits = {on_cuda: peaks[Moment(0, "forward", HEAD)][LOGITS] for on_cuda, peaks in at_head.items()}
    assert logits == {True: 64 * VOCAB * 4, False: 64 * VOCAB * 6}


def test_logits_stay_within_their_budget() -> None:
    """64 scored rows of 512 float32 logits are 128 KiB; never more than a budget of 1 MiB, and at a vocabulary of
    16 times the size not more either."""
    few = seen(config_with(parallel__head_memory_mib=1), 4, 4, depth=2).peaks
    wide = llama(2)
    wide.vocab_size = 16 * VOCAB
    config = config_with(parallel__head_memory_mib=1)
    many = rehearse(config, wide, 4, step_of(config, 4, 4), True).peaks
    for peaks in (few, many):
        assert 2**16 < max(peak[LOGITS] for peak in peaks.values()) <= 2**20 * 1.01


def test_gloo_copies_what_it_gathers_and_scatters() -> None:
    """On a CPU the root's gradients, in float32, are copied whole while they are reduced, or a layer's are."""
    config = config_with(parallel__compute_dtype="float32", parallel__sync_gradients="every_micro_batch")
    peaks = seen(config, 4, 8, 2, on_cuda=False).peaks
    assert max(peak[COPIED] for peak in peaks.values()) in (4 * ROOT, 4 * LAYER)
    assert not any(peak[COPIED] for peak in seen(config, 4, 8, 2).peaks.values())


# --- few layers to many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"parallel__compile": False},
        {"parallel__activation_checkpointing": "full", "parallel__sync_gradients": "every_micro_batch"},
        {"parallel__reshard_after_forward": False, "parallel__activation_checkpointing": "selective"},
        {"parallel__replicate": 2, "parallel__sync_gradients": "every_micro_batch"},
        {"parallel__cpu_offload": True, "parallel__replicate": 2, "parallel__sync_gradients": "every_micro_batch"},
    ],
)
def test_drawn_out_layers_are_the_layers_themselves(keys: dict[str, Any], on_cuda: bool) -> None:
    """The oracle: all layers of a deeper model rehearsed, its greatest moment of all, those between the ends too."""
    dtype = "bfloat16" if on_cuda else "float32"
    config = config_with(**{"optim__name": "sgd", "parallel__compute_dtype": dtype} | keys)
    away = (WEIGHTS, GRADIENTS) if config.parallel.cpu_offload and on_cuda else ()
    whole = seen(config, 4, 8, DEEP, on_cuda).peaks.values()
    drawn = step_memory(config, llama(DEEP), 4, *step_of(config, 4, 8), on_cuda)
    assert drawn.peak == max(sum(n for kind, n in peak.items() if kind not in away) for peak in whole)
    assert groups_of(config, llama(DEEP), 4) == Groups((LAYER,) * DEEP, ROOT)


def test_the_garbage_collector_changes_nothing() -> None:
    """With layers traced anew, and a collection after every 100 new objects."""
    thresholds, totals = gc.get_threshold(), []
    for threshold in (0, 100):
        torch._dynamo.reset()
        gc.set_threshold(threshold)
        try:
            peaks = seen(config_with(), 4, 8, depth=2).peaks
        finally:
            gc.set_threshold(*thresholds)
        totals.append({moment: peak.total() for moment, peak in peaks.items()})
    assert totals[0] == totals[1]


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox-tied", "qwen3", "mistral"])
@pytest.mark.parametrize("on_cuda", [True, False])
def test_every_family_can_be_estimated(family: str, on_cuda: bool) -> None:
    """Also with 3 ranks, which divide none of its shapes, and with one rank."""
    for num_ranks in (1, 3):
        config = config_with(parallel__compute_dtype="bfloat16" if on_cuda else "float32")
        memory = step_memory(config, family_config(family), num_ranks, *step_of(config, num_ranks, 6), on_cuda)
        assert memory.device[WEIGHTS] > 0 and memory.device[ACTIVATIONS] > 0


@pytest.mark.parametrize("on_cuda", [True, False])
def test_one_rank_can_be_estimated(on_cuda: bool) -> None:
    """Its shard is the whole model."""
    config = config_with(parallel__compute_dtype="bfloat16" if on_cuda else "float32")
    memory = step_memory(config, llama(2), 1, *step_of(config, 1, 2), on_cuda)
    assert memory.device[WEIGHTS] == pytest.approx(4 * (2 * LAYER + ROOT), abs=256)
    assert memory.device[ACTIVATIONS] > 0


def test_offloading_moves_the_state_to_the_host() -> None:
    """A checkpoint's copy lies there in any case. On a CPU, whose memory is the host's, nothing moves."""
    config = config_with(parallel__cpu_offload=True)
    here, there = (
        step_memory(c, llama(), 4, *step_of(c, 4, 8), True)
        for c in (changed(config, parallel__cpu_offload=False), config)
    )
    numbers = DEPTH * LAYER + ROOT
    assert not any(there.device[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER))
    sizes = [parameter.numel() for parameter in LlamaForCausalLM(llama()).parameters()]  # bytes of a quarter
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    assert sum(sizes) == numbers < pinned
    assert set(here.host) == {COPY} and here.host[COPY] == there.host[COPY] == 2 * pinned  # weights, RMSprop's state
    assert there.host[OPTIMIZER] == numbers and there.host[GRADIENTS] == numbers  # 4 bytes, a quarter of them
    assert there.peak <= here.peak - 2 * numbers
    cpu = changed(config, parallel__compute_dtype="float32")
    kept, moved = (
        step_memory(c, llama(), 4, *step_of(c, 4, 8), False) for c in (changed(cpu, parallel__cpu_offload=False), cpu)
    )
    assert moved.device == kept.device and moved.host == {COPY: 2 * numbers}


def test_replicas_keep_what_they_reduced_until_the_last_backward_pass_ends() -> None:
    """Two replicas of two shards, offloaded: beside the gradients on the host, half of the layers' numbers in float32,
    all-reduced, on the device.
    """
    config = config_with(parallel__cpu_offload=True, parallel__replicate=2)
    peak = seen(config, 4, 4).peaks[Moment(0, "backward", 0)]
    assert 4 * DEPTH * LAYER // 2 <= peak[REDUCED] <= 4 * (DEPTH * LAYER + 2 * ROOT)


# --- the optimizer ----------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    OptimConfig(),
    OptimConfig(momentum=0.9),
    OptimConfig(weight_decay=0.1),
    OptimConfig(name="adamw"),
    OptimConfig(name="adamw", weight_decay=0.1),
    OptimConfig(name="sgd"),
    OptimConfig(name="sgd", momentum=0.9, weight_decay=0.1),
]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.momentum}-{o.weight_decay}")
@pytest.mark.parametrize("at_once", [False, True])
def test_the_optimizer_keeps_and_needs_what_the_formula_says(optim: OptimConfig, at_once: bool) -> None:
    """torch's own, tensor by tensor and, as on CUDA, all tensors at once (AdamW fused): its state after a step, and the
    room that the next step needs beside it, in numbers a weight."""
    weights = [nn.Parameter(torch.ones(1000, 10)) for _ in range(4)]
    optimizer = make_optimizer(weights, optim)
    if at_once:
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": False} if optim.name == "adamw" else {"foreach": True}
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = sum(x.numel() for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x) and x.dim())
    with LiveBytes() as live:
        optimizer.step()
    assert state == optimizer_elements(optim) * 40_000
    assert live.peak == pytest.approx(4 * update_elements(optim, at_once) * (40_000 if at_once else 10_000), abs=64)


# --- traffic and time -------------------------------------------------------------------------------------------------


def speed_of(ranks_per_node: int, **keys: Any) -> Any:
    """16 ranks, one tree each, on a device of 100 and 10 bytes a second."""
    device = Device("H100", GIB, link=100.0, node_link=10.0, host_link=50.0)
    config = config_with(**keys)
    plans = [plan_step([tree(32, 32)] * 16, 16, 96, cost_model(llama()))]
    return step_speed(config, llama(), plans, Groups((100,) * 3, 60), Cluster(device, 16, ranks_per_node, 0.5))


def seconds(speed: Any) -> dict[str, float]:
    return {part.name: part.seconds for part in speed.parts[1:]}


def test_bytes_and_seconds_of_one_copy() -> None:
    """Two gathers of 3 layers of 100 and one of a root of 60 numbers, 2 bytes each: 1,320 bytes, of which a rank of 16
    sends 15/16; 360 gradients of 4 bytes. On one node the link is the limit; on nodes of 4 their 4 cards of 10 are."""
    gathered, scattered = 1320 * 15 / 16, 1440 * 15 / 16
    assert seconds(speed_of(16)) == pytest.approx({"all-gather": gathered / 100, "reduce-scatter": scattered / 100})
    assert seconds(speed_of(4)) == pytest.approx({"all-gather": gathered / 40, "reduce-scatter": scattered / 40})


def test_bytes_and_seconds_of_copies() -> None:
    """Four copies of four ranks: a copy a node, so gathers stay inside; each rank's quarter of the gradients, 360
    bytes, goes around a ring of 4 ranks on 4 nodes, twice 3/4 of it, over one card."""
    found = seconds(speed_of(4, parallel__replicate=4))
    assert found["all-gather"] == pytest.approx(1320 * 3 / 4 / 100)
    assert found["all-reduce"] == pytest.approx(360 * 2 * 3 / 4 / 10)


def test_bytes_to_and_from_the_host() -> None:
    """A sixteenth of what is gathered, and of the gradients, both as float32, also where less is sent to others."""
    for reduced in ("float32", "bfloat16"):
        found = seconds(speed_of(16, parallel__cpu_offload=True, parallel__reduce_dtype=reduced))
        assert found["host"] == pytest.approx((2640 + 1440) / 16 / 50)


def test_arithmetic_pays_for_what_is_computed_twice() -> None:
    """One tree a rank, at half of 989e12. Its attention's scores are computed twice, half a unit beside the three;
    where layers are checkpointed all of them is, but the last product; the head's logits never."""
    costs, mine = cost_model(llama()), tree(32, 32)
    scores, last = costs.per_attended * mine.num_attended / 2, costs.per_token_last * mine.num_tokens
    layers = costs.cost(mine) - costs.per_scored * mine.num_scored
    once = 3 * costs.cost(mine) + scores
    plain, full = speed_of(16), speed_of(16, parallel__activation_checkpointing="full")
    assert plain.parts[0].seconds == pytest.approx(once / (989e12 / 2))
    assert full.parts[0].seconds == pytest.approx((once + layers - last) / (989e12 / 2))
    assert full.model_seconds == plain.model_seconds == pytest.approx(3 * costs.cost(mine) / 989e12)
    assert plain.overlapped == max(p.seconds for p in plain.parts) and plain.serial == sum(
        p.seconds for p in plain.parts
    )


def test_every_device_has_a_peak() -> None:
    for device in DEVICES.values():
        assert device_peak(device.name, "bfloat16") and device_peak(device.name, "float32")


# --- lengths ----------------------------------------------------------------------------------------------------------


def lengths_of(config: Any, prompt: int | None = None, completion: int | None = None) -> tuple[set, str]:
    found = find_lengths(config, family_config("llama"), prompt, completion)
    trees = {(len(t.prompt_ids), *map(len, t.completion_ids)) for step in found.steps for t in step}
    return trees, found.description


def test_lengths_are_those_of_the_data_where_it_is_here(tmp_path: Path) -> None:
    data = save_pairs(tmp_path / "pairs.jsonl", 12)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    expected = {(len(row["prompt_ids"]), *map(len, row["completion_ids"])) for row in rows}
    config = make_config("no model", data, "run", batch__pairs_per_step=4)
    config = replace(config, data=replace(config.data, train=[replace(config.data.train[0], format="tokens")]))
    trees, said = lengths_of(config)
    assert trees == expected
    assert said == "read from the data, 3 of the first 3 steps; for memory, the longest pairs together in one step"


@pytest.mark.parametrize("grouped", [False, True])
def test_the_longest_pairs_need_the_memory(grouped: bool, tmp_path: Path) -> None:
    """40 prompts, of which one has a pair of 3 + 60 + 2 tokens and another five pairs of 3 + 10 + 2: with pairs of a
    prompt together in a step of three, three of the five make the tree of the most tokens."""
    rows = [{"prompt_ids": [1, 1, i + 3], "chosen_ids": [3, 2], "rejected_ids": [4, 2]} for i in range(40)]
    rows[7]["chosen_ids"] = [5] * 60
    rows += [{"prompt_ids": [1, 1, 50], "chosen_ids": [6] * 9 + [i], "rejected_ids": [4, 2]} for i in range(5)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config("no model", data, "run", batch__pairs_per_step=3, batch__group_by_prompt=grouped)
    config = replace(config, data=replace(config.data, train=[replace(config.data.train[0], format="tokens")]))
    longest = find_lengths(config, family_config("llama"), None, None).longest
    assert max(tree.num_tokens for tree in longest) == (3 + 3 * 10 + 2 if grouped else 65)


def test_lengths_that_are_given_or_assumed() -> None:
    config = make_config("no model", "no/data", "run", batch__pairs_per_step=4)
    assert lengths_of(config) == (
        {(256, 256, 256)},
        "prompts of 256 and two completions of 256 tokens, assumed: no/data is not here",
    )
    assert lengths_of(config, 10, 20)[0] == {(10, 20, 20)}
    assert lengths_of(config, 100)[0] == {(100, 412, 412)}
    without_losers = changed(config, loss__name="sft")
    assert lengths_of(without_losers, 10, 20) == ({(10, 20)}, "prompts of 10 and a completion of 20 tokens, as given")
    with pytest.raises(UserError, match="--completion-tokens"):
        lengths_of(changed(config, data__max_length=None))


def test_the_largest_micro_batch_shares_its_step_or_is_alone() -> None:
    """A step of several micro-batches holds gradients beside; a longer one that is alone may need more all the same."""
    several = plan_step([tree(10, 10)] * 4, 1, 60, CostModel())
    alone = plan_step([tree(30, 30)], 1, 90, CostModel())
    assert [plan for plan, _ in largest_micro_batches([alone, several])] == [several, alone]
    assert [plan for plan, _ in largest_micro_batches([several])] == [several]
    assert [sum(t.num_tokens for t in trees) for _, trees in largest_micro_batches([alone])] == [90]


# --- what to change ---------------------------------------------------------------------------------------------------


def changes_for(memory: float, **keys: Any) -> list[tuple[str, bool]]:
    """The changes of a made-up device on which every token of a micro-batch needs 1 byte, unsharded gradients 1,000, no
    checkpointing 2,000, and the state 8,000 over the ranks, 8 at first."""

    def needed(trial: Trial) -> float:
        parallel = trial.config.parallel
        gradients = 1000 * (parallel.sync_gradients == "last_micro_batch")
        activations = {"none": 2000, "selective": 1000, "full": 0}[parallel.activation_checkpointing]
        state = 0 if parallel.cpu_offload else 64_000 / trial.num_ranks
        return trial.config.batch.tokens_per_micro_batch + gradients + activations + state

    config = config_with(**{"batch__tokens_per_micro_batch": 1024} | keys)
    trial = Trial(config, 8)
    found = find_changes(trial, needed(trial), 300, needed, memory)
    return [(change.words, change.fits) for change in found]


def test_one_change_is_enough() -> None:
    """12,024 bytes at first; 1,000 and 2,000 less are enough for 11,100 and 10,100."""
    changes = dict(changes_for(11_100))
    assert changes["--parallel.sync_gradients every_micro_batch"]
    assert changes["--parallel.activation_checkpointing selective"]
    assert not changes["--batch.tokens_per_micro_batch 512"] and "--batch.tokens_per_micro_batch 256" not in changes


def test_all_changes_together_then_more_ranks_or_the_host() -> None:
    together = (
        "--parallel.sync_gradients every_micro_batch --parallel.activation_checkpointing full"
        " --batch.tokens_per_micro_batch 512"
    )
    assert changes_for(9000)[-1] == (together, True)
    assert changes_for(5000)[-2:] == [
        (f"{together} --ranks 16", True),
        (f"{together} --parallel.cpu_offload true", True),
    ]
    given = changes_for(5000, parallel__shard=8)
    assert (f"{together} --ranks 16 --parallel.shard 16", True) in given
    assert not any(fits for _, fits in changes_for(500))


# --- the program ------------------------------------------------------------------------------------------------------


def save_config(folder: Path, config: PretrainedConfig | dict[str, Any]) -> Path:
    """A model folder with config.json and nothing else, and a run's config beside it."""
    folder.mkdir()
    facts = config if isinstance(config, dict) else config.to_dict()
    (folder / "config.json").write_text(json.dumps(facts))
    path = folder.with_suffix(".yaml")
    sections = {"model": {"path": str(folder)}, "data": {"train": [{"path": "no/data"}]}}
    path.write_text(json.dumps(sections))
    return path


def run(path: Path, *words: str) -> int:
    return exit_code_of(program.main, "dpo.estimate", "--config", str(path), *words)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_config(tmp_path / "small", llama(2))


def test_llama_3_70b(tmp_path: Path, capsys) -> None:
    """Published: 70.6 billion parameters. Float32 weights, gradients and RMSprop's state over 64 ranks: 3 x 4.1 GiB."""
    path = save_config(tmp_path / "llama", LLAMA_70B)
    words = ["--ranks", "64", "--parallel.activation_checkpointing", "full", "--train.steps", "2500"]
    assert run(path, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("parallel (auto): sync_gradients ")
    assert any("70.55 billion parameters, one copy over 64 H100" in line for line in lines)
    assert [line.split()[1:] for line in lines if line.split()[0] in ("weights", "optimizer")] == [["4.1", "GiB"]] * 2
    assert any(line.startswith("fits: ") and line.endswith(" of 79.1 GiB") for line in lines)
    head = next(line for line in lines if line.startswith("a run of "))
    assert re.fullmatch(r"a run of 2,500 steps takes at least [\d.]+ (h|min), [\d,.]+ GPU-hours on 64 GPUs:", head)
    disk = lines.index(next(line for line in lines if line.startswith("disk of a run: ")))
    assert [line.split()[0] for line in lines[disk + 1 : disk + 4]] == ["checkpoint", "final/", "cache"]
    assert len(lines) <= 38 and max(map(len, lines)) <= 100


def test_what_does_not_fit_says_so_and_what_would(small: Path, capsys, monkeypatch) -> None:
    """2 GiB are the process's own; 16 MiB remain, where 12,288 tokens need several times as much."""
    tight = replace(DEVICES["l4"], memory=2 * GIB + 16 * 2**20)
    monkeypatch.setitem(DEVICES, "l4", tight)
    words = ["--ranks", "1", "--device", "l4", "--completion-tokens", "64", "--prompt-tokens", "64"]
    words += ["--parallel.activation_checkpointing", "full", "--parallel.sync_gradients", "every_micro_batch"]
    assert run(small, *words, "--parallel.compile", "false") == 1
    shown = capsys.readouterr()
    assert "does not fit: 2." in shown.out and error_lines(shown.err)[0].startswith("error: does not fit: ")
    assert "fits --" in shown.out and "--batch.tokens_per_micro_batch" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100


def test_advice_follows_what_makes_a_step_fit(small: Path, capsys, monkeypatch) -> None:
    """Two ranks whose link moves 1 MB a second are bound by traffic. What would help is said of the step with the first
    change that fits, after the changes; where none does, nothing is advised."""
    for room, is_advised in ((16 * 2**20, True), (0, False)):
        monkeypatch.setitem(DEVICES, "l4", replace(DEVICES["l4"], memory=2 * GIB + room, link=1e6))
        words = ["--ranks", "2", "--device", "l4", "--completion-tokens", "64", "--prompt-tokens", "64"]
        words += ["--parallel.activation_checkpointing", "full", "--parallel.sync_gradients", "every_micro_batch"]
        assert run(small, *words, "--parallel.compile", "false") == 1
        lines = capsys.readouterr().out.splitlines()
        fitting = [line.split("fits ")[1] for line in lines if " fits --" in line]
        assert bool(fitting) == is_advised
        if is_advised:
            place = lines.index(f"with {fitting[0]}:")
            assert place > lines.index("changes to try, and the GiB that each needs of 2.0:")
            assert lines[place + 1].startswith("bound by traffic: ")
        else:
            assert not any(line.startswith(("with ", "bound by traffic")) for line in lines)


def test_on_this_machine(small: Path, capsys) -> None:
    assert run(small, "--ranks", "2", "--device", "cpu", "--completion-tokens", "8", "--prompt-tokens", "8") == 0
    assert "float32 compute over float32 weights" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "device"),
    [("a100", "A100"), ("nvidia_h100_80gb_hbm3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("l40s", "L40S")],
)
def test_a_device_by_the_name_that_slurm_or_cuda_gives(name: str, device: str) -> None:
    assert DEVICES[device_key(name)].name == device


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: command line: --ranks: is missing, and parallel.shard is null; valid: --ranks N"),
        (["--ranks", "0"], "error: command line: --ranks: must be > 0, got 0; valid: a number > 0"),
        (
            ["--ranks", "12", "--ranks-per-node", "8"],
            "error: command line: --ranks-per-node: 12 ranks do not fill nodes of 8; valid: --ranks-per-node 1, 2, 3,"
            " 4, 6, or --ranks a multiple of 8",
        ),
        (["--ranks", "12"], "error: command line: --ranks: 12 ranks do not fill nodes of 8; valid: "),
        (["--ranks", "2", "--mfu", "40"], "error: command line: --mfu: must be <= 1, got 40.0; valid: a share"),
        (["--ranks", "2", "--device", "h1"], "error: command line: --device: no such device: h1; valid: gb300, gb200"),
        (["--ranks", "2", "--link-gb-s", "fast"], "error: command line: argument --link-gb-s: invalid float"),
        (["--ranks", "3", "--parallel.replicate", "2"], "error: command line: parallel.replicate: 2 replicas do not"),
        (["--ranks", "2", "--model.path", "/"], "error: command line: model.path: / has no config.json"),
        (["--ranks", "2", "--data.max_length", "null"], "error: command line: --prompt-tokens, --completion-tokens:"),
    ],
)
def test_wrong_words_are_one_line(small: Path, capsys, words: list[str], message: str) -> None:
    assert run(small, *words) == 2
    line = error_lines(capsys.readouterr().err)[-1]
    assert line.startswith(message) or line.replace(str(small), "command line").startswith(message)


def test_a_dtype_without_a_known_peak_is_no_wrong_input(small: Path, capsys) -> None:
    """A run of this config works, so the launcher must not refuse it."""
    assert run(small, "--ranks", "2", "--model.dtype", "float64", "--parallel.reduce_dtype", "float64") == 1
    line = error_lines(capsys.readouterr().err)[-1]
    assert line == "error: no peak of H100 in float64 is known; valid: model.dtype float32, or --device cpu"


def test_the_number_of_ranks_may_stand_in_the_config(small: Path, capsys) -> None:
    words = ["--parallel.compile", "false", "--completion-tokens", "8", "--prompt-tokens", "8"]
    assert run(small, "--parallel.shard", "4", "--parallel.replicate", "2", *words) == 0
    assert "2 copies over 8 H100" in capsys.readouterr().out
