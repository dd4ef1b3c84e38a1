"""A step that is NaN or infinite: its pairs are named and written; it stops the run, or is left out and nothing else.

The fault is real. One row of the model's embedding, of a token that a single pair has, is either NaN, which makes the
pair's log-probability NaN, or 3e38, whose square is infinite: the norms of the model then make the log-probability
finite and its gradient NaN.
"""

import contextlib
import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.state import read_state
from dpo.config import Config, SourceConfig
from dpo.distributed.program import run_program
from dpo.distributed.startup import open_world, start_devices
from dpo.model.policy import announce_backward, completion_logps
from dpo.replay import program as replay
from dpo.report.metrics import cost, curve
from dpo.report.one_run import key_numbers
from dpo.report.record import read_record
from dpo.run.folder import Start
from dpo.run.inputs import read_inputs
from dpo.run_folder.files import read_lines, read_metrics
from dpo.step import nonfinite, update
from dpo.step.nonfinite import BAD_WEIGHTS
from dpo.step.objective import pair_losses
from dpo.step.optim import lr_at
from dpo.train import nonfinite as reports
from dpo.train import program as train
from dpo.train.setup import Hooks, build_run
from launch.compare import read_run
from tests.support.boards import points_of
from tests.support.models import VOCAB, save_model
from tests.support.ranks import Ranks
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    exit_code_of,
    logged,
    make_config,
    run,
    run_until,
    without_clock,
)

pytestmark = pytest.mark.xdist_group("ranks")

EVIL = VOCAB - 1
"""A token that one pair alone has."""
NAN, HUGE = float("nan"), 3e38


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nan/ and huge/, two models; pairs.jsonl, of whose eight pairs that of line 6 has the token EVIL; good.jsonl."""
    root = tmp_path_factory.mktemp("nonfinite")
    for name, value in (("nan", NAN), ("huge", HUGE)):
        file = save_model(root / name, "llama") / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][EVIL] = value
        save_file(weights, file, metadata={"format": "pt"})
    write_pairs(root / "pairs.jsonl", 8, evil=(6,))
    write_pairs(root / "good.jsonl", 3)
    write_pairs(root / "bad.jsonl", 4, evil=(1, 2, 3, 4))
    return root


def write_pairs(path: Path, count: int, evil: Sequence[int] = ()) -> None:
    """Pairs of one prompt each, of which the lines `evil` have the token EVIL in the winner."""
    rng = np.random.default_rng(0)
    rows = []
    for line in range(1, count + 1):
        prompt, chosen, rejected = (rng.integers(3, EVIL, rng.integers(3, 9)).tolist() for _ in range(3))
        chosen = [*chosen, EVIL, 5] if line in evil else chosen
        rows.append({"prompt_ids": prompt, "completion_ids": [chosen, rejected], "pairs": [[0, 1]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(root: Path, run_dir: Path, model: str = "nan", **changes: Any) -> Config:
    """Six steps of four pairs in file order, each pair a micro-batch of its own: steps 2, 4 and 6 are not finite."""
    facts = {
        "data__order": "sequential",
        "batch__pairs_per_step": 4,
        "batch__tokens_per_micro_batch": 8,
        "loss__name": "simpo",
        "loss__beta": 2.0,
        "train__steps": 6,
        "train__eval_every": None,
        "train__on_nonfinite": "skip",
        "optim__name": "adamw",
        "optim__lr": 1e-3,
        "optim__warmup_steps": 3,
        "checkpoint__save_every": 1,
        "checkpoint__keep": None,
    }
    return make_config(root / model, root / "pairs.jsonl", run_dir, **(facts | changes))


def lines_of(config: Config) -> list[dict[str, float | None]]:
    return without_clock(read_lines(Path(str(config.train.run_dir))))  # type: ignore[arg-type]


def report_of(config: Config, name: str) -> list[dict[str, Any]]:
    path = Path(str(config.train.run_dir), "nonfinite", name)
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_bits(folder: Path, other: Path) -> bool:
    """As `same_weights`, where NaN equals NaN."""
    mine, theirs = (load_file(each / "final" / "model.safetensors") for each in (folder, other))
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name].view(torch.int32), theirs[name].view(torch.int32)) for name in mine
    )


# --- named -----------------------------------------------------------------------------------------------------------


def as_rank(config: Config) -> tuple[int, str, list[tuple[int, int]], int]:
    """Exit code, stderr, this rank's micro-batches (step, number) that have the token EVIL, passes of this rank."""
    where, passes, logps = [], [], update.completion_logps

    def noted(policy: Any, batch: Any) -> Any:
        passes.append(1)
        step, number = divmod(len(passes) - 1, NUM_MICRO_BATCHES[int(os.environ["WORLD_SIZE"])])
        if EVIL in batch.tokens.tolist():
            where.append((step + 1, number + 1))
        return logps(policy, batch)

    stderr = io.StringIO()
    with patch.object(update, "completion_logps", noted), contextlib.redirect_stderr(stderr):
        code = run_program(lambda: train.run_training(config))
    return code, stderr.getvalue(), where, len(passes)


