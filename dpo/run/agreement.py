"""Checks that policy, reference and tokenizer agree on the token ids of the data, before any weights are read.

The data is tokenized for the policy. A reference of another family can share its ids, but need not: an id beyond its
vocabulary ends the program within a GPU's kernel, and an id that means another text gives log-probabilities of nothing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.base.errors import UserError
from dpo.config import Config
from dpo.encode.tokenizer import find_tokenizer_folder, has_tokenizer, load_tokenizer, tokenizer_is_here
from dpo.pairs.pair_set import PairSet
from dpo.pairs.prepare import PreferenceData
from dpo.pairs.token_rows import blocks, lists
from dpo.pairs.tokens import limits_of
from dpo.sources.formats.examples import holds_ids
from dpo.terminal.console import warn

TOKENIZER = "tokenizer.json"
BLOCK = 8192
"""Token rows whose ids are read at a time."""


@dataclass(frozen=True)
class NamedModel:
    """A model folder, its config, and the key of the trainer's config that names it."""

    key: str
    folder: Path
    config: PretrainedConfig


def check_agreement(config: Config, policy: NamedModel, reference: NamedModel, data: PreferenceData) -> None:
    """Checks the reference, and the tokenizer where it is not the policy's own, against the data. Adapters to start
    from count as a model with the policy's vocabulary, where their folder has a tokenizer.

    Args:
        config: the config of the run.
        policy: the model for which the data was prepared.
        reference: the reference; the same folder where there is no other.
        data: the pairs of training and evaluation.

    Raises:
        UserError: the reference has no row or no position for a token of the data, or ids of the data mean another text
            in one of the models than in the tokenizer.
    """
    others = [reference] if config.loss.facts.uses_reference and reference.folder != policy.folder else []
    for model in others:
        _check_vocabulary(model, policy.config.vocab_size, data)
        _check_positions(model, data)
    tokenizer = config.model.tokenizer or str(policy.folder)
    if tokenizer_is_here(tokenizer):
        used, adapters = find_tokenizer_folder(tokenizer), find_adapters(config)
        if adapters and adapters.folder:
            others.append(NamedModel("lora.path", adapters.folder, policy.config))
            _compare_templates(adapters.folder, used, config, data)
        for model in (policy, *others):
            _check_texts(model, used, data)


# --- ids and positions that a model lacks ----------------------------------------------------------------------------


def _check_vocabulary(model: NamedModel, policy_size: int, data: PreferenceData) -> None:
    """Raises UserError where the data has an id beyond a reference's vocabulary."""
    size = model.config.vocab_size
    if size >= policy_size:
        return
    for pairs, name in ((data.train, "data.train"), (data.eval, "data.eval")):
        found = _first_beyond(pairs, size)
        if found:
            token, where = found
            sizes = f"its vocabulary has {size} tokens, the policy's {policy_size}"
            what = f"{model.folder}: {sizes}, and {name} has id {token}, first in row {where}"
            raise UserError(model.key, what, "a model with the policy's vocabulary")


