"""Demonstrations: answers that are compared with nothing, for the loss `sft` alone."""

import pytest

from dpo.base.errors import UserError
from dpo.batch.trees import grow_trees
from dpo.config import LossConfig, SourceConfig
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import EOS, TinyModelConfig, all_pairs, ids, make_config, write_jsonl
from tests.support.runs import changed

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
SFT = LossConfig(name="sft")
TURNS = [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "p1"}]
ANSWER = {"role": "assistant", "content": "bc"}
CHAT = ("[user]p0</s>[assistant]a</s>[user]p1</s>[assistant]", "bc")


def written(text):
    """The ids of a text in which </s> is EOS."""
    return [i for part in text.split("</s>") for i in [*ids(part), EOS]][:-1]


def prepared(tmp_path, tokenizer_folder, rows, loss=SFT, **source):
    config = make_config(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), **source), tokenizer=tokenizer_folder)
    return prepare_data(changed(config, loss__name=loss.name), MODEL)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "p0", "completion": "a"}, "p0", "a"),
        ({"prompt": "p0", "chosen": "a"}, "p0", "a"),
        ({"messages": [*TURNS, ANSWER]}, *CHAT),
        ({"prompt": TURNS, "completion": [ANSWER]}, *CHAT),
        ({"prompt": TURNS, "chosen": "bc"}, *CHAT),
        ({"messages": [{"from": "human", "value": "p1"}, {"from": "gpt", "value": "bc"}]},
         "[user]p1</s>[assistant]", "bc"),
        ({"conversations": [{"from": "human", "value": "p1"}, {"from": "gpt", "value": "bc"}]},
         "[user]p1</s>[assistant]", "bc"),
        ({"messages": [{"role": "human", "content": "p1"}, {"role": "gpt", "content": "bc"}]},
         "[user]p1</s>[assistant]", "bc"),
        ({"system": "s", "messages": [TURNS[2], ANSWER]}, "[system]s</s>[user]p1</s>[assistant]", "bc"),
    ],
)  # fmt: skip
def test_a_row_is_a_pair_of_the_answer_with_itself(tmp_path, tokenizer_folder, row, prompt, answer):
    """One tree of one completion: the answer is computed once."""
    data = prepared(tmp_path, tokenizer_folder, [row])
    expected = (written(prompt), [*ids(answer), EOS])
    assert [pair[:3] for pair in all_pairs(data.train)] == [(expected[0], expected[1], expected[1])]
    (tree,) = grow_trees(data.train.pairs([0]))
    assert (len(tree.completion_ids), tree.pairs) == (1, ((0, 0),))
    (report,) = data.report.sources
    assert (report.format, report.pairs, report.repeated_pairs, report.contradicting_pairs) == (
        "demonstrations",
        1,
        0,
        0,
    )


def test_losers_are_not_computed(tmp_path, tokenizer_folder):
    """The same pairs as for dpo: a winner in two pairs counts twice, a tie is dropped. The trees have winners alone."""
    rows = [{"prompt": "p0", "completions": ["a", "b", "cc"], "scores": [2, 1, 1]}]
    data = prepared(tmp_path, tokenizer_folder, rows)
    assert [pair[1:3] for pair in all_pairs(data.train)] == [([*ids("a"), EOS],) * 2] * 2
    (tree,) = grow_trees(data.train.pairs([0, 1]))
    assert tree.num_scored == 2
    compared = prepared(tmp_path, tokenizer_folder, rows, LossConfig(name="dpo"))
    assert [pair[2] for pair in all_pairs(compared.train)] == [[*ids("b"), EOS], [*ids("cc"), EOS]]


def test_an_empty_answer_is_dropped(tmp_path, tokenizer_folder):
    rows = [{"prompt": "p0", "completion": " "}, {"prompt": "p1", "completion": "a"}]
    data = prepared(tmp_path, tokenizer_folder, rows)
    assert (len(data.train), data.report.sources[0].dropped) == (1, {"empty": 1})


def test_a_loss_that_compares_refuses_demonstrations(tmp_path, tokenizer_folder):
    wrong = r"data.train\[0\].path: .*rows without rejected, and loss.name dpo compares; valid: .*loss.name sft"
    with pytest.raises(UserError, match=wrong):
        prepared(tmp_path, tokenizer_folder, [{"prompt": "p0", "completion": "a"}], LossConfig(name="dpo"))


def test_answers_judged_alone_are_no_demonstrations(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="no format fits the columns completion, label, prompt"):
        prepared(tmp_path, tokenizer_folder, [{"prompt": "p0", "completion": "a", "label": True}])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "completion": "bc"},
        {"messages": TURNS, "chosen": [ANSWER]},
        {"messages": TURNS, "completion": [ANSWER]},
    ],
)
def test_messages_beside_an_answer_are_the_prompt(tmp_path, tokenizer_folder, row):
    data = prepared(tmp_path, tokenizer_folder, [row])
    assert [pair[:2] for pair in all_pairs(data.train)] == [(written(CHAT[0]), [*ids(CHAT[1]), EOS])]


def test_of_two_answers_none_is_left_out(tmp_path, tokenizer_folder):
    row = {"prompt": "p0", "completion": "a", "chosen": "b"}
    with pytest.raises(UserError, match=r"completion and chosen are given; valid: one of them, with columns: {unused"):
        prepared(tmp_path, tokenizer_folder, [row])
    data = prepared(tmp_path, tokenizer_folder, [row], columns={"unused": "chosen"})
    assert all_pairs(data.train)[0][1] == [*ids("a"), EOS]


def test_the_place_of_a_wrong_answer(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match=r"a.jsonl:1: messages\[2\] has the role 'user'; valid: assistant"):
        prepared(tmp_path, tokenizer_folder, [{"messages": TURNS}])


@pytest.mark.parametrize("share", [{"count": 3}, {"weight": 0.5}, {"weight": 2.5}])
def test_a_share_of_an_epoch_is_the_same_with_and_without_losers(tmp_path, tokenizer_folder, share):
    """SFT and DPO of one mixture train on the same pairs."""
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(8)]
    sft = prepared(tmp_path, tokenizer_folder, rows, **share)
    dpo = prepared(tmp_path, tokenizer_folder, rows, LossConfig(name="dpo"), **share)
    assert [pair[:2] for pair in all_pairs(sft.train)] == [pair[:2] for pair in all_pairs(dpo.train)]