NUM_MICRO_BATCHES = {1: 4, 2: 2, 3: 2}
"""Micro-batches of a step of four trees by the number of ranks."""


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("model", ["nan", "huge"])
def test_the_pair_is_named_and_written(root: Path, ranks: Ranks, tmp_path: Path, model: str, size: int) -> None:
    """Step 2: rank and micro-batch as the ranks saw the token, the place in the data, the ids."""
    config = config_of(root, tmp_path / "run", model, train__on_nonfinite="stop")
    answers = ranks(size, as_rank, config)
    assert [answer[0] for answer in answers] == [1] * size
    assert [len(error_lines(answer[1])) for answer in answers] == [1] + [0] * (size - 1)
    ((rank, number),) = [(rank, number) for rank, answer in enumerate(answers) for step, number in answer[2]]
    file = tmp_path / "run/nonfinite/step-000002.jsonl"
    (line,) = error_lines(answers[0][1])
    assert line.startswith(
        f"error: step 2: the gradient is not finite: rank {rank}, micro-batch {number}: pair {root}/pairs.jsonl:6"
    )
    assert f"({file})" in line and line.endswith("; the weights were not updated")
    (pair,) = report_of(config, file.name)
    row = json.loads((root / "pairs.jsonl").read_text().splitlines()[5])
    assert (pair["step"], pair["rank"], pair["micro_batch"]) == (2, rank, number)
    assert (pair["source"], pair["place"], pair["pair"]) == ("data.train[0]", f"{root}/pairs.jsonl:6", 5)
    assert pair["prompt_ids"] == row["prompt_ids"]
    assert pair["chosen_ids"][: len(row["completion_ids"][0])] == row["completion_ids"][0]
    assert pair["rejected_ids"][: len(row["completion_ids"][1])] == row["completion_ids"][1]
    assert pair["prompt"] is None, "the model has no tokenizer"
    assert (pair["logp_chosen"] == "nan") is (model == "nan") and (pair["loss"] == "nan") is (model == "nan")
    assert ("losses are finite, their gradient is not" in line) is (model == "huge")
    assert ("the weights are not finite either" in line) is (model == "nan")


def test_texts_where_a_tokenizer_is_at_hand(root: Path, tmp_path: Path, shared_data: Path) -> None:
    """As the tokenizer decodes the ids, special tokens included."""
    folder = shared_data / "tok-smollm2"
    config = config_of(root, tmp_path / "run", model__tokenizer=str(folder), train__on_nonfinite="stop")
    assert exit_code(config) == 1
    (pair,) = report_of(config, "step-000002.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("prompt", "chosen", "rejected"):
        assert pair[name] == tokenizer.decode(pair[f"{name}_ids"], skip_special_tokens=False)


def searching(config: Config, weights_are_good: bool, after: int | None = None) -> tuple[int, str, int]:
    """Exit code, stderr, passes of the search on this rank.

    Args:
        config: the run's.
        weights_are_good: takes the weights for finite, as where a value between them overflows.
        after: the pass after which the last rank is asked to stop.
    """
    passes, logps = [], nonfinite.completion_logps

    def noted(policy: Any, batch: Any) -> Any:
        passes.append(1)
        if len(passes) == after and os.environ.get("RANK", "0") == str(dist.get_world_size() - 1):
            os.kill(os.getpid(), signal.SIGUSR2)
        return logps(policy, batch)

    stderr = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(stderr))
        stack.enter_context(patch.object(nonfinite, "completion_logps", noted))
        if weights_are_good:
            stack.enter_context(patch.object(nonfinite, "weights_are_finite", lambda policy: True))
        code = run_program(lambda: train.run_training(config))
    return code, stderr.getvalue(), len(passes)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model", ["nan", "huge"])
