"""Popular sets by name: each file of configs/data against three rows of ours, in the shape of the set's card.

The hub is not asked: `load_dataset` is replaced, and must be asked for the set, its configuration and its split. The
pairs are compared as texts that are written by hand; a chat template writes [role]content</s>.
"""

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import yaml

from dpo.config.load import load_config
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import EOS, TinyModelConfig, all_pairs, ids

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
FOLDER = Path(__file__).parents[2] / "configs" / "data"
TLDR = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"


def user(text):
    return {"content": text, "role": "user"}


def assistant(text):
    return {"content": text, "role": "assistant"}


def chat(prompt, *answers):
    """The texts of a prompt, the winner and the loser through the template of the tests."""
    return (f"[user]{prompt}</s>[assistant]", *(f"{answer}</s>" for answer in answers))


def whole(question, chosen, rejected, **columns):
    """A row with chosen and rejected as whole conversations."""
    sides = {"chosen": [user(question), assistant(chosen)], "rejected": [user(question), assistant(rejected)]}
    return sides | columns


SHEEP = ("Which animal gives wool?", "A sheep.", "A tree.")
BEES = ("What do bees make?", "Honey.", "Butter.")
ICE = ("What is frozen water?", "Ice.", "Steam.")
FACTS = (SHEEP, BEES, ICE)


def conversations(*columns):
    """Rows of whole conversations with further columns, and their pairs."""
    rows = [whole(*fact) | {name: value.format(fact[0]) for name, value in columns} for fact in FACTS]
    return rows, [chat(*fact) for fact in FACTS]


# --- the rows, and the pairs that are right ---------------------------------------------------------------------------


