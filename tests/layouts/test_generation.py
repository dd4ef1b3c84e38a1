"""Answers on 1 to 5 real processes: the same ones, after the same number of forwards on each, nothing of training
changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from dpo.distributed.startup import open_world
from dpo.encode.tokenizer import load_tokenizer
from dpo.model import generation
from dpo.model.generation import AnswerRule, generate
from tests.model.test_generation import NEW, PROMPTS, load, plain_draw, plain_greedy, trained
from tests.support.collectives import CollectiveBytes
from tests.support.models import plain_model, save_model
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


def answers(
    folder: Path, prompts: list[list[int]], eos_ids: list[int], count: int, temperature: float, **parallel: Any
) -> tuple[list[list[int]], int]:
    """On a rank: the answers, drawn with seed 3, and how many forwards it took."""
    with open_world(60) as world:
        policy = load(world, folder, **parallel)
        forwards: list[Any] = []
        policy.model.register_forward_pre_hook(lambda module, args: forwards.append(None))
        return generate(policy, prompts, AnswerRule(tuple(eos_ids), count, temperature, 3), world), len(forwards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{size} ranks": (size, {}) for size in (1, 2, 3, 5)},
    "replicated 2 x sharded 2": (4, {"replicate": 2, "shard": 2}),
    "offloaded to the CPU": (2, {"cpu_offload": True}),
    "parameters kept after forward": (2, {"reshard_after_forward": False}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_answers_do_not_depend_on_the_ranks(ranks: Ranks, folder: Path, name: str) -> None:
    """Those of the plain model, drawn by hand, on every rank; some end at once, one never: ranks that are done wait
    for it. 5 ranks are more than the prompts are.
    """
    size, parallel = LAYOUTS[name]
    unending = [plain_draw(plain_model(folder), prompt, 3, 2.0, NEW) for prompt in PROMPTS]
    eos_ids = [unending[0][5], unending[1][2], unending[2][0]]
    lengths = [next((i for i, token in enumerate(answer) if token in eos_ids), NEW) for answer in unending]
    expected = [answer[:length] for answer, length in zip(unending, lengths, strict=True)]
    assert max(lengths) == NEW > min(lengths)
    found = ranks(size, answers, folder, PROMPTS, eos_ids, NEW, 2.0, **parallel)
    assert found == [(expected, NEW)] * size


def test_all_stop_when_the_last_is_done(ranks: Ranks, folder: Path) -> None:
    """One prompt on three ranks, whose second token is EOS: two forwards on each."""
    second = plain_draw(plain_model(folder), PROMPTS[1], 3, 2.0, 2)
    found = ranks(3, answers, folder, PROMPTS[1:2], [second[1]], NEW, 2.0)
    assert found == [([second[:1]], 2)] * 3


def test_prompts_with_other_room_are_answered_apart(ranks: Ranks, tmp_path: Path) -> None:
    """GPT-2 with 256 positions, prompts of 250 and 1: 6 + 24 forwards on each rank."""
    model = save_model(tmp_path, "gpt2")
    prompts = [[1, *[3 + n % 90 for n in range(249)]], [4]]
    expected = [
        plain_draw(plain_model(model), prompt, 3, 2.0, count) for prompt, count in zip(prompts, (6, NEW), strict=True)
    ]
    assert ranks(2, answers, model, prompts, [], NEW, 2.0) == [(expected, 6 + NEW)] * 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_published_greedy_story(ranks: Ranks, shared_data: Path, size: int) -> None:
    """stories260K from BOS alone: the text that llama2.c's own test expects of these weights, 200 tokens."""
    folder = shared_data / "stories260K"
    expected = (folder / "expected_greedy_200.txt").read_text()
    for story, num_forwards in ranks(size, answers, folder, [[1]], [2], 200, 0.0):
        assert load_tokenizer(str(folder)).decode(story[0]) == expected
        assert num_forwards == 200


def train_on_ranks(folder: Path, with_answers: bool, **parallel: Any) -> list[np.ndarray]:
    with open_world(60) as world:
        return trained(load(world, folder, **parallel), world, with_answers)


@pytest.mark.parametrize("parallel", [{}, {"sync_gradients": "every_micro_batch"}])
def test_training_is_bitwise_the_same_with_and_without(ranks: Ranks, folder: Path, parallel: dict[str, Any]) -> None:
    without, with_answers = (ranks(2, train_on_ranks, folder, answers, **parallel) for answers in (False, True))
    for mine, theirs in zip(without, with_answers, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def gathers_while_answering(
    folder: Path, count: int, free: Sequence[int], **parallel: Any
) -> tuple[list[list[int]], int, int]:
    """On a rank whose machine has so many bytes free: the greedy answers, all-gathers of parameters, and layers of the
    model.
    """
    with open_world(60) as world:
        policy = load(world, folder, **parallel)
        with patch.object(generation, "_free_bytes", lambda world: free[world.rank]), CollectiveBytes() as sent:
            found = generate(policy, PROMPTS, AnswerRule((), count, 0.0, 0), world)
        return found, sent.calls["all_gather"], policy.config.num_hidden_layers


PLENTY = 10**12


@pytest.mark.parametrize("count", [2, 12])
def test_layers_are_gathered_once_for_all_tokens(ranks: Ranks, folder: Path, count: int) -> None:
    """The root and each layer once, however long the answers are."""
    expected = [plain_greedy(plain_model(folder), prompt, count) for prompt in PROMPTS]
    for found, gathers, num_layers in ranks(2, gathers_while_answering, folder, count, [PLENTY] * 2):
        assert (found, gathers) == (expected, num_layers + 1)


@pytest.mark.parametrize("poor", [(0,), (2,), (0, 1, 2)])
def test_the_rank_with_the_least_memory_decides_for_all(ranks: Ranks, folder: Path, poor: tuple[int, ...]) -> None:
    """Where any rank has no room, all gather each layer for every one of the 5 tokens, and the root once; a rank that
    kept its layers would not join the others' gathers. The answers are the same.
    """
    free = [0 if rank in poor else PLENTY for rank in range(3)]
    expected = [plain_greedy(plain_model(folder), prompt, 5) for prompt in PROMPTS]
    for found, gathers, num_layers in ranks(3, gathers_while_answering, folder, 5, free):
        assert (found, gathers) == (expected, 5 * num_layers + 1)
