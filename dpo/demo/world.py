"""The demo's data and model: questions to an owl, with answers that are ranked by a rule.

    Nora asks: what does the cow say?
    Owl: Dear Nora, it says moo.

An answer can be right, kind and short. Right counts 4, kind 2, short 1, so that the scores 0 to 7 order all eight
grades. The question above has, among others, the answers

    Dear Nora, it says moo.                          right, kind, short    7
    Hmpf! it says moo, and owls sleep by day.        right                 4
    Dear Nora, it says meow.                         kind, short           3

Questions, answers and the untrained model depend on a seed alone.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.base.files import naming, write_file

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Greta", "Hugo", "Ida", "Jon", "Kira", "Leo", "Mia", "Nora",
         "Otto", "Pia")  # fmt: skip
SOUNDS = {"cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack", "sheep": "baa", "pig": "oink", "frog": "croak",
          "mouse": "squeak", "rooster": "crow", "lion": "roar", "bee": "buzz", "snake": "hiss"}  # fmt: skip
HOMES = {"bee": "hive", "fox": "den", "bird": "nest", "fish": "pond", "bear": "cave", "spider": "web", "mole": "tunnel",
         "horse": "stable", "dog": "kennel", "snail": "shell", "rabbit": "burrow", "squirrel": "tree"}  # fmt: skip
NUMBERS = range(1, 7)

RUDE = " Hmpf! "
ASIDES = ("owls sleep by day", "the moon is round", "my left wing is itchy", "it may rain", "I once met a king",
          "tea is best at dawn")  # fmt: skip

BOS, EOS, PAD, UNKNOWN = SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
WORDS = r"\n| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]"


@dataclass(frozen=True)
class Question:
    """A question that `name` asks, the right sentence, and wrong sentences of the same kind."""

    name: str
    text: str
    right: str
    wrong: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Returns the text that the model reads."""
        return f"{self.name} asks: {self.text}?\nOwl:"

    @property
    def greeting(self) -> str:
        """Returns the beginning of a kind answer."""
        return f" Dear {self.name}, "


@dataclass(frozen=True)
class Grade:
    """The qualities of an answer."""

    right: bool
    kind: bool
    short: bool

    @property
    def score(self) -> int:
        """Returns 0 to 7, different for each grade: right outweighs kind and short together."""
        return 4 * self.right + 2 * self.kind + self.short


GRADES = tuple(Grade(*parts) for parts in product((False, True), repeat=3))


# --- questions and answers -------------------------------------------------------------------------------------------


def questions(num: int, seed: int) -> list[Question]:
    """Returns `num` different questions, of the 960 of 16 names, in an order that depends on the seed."""
    possible = [Question(name, *fact) for name in NAMES for fact in _facts()]
    return random.Random(seed).sample(possible, num)


def _facts() -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns (question, right sentence, wrong sentences) of 36 sums, 12 sounds and 12 homes."""
    sums = [(f"what is {a} plus {b}", "that makes ", str(a + b)) for a in NUMBERS for b in NUMBERS]
    sounds = [(f"what does the {animal} say", "it says ", sound) for animal, sound in SOUNDS.items()]
    homes = [(f"where does the {animal} live", "it lives in a ", home) for animal, home in HOMES.items()]
    return [fact for kind in (sums, sounds, homes) for fact in _with_wrong(kind)]


def _with_wrong(facts: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Adds the wrong sentences of each fact: the right sentences of the other facts of its kind."""
    ends = sorted({end for _, _, end in facts})
    return [(text, begin + end, tuple(begin + e for e in ends if e != end)) for text, begin, end in facts]


def answer(question: Question, grade: Grade, rng: random.Random) -> str:
    """Returns an answer of a grade.

    Args:
        question: the question.
        grade: the qualities that the answer has.
        rng: draws the wrong sentence and the asides.
    """
    opening = question.greeting if grade.kind else RUDE
    sentence = question.right if grade.right else rng.choice(question.wrong)
    asides = [] if grade.short else rng.sample(ASIDES, rng.randint(1, 3))
    return opening + ", and ".join([sentence, *asides]) + "."


def grade_of(question: Question, text: str) -> Grade:
    """Returns the grade of any text as an answer: the inverse of `answer`."""
    sentence, aside, _ = text.removeprefix(question.greeting).removeprefix(RUDE).partition(", and ")
    return Grade(
        right=sentence.rstrip(".") == question.right,
        kind=text.startswith(question.greeting),
        short=not aside and text.endswith("."),
    )


def preference_row(question: Question, num_answers: int, rng: random.Random) -> dict[str, Any]:
    """Returns a row of format `grouped`: a prompt with answers of different grades, scored.

    Args:
        question: the question.
        num_answers: number of answers, 2 to 8, each of another grade.
        rng: draws the grades and the answers.
    """
    grades = rng.sample(GRADES, num_answers)
    completions = [answer(question, grade, rng) for grade in grades]
    return {"prompt": question.prompt, "completions": completions, "scores": [grade.score for grade in grades]}


def save_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# --- the model -------------------------------------------------------------------------------------------------------


def save_model(folder: Path, rows: Iterable[dict[str, Any]], seed: int) -> None:
    """Writes an untrained Llama of 0.3 million parameters, and its tokenizer, as a Hugging Face folder.

    Args:
        folder: the folder to write.
        rows: rows of format `grouped`, whose words the tokenizer knows.
        seed: the seed of the initial weights.
    """
    tokenizer = make_tokenizer(text for row in rows for text in (row["prompt"], *row["completions"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # about 1/sqrt(hidden_size): the usual 0.02 is for far wider models, and slow here
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with naming(folder, 4 * model.num_parameters()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per word and the space before it, so that decoding restores the text; it puts
    BOS before a prompt.
    """
    splitter = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )


def sample_answers(folder: Path, prompts: Sequence[str], temperature: float, seed: int) -> list[str]:
    """Samples a model's answer to each prompt, at most 48 tokens.

    Args:
        folder: the model's Hugging Face folder, with its tokenizer.
        prompts: the prompts, as texts.
        temperature: of the softmax from which tokens are drawn, above 0.
        seed: the seed of the draws.

    Returns:
        The answer to each prompt, as text without special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
