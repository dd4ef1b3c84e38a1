"""Which files of a repository are downloaded: lists as they stand on the hub, and the files that are right by hand."""

import json
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.hub.files import ADAPTERS, CONFIG, MODEL, TOKENIZER, files_to_download, read_index, stored_weights

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"

MISTRAL = [
    *(".gitattributes", "README.md", "config.json", "consolidated.safetensors", "generation_config.json"),
    *("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"),
    *(INDEX, "params.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3"),
    "tokenizer_config.json",
]
LLAMA = [
    *(".gitattributes", "LICENSE.txt", "USE_POLICY.md", "config.json", "generation_config.json", *SHARDS, INDEX),
    *("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
]
GPT2 = [
    *("64-8bits.tflite", "64-fp16.tflite", "64.tflite", "README.md", "config.json", "flax_model.msgpack"),
    *("generation_config.json", "merges.txt", "model.safetensors", "onnx/config.json", "onnx/decoder_model.onnx"),
    *("onnx/merges.txt", "onnx/tokenizer.json", "onnx/vocab.json", "pytorch_model.bin"),
    *("tf_model.h5", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
]
FP16 = [
    *("config.json", "fp16/config.json", "fp16/model.safetensors", "model.fp16.safetensors", "model.safetensors"),
    *("tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors", "vocab.json", "merges.txt"),
]
OWN_CODE = [
    *("config.json", "configuration_x.py", "modeling_x.py", "ops/kernel.py", "qwen.tiktoken", "tokenization_x.py"),
    *(*SHARDS, INDEX, "model.gguf", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("added_tokens.json", "assets/logo.png", "chat_template.json"),
]


@pytest.mark.parametrize(
    ("names", "index_names", "left"),
    [
        pytest.param(
            MISTRAL,
            MISTRAL[5:8],
            {".gitattributes", "README.md", "consolidated.safetensors", "params.json", "tokenizer.model.v3"},
            id="mistral",
        ),
        pytest.param(
            LLAMA,
            SHARDS,
            {".gitattributes"} | {"original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"},
            id="llama",
        ),
        pytest.param(
            GPT2,
            None,
            {"64-8bits.tflite", "64-fp16.tflite", "64.tflite", "README.md", "flax_model.msgpack", "pytorch_model.bin"}
            | {"tf_model.h5", "onnx/config.json", "onnx/decoder_model.onnx", "onnx/merges.txt"}
            | {"onnx/tokenizer.json", "onnx/vocab.json"},
            id="gpt2",
        ),
        pytest.param(
            FP16,
            None,
            {"fp16/config.json", "fp16/model.safetensors", "model.fp16.safetensors", "tokenizer/merges.txt"}
            | {"unet/diffusion_pytorch_model.safetensors"},
            id="fp16",
        ),
        pytest.param(OWN_CODE, SHARDS, {"model.gguf", "assets/logo.png"}, id="own code"),
        pytest.param(["config.json", *SHARDS, "model.fp16.safetensors"], None, {"model.fp16.safetensors"}, id="shards"),
        pytest.param(
            ["config.json", "consolidated.safetensors", "weights.safetensors", "adapter_model.safetensors"],
            None,
            {"consolidated.safetensors", "adapter_model.safetensors"},
            id="another name",
        ),
        pytest.param(["config.json", "pytorch_model.bin"], None, {"pytorch_model.bin"}, id="no safetensors"),
    ],
)
def test_what_is_downloaded_and_what_is_left(names: list[str], index_names: list[str] | None, left: set[str]) -> None:
    assert files_to_download(names, index_names) == sorted(set(names) - left)


SFT = [
    *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE"),
    *("training_args.bin", "optimizer.pt", "checkpoint-10/adapter_model.safetensors", "modeling_own.py"),
]
"""A repository of adapters, as Trainer uploads it."""


def test_what_is_downloaded_of_adapters() -> None:
    """Config, tensors, tokenizer and licence; no pickled file, no code."""
    left = {".gitattributes", "README.md", "adapter_model.bin", "training_args.bin", "optimizer.pt", SFT[-2], SFT[-1]}
    assert ADAPTERS.wanted(SFT, None) == sorted(set(SFT) - left)


def test_adapters_in_place_of_a_model_are_seen_by_their_config() -> None:
    """It names the base, for the error; of a repository with both, the model is wanted."""
    assert CONFIG.wanted(SFT, None) == ["adapter_config.json"]
    assert "adapter_config.json" in MODEL.wanted(SFT, None) and "adapter_model.safetensors" not in MODEL.wanted(
        SFT, None
    )
    both = ["config.json", "model.safetensors", *SFT[2:4]]
    assert (CONFIG.wanted(both, None), MODEL.wanted(both, None)) == (both[:1], both[:2])


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], []),
        (["adapter_config.json", "adapter_model.bin"], ["adapter_model.safetensors"]),
        (["config.json"], ["adapter_config.json", "adapter_model.safetensors"]),
    ],
)
def test_what_a_folder_of_adapters_lacks(present: list[str], missing: list[str], tmp_path: Path) -> None:
    write(tmp_path, *present)
    assert ADAPTERS.missing(tmp_path) == missing


def test_the_index_decides_which_weights() -> None:
    """A file that it names is wanted though no list has it, so that the download tells that it is missing."""
    assert files_to_download(["config.json", INDEX, "model.safetensors", SHARDS[0]], SHARDS) == [
        "config.json",
        *SHARDS,
        INDEX,
    ]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (["config.json", "model.safetensors"], []),
        (["model.safetensors"], ["config.json"]),
        (["config.json"], ["model.safetensors"]),
        (["config.json", "consolidated.safetensors"], ["model.safetensors"]),
        (["config.json", *SHARDS], []),
        (["config.json", SHARDS[0]], [SHARDS[1]]),
        (["config.json", "weights.safetensors"], []),
    ],
)
def test_what_a_model_folder_lacks(present: list[str], missing: list[str], tmp_path: Path) -> None:
    write(tmp_path, *present)
    assert MODEL.missing(tmp_path) == missing


def test_a_file_of_the_index_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "model.safetensors", "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}))
    assert MODEL.missing(tmp_path) == ["a.safetensors"]
    assert stored_weights(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=rf"{INDEX}: not an index of safetensors files"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("name", ["../model.safetensors", "a/b.safetensors", "/b", "..", "", "a\\b", "a\0b", 3, None])
def test_an_index_that_names_another_folder_is_refused(name: object, tmp_path: Path) -> None:
    """By what it names, on one line; nothing is read there."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": name}}))
    with pytest.raises(UserError) as error:
        stored_weights(tmp_path)
    named = f"names the file {name!r}; valid: names of files in the same folder"
    assert error.value.place == str(tmp_path / INDEX)
    assert "not an index" in str(error.value) or named in str(error.value)
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


def test_an_index_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{INDEX}: not an index of safetensors files"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "qwen.tiktoken"])
def test_a_vocabulary_makes_a_tokenizer(name: str, tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", "config.json")
    assert TOKENIZER.missing(tmp_path) == ["tokenizer.json"]
    write(tmp_path, name)
    assert TOKENIZER.missing(tmp_path) == []
