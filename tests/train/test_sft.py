"""The loss `sft` as a run: on demonstrations, and on pairs, whose losers are not computed."""

from pathlib import Path

import pytest

from tests.support.data_fixtures import EOS, ids, make_tokenizer, write_jsonl
from tests.support.models import plain_logp, plain_model, save_model
from tests.support.runs import eval_lines, make_config, run, train_lines, without_clock

ANSWERS = [("ab", "cde"), ("ab", "fg"), ("hij", "k"), ("lm", "nopq")]


def test_demonstrations_and_pairs_give_one_run(tmp_path: Path) -> None:
    """The loss is that of plain transformers; winners with losers beside them give the same, bitwise."""
    make_tokenizer().save_pretrained(save_model(tmp_path / "model", "llama"))
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS]
    paired = [{"prompt": prompt, "chosen": answer, "rejected": "xyzxyz"} for prompt, answer in ANSWERS]
    runs = []
    for name, listed in (("alone", rows), ("paired", paired)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", listed)
        facts = {"train__steps": 2, "batch__pairs_per_step": 4, "loss__name": "sft", "optim__warmup_steps": 0}
        runs.append(run(make_config(tmp_path / "model", path, tmp_path / name, **facts)))
    lines = [without_clock(train_lines(folder)) for folder in runs]
    assert lines[0] == lines[1]
    assert not {name for line in lines[0] for name in line if "rejected" in name or "rewards" in name}
    assert eval_lines(runs[0]) == []
    model = plain_model(tmp_path / "model")
    logps = [plain_logp(model, ids(prompt), [*ids(answer), EOS]).item() for prompt, answer in ANSWERS]
    assert lines[0][0]["train/loss"] == pytest.approx(-sum(logps) / sum(len(answer) + 1 for _, answer in ANSWERS))
    assert lines[0][0]["train/logps/chosen"] == pytest.approx(sum(logps) / 4)
    answers = sum(len(answer) + 1 for _, answer in ANSWERS)
    assert lines[0][0]["train/tokens"] == len("ab") + len("hij") + len("lm") + answers, "no loser is computed"
