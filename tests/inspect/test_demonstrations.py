"""`python -m dpo.inspect` of data without losers: demonstrations, and preference files under `sft`."""

import pytest

from dpo.inspect.program import main
from tests.support.data_fixtures import write_jsonl
from tests.support.runs import exit_code_of


@pytest.mark.parametrize("rows", [
    [{"prompt": "ab", "completion": "cde"}, {"prompt": "f", "completion": "g"}],
    [{"prompt": "ab", "chosen": "cde", "rejected": "xyzxyzxyz"}, {"prompt": "f", "chosen": "g", "rejected": "h"}],
])  # fmt: skip
def test_no_line_speaks_of_losers(rows, tmp_path, shared_data, capsys, monkeypatch):
    """No loser is counted, shown or said to contradict."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path, page = write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "page.html"
    words = ["--model.path", str(shared_data / "stories260K"), "--data.train", f"[{{path: {path}}}]"]
    words += ["--batch.pairs_per_step", "2", "--loss.name", "sft", "--html", str(page)]
    assert exit_code_of(main, "dpo.inspect", *words) == 0
    shown = capsys.readouterr().out.partition("findings")[2]  # the lines of the sources name their columns
    assert "rejected" not in shown and "longer completion" not in shown and "xyz" not in shown
    assert "contradict" not in shown.partition("training:")[0]
    assert "completions in a pair                           2" in shown
    assert "Does the longer completion win" not in page.read_text()
