"""A model's path that is a folder or a repository of adapters, and adapters that come from the hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from dpo.base.errors import UserError
from dpo.model.download import checked_model, read_named_config
from tests.support.hub import Hub, connections, environment
from tests.surroundings import ROOT

MERGE = "a whole model; `dpo export --merge` writes one from the checkpoint of a run with adapters"


def save(folder: Path, base: str | None = "org/base") -> Path:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("A card.")
    return folder


@pytest.mark.parametrize(
    ("key", "base", "valid"),
    [
        ("model.path", "org/base", "model.path org/base and lora.path org/sft"),
        ("model.path", None, "model.path BASE and lora.path org/sft"),
        ("reference.path", "org/base", MERGE),
        ("command line: --model", "org/base", MERGE),
    ],
)
def test_adapters_are_no_model(key: str, base: str | None, valid: str, tmp_path: Path) -> None:
    """Of the hub, as of a folder that no config names as model.path."""
    with pytest.raises(UserError) as caught:
        checked_model(save(tmp_path / "sft", base), "org/sft", key)
    assert str(caught.value) == f"{key}: org/sft holds adapters, not a model; valid: {valid}"


def test_the_config_of_a_cached_repository_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `dpo inspect` and `dpo estimate` read it, without weights."""
    with pytest.raises(UserError) as caught:
        read_named_config(str(save(tmp_path / "sft")), "reference.path", False)
    assert caught.value.valid == MERGE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"^model\.path: org/sft: the cache .* lacks config\.json, and the hub does not"
    ):
        read_named_config("org/sft", "model.path", False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    hub.add("models", "org/sft", save(tmp_path / "sft"))
    yield hub
    hub.stop()


def run(hub: Hub, home: Path, code: str) -> str:
    """What a program prints that knows this hub alone."""
    start = (
        "from dpo.config import load_config; from dpo.base.errors import UserError;"
        "load = lambda *words: load_config(['data.train=[{path: a}]', *words], 'dpo.train');"
    )
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert connections(home) == []
    return done.stdout


def test_adapters_of_the_hub_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    """Config, tensors and tokenizer alone; a second program makes no request, even where the hub is down."""
    code = (
        "from dpo.adapters.choice import find_adapters;"
        "spec = find_adapters(load('model.path=org/base', 'lora.path=org/sft')); print(spec.rank, spec.folder)"
    )
    first = run(hub, tmp_path / "home", code)
    assert first.startswith("4 ") and str(tmp_path / "home") in first
    assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    hub.closed = True
    hub.requests.clear()
    assert run(hub, tmp_path / "home", code) == first and hub.requests == []


def test_a_repository_of_adapters_as_the_model(hub: Hub, tmp_path: Path) -> None:
    """The base is known from its config, without its tensors."""
    code = (
        "from dpo.model.download import find_model_config\n"
        "try: find_model_config(load('model.path=org/sft'))\n"
        "except UserError as failure: print(failure)"
    )
    line = "model.path: org/sft holds adapters, not a model; valid: model.path org/base and lora.path org/sft\n"
    assert run(hub, tmp_path / "home", f"\n{code}") == line
    assert hub.fetched() == ["adapter_config.json"]


def test_a_repository_of_adapters_is_named_with_its_base(hub: Hub, tmp_path: Path) -> None:
    """As --model of scoring and sampling: by its config alone, which is in the cache from then on."""
    code = "\nfrom dpo.adapters.base import name_model\nprint(repr(name_model('org/sft', 'command line: --model')))"
    named = "NamedModel(base='org/base', adapters='org/sft')\n"
    assert run(hub, tmp_path / "home", code) == named
    assert hub.fetched() == ["adapter_config.json"]
    hub.closed = True
    hub.requests.clear()
    assert run(hub, tmp_path / "home", code) == named and hub.requests == []


def test_a_repository_in_the_cache_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    hub.add("models", "org/whole", tmp_path / "whole")
    code = "\nfrom dpo.adapters.base import name_model\nprint(repr(name_model('org/whole', '--model')))"
    for closed in (False, True):
        hub.closed = closed
        hub.requests.clear()
        assert run(hub, tmp_path / "home", code) == "NamedModel(base='org/whole', adapters=None)\n"
    assert hub.requests == []


def test_a_repository_that_the_hub_does_not_give(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from dpo.adapters.base import name_model\n"
        "try: name_model('org/none', 'command line: --model')\n"
        "except UserError as failure: print(failure)"
    )
    line = run(hub, tmp_path / "home", f"\n{code}")
    assert line.startswith("command line: --model: org/none is no folder here and the hub did not give it (")