def ultrafeedback():
    """Equal scores, as some rows of the set have, are no tie: the set says which answer is chosen."""
    rows, pairs = conversations(("prompt", "{}"), ("prompt_id", "5e"))
    for row in rows:
        row |= {
            "messages": row["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 8.0,
        }
    return rows, pairs


def orca_pairs():
    rows = [{"system": "Be brief.", "question": q, "chosen": c, "rejected": r} for q, c, r in FACTS]
    rows[1]["system"] = ""
    pairs = [chat(*fact) for fact in FACTS]
    return rows, [("[system]Be brief.</s>" + p if i != 1 else p, c, r) for i, (p, c, r) in enumerate(pairs)]


def truthy():
    rows = [
        {"id": "1", "source": "t", "system": "Be brief.", "prompt": q, "chosen": c, "rejected": r} for q, c, r in FACTS
    ]
    return rows, [(f"[system]Be brief.</s>{p}", c, r) for p, c, r in (chat(*fact) for fact in FACTS)]


def helpsteer3():
    """-2 prefers response1, 1 response2, 0 is a tie; the first context has three messages."""
    contexts = [[user("Hi"), assistant("Yo"), user(SHEEP[0])], [user(BEES[0])], [user(ICE[0])]]
    answers, scores = [SHEEP[1:], BEES[:0:-1], ICE[1:]], [-2, 1, 0]
    rows = [
        {"domain": "general", "language": "english", "context": context, "response1": a, "response2": b,
         "overall_preference": score, "individual_preference": [{"score": score, "reasoning": "so"}]}
        for context, (a, b), score in zip(contexts, answers, scores, strict=True)
    ]  # fmt: skip
    first, *answers = chat(*SHEEP)
    return rows, [(f"[user]Hi</s>[assistant]Yo</s>{first}", *answers), chat(*BEES)]


def skywork():
    return conversations(("source", "magpie"))


def tulu3():
    return conversations(("id", "1"), ("prompt", "{}"), ("source", "wildchat"))


def shp():
    """labels 1 prefers A."""
    rows = [
        {"post_id": "1", "domain": "askscience_train", "history": q, "human_ref_A": a, "human_ref_B": b,
         "labels": label, "score_ratio": 2.0}
        for (q, a, b), label in ((SHEEP, 1), ((BEES[0], BEES[2], BEES[1]), 0), (ICE, 1))
    ]  # fmt: skip
    return rows, [(f"\n\nHuman: {q}\n\nAssistant:", f" {c}</s>", f" {r}</s>") for q, c, r in FACTS]


def hh():
    rows = [
        {side: f"\n\nHuman: {q}\n\nAssistant: {a}" for side, a in (("chosen", c), ("rejected", r))} for q, c, r in FACTS
    ]
    return rows, [(f"\n\nHuman: {q}\n\nAssistant:", f" {c}</s>", f" {r}</s>") for q, c, r in FACTS]


def tldr():
    """The reproduction's rows: OpenAI's columns, and its own as texts and as ids; 98 is padding, which no text has."""
    rows, pairs, pad = [], [], 98
    for i, (post, chosen, rejected) in enumerate(FACTS):
        choice = i % 2
        summaries = [{"text": f" {text}", "policy": "sft", "note": "ok"} for text in (chosen, rejected)]
        query = f"SUBREDDIT: r/a\n\nTITLE: t\n\nPOST: {post}\n\nTL;DR:"
        row = {
            "info": {"id": "1", "post": post, "title": "t", "subreddit": "a", "site": None, "article": None},
            "summaries": summaries[::-1] if choice else summaries, "choice": choice, "worker": "w", "batch": "b",
            "split": "train", "extra": {"confidence": 3}, "query": query, "chosen": f" {chosen}<|endoftext|>",
            "rejected": f" {rejected}<|endoftext|>",
        }  # fmt: skip
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            answer_ids = [*ids(f" {answer}"), EOS]
            padding = [pad] * (80 - len(answer_ids))
            row[f"query_{side}_token"] = [*ids(query.replace("\n", "|")), *answer_ids, *padding]
            row[f"query_{side}_token_response_label"] = [*[pad] * len(query), *answer_ids, *padding]
        rows.append(row)
        pairs.append((query, f" {chosen}</s>", f" {rejected}</s>"))
    return rows, pairs


def tldr_tokens():
    """The ids of a row of `tldr`: they have `|` for a line end, so that the texts cannot pass for them."""
    rows, pairs = tldr()
    return rows, [(query.replace("\n", "|"), chosen, rejected) for query, chosen, rejected in pairs]


def arena_55k():
    """A vote for b, a tie, and two turns after equal answers with a vote for a."""
    turns = [
        ([SHEEP[0]], [SHEEP[2]], [SHEEP[1]], (0, 1, 0)),
        ([BEES[0]], [BEES[1]], [BEES[2]], (0, 0, 1)),
        (["Hi", ICE[0]], ["Yo", ICE[1]], ["Yo", ICE[2]], (1, 0, 0)),
    ]
    rows = [
        {"id": 1, "model_a": "m", "model_b": "n", "prompt": json.dumps(prompt), "response_a": json.dumps(a),
         "response_b": json.dumps(b), "winner_model_a": vote[0], "winner_model_b": vote[1], "winner_tie": vote[2]}
        for prompt, a, b, vote in turns
    ]  # fmt: skip
    prompt, *answers = chat(*ICE)
    return rows, [chat(*SHEEP), (f"[user]Hi</s>[assistant]Yo</s>{prompt}", *answers)]


def pku_saferlhf():
    """The more helpful answer is the second one of the first row; the safer one is the other one everywhere."""
    rows = [
        {"prompt": q, "response_0": a, "response_1": b, "is_response_0_safe": True, "is_response_1_safe": False,
         "better_response_id": better, "safer_response_id": 1 - better}
        for (q, a, b), better in (((SHEEP[0], SHEEP[2], SHEEP[1]), 1), (BEES, 0), (ICE, 0))
    ]  # fmt: skip
    return rows, [chat(*fact) for fact in FACTS]


def nectar():
    """Two answers a row, of equal rank in the second row; the third prompt has three turns."""
    begins = ["", "", "\n\nHuman: Hi\n\nAssistant: Yo"]
    rows = [
        {"prompt": f"{begin}\n\nHuman: {q}\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["s"],
         "answers": [{"answer": r, "model": "m", "rank": 2}, {"answer": c, "model": "n", "rank": 1 + (q == BEES[0])}]}
        for begin, (q, c, r) in zip(begins, FACTS, strict=True)
    ]  # fmt: skip
    prompt, *answers = chat(*ICE)
    return rows, [chat(*SHEEP), (f"[user]Hi</s>[assistant]Yo</s>{prompt}", *answers)]


# --- the tests --------------------------------------------------------------------------------------------------------

SETS = (
    (ultrafeedback, "HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs", 0),
    (orca_pairs, "Intel/orca_dpo_pairs", None, "train", None, 0),
    (helpsteer3, "nvidia/HelpSteer3", "preference", "train", "validation", 1),
    (skywork, "Skywork/Skywork-Reward-Preference-80K-v0.2", None, "train", None, 0),
    (tulu3, "allenai/llama-3.1-tulu-3-8b-preference-mixture", None, "train", None, 0),
    (shp, "stanfordnlp/SHP", None, "train", "validation", 0),
    (hh, "Anthropic/hh-rlhf", None, "train", "test", 0),
    (tldr, TLDR, None, "train", "validation", 0),
    (tldr_tokens, TLDR, None, "train", "validation", 0),
    (arena_55k, "lmarena-ai/arena-human-preference-55k", None, "train", None, 1),
    (pku_saferlhf, "PKU-Alignment/PKU-SafeRLHF", None, "train", "test", 0),
    (nectar, "berkeley-nest/Nectar", None, "train", None, 1),
    (truthy, "jondurbin/truthy-dpo-v0.1", None, "train", None, 0),
)
"""(rows and pairs, hub id, configuration, split to train on, split to evaluate on, ties)."""


def texts(pair_set):
    """The pairs as texts, each id by the tokenizer of the tests."""
    tokens = {token: text for text in map(chr, range(32, 127)) for token in ids(text)} | {98: "\n", EOS: "</s>"}
    return [tuple("".join(map(tokens.__getitem__, part)) for part in pair) for pair in all_pairs(pair_set)]


@pytest.mark.parametrize(("shape", "hub_id", "name", "split", "eval_split", "ties"), SETS)
def test_a_named_set(monkeypatch, tokenizer_folder, shape, hub_id, name, split, eval_split, ties):
    rows, pairs = shape()
    asked = []

    def load(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    words = ["--config", str(FOLDER / f"{shape.__name__}.yaml"), "--model.path", tokenizer_folder]
    config = load_config([*words, "--batch.pairs_per_step", "1"], prog="dpo.train")
    train = [dataclasses.replace(source, holdout=None) for source in config.data.train]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))
    data = prepare_data(config, TinyModelConfig())
    assert texts(data.train) == pairs
    assert texts(data.eval) == (pairs if eval_split else [])
    assert asked == [(hub_id, name, one) for one in (split, eval_split) if one]
    assert all(source.dropped == ({"tie": ties} if ties else {}) for source in data.report.sources)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_file_says_what_it_reads(file):
    """Only data, with something to evaluate on; its card, and the command that uses it."""
    config = yaml.safe_load(file.read_text())
    assert set(config) == {"data"}
    (source,) = config["data"]["train"]
    assert ("holdout" in source) != ("eval" in config["data"])
    assert f"# https://huggingface.co/datasets/{source['path']}\n" in file.read_text()
    assert f"-m dpo.train --config configs/data/{file.name} --model.path " in file.read_text()
    names = [getattr(entry, "values", entry)[0].__name__ for entry in SETS]
    assert names.count(file.stem) == 1, "a test with rows of its shape"
