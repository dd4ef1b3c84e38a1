"""The check of the first step in bfloat16: a trained model with the GPU kernel's rounding passes with room, and every
fault of the reference rows trips.

The log-probabilities are the program's own, from a run under `tests.gpu.emulation`. A fault's effect is computed in
float32 by plain Hugging Face and added to the rows.
"""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from dpo.pairs.tokens import completion_key
from dpo.run_folder.files import read_metrics
from dpo.step import first_step
from dpo.step.deviation import Completions, Verdict, judge, measure
from tests.gpu.emulation import emulated_kernel
from tests.support.models import plain_model
from tests.support.runs import make_config, run

pytestmark = pytest.mark.xdist_group("first-step-noise")  # its run takes long: once, in one worker

ROWS = 25
"""Of the data; each is one pair, but for a few that are dropped."""
PAIRS = 20

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Prompt, completion, and the completion that it is compared with."""


@dataclass(frozen=True)
class Seen:
    """What the check saw in a run that passed."""

    found: Completions
    rows: Sequence[Row]
    """The ids of each completion of `found`."""
    run_dir: Path
    model: Path
    exact: np.ndarray
    """Their log-probabilities in float32."""


@pytest.fixture(scope="module")
def seen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A run of one step in bfloat16 on stories260K and real HH pairs, with the kernel's arithmetic."""
    root, kept = tmp_path_factory.mktemp("noise"), []
    with gzip.open(shared_data / "hh" / "public-0000-1799.jsonl.gz", "rt") as lines:
        (root / "pairs.jsonl").write_text("".join(next(lines) for _ in range(ROWS)))
    compute = first_step._compute

    def keep(policy: Any, packer: Any, trees: Any, *others: Any) -> Any:
        kept.append((compute(policy, packer, trees, *others), trees))
        return kept[0][0]

    facts = {
        "batch__pairs_per_step": PAIRS,
        "batch__tokens_per_micro_batch": 2048,
        "train__steps": 1,
        "parallel__compute_dtype": "bfloat16",
        "reference__cache_dir": str(root / "cache"),
    }
    config = make_config(shared_data / "stories260K", root / "pairs.jsonl", root / "run", **facts)
    with emulated_kernel(), patch.object(first_step, "_compute", keep):
        run(config)
    ((found, _), trees) = kept[0]
    rows = {
        completion_key(tree.prompt_ids, ids): (tree.prompt_ids, ids, tree.completion_ids[number - 1])
        for tree in trees
        for number, ids in enumerate(tree.completion_ids)
    }
    ordered = [rows[key] for key in sorted(rows)]
    exact = logps(plain_model(shared_data / "stories260K"), ordered)
    yield Seen(found, ordered, root / "run", shared_data / "stories260K", exact)


