"""What lies in an exported model beside its weights: the form of the model from which the run started."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo.checkpoint.companions import write_companions
from dpo.config import Config
from dpo.model.model_config import read_model_config
from tests.support.data_fixtures import make_tokenizer
from tests.support.models import plain_model, save_model
from tests.support.runs import changed, make_config


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """Changes keys of a JSON file; returns its content."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
    return dict(content)


def companions(folder: Path, dtype: torch.dtype = torch.float32, config: Config | None = None) -> Path:
    """The folder of an exported model without its weights."""
    code = (config or make_config(folder, "", "")).model.trust_remote_code
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_model_config(folder, code), trust_remote_code=code)
    assert isinstance(model, PreTrainedModel)
    draft = folder.with_name("draft")
    draft.mkdir()
    write_companions(draft, folder, config or make_config(folder, "", ""), model, dtype)
    return draft


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


# --- config.json -----------------------------------------------------------------------------------------------------

OLD_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_FORMS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0,
        "rope_scaling": OLD_ROPE | {"original_max_position_embeddings": 8192},
        "torch_dtype": "bfloat16",
        "_name_or_path": "org/base",
    },
    "qwen3": {"rope_theta": 1e6, "rope_scaling": None, "use_sliding_window": False, "torch_dtype": "float32"},
    "mistral": {"rope_theta": 1e6, "transformers_version": "4.34.0.dev0"},
    "gpt-neox": {"rotary_emb_base": 50000, "rotary_pct": 0.5, "torch_dtype": "float16"},
    "gpt2": {"n_ctx": 256, "task_specific_params": {"text-generation": {"do_sample": True}}, "torch_dtype": "float32"},
}
"""Keys of config.json by family, as transformers 4 wrote them."""


@pytest.mark.parametrize("family", OLD_FORMS)
def test_keys_of_the_start_stay_with_their_values(family: str, tmp_path: Path) -> None:
    """All but the dtype, and a reader of the new form gets the same config."""
    start = save_model(tmp_path / "start", family)
    before = read(start / "config.json")
    for key in ("rope_parameters", "dtype"):  # not known to transformers 4
        before.pop(key, None)
    before |= OLD_FORMS[family]
    (start / "config.json").write_text(json.dumps(before))
    draft = companions(start, torch.bfloat16)
    after = read(draft / "config.json")
    dtype = "torch_dtype" if "torch_dtype" in before else "dtype"
    assert after == before | {dtype: "bfloat16"}
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (start, draft)]
    assert [facts.pop("dtype") for facts in configs][1] in ("bfloat16", torch.bfloat16)
    assert {**configs[0], "_name_or_path": ""} == {**configs[1], "_name_or_path": ""}


@pytest.mark.parametrize("named", [["LlamaModel"], ["LlamaForSequenceClassification"], ["LLaMAForCausalLM"], None])
def test_the_class_is_that_of_the_model_that_was_trained(named: list[str] | None, tmp_path: Path) -> None:
    """A program that chooses the class by `architectures` must find the head."""
    start = save_model(tmp_path / "start", "llama")
    edit(start / "config.json", architectures=named)
    assert read(companions(start) / "config.json")["architectures"] == ["LlamaForCausalLM"]


def test_the_start_of_a_body_alone(tmp_path: Path) -> None:
    """Its own config.json, as `AutoModel` writes it: final/ has the whole model."""
    plain_model(save_model(tmp_path / "whole", "llama-tied")).base_model.save_pretrained(tmp_path / "start")
    assert read(tmp_path / "start" / "config.json")["architectures"] == ["LlamaModel"]
    draft = companions(tmp_path / "start")
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(draft))).__name__ == "LlamaModel"
    assert read(draft / "config.json")["architectures"] == ["LlamaForCausalLM"]


# --- the tokenizer and other files -----------------------------------------------------------------------------------