def _first_beyond(pairs: PairSet, size: int) -> tuple[int, int] | None:
    """Returns the first id of the pairs that is not below `size`, and the line or number of its row; None: no such id.

    Blocks of token rows without such an id are passed over; rows may hold ids of pairs that were dropped.
    """
    if not len(pairs):
        return None
    row_of_pair = np.asarray(pairs.row_of_pair)
    for first, ids in _blocks_of_ids(pairs):
        if ids.max(initial=-1) < size:
            continue
        begin, end = np.searchsorted(row_of_pair, (first, first + BLOCK))
        for number, pair in zip(range(begin, end), pairs.pairs(np.arange(begin, end)), strict=True):
            used = np.concatenate([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
            if used.max() >= size:
                return int(used[used >= size][0]), int(pairs.row(int(row_of_pair[number]))["where"])
    return None


def _blocks_of_ids(pairs: PairSet) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of a block's first row, and all its ids."""
    for first, table in blocks(pairs.rows, ["prompt_ids", "completion_ids"], BLOCK):
        prompts, completions = lists(table, "prompt_ids")[1], lists(table, "completion_ids")[1]
        yield first, np.concatenate([_numbers(prompts), _numbers(completions.flatten())])


def _numbers(array: pa.Array) -> np.ndarray:
    numbers: np.ndarray = array.to_numpy(zero_copy_only=False)
    return numbers


def _check_positions(model: NamedModel, data: PreferenceData) -> None:
    """Raises UserError where a pair is longer than a reference with a fixed number of positions; warns of other ones,
    as the data report does of the policy's.
    """
    limits = limits_of(None, None, model.config)
    sizes = np.concatenate([pairs.lengths() for pairs in (data.train, data.eval)])
    longest = int((sizes[:, :1] + sizes[:, 1:]).max(initial=0))
    if limits.max_positions is None or longest <= limits.max_positions:
        return
    what = (
        f"{model.folder}: its positions end at {limits.max_positions}, and a prompt with its completion has {longest}"
    )
    if limits.positions_are_hard:
        raise UserError(model.key, f"{what} tokens", f"data.max_length up to {limits.max_positions}")
    warn(f"{model.key}: {what} tokens")


# --- ids that mean another text --------------------------------------------------------------------------------------


def _check_texts(model: NamedModel, tokenizer: Path, data: PreferenceData) -> None:
    """Raises UserError where ids of the data are other tokens in a model's own tokenizer.json.

    Special and added tokens are left out: models rename reserved ones, and have the same rows of weights all the same.
    """
    files = [folder / TOKENIZER for folder in (model.folder, tokenizer)]
    if not all(file.is_file() for file in files) or files[0].samefile(files[1]):
        return
    own, used = map(_tokens, files)
    differing = [token for token in own.keys() & used.keys() if own[token] != used[token]]
    if not differing:
        return
    ids = np.unique(np.concatenate([_all_ids(data.train), _all_ids(data.eval)]))
    wrong = np.intersect1d(ids, differing)
    if len(wrong):
        token = int(wrong[0])
        what = f"{model.folder}: {len(wrong)} of the {len(ids)} ids of the data are other tokens in its tokenizer"
        texts = f"{token} is {own[token]!r} there, and {used[token]!r} in {tokenizer}"
        raise UserError(model.key, f"{what}: {texts}", "models with one vocabulary, and their tokenizer")


def _compare_templates(adapters: Path, used: Path, config: Config, data: PreferenceData) -> None:
    """Warns where adapters come with another chat template than that by which the data was written."""
    has_texts = not all(holds_ids(source.format) for source in data.report.sources)
    if not has_texts or not has_tokenizer(adapters) or adapters.samefile(used):
        return
    template = load_tokenizer(str(adapters), config.model.trust_remote_code).chat_template
    if template and template != load_tokenizer(str(used), config.model.trust_remote_code).chat_template:
        what = f"the tokenizer in {adapters} has another chat template than {used}, which tokenizes the data"
        warn(f"lora.path: {what}; model.tokenizer: {adapters} takes it")


def _all_ids(pairs: PairSet) -> np.ndarray:
    """Returns the ids of a set, sorted, each once."""
    if not len(pairs):
        return np.empty(0, np.int32)
    return np.unique(np.concatenate([np.unique(ids) for _, ids in _blocks_of_ids(pairs)]))


def _tokens(file: Path) -> Mapping[int, str]:
    """Returns the tokens of a tokenizer.json by id, without those that were added to the vocabulary."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a Unigram model: [token, score] in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {entry["id"] for entry in content["added_tokens"]}
        return {number: token for token, number in vocabulary.items() if number not in added}
    except (ValueError, KeyError, TypeError):  # a form that cannot be compared, of a tokenizer that is not used
        return {}
