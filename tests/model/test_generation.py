"""Answers of a sharded policy against the plain model, one prompt at a time and without a cache; draws by hand."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from dpo.adapters.reading import read_spec
from dpo.adapters.switch import adapters_off
from dpo.batch.costs import CostModel
from dpo.batch.packing import RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import Config, LossConfig, OptimConfig, ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.attention import ATTENTION
from dpo.model.build import build_policy, load_weights, read_start
from dpo.model.generation import ROWS_PER_LANE, AnswerRule, generate, uniform
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.pairs.pair_set import Pair
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.support.models import FAMILIES, VOCAB, plain_model, save_model
from tests.support.peft_folders import adapted_model, save_adapter

PROMPTS = [[1, 5, 6], [1, *range(40, 57)], [4], [1, 90, 7, 7, 7, 23]]
"""Of 1 to 18 tokens: all but the longest are padded, and Mistral's window of 12 is shorter than that."""

NEW = 24


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def load(world: World, folder: Path, dtype: str = "float32", **parallel: Any) -> Policy:
    config = ParallelConfig(**({"reduce_dtype": "float64"} if dtype == "float64" else {}) | parallel)
    policy = build_policy(read_model_config(folder, False), config, dtype, make_mesh(world, config))
    load_weights(policy, folder)
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama-tied")


@pytest.fixture(scope="module")
def policy(world: World, folder: Path) -> Policy:
    return load(world, folder)


def next_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """(V,) from one plain forward of all the ids."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def plain_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The oracle: the likeliest token after everything before, again and again."""
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(next_logits(model, [*prompt, *answer]).argmax()))
    return answer


def plain_draw(model: PreTrainedModel, prompt: Sequence[int], seed: int, temperature: float, count: int) -> list[int]:
    """The oracle of draws: token k where p_0 + … + p_k first reaches the place's number, p = softmax(logits / T)."""
    answer: list[int] = []
    for place in range(count):
        powers = np.exp(next_logits(model, [*prompt, *answer]).double().numpy() / temperature)
        cumulated = np.cumsum(powers / powers.sum())
        answer.append(next(k for k in range(VOCAB) if cumulated[k] >= uniform(seed, prompt, place)))
    return answer


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_answer_like_the_plain_model(family: str, world: World, tmp_path: Path) -> None:
    """Greedy, and drawn: some of the tiny models repeat one token for ever, their draws do not."""
    model, policy = plain_model(save_model(tmp_path, family)), load(world, tmp_path)
    greedy = [plain_greedy(model, prompt, NEW) for prompt in PROMPTS]
    drawn = [plain_draw(model, prompt, 3, 2.0, NEW) for prompt in PROMPTS]
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 0.0, 0), world) == greedy
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 2.0, 3), world) == drawn
    assert min(len(set(answer)) for answer in drawn) > 4


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt-neox", "qwen3"])
def test_adapters_answer_like_peft(family: str, world: World, tmp_path: Path) -> None:
    """Greedy and drawn; with the adapters switched off the answers are the base's, and on again the first ones."""
    base = save_model(tmp_path / "base", family)
    folder = save_adapter(tmp_path / "adapters", base, use_rslora=True)
    parallel = ParallelConfig()
    config, mesh = read_model_config(base, False), make_mesh(world, parallel)
    policy = build_policy(config, parallel, "float32", mesh, adapters=read_spec(folder))
    load_weights(policy, base)
    read_start(policy)
    greedy, drawn = AnswerRule((), NEW, 0.0, 0), AnswerRule((), NEW, 2.0, 3)
    models = {"adapters": adapted_model(base, folder), "base": plain_model(base)}
    expected = {name: [plain_draw(model, prompt, 3, 2.0, NEW) for prompt in PROMPTS] for name, model in models.items()}
    assert generate(policy, PROMPTS, drawn, world) == expected["adapters"] != expected["base"]
    with adapters_off(policy.model):
        assert generate(policy, PROMPTS, drawn, world) == expected["base"]
    assert generate(policy, PROMPTS, greedy, world) == [
        plain_greedy(models["adapters"], prompt, NEW) for prompt in PROMPTS
    ]


def test_in_float64(world: World, folder: Path) -> None:
    model = plain_model(folder, torch.float64)
    expected = [plain_greedy(model, prompt, NEW) for prompt in PROMPTS]
    assert generate(load(world, folder, "float64"), PROMPTS, AnswerRule((), NEW, 0.0, 0), world) == expected


def test_in_bfloat16_every_token_is_nearly_the_likeliest(world: World, folder: Path) -> None:
    """bfloat16 keeps 8 bits: logits of up to 8 or so are off by some hundredths. A token that the float32 model finds
    less likely than another may only be so by that much.
    """
    policy, model = load(world, folder, compute_dtype="bfloat16"), plain_model(folder)
    for prompt, answer in zip(PROMPTS, generate(policy, PROMPTS, AnswerRule((), NEW, 0.0, 0), world), strict=True):
        assert len(answer) == NEW
        for place, token in enumerate(answer):
            logits = next_logits(model, [*prompt, *answer[:place]])
            assert logits.max() - logits[token] <= 0.15