def logps(model: PreTrainedModel, rows: Sequence[Row], moved: int = 0) -> np.ndarray:
    """(N,) of the completions after their prompts, each alone, at positions that are `moved` against the prompt."""
    found = []
    with torch.no_grad():
        for prompt, ids, _ in rows:
            tokens = torch.tensor(np.concatenate([prompt, ids])).long()
            positions = torch.arange(len(tokens))
            positions[len(prompt) :] += moved
            logits = model(tokens[None], position_ids=positions[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.double().log_softmax(-1).gather(1, tokens[len(prompt) :, None]).sum().item())
    return np.array(found)


def test_the_kernels_rounding_passes_with_room(seen: Seen) -> None:
    """Spread below a quarter of its cap, drift below a tenth; both passes rounded differently."""
    deviation = measure(seen.found)
    print(deviation)
    assert judge(seen.found, 1.0) == Verdict.PASSES
    assert 0.01 < deviation.spread < 0.25 / 4
    assert deviation.drift < 0.02 / 10
    assert 0.01 < deviation.noise
    assert deviation.spread < 2 * deviation.noise


def test_what_is_measured_stands_in_the_metrics_once(seen: Seen) -> None:
    lines = [line for line in read_metrics(seen.run_dir) if "first_step/spread" in line]
    deviation = {f"first_step/{name}": value for name, value in vars(measure(seen.found)).items()}
    assert lines == [{"step": 0, **deviation}]


# --- faults ----------------------------------------------------------------------------------------------------------


def other_weights(seen: Seen) -> np.ndarray:
    """25 steps of supervised fine-tuning on the pairs' prompts and completions, AdamW at 4e-5."""
    model = plain_model(seen.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-5)
    for step in range(25):
        prompt, ids, _ = seen.rows[step % len(seen.rows)]
        tokens = torch.tensor(np.concatenate([prompt, ids])).long()[None]
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logps(model.eval(), seen.rows)


def rolled(seen: Seen) -> np.ndarray:
    """Every completion has the row of the next one."""
    return np.roll(seen.exact, 1)


def one_pair_exchanged(seen: Seen) -> np.ndarray:
    """The winner and the loser of the pair whose rows differ the most have each other's."""
    keys = {completion_key(prompt, ids): place for place, (prompt, ids, _) in enumerate(seen.rows)}
    partner = np.array([keys[completion_key(prompt, other)] for prompt, _, other in seen.rows])
    place = int(np.abs(seen.exact - seen.exact[partner]).argsort()[len(partner) // 2])
    swapped = seen.exact.copy()
    swapped[[place, partner[place]]] = swapped[[partner[place], place]]
    return swapped


def one_sees_its_neighbour(seen: Seen) -> np.ndarray:
    """The longest completion is computed after its prompt and the other completion."""
    place = int(seen.found.lengths.argmax())
    prompt, ids, other = seen.rows[place]
    rows = seen.exact.copy()
    rows[place] = logps(plain_model(seen.model), [(np.concatenate([prompt, other]), ids, other)])[0]
    return rows


def reworded(change: Callable[[str], str]) -> Callable[[Seen], np.ndarray]:
    """Every prompt is written otherwise."""

    def rows(seen: Seen) -> np.ndarray:
        tokenizer = AutoTokenizer.from_pretrained(seen.model)
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, *_ in seen.rows]
        prompts = [np.array(tokenizer(change(text)).input_ids, np.int32) for text in texts]
        changed = [(prompt, *others) for prompt, (_, *others) in zip(prompts, seen.rows, strict=True)]
        return logps(plain_model(seen.model), changed)

    return rows


def one_newline_less(text: str) -> str:
    return text.replace("\n\n", "\n")


def other_template(text: str) -> str:
    return text.replace("\n\nHuman:", "<|user|>\n").replace("\n\nAssistant:", "\n<|assistant|>\n")


FAULTS: dict[str, Callable[[Seen], np.ndarray]] = {
    "other weights": other_weights,
    "rows exchanged": rolled,
    "one pair's rows exchanged": one_pair_exchanged,
    "positions + 1": lambda seen: logps(plain_model(seen.model), seen.rows, 1),
    "one answer sees its neighbour": one_sees_its_neighbour,
    "another template": reworded(other_template),
    "one newline less": reworded(one_newline_less),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_reference_rows_trips(seen: Seen, fault: str) -> None:
    wrong = seen.found.ref_logps + FAULTS[fault](seen) - seen.exact
    found = replace(seen.found, ref_logps=wrong)
    print(fault, measure(found))
    assert judge(found, 1.0) >= Verdict.BEYOND_NOISE


def test_a_missing_bos_is_measured(seen: Seen) -> None:
    """It need not trip: a model may hardly look at its BOS. It is seen in the spread all the same."""
    without = [(prompt[1:], *others) for prompt, *others in seen.rows]
    wrong = seen.found.ref_logps + logps(plain_model(seen.model), without) - seen.exact
    deviation = measure(replace(seen.found, ref_logps=wrong))
    print(deviation)
    assert deviation.spread > 1.5 * measure(seen.found).spread