def test_one_pair_of_a_micro_batch_of_several(root: Path, ranks: Ranks, tmp_path: Path, model: str, size: int) -> None:
    """A NaN spreads to all trees of its row; each tree alone tells."""
    config = config_of(root, tmp_path / "run", model, batch__tokens_per_micro_batch=1000, train__on_nonfinite="stop")
    answers = ranks(size, searching, config, True)
    (line,) = error_lines(answers[0][1])
    assert answers[0][0] == 1 and f": pair {root}/pairs.jsonl:6" in line
    assert [pair["pair"] for pair in report_of(config, "step-000002.jsonl")] == [5]
    told = f"prompts are computed again alone, {4 // size} of {4 // size}"
    assert [answer[1].count(told) for answer in answers] == [1] + [0] * (size - 1)


@pytest.mark.parametrize("tokens", [8, 1000])
def test_bad_weights_are_not_searched(root: Path, ranks: Ranks, tmp_path: Path, tokens: int) -> None:
    """Where the weights have diverged, nothing is computed again: all pairs of the bad micro-batches are named."""
    config = config_of(root, tmp_path / "run", batch__tokens_per_micro_batch=tokens, train__on_nonfinite="stop")
    answers = ranks(2, searching, config, False)
    assert [(code, passes) for code, _, passes in answers] == [(1, 0)] * 2
    (line,) = error_lines(answers[0][1])
    assert "; the weights are not finite either (" in line
    pairs = report_of(config, "step-000002.jsonl")
    assert len(pairs) == (1 if tokens == 8 else 2) and 5 in [pair["pair"] for pair in pairs]


def finite_alone(config: Config) -> tuple[int, str, int]:
    """As where it takes the others of the micro-batch: each tree alone is finite."""
    compute = nonfinite.Again._is_finite_here

    def call(again: Any, rank: int, trees: Sequence[Any]) -> bool:
        return compute(again, rank, trees) or len(trees) == 1

    with patch.object(nonfinite.Again, "_is_finite_here", call):
        return searching(config, True)


@pytest.mark.parametrize("model", ["nan", "huge"])
def test_where_each_prompt_is_finite_alone_all_of_the_micro_batch_are_named(
    root: Path, ranks: Ranks, tmp_path: Path, model: str
) -> None:
    config = config_of(root, tmp_path / "run", model, batch__tokens_per_micro_batch=1000, train__on_nonfinite="stop")
    (code, said, _), _ = ranks(2, finite_alone, config)
    assert code == 1 and "micro-batch 1: pairs " in error_lines(said)[0]
    pairs = report_of(config, "step-000002.jsonl")
    assert len(pairs) == 2 and 5 in [pair["pair"] for pair in pairs] and len({pair["rank"] for pair in pairs}) == 1