def test_an_answer_ends_before_any_of_the_eos_tokens(world: World, folder: Path, policy: Policy) -> None:
    """Three tokens of the unending answers are declared EOS: each answer ends where the first of them comes, and the
    last of all goes on to the limit while the others are padded.
    """
    unending = [plain_draw(plain_model(folder), prompt, 3, 2.0, NEW) for prompt in PROMPTS]
    eos_ids = [unending[0][5], unending[1][2], unending[2][0]]
    lengths = [next((i for i, token in enumerate(answer) if token in eos_ids), NEW) for answer in unending]
    expected = [answer[:length] for answer, length in zip(unending, lengths, strict=True)]
    assert generate(policy, PROMPTS, AnswerRule(tuple(eos_ids), NEW, 2.0, 3), world) == expected
    assert len(set(lengths)) == 4 and {0, NEW} < set(lengths), lengths


def test_more_prompts_than_are_answered_at_a_time(world: World, folder: Path, policy: Policy) -> None:
    prompts = [[1, 3 + number] for number in range(2 * ROWS_PER_LANE + 1)]
    model = plain_model(folder)
    assert generate(policy, prompts, AnswerRule((), 3, 0.0, 0), world) == [plain_greedy(model, p, 3) for p in prompts]
    assert generate(policy, [], AnswerRule((), 3, 0.0, 0), world) == []


def test_nothing_of_the_folders_own_generation_config_leaks(
    world: World, folder: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=1,
        repetition_penalty=50.0,
        forced_eos_token_id=60,
        suppress_tokens=[*range(50)],
        eos_token_id=[*range(90)],
        min_new_tokens=3,
        num_beams=2,
    )
    monkeypatch.setattr(policy.model, "generation_config", wild)
    expected = [plain_greedy(plain_model(folder), prompt, NEW) for prompt in PROMPTS]
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 0.0, 0), world) == expected
    assert policy.model.generation_config is wild


