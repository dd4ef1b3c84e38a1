"""Folders whose files do not agree with their config.json: loaded as plain transformers loads them, and told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo.base.errors import UserError
from dpo.config import ParallelConfig
from dpo.disk.sizes import sizes_of
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from tests.support.models import VOCAB, plain_model, save_model
from tests.support.ranks import Ranks
from tests.support.runs import make_config

CONFIG = ParallelConfig()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def load(world: World, folder: Path) -> Policy:
    policy = build_policy(read_model_config(folder, False), CONFIG, "float32", make_mesh(world, CONFIG))
    load_weights(policy, folder)
    return policy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Changes the tensors of a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def assert_as_plain(policy: Policy, folder: Path) -> None:
    """The tensors that plain `from_pretrained` has, tied ones under both names, bit by bit."""
    wanted = plain_model(folder).state_dict()
    found = {name: value.full_tensor() for name, value in policy.model.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]


# --- tensors without a place -----------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn"
SURPLUS = {
    "biases": {f"{LAYER}.{part}_proj.bias": torch.ones(32) for part in "qo"},
    "a head of scores": {"score.weight": torch.ones(1, 32)},
    "a value head": {f"v_head.summary.{part}": torch.ones(1) for part in ("weight", "bias")},
    "norms of queries and keys": {f"{LAYER}.{part}_norm.weight": torch.ones(8) for part in "qk"},
    "scales": {f"{LAYER}.q_proj.weight_scale_inv": torch.ones(1, 1)},
    "a layer that predicts a later token": {"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)},
    "one layer more": {"model.layers.2.input_layernorm.weight": torch.ones(32)},
    "another prefix": {"language_model.model.norm.weight": torch.ones(32)},
}


@pytest.mark.parametrize("kind", SURPLUS)
def test_tensors_without_a_place_are_counted(
    kind: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is the list of unexpected names that transformers reports."""
    folder = rewrite(save_model(tmp_path, "llama"), lambda tensors: tensors.update(SURPLUS[kind]))
    unexpected = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1]["unexpected_keys"]
    assert set(unexpected) == set(SURPLUS[kind])
    capsys.readouterr()
    assert_as_plain(load(world, folder), folder)
    count = "1 tensor" if len(unexpected) == 1 else f"{len(unexpected)} tensors"
    (line,) = warnings_of(capsys)
    assert line.startswith(f"WARNING: {folder}: {count} for which a LlamaForCausalLM has no place ")
    assert line.endswith(f", the first is {min(unexpected)}")