COPIED = {
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": "{{ 'x' }}"},
    "special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<extra>": 99},
    "generation_config.json": {"temperature": 0.9, "do_sample": False, "transformers_version": "4.31.0"},
    "vocab.json": {"a": 0},
    "chat_template.json": {"chat_template": "{{ 'x' }}"},
}
TEXTS = ["tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "handler.py"]
OTHERS = ["README.md", "training_args.bin", "optimizer.pt", "pytorch_model.bin", "trainer_state.json", ".gitattributes"]


def test_files_of_the_start_are_copied_as_they_are(tmp_path: Path) -> None:
    """But for the base's own story, its training state and its weights."""
    start = save_model(tmp_path / "start", "llama")
    for name, content in COPIED.items():
        (start / name).write_text(json.dumps(content))
    for name in (*TEXTS, *OTHERS):
        (start / name).write_text(f"of {name}")
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    draft = companions(start)
    found = {path.relative_to(draft).as_posix(): path.read_bytes() for path in draft.rglob("*") if path.is_file()}
    wanted = ["config.json", *COPIED, *TEXTS, "additional_chat_templates/tools.jinja"]
    assert sorted(found) == sorted(wanted)
    assert all(found[name] == (start / name).read_bytes() for name in wanted if name != "config.json")


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
def test_the_class_of_the_tokenizer_is_that_of_the_start(named: str | None, tmp_path: Path) -> None:
    start = save_model(tmp_path / "start", "llama")
    make_tokenizer(bos=True).save_pretrained(start)
    settings = {"eos_token": "</s>", "bos_token": "<s>"} | ({"tokenizer_class": named} if named else {})
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    draft = companions(start)
    assert read(draft / "tokenizer_config.json") == settings
    ids = [AutoTokenizer.from_pretrained(folder)("some text QZ").input_ids for folder in (start, draft)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", None])
def test_a_tokenizer_of_another_folder_gives_the_same_ids(family: str | None, tmp_path: Path) -> None:
    """Without a class of its own, transformers takes that of the config.json beside it, which is another there."""
    start, other = save_model(tmp_path / "start", "llama"), tmp_path / "tokenizer"
    make_tokenizer(bos=True).save_pretrained(start)
    if family:
        save_model(other, family)
    make_tokenizer(bos=False, chat_template="{{ 'other' }}").save_pretrained(other)
    (other / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    draft = companions(start, config=changed(make_config(start, "", ""), model__tokenizer=str(other)))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (other, draft))
    assert after("some text QZ").input_ids == before("some text QZ").input_ids
    assert after.eos_token_id == before.eos_token_id and after.chat_template == "{{ 'other' }}"
    assert read(draft / "tokenizer_config.json")["tokenizer_class"] != "TokenizersBackend"


def test_a_snapshot_of_links_becomes_files(tmp_path: Path) -> None:
    """As the hub's cache holds them: links into a folder of blobs, which may be cleaned up."""
    blobs, start = save_model(tmp_path / "blobs", "llama"), tmp_path / "start"
    make_tokenizer().save_pretrained(blobs)
    start.mkdir()
    for path in blobs.iterdir():
        (start / path.name).symlink_to(path)
    draft = companions(start)
    assert not any(path.is_symlink() for path in draft.iterdir())
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in draft.iterdir()}


# --- a model's own code ----------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_of_test"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import HALF

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    half = HALF
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def own(self):
        return "own"
"""
CODE = {"configuration_own.py": CONFIGURATION, "modeling_own.py": MODELING, "helper_own.py": "HALF = 0.5\n"}
CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a tokenizer whose classes are in the folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    start = save_model(tmp_path / "start", "llama")
    make_tokenizer().save_pretrained(start)
    edit(start / "config.json", model_type="own_of_test", architectures=["OwnForCausalLM"], auto_map=CLASSES)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit(start / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    for name, text in (CODE | {"tokenization_own.py": TOKENIZATION}).items():
        (start / name).write_text(text)
    return start


def own_config(start: Path, **changes: Any) -> Config:
    return changed(make_config(start, "", ""), model__trust_remote_code=True, **changes)


def test_own_code_goes_with_the_model_and_loads(own: Path) -> None:
    """With the modules that it imports; the tokenizer's too."""
    draft = companions(own, config=own_config(own))
    assert read(draft / "config.json")["auto_map"] == CLASSES
    config = AutoConfig.from_pretrained(draft, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and model.half == 0.5
    assert AutoTokenizer.from_pretrained(draft, trust_remote_code=True).own() == "own"


def test_own_code_below_the_folder_goes_along(own: Path) -> None:
    """But not that of other models there, nor of hidden folders."""
    for place in ("ops", "ops/cuda", ".venv", "older"):
        (own / place).mkdir()
        (own / place / "kernel.py").write_text("X = 1")
    (own / "older" / "config.json").write_text("{}")
    draft = companions(own, config=own_config(own))
    found = sorted(path.relative_to(draft).as_posix() for path in draft.glob("*/**/*.py"))
    assert found == ["ops/cuda/kernel.py", "ops/kernel.py"]


def test_names_of_classes_with_own_code_stay(own: Path) -> None:
    """Other programs know such models by that name."""
    edit(own / "config.json", architectures=["OwnModel"])
    assert read(companions(own, config=own_config(own)) / "config.json")["architectures"] == ["OwnModel"]


def test_code_of_another_repository_stays_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = save_model(tmp_path / "start", "llama")
    auto_map = {"AutoModelForCausalLM": "org/code--modeling_x.X"}
    edit(start / "config.json", auto_map=auto_map)
    draft = companions(start)
    assert read(draft / "config.json")["auto_map"] == auto_map
    assert "the exported model reads its code from org/code, as" in capsys.readouterr().err


def test_code_of_a_tokenizer_in_another_folder(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code of the same name and another content cannot lie in one folder: the model's stays, and that is told."""
    other = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(other)
    edit(other / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_new.NewTokenizer"]})
    (other / "tokenization_new.py").write_text(TOKENIZATION.replace("OwnTokenizer", "NewTokenizer"))
    (other / "helper_own.py").write_text("HALF = 0.25\n")
    draft = companions(own, config=own_config(own, model__tokenizer=str(other)))
    assert type(AutoTokenizer.from_pretrained(draft, trust_remote_code=True)).__name__ == "NewTokenizer"
    assert (draft / "helper_own.py").read_text() == "HALF = 0.5\n"
    assert f"its own helper_own.py, not that of the tokenizer in {other}" in capsys.readouterr().err