@pytest.mark.parametrize(
    "parallel", [{"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}, {"compile": True}]
)
def test_checkpointing_and_compilation_do_not_stand_in_the_way(
    parallel: dict[str, Any], world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache: every forward but the first has one token a row. Nothing is compiled, which would take minutes."""
    policy = load(world, folder, **parallel)
    widths = []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    torch._dynamo.utils.counters.clear()
    expected = [plain_greedy(plain_model(folder), prompt, NEW) for prompt in PROMPTS]
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 0.0, 0), world) == expected
    assert widths == [max(map(len, PROMPTS))] + [1] * (NEW - 1)
    assert not torch._dynamo.utils.counters["stats"]


# --- where positions end ---------------------------------------------------------------------------------------------


def test_learned_positions_end_an_answer_early(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has 256: prompts of 250, 254, 255 and 256 tokens leave room for 6, 2, 1 and 0; short ones have all they may
    have.
    """
    model, policy = plain_model(save_model(tmp_path, "gpt2")), load(world, tmp_path)
    long = [[1, *[3 + (7 * n + length) % 90 for n in range(length - 1)]] for length in (250, 254, 255, 256)]
    prompts = [PROMPTS[0], *long, PROMPTS[1], long[0]]
    limits = [NEW, 6, 2, 1, 0, NEW, 6]
    expected = [plain_greedy(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    capsys.readouterr()
    assert generate(policy, prompts, AnswerRule((), NEW, 0.0, 0), world) == expected
    assert f"5 answers end before {NEW} tokens, where the model's positions end" in capsys.readouterr().err


def test_rotary_positions_do_not_end(world: World, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    limit = policy.config.max_position_embeddings
    (answer,) = generate(policy, [[1] * (limit - 1)], AnswerRule((), 3, 0.0, 0), world)
    assert len(answer) == 3
    assert "positions" not in capsys.readouterr().err


# --- drawn at random -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_those_of_the_softmax_by_hand(temperature: float, world: World, folder: Path, policy: Policy) -> None:
    model = plain_model(folder)
    expected = [plain_draw(model, prompt, 11, temperature, 12) for prompt in PROMPTS]
    assert generate(policy, PROMPTS, AnswerRule((), 12, temperature, 11), world) == expected


def test_a_draw_depends_on_seed_and_prompt_alone(world: World, policy: Policy) -> None:
    """Not on what else is asked, nor where it stands; another seed gives other answers."""
    together = generate(policy, PROMPTS, AnswerRule((), 12, 1.0, 11), world)
    for number in (2, 0, 3, 1):
        assert generate(policy, [PROMPTS[number]], AnswerRule((), 12, 1.0, 11), world) == [together[number]]
    assert generate(policy, PROMPTS[::-1], AnswerRule((), 12, 1.0, 11), world) == together[::-1]
    other = generate(policy, PROMPTS, AnswerRule((), 12, 1.0, 12), world)
    assert all(mine != theirs for mine, theirs in zip(together, other, strict=True))


def test_the_numbers_are_uniform() -> None:
    """Kolmogorov-Smirnov: of n = 4,000 uniform numbers the greatest distance of the empirical distribution from the
    diagonal is below 1.95 / sqrt(n) in 999 of 1,000 cases. So are sums of neighbours mod 1, if they are independent.
    """
    numbers = np.array(
        [uniform(seed, [1, prompt], place) for seed in range(10) for prompt in range(20) for place in range(20)]
    )
    assert numbers.min() > 0 and numbers.max() <= 1
    for sample in (numbers, (numbers + np.roll(numbers, 1)) % 1, (numbers + np.roll(numbers, 20)) % 1):
        distance = np.abs(np.sort(sample) - (np.arange(len(sample)) + 0.5) / len(sample)).max()
        assert distance < 1.95 / len(sample) ** 0.5


def test_temperature_near_0_is_greedy(world: World, policy: Policy) -> None:
    greedy = generate(policy, PROMPTS, AnswerRule((), NEW, 0.0, 0), world)
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 1e-6, 5), world) == greedy


def test_logits_that_are_not_finite_end_in_an_answer(world: World, folder: Path) -> None:
    """A policy that diverged is for the evaluation's loss to report, not for an index out of range."""
    policy = load(world, folder)
    with torch.no_grad():
        next(policy.model.parameters()).fill_(float("nan"))
    assert [len(answer) for answer in generate(policy, PROMPTS, AnswerRule((), 3, 1.0, 0), world)] == [3] * len(PROMPTS)


# --- what is left behind ---------------------------------------------------------------------------------------------


def states() -> list[Any]:
    """The states of all global random generators."""
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        random.getstate(),
    ]


def test_the_random_generators_are_left_as_they_were(world: World, policy: Policy) -> None:
    before = states()
    generate(policy, PROMPTS, AnswerRule((), 5, 1.0, 11), world)
    assert states() == before


def assert_modes_of_training(policy: Policy) -> None:
    assert policy.model.config._attn_implementation == policy.model.base_model.config._attn_implementation == ATTENTION
    assert all(module.training for module in policy.model.modules())


def test_the_model_is_ready_to_train_again(world: World, folder: Path) -> None:
    policy = load(world, folder)
    generate(policy, PROMPTS, AnswerRule((), 5, 1.0, 11), world)
    assert_modes_of_training(policy)
    assert all(isinstance(parameter, DTensor) for parameter in policy.model.parameters())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_its_modes_are_those_of_training_after_a_failure_too(world: World, folder: Path) -> None:
    policy = load(world, folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    handle = policy.model.base_model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(policy, PROMPTS, AnswerRule((), 5, 1.0, 11), world)
    handle.remove()
    assert_modes_of_training(policy)


def some_pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, VOCAB, n).astype(np.int32) for n in (9, 5, 7, 17, 3, 12)]
    return [Pair(*ids[:3]), Pair(*ids[3:])]


def trained(policy: Policy, world: World, with_answers: bool) -> list[np.ndarray]:
    """The weights after three updates, with or without answers before and between them."""
    optim = OptimConfig(name="rmsprop", lr=1e-3)
    optimizer = make_optimizer(policy.model.parameters(), optim)
    plan = plan_step(grow_trees(some_pairs()), world.size, 30, CostModel())
    micro_batches = plan.micro_batches[world.rank]
    config = Config(model=None, data=None, optim=optim, loss=LossConfig())  # type: ignore[arg-type]
    for _ in range(3):
        if with_answers:
            generate(policy, PROMPTS, AnswerRule((2,), 6, 1.0, 0), world)
        batches = [
            pack(trees, plan, lambda *_: -5.0, RowFormat(policy.windows, policy.device)) for trees in micro_batches
        ]
        train_step(policy, optimizer, batches, config, config.optim.lr, lambda: False)
    return [parameter.full_tensor().detach().numpy().copy() for parameter in policy.model.parameters()]


@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": "full"}, {"reshard_after_forward": False}])
def test_training_is_bitwise_the_same_with_and_without(keys: dict[str, Any], world: World, folder: Path) -> None:
    """The weights moved, and to the same bits; an answer before a step is that of the weights of then."""
    without, with_answers = (trained(load(world, folder, **keys), world, answers) for answers in (False, True))
    untrained = [parameter.full_tensor().detach().numpy() for parameter in load(world, folder).model.parameters()]
    assert all(np.array_equal(a, b) for a, b in zip(without, with_answers, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(without, untrained, strict=True))


def test_answers_are_those_of_the_weights_of_now(world: World, folder: Path) -> None:
    """Whole parameters that an earlier pass left behind would answer as before the update."""
    policy = load(world, folder)
    before = generate(policy, PROMPTS, AnswerRule((), NEW, 2.0, 3), world)
    trained(policy, world, False)
    model = plain_model(folder)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), policy.model.parameters(), strict=True):
            mine.copy_(theirs.full_tensor())
    expected = [plain_draw(model, prompt, 3, 2.0, NEW) for prompt in PROMPTS]
    assert generate(policy, PROMPTS, AnswerRule((), NEW, 2.0, 3), world) == expected != before