MASK = torch.ones(1, 1, 8, 8)
HARMLESS = {
    "gpt2": {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
    "gpt-neox": {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": torch.ones(())},
    "llama": {f"{LAYER}.rotary_emb.inv_freq": torch.ones(4), "model.embeddings.position_ids": torch.ones(1, 8)},
    "llama-tied": {"model.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.self_attn.bias": MASK},
}


@pytest.mark.parametrize("family", HARMLESS)
def test_buffers_of_old_checkpoints_are_left_out_in_silence(
    family: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rewrite(save_model(tmp_path, family), lambda tensors: tensors.update(HARMLESS[family]))
    assert_as_plain(load(world, folder), folder)
    assert warnings_of(capsys) == []


def test_names_that_the_class_leaves_out_are_left_out_in_silence(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the classes of DeepSeek V3 and Qwen 3 Next leave out the layers that predict later tokens."""
    surplus = SURPLUS["a layer that predicts a later token"]
    folder = rewrite(save_model(tmp_path, "llama"), lambda tensors: tensors.update(surplus))
    monkeypatch.setattr("transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert_as_plain(load(world, folder), folder)
    assert warnings_of(capsys) == []


def test_quantized_weights_are_refused(world: World, tmp_path: Path) -> None:
    """Without quantization_config, transformers reads them as if they were not, and leaves out the scales."""
    name = f"{LAYER}.q_proj.weight"

    def quantize(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}

    folder = rewrite(save_model(tmp_path, "llama"), quantize)
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} is stored as F8_E4M3: it is quantized; valid: "):
        load(world, folder)


# --- the embedding and the head --------------------------------------------------------------------------------------

FAMILIES = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "gpt-neox": "embed_out.weight"}
"""The name of the head in the files of each family."""
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")


def two_heads(folder: Path, family: str) -> Path:
    """A folder with an embedding and a head of different values, whose config ties them."""
    untied = "gpt2-untied" if family == "gpt2" else family
    return edit_config(save_model(folder, untied), tie_word_embeddings=True)


def embedding_of(tensors: dict[str, Tensor]) -> str:
    (name,) = [name for name in tensors if name in EMBEDDINGS]
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_other_values_is_not_tied(
    family: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two_heads(tmp_path, family)
    policy = load(world, folder)
    assert policy.model.config.tie_word_embeddings is False
    assert_as_plain(policy, folder)
    (line,) = warnings_of(capsys)
    assert f"config.json says tie_word_embeddings: true, but {FAMILIES[family]} differs from " in line


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["equal", "the head alone", "the embedding alone"])
def test_a_head_is_tied_where_there_is_one_set_of_values(
    family: str, form: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        embedding, head = embedding_of(tensors), FAMILIES[family]
        changes: dict[str, Callable[[], object]] = {
            "equal": lambda: tensors.update({head: tensors[embedding].clone()}),
            "the head alone": lambda: tensors.pop(embedding),
            "the embedding alone": lambda: tensors.pop(head),
        }
        changes[form]()

    folder = rewrite(two_heads(tmp_path, family), change)
    policy = load(world, folder)
    assert policy.model.config.tie_word_embeddings is True
    assert_as_plain(policy, folder)
    assert warnings_of(capsys) == []


@pytest.mark.parametrize("row", [0, VOCAB - 1])
def test_one_value_in_any_row_unties(row: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are compared a few at a time; the head may have a wider dtype than the embedding."""
    monkeypatch.setattr("dpo.model.model_config.ROWS", 10)

    def change(tensors: dict[str, Tensor]) -> None:
        half = tensors["model.embed_tokens.weight"].bfloat16()
        tensors |= {"model.embed_tokens.weight": half, "lm_head.weight": half.float()}

    folder = rewrite(two_heads(tmp_path, "llama"), change)
    assert read_model_config(folder, False).tie_word_embeddings is True
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][row].add_(0.5))
    assert read_model_config(folder, False).tie_word_embeddings is False
    assert_as_plain(load(world, folder), folder)


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", "flash_attention_2", "nobody/kernel"])
def test_no_kernel_that_a_config_names_is_loaded(name: str, tmp_path: Path) -> None:
    """transformers runs the code of such a repository, without being asked to trust it."""
    folder = edit_config(two_heads(tmp_path, "llama"), attn_implementation=name)
    with patch("transformers.modeling_utils.lazy_import_flash_attention") as load_kernel:
        assert read_model_config(folder, False).tie_word_embeddings is False
    load_kernel.assert_not_called()


def test_an_untied_model_without_a_head_is_refused(world: World, tmp_path: Path) -> None:
    """Plain transformers makes a random head, and says so."""
    folder = rewrite(save_model(tmp_path, "llama"), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"the first is lm_head\.weight; valid: tie_word_embeddings true in config"):
        load(world, folder)


def test_a_second_head_counts_in_what_a_run_needs(tmp_path: Path) -> None:
    """One matrix of 97 x 32 more than the tied model has."""

    def num_parameters(folder: Path) -> int:
        return sizes_of(make_config(folder, "", ""), read_model_config(folder, False)).num_parameters

    tied, both = save_model(tmp_path / "tied", "llama-tied"), two_heads(tmp_path / "both", "llama")
    assert num_parameters(both) - num_parameters(tied) == 97 * 32


def test_weights_that_are_not_there_do_not_matter_for_the_config(tmp_path: Path) -> None:
    """A program that needs the config alone does not download them."""
    folder = two_heads(tmp_path, "llama")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert read_model_config(folder, False).tie_word_embeddings is True
    (folder / "model.safetensors").unlink()
    assert read_model_config(folder, False).tie_word_embeddings is True


def load_as_rank(folder: Path) -> tuple[bool, list[str]]:
    """On a rank: whether each tensor is as plain transformers reads it, and the warnings."""
    with open_world(60) as world, patch("dpo.model.build.warn") as warn:
        policy, wanted = load(world, folder), plain_model(folder).state_dict()
        found = {name: value.full_tensor() for name, value in policy.model.state_dict().items()}
        return all(torch.equal(found[name], wanted[name]) for name in wanted), [
            call.args[0] for call in warn.mock_calls
        ]


@pytest.mark.xdist_group("ranks")
def test_three_ranks_load_both_heads_and_one_tells(ranks: Ranks, tmp_path: Path) -> None:
    folder = rewrite(two_heads(tmp_path, "llama"), lambda tensors: tensors.update(SURPLUS["biases"]))
    results = ranks(3, load_as_rank, folder)
    assert [is_equal for is_equal, _ in results] == [True] * 3
    assert [len(lines) for _, lines in results] == [2, 0, 0]