def test_few_prompts_are_computed_alone(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Of four in the micro-batch only two, after one pass of the micro-batch: the others may be bad, and are named."""
    config = config_of(root, tmp_path / "run", "huge", batch__tokens_per_micro_batch=1000, train__on_nonfinite="stop")
    code, said, passes = ranks(1, few_alone, config)[0]
    (line,) = error_lines(said)
    assert code == 1 and passes == 1 + 2
    assert "; 2 of 4 prompts were computed alone, which is the most; the others are named unseen (" in line
    ids = [pair["pair"] for pair in report_of(config, "step-000002.jsonl")]
    assert 5 in ids and len(ids) in (2, 3) and set(ids) <= {4, 5, 6, 7}
    assert "micro-batches are computed again one by one, 1 at most" in said
    assert "prompts are computed again alone, 2 of 4" in said


def few_alone(config: Config) -> tuple[int, str, int]:
    with patch.object(nonfinite, "MOST_ALONE", 2):
        return searching(config, False)


def test_a_request_to_stop_ends_the_search_on_every_rank(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """It comes to the last rank alone, in the second pass over the two trees of each of two bad micro-batches."""
    pairs = [SourceConfig(str(root / "bad.jsonl"))]
    config = config_of(root, tmp_path / "run", data__train=pairs, batch__tokens_per_micro_batch=1000)
    answers = ranks(2, searching, changed(config, train__on_nonfinite="stop"), True, 2)
    assert [(code, passes) for code, _, passes in answers] == [(1, 2)] * 2
    (line,) = error_lines(answers[0][1])
    assert "2 of 4 prompts were computed alone, then came a request to stop; the others are named unseen (" in line
    assert sorted(pair["pair"] for pair in report_of(config, "step-000001.jsonl")) == [0, 1, 2, 3]


def broken_once(config: Config, rank: int, after: int | None = None) -> tuple[int, str, int, int]:
    """A gradient on one rank that is infinite in step 2 and in no later pass: exit code, stderr, updates, passes of the
    search, in one of which the last rank may be asked to stop.
    """
    steps, norm, updates = [], update.square_norm, []

    def infinite(parameters: Any) -> Any:
        steps.append(1)
        is_here = int(os.environ.get("RANK", "0")) == rank and len(steps) == 2
        return norm(parameters) * (float("inf") if is_here else 1)

    counted = patch.object(
        torch.optim.AdamW, "step", lambda *a, step=torch.optim.AdamW.step, **k: (updates.append(1), step(*a, **k))[1]
    )
    with counted, patch.object(update, "square_norm", infinite):
        code, said, passes = searching(config, True, after)
    return code, said, len(updates), passes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_that_does_not_come_again(root: Path, ranks: Ranks, tmp_path: Path, rank: int) -> None:
    """As of a GPU that has erred: no rank updates, nobody is blamed, all pairs of the step are written."""
    good = [SourceConfig(str(root / "good.jsonl"))]
    config = config_of(root, tmp_path / "run", train__on_nonfinite="stop", data__train=good, batch__pairs_per_step=3)
    answers = ranks(2, broken_once, config, rank)
    assert [(answer[0], *answer[2:]) for answer in answers] == [(1, 1, 3)] * 2, "the fourth micro-batch is empty"
    (line,) = error_lines(answers[0][1])
    assert line.startswith("error: step 2: the gradient is not finite: no single pair; computed again one by one, ")
    assert sorted(pair["pair"] for pair in report_of(config, "step-000002.jsonl")) == [0, 1, 2]


def test_a_request_to_stop_leaves_micro_batches_out(root: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The gradient alone is not finite: what is known is that one of them may be to blame."""
    good = [SourceConfig(str(root / "good.jsonl"))]
    config = config_of(root, tmp_path / "run", train__on_nonfinite="stop", data__train=good, batch__pairs_per_step=3)
    answers = ranks(2, broken_once, config, 0, 2)
    assert [(answer[0], *answer[2:]) for answer in answers] == [(1, 1, 2)] * 2
    (line,) = error_lines(answers[0][1])
    assert ": no single pair; a request to stop ended the search after 2 of 3 micro-batches; the file has all " in line
    assert len(report_of(config, "step-000002.jsonl")) == 3


def test_a_report_that_cannot_be_written_hides_no_fault(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "run", train__on_nonfinite="stop")
    with (
        patch("sys.stderr", io.StringIO()) as stderr,
        patch("dpo.train.nonfinite.write_atomically", side_effect=OSError(28, "No space left on device")),
    ):
        assert exit_code(config) == 1
    (line,) = error_lines(stderr.getvalue())
    assert f"pair {root}/pairs.jsonl:6; the weights are not finite either (their texts are not kept: " in line


@pytest.mark.parametrize("part", ["load_tokenizer", "tokenizer_is_here"])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error", "tokenizer.json"), RuntimeError("no such class")])
def test_a_tokenizer_that_fails_ends_no_run(
    root: Path, tmp_path: Path, shared_data: Path, part: str, failure: Exception
) -> None:
    """Its files lie on a disk that fails, or its code does: the pairs are written without texts, the run goes on."""
    config = config_of(root, tmp_path / "run", model__tokenizer=str(shared_data / "tok-smollm2"), train__steps=2)
    with patch(f"dpo.train.nonfinite.{part}", side_effect=failure):
        folder = run(config)
    (pair,) = report_of(config, "step-000002.jsonl")
    assert (pair["pair"], pair["prompt"], pair["chosen"], pair["rejected"]) == (5, None, None, None)
    (line,) = [line for line in logged(folder) if line.startswith("WARNING: step 2")]
    assert f"({folder}/nonfinite/step-000002.jsonl, without texts: {type(failure).__name__}: " in line


def test_the_step_that_ended_a_run_is_computed_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line is not in metrics.jsonl, its pairs are in the folder: it is not finite again, unless a GPU had erred."""
    config = config_of(root, tmp_path / "run", train__on_nonfinite="stop")
    assert exit_code(config) == 1
    words = ("dpo.replay", str(tmp_path / "run"), "--step", "2")
    capsys.readouterr()
    assert exit_code_of(replay.main, *words) == 0
    told = "steps 2 to 2 are equal to the last bit; step 2, which ended the run, is not finite again; the weights are"
    assert told in capsys.readouterr().out
    good = config_of(root, tmp_path / "good", train__on_nonfinite="stop", batch__pairs_per_step=3)
    good = changed(good, data__train=[SourceConfig(str(root / "good.jsonl"))])
    assert broken_once(good, 0)[0] == 1
    assert exit_code_of(replay.main, "dpo.replay", str(tmp_path / "good"), "--step", "2") == 1
    (line,) = error_lines(capsys.readouterr().err)
    told = "step 2 is the first that differs: it was not finite, which ended the run, and it is finite again"
    assert line == f"error: {told}"
    assert exit_code_of(replay.main, "dpo.replay", str(tmp_path / "good"), "--step", "3") == 2


# --- skipped ---------------------------------------------------------------------------------------------------------


def plain_loop(config: Config, left_out: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weights after six steps without the updates of some of them; these steps are not computed at all."""
    with open_world(60) as world:
        inputs = read_inputs(config, world)
        start_devices(world, 60)
        made = build_run(config, world, inputs, Start(), Hooks())
        for step in (step for step in range(1, 7) if step not in left_out):
            batches = made.batches(step)
            for number, batch in enumerate(batches, start=1):
                announce_backward(made.policy, is_last=number == len(batches))
                losses, _ = pair_losses(completion_logps(made.policy, batch), batch, config.loss)
                (losses.sum() / batch.pairs_in_step).backward()
            for group in made.optimizer.param_groups:
                group["lr"] = lr_at(step, 6, config.optim)
            made.optimizer.step()
            made.optimizer.zero_grad(set_to_none=True)
        return {name: tensor.full_tensor() for name, tensor in made.policy.model.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "model", "optimizer", "copies"),
    [
        (1, "nan", "sgd", 1),
        (2, "nan", "adamw", 1),
        (2, "huge", "rmsprop", 1),
        (2, "huge", "adamw", 2),
        (3, "nan", "adamw", 1),
    ],
)
def test_a_skipped_step_is_as_if_it_had_never_been(
    root: Path, ranks: Ranks, tmp_path: Path, size: int, model: str, optimizer: str, copies: int
) -> None:
    """To the last bit, also in the states of the optimizer, which later updates show; the learning rate goes on."""
    config = config_of(
        root,
        tmp_path / "run",
        model,
        optim__name=optimizer,
        optim__max_grad_norm=None,
        parallel__replicate=copies,
        parallel__activation_checkpointing="none",
        parallel__sync_gradients="every_micro_batch",
    )
    folder, *_ = ranks(size, run, config)
    lines = lines_of(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("train/skipped") for line in lines] == [None, 1, None, 1, None, 1]
    assert [line["train/grad_norm"] is None for line in lines] == [False, True] * 3
    assert [line["train/loss"] is None for line in lines] == [False, model == "nan"] * 3
    assert [line["train/lr"] for line in lines] == [lr_at(step, 6, config.optim) for step in range(1, 7)]
    weights, found = ranks(size, plain_loop, config, [2, 4, 6])[0], load_file(folder / "final" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(weights[name].view(torch.int32), tensor.view(torch.int32)), name
    said = [line for line in logged(folder) if line.startswith("WARNING: step ")]
    assert [line.split(": ")[1] for line in said] == ["step 2", "step 4", "step 6"]
    assert all(line.endswith("; the step is skipped, 1 of at most 3 in a row") for line in said)
    assert [path.name for path in sorted((folder / "nonfinite").iterdir())] == [
        f"step-00000{step}.jsonl" for step in (2, 4, 6)
    ]
    assert [line for line in logged(folder) if line.startswith("skipped ")] == [
        f"skipped  3 steps that were not finite; their pairs are in {folder / 'nonfinite'}"
    ]


@pytest.mark.parametrize("until", [2, 3, 5])
def test_resumed_it_is_the_same_run(root: Path, ranks: Ranks, tmp_path: Path, until: int) -> None:
    """Killed before, at and after a skipped step."""
    whole, parts = (config_of(root, tmp_path / name, checkpoint__save_every=2) for name in ("whole", "parts"))
    ranks(2, run, whole)
    ranks(2, run_until, parts, until)
    ranks(2, run, parts)
    assert lines_of(parts) == lines_of(whole)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_too_many_in_a_row_stop_the_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step has the bad pair. Two may be skipped; the third stops the run, its pairs are named too."""
    config = config_of(root, tmp_path / "run", batch__pairs_per_step=8, train__max_skipped=2)
    assert exit_code(config) == 1
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith("error: step 3: the gradient is not finite: ")
    assert line.endswith("; the 2 steps before it were skipped, train.max_skipped 2")
    assert [line["step"] for line in lines_of(config)] == [1, 2]
    assert len(report_of(config, "step-000003.jsonl")) == 1


@pytest.mark.parametrize("other", [False, True])
def test_steps_in_a_row_are_counted_across_a_resume(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: bool
) -> None:
    """Also where the run goes on in another folder, without the lines of metrics.jsonl."""
    config = config_of(root, tmp_path / "run", batch__pairs_per_step=8, train__max_skipped=2)
    run_until(config, 3)
    assert read_state(checkpoint_path(tmp_path / "run", 2), "").skipped == 2
    if other:
        config = changed(config, train__run_dir=str(tmp_path / "other"), checkpoint__resume=str(tmp_path / "run"))
    assert exit_code(config) == 1
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith("error: step 3: ")
    assert line.endswith("; the 2 steps before it were skipped, train.max_skipped 2")


def test_a_good_step_ends_the_count(root: Path, tmp_path: Path) -> None:
    """Steps 2, 4 and 6 are skipped, never two in a row."""
    run(config_of(root, tmp_path / "run", train__max_skipped=1))


def test_the_next_gradient_is_not_spoilt(root: Path, tmp_path: Path) -> None:
    """Step 3 has the pairs of step 1; with a learning rate of 0 its numbers are those of step 1, to the last bit."""
    config = config_of(root, tmp_path / "run", optim__lr=1e-30, optim__name="sgd")
    run(config)
    first, _, third, *_ = lines_of(config)
    assert {**first, "step": 0, "train/lr": 0} == {**third, "step": 0, "train/lr": 0}


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_pairs_of_an_evaluation_are_named(root: Path, ranks: Ranks, tmp_path: Path, on_nonfinite: str) -> None:
    """There is no step to skip: it ends the run."""
    pairs, good = (SourceConfig(str(root / name)) for name in ("pairs.jsonl", "good.jsonl"))
    data = {"data__train": [good], "data__eval": [good, pairs], "batch__pairs_per_step": 3}
    config = config_of(root, tmp_path / "run", train__on_nonfinite=on_nonfinite, **data)
    code, said, *_ = ranks(2, as_rank, config)[0]
    assert code == 1
    (line,) = error_lines(said)
    file = tmp_path / "run/nonfinite/eval-000000.jsonl"
    assert line == f"error: evaluation after step 0: the loss is nan: pair {root}/pairs.jsonl:6; {BAD_WEIGHTS} ({file})"
    (pair,) = report_of(config, file.name)
    assert (pair["source"], pair["pair"], pair["logp_chosen"]) == ("data.eval[1]", 3 + 5, "nan")
    assert EVIL in pair["chosen_ids"]


# --- who reads the metrics -------------------------------------------------------------------------------------------


def test_readers_of_the_metrics_pass_a_skipped_step_over(root: Path, tmp_path: Path) -> None:
    """The last of three steps is skipped: the page, the comparison, the charts and the model card know three steps."""
    config = config_of(root, tmp_path / "run", train__steps=4)
    folder = run(config)
    record = read_record(folder)
    assert (record.step, record.faults) == (4, ())
    assert [step for step, _ in curve(record.train, "train/loss")] == [1, 3]
    assert "4" in "".join(number for number, _ in key_numbers(record, cost(record)))
    facts = read_run(folder)
    steps = read_metrics(folder)
    assert facts.step == 4
    assert facts.metrics["train/loss"] == pytest.approx((steps[0]["train/loss"] + steps[2]["train/loss"]) / 2)
    points = {tag: [step for step, _ in values] for tag, values in points_of(folder / "tensorboard").items()}
    assert points["train/loss"] == [1, 3] and points["train/lr"] == [1, 2, 3, 4] and points["train/skipped"] == [2, 4]
    assert (folder / "report.html").is_file() and "4 of 4" not in (folder / "final" / "README.md").read_text()


def test_the_first_and_the_last_reports_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that skips steps for weeks writes a file for each; those are removed that lie between."""
    monkeypatch.setattr(reports, "FILES_KEPT", 2)
    for step in (1, 30, 200, 1000, 1001, 1002):
        path = tmp_path / f"step-{step:06d}.jsonl"
        path.write_text("{}")
        os.utime(path, (step, step))
        reports._drop_others(tmp_path)
    assert [int(path.stem[5:]) for path in sorted(tmp_path.iterdir())] == [1, 30, 1001, 1002]
    assert capsys.readouterr().err.count("of such reports the first 2 and the last 2 are kept") == 2
