"""`python -m dpo.prepare` against a stand-in of the hub, and runs after it, as real processes that reach nothing."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo.base import space
from dpo.base.errors import RunError
from dpo.config import Config, SourceConfig, to_yaml
from dpo.hub import snapshots
from dpo.hub.files import MODEL
from dpo.hub.snapshots import PREPARE
from dpo.prepare import program as prepare
from dpo.prepare.program import Place, check_places, limited, next_line
from tests.support.data_fixtures import VOCAB_SIZE, make_tokenizer, write_jsonl
from tests.support.hub import Hub, connections, environment
from tests.support.models import FAMILIES, save_model
from tests.support.peft_folders import save_adapter
from tests.support.runs import changed, eval_lines, exit_code_of, make_config, train_lines, without_clock
from tests.surroundings import ROOT

ROWS = [{"prompt": f"p{i}", "chosen": f"a{i % 7}", "rejected": "b"} for i in range(20)]
SURPLUS = ("consolidated.safetensors", "pytorch_model.bin", "README.md", "fp16/model.safetensors")
"""Files of a model's repository that no run reads."""
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]
- config_name: few
  data_files: [{split: train, path: data/test-*}]
---
"""


@dataclass(frozen=True)
class Site:
    """A hub with repositories, the same as local folders, and the caches of a user."""

    hub: Hub
    root: Path
    home: Path

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with the environment of a user who knows this hub alone; forgets earlier requests."""
        self.hub.requests.clear()
        (self.home / "connections").unlink(missing_ok=True)
        env = environment(self.hub, self.home)
        return subprocess.run([sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)

    def program(self, name: str, config: Config) -> subprocess.CompletedProcess[str]:
        """Runs `python -m NAME --config FILE`."""
        file = self.root / "config.yaml"
        file.write_text(to_yaml(config))
        return self.python("-m", name, "--config", str(file))

    @property
    def reached(self) -> list[str]:
        """Every request of the last program, and every host beside loopback that it wanted to reach."""
        return self.hub.requests + connections(self.home)


def save(folder: Path, seed: int) -> Path:
    """A model of the vocabulary of `make_tokenizer`, in several files with an index, and what repositories have."""
    torch.manual_seed(seed)
    facts = FAMILIES["llama"] | {"vocab_size": VOCAB_SIZE}
    config = AutoConfig.for_model(**facts, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    for name in SURPLUS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def save_data(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in (("train", ROWS), ("test", ROWS[:5])):
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny/ and other/, two models; tok/, a tokenizer; tok-model/, a model of one file; pairs/, parquet files of two
    splits.
    """
    root = tmp_path_factory.mktemp("repositories")
    save(root / "tiny", 0)
    save(root / "other", 1)
    make_tokenizer().save_pretrained(root / "tok")
    shutil.copytree(root / "tok", root / "tiny", dirs_exist_ok=True)
    save_data(root / "pairs")
    make_tokenizer().save_pretrained(save_model(root / "tok-model", "llama"))
    return root


@pytest.fixture
def place(folders: Path, tmp_path: Path) -> Iterator[Site]:
    hub = Hub()
    for name in ("tiny", "other", "tok"):
        hub.add("models", f"org/{name}", folders / name)
    hub.add("datasets", "org/Pairs", folders / "pairs")
    yield Site(hub, tmp_path, tmp_path / "home")
    hub.stop()


def run_of(model: str, train: str, run_dir: Path, **changes: object) -> Config:
    facts = {"batch__pairs_per_step": 4, "train__steps": 3, "optim__lr": 1e-3, "optim__warmup_steps": 0}
    return make_config(model, train, run_dir, **(facts | changes))


WANTED = ["config.json", "generation_config.json", "model.safetensors.index.json"]
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_are_found_before_the_run(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given ones and fresh ones: the layers that they are for; a name that fits none is refused before data is read."""
    sft = save_adapter(tmp_path / "sft", folders / "tok-model", target_modules=["q_proj", "v_proj"])

    def prepared(**lora: object) -> tuple[int, str]:
        config = run_of(str(folders / "tok-model"), write_jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "run", **lora)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        code = exit_code_of(prepare.main, "dpo.prepare", "--config", str(tmp_path / "config.yaml"))
        found = capsys.readouterr()
        return code, found.out + found.err

    code, told = prepared(lora__path=str(sft))
    assert code == 0, told
    assert f"lora.path {sft}: in {sft}, rank 4, alpha 12, for q_proj, v_proj\n" in told
    assert "lora: rank 8, alpha 16, for down_proj\n" in prepared(lora__rank=8, lora__target_modules="down_proj")[1]
    code, told = prepared(lora__rank=8, lora__target_modules="c_attn")
    assert code == 2 and "lora.target_modules: 'c_attn' fits no" in told and "data: reading" not in told
    assert prepared(lora__path="./gone")[0] == 2


def test_adapters_of_the_hub_are_prepared(place: Site, folders: Path) -> None:
    """The newest revision; then the run finds it without the hub, and so does a second prepare."""
    sft = save_adapter(place.root / "sft", folders / "tok-model", target_modules=["q_proj"])
    place.hub.add("models", "org/sft", sft)
    train = write_jsonl(place.root / "a.jsonl", ROWS)
    config = run_of(str(folders / "tok-model"), train, place.root / "run", lora__path="org/sft")
    first = place.program("dpo.prepare", config)
    assert first.returncode == 0, first.stderr
    assert place.hub.fetched() == ["adapter_config.json", "adapter_model.safetensors"]
    (sft / "adapter_config.json").write_text((sft / "adapter_config.json").read_text().replace(": 12,", ": 20,"))
    revision = place.hub.add("models", "org/sft", sft)
    second = place.program("dpo.prepare", config)
    assert (
        f"lora.path org/sft: revision {revision[:12]}, " in second.stdout and "rank 4, alpha 20, for" in second.stdout
    )
    place.hub.closed = True
    alone = place.program("dpo.prepare", config)
    assert alone.returncode == 0 and "the revision in the cache is taken" in alone.stderr, alone.stderr
    run = place.program("dpo.train", config)
    assert run.returncode == 0 and place.reached == [], run.stderr


def test_adapters_that_the_hub_does_not_give(place: Site, folders: Path) -> None:
    """What is missing is named, not the config of a model."""
    place.hub.closed = True
    train = write_jsonl(place.root / "a.jsonl", ROWS)
    ended = place.program("dpo.prepare", run_of(str(folders / "tok-model"), train, place.root, lora__path="org/sft"))
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2 and "lora.path: org/sft: the cache" in line and "lacks adapter_config.json" in line


# --- the run after it ------------------------------------------------------------------------------------------------


def test_a_prepared_run_needs_no_network(place: Site, folders: Path) -> None:
    """Policy, reference, tokenizer and data of the hub; then every request is an error, and so is every connection. The
    run is the run from local folders, to the last bit.
    """
    eval_set = [SourceConfig("org/Pairs", split="test")]
    more = {"model__tokenizer": "org/tok", "reference__path": "org/other", "data__eval": eval_set}
    config = run_of("org/tiny", "org/Pairs", place.root / "run", **more)
    prepared = place.program("dpo.prepare", config)
    assert prepared.returncode == 0, prepared.stderr
    assert len(shards(folders / "tiny")) > 1
    parquets = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train")]
    other = WANTED + shards(folders / "other")
    assert place.hub.fetched() == sorted(
        [*WANTED, *shards(folders / "tiny"), *TOKENIZER, *other, *TOKENIZER, *parquets, "README.md"]
    )
    place.hub.closed = True
    run = place.program("dpo.train", config)
    assert run.returncode == 0, run.stderr
    assert place.reached == []
    assert "20 pairs to train on, 5 to evaluate" in prepared.stdout and "the run: 3 steps of 4 pairs" in prepared.stdout

    policy, reference = (shutil.copytree(folders / name, place.root / name) for name in ("tiny", "other"))
    for folder in (policy, reference):
        (folder / "consolidated.safetensors").unlink()  # these bytes are not even safetensors
    train, evals = (str(folders / "pairs" / name) for name in reversed(parquets))
    names = {"model__tokenizer": folders / "tok", "reference__path": reference}
    local = {name: str(path) for name, path in names.items()} | {"data__eval": [SourceConfig(evals)]}
    local |= {"reference__cache_dir": str(place.root / "own cache")}
    run = place.program("dpo.train", run_of(str(policy), train, place.root / "local", **local))
    assert run.returncode == 0, run.stderr
    assert place.reached == [], "parquet files are loaded without telling anyone, and so are models and tokenizers"
    for lines in (train_lines, eval_lines):
        mine, theirs = (without_clock(lines(place.root / name)) for name in ("run", "local"))
        assert mine == theirs and mine


def test_a_second_prepare_asks_and_fetches_nothing(place: Site, folders: Path) -> None:
    config = run_of("org/tiny", "org/Pairs", place.root / "run")
    assert place.program("dpo.prepare", config).returncode == 0
    again = place.program("dpo.prepare", config)
    asked = [request for request in place.hub.requests if "agent-harnesses" not in request]
    assert asked == ["GET /api/models/org/tiny", "GET /api/datasets/org/Pairs"]
    revision = place.hub.repositories["models", "org/tiny"][0]
    assert f"model.path org/tiny: revision {revision[:12]}, in the cache already, in " in again.stdout

    place.hub.closed = True
    alone = place.program("dpo.prepare", config)
    assert alone.returncode == 0, "a job on a node without internet takes what is here"
    assert alone.stderr.count("the revision in the cache is taken") == 2

    estimate = place.python(
        *("-m", "dpo.estimate", "--config", str(place.root / "config.yaml"), "--device", "cpu", "--ranks", "1")
    )
    assert place.reached == []
    assert "read from the data" in " ".join(estimate.stdout.split()), estimate.stdout + estimate.stderr


def test_a_missing_file_is_named_and_fetched_alone(place: Site, folders: Path) -> None:
    config = run_of("org/tiny", "org/Pairs", place.root / "run")
    assert place.program("dpo.prepare", config).returncode == 0
    (shard,) = place.home.rglob(f"snapshots/*/{shards(folders / 'tiny')[1]}")
    shard.resolve().unlink()
    shard.unlink()
    place.hub.closed = True
    run = place.program("dpo.train", config)
    assert run.returncode == 2
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert f"model.path: org/tiny: the cache {place.home}/hf/hub lacks {shard.name}, and the hub does not" in error
    assert error.endswith(f"valid: {PREPARE}")
    place.hub.closed = False
    found = place.python("-c", FIND, "org/tiny")
    assert place.hub.fetched() == [shard.name] and found.stdout.strip() == str(shard.parent)


FIND = """
import sys
from dpo.hub.files import MODEL
from dpo.hub.snapshots import find_snapshot
print(find_snapshot(sys.argv[1], MODEL))
"""


def test_a_run_keeps_its_revision_and_prepare_takes_the_newest(place: Site, folders: Path) -> None:
    config = run_of("org/tiny", "org/Pairs", place.root / "run")
    before = place.python("-c", FIND, "org/tiny").stdout.strip()
    changed_folder = shutil.copytree(folders / "tiny", place.root / "changed")
    (changed_folder / "generation_config.json").write_text('{"max_length": 7}')
    revision = place.hub.add("models", "org/tiny", changed_folder)
    assert place.python("-c", FIND, "org/tiny").stdout.strip() == before
    assert place.reached == []
    assert place.program("dpo.prepare", config).returncode == 0
    assert [name for name in place.hub.fetched() if "data/" not in name] == ["README.md", "generation_config.json"]
    assert place.python("-c", FIND, "org/tiny").stdout.strip() == str(Path(before).with_name(revision))


def test_a_wrong_path_of_data_is_told_before_the_model_is_downloaded(place: Site) -> None:
    ended = place.program("dpo.prepare", run_of("org/tiny", "pairs.jsonl", place.root / "run"))
    assert ended.returncode == 2 and "data.train[0].path: no such file or folder: pairs.jsonl; valid: " in ended.stderr
    assert place.reached == []


# --- data ------------------------------------------------------------------------------------------------------------

OPEN = """
import json, sys
from dpo.config import SourceConfig
from dpo.sources.hub_sets import is_here
from dpo.sources.source import open_source
config = SourceConfig("org/Pairs", name=sys.argv[1] or None, split=sys.argv[2])
here = is_here(config)
source = open_source(config, "data.train[0]")
print(json.dumps([here, source.content, len(source.rows), source.first_row()]))
"""


def test_a_data_set_is_the_same_online_and_from_the_cache(place: Site) -> None:
    """Its content has the same hash, else all rows would be tokenized again; also beside another config of it, of which
    the cache of `datasets` alone does not tell which is meant.
    """
    first = json.loads(place.python("-c", OPEN, "", "train").stdout)
    assert first[0] is False and first[2:] == [20, ROWS[0]]
    few = json.loads(place.python("-c", OPEN, "few", "train").stdout)
    assert few[2] == 5
    place.hub.closed = True
    assert json.loads(place.python("-c", OPEN, "", "train").stdout) == [True, *first[1:]]
    assert place.reached == []
    part = json.loads(place.python("-c", OPEN, "", "train[5:9]").stdout)
    assert part[2:] == [4, ROWS[5]] and part[1] != first[1]
    assert json.loads(place.python("-c", OPEN, "few", "train").stdout) == [True, *few[1:]]
    wrong = place.python("-c", OPEN, "", "absent")
    assert 'UserError: data.train[0].path: org/Pairs: cannot be loaded: Unknown split "absent"' in wrong.stderr
    assert place.reached == []


# --- a model's own code ----------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
BUILD = """
import sys, torch
from dpo.model.build import build_on_meta
from dpo.model.download import read_named_config
print(type(build_on_meta(read_named_config(sys.argv[1], "model.path", True), torch.float32, True)).__name__)
"""


def test_code_of_the_model_and_of_another_repository(place: Site, folders: Path) -> None:
    """`auto_map` names classes of the model's own repository, or of another: both are there when the hub is not."""
    for name, owner in (("own", ""), ("borrows", "org/own--")):
        folder = shutil.copytree(folders / "tiny", place.root / name)
        facts = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        facts |= {"model_type": "own", "auto_map": {auto: f"{owner}{name}" for auto, name in classes.items()}}
        (folder / "config.json").write_text(json.dumps(facts))
        if not owner:
            (folder / "configuration_own.py").write_text(CONFIGURATION)
            (folder / "modeling_own.py").write_text(MODELING)
        place.hub.add("models", f"org/{name}", folder)
    config = run_of("org/borrows", "org/Pairs", place.root / "run", model__trust_remote_code=True)
    prepared = place.program("dpo.prepare", config)
    assert prepared.returncode == 0, prepared.stderr
    place.hub.closed = True
    for name in ("org/borrows", "org/own"):
        if name == "org/own":  # its weights were not needed
            place.hub.closed = False
            place.python("-c", FIND, name)
            place.hub.closed = True
        built = place.python("-c", BUILD, name)
        assert built.stdout.strip() == "OwnForCausalLM", built.stderr
        assert place.reached == []


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "path", "error"),
    [
        ("model__path", "org/absent", "model.path: org/absent is no folder here and the hub did not give it (404"),
        ("model__path", "absent", "model.path: no such folder: absent; valid: a Hugging Face model folder or hub id"),
        ("model__path", "org/tok", "model.path: org/tok has no config.json; valid: a Hugging Face model folder or hub"),
        ("reference__path", "org/gone", "reference.path: org/gone is no folder here and the hub did not give it (404"),
        ("model__tokenizer", "org/other", "model.tokenizer: org/other: cannot be loaded: it holds none"),
        (
            "data__train",
            [SourceConfig("org/absent")],
            "data.train[0].path: org/absent is no folder here and the hub did",
        ),
    ],
)
def test_wrong_input_is_one_line(key: str, path: object, error: str, place: Site, folders: Path) -> None:
    config = changed(run_of(str(folders / "tiny"), "org/Pairs", place.root / "run"), **{key: path})
    ended = place.program("dpo.prepare", config)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ended.returncode == 2 and f"{place.root}/config.yaml: {error}" in line


def test_weights_that_were_cut_off_are_told(place: Site, folders: Path) -> None:
    """As by a copy that was interrupted; a run would end there after it has waited for its GPUs."""
    folder = shutil.copytree(folders / "tiny", place.root / "cut")
    shard = min(folder.glob("model*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    ended = place.program("dpo.prepare", run_of(str(folder), "org/Pairs", place.root / "run"))
    assert ended.returncode == 2
    assert f"error: {shard}: not a readable safetensors file" in ended.stderr


FULL = """
import errno, shutil, sys
from dpo.base import space

def reserve(folder, num_bytes):
    raise OSError(errno.EDQUOT, "Disk quota exceeded")

space._reserve = reserve
shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12)
from dpo.hub.files import MODEL
from dpo.hub.snapshots import download
download(sys.argv[1], MODEL)
"""


def test_a_download_without_room_does_not_begin(place: Site, folders: Path) -> None:
    """A quota is used up on a file system with free space."""
    ended = place.python("-c", FULL, "org/tiny")
    needed = sum((folders / "tiny" / name).stat().st_size for name in (*shards(folders / "tiny"), *TOKENIZER, *WANTED))
    index = (folders / "tiny" / WANTED[2]).stat().st_size  # which has been read by then
    shown = f"the download of org/tiny needs {(needed - index) / 2**10:.1f} KiB; 931.3 GiB are free there, but a quota"
    assert f"RunError: {place.home}/hf/hub: {shown}" in ended.stderr
    assert place.hub.fetched() == [WANTED[2]]


Usage = namedtuple("Usage", "total used free")


def test_a_run_without_room_is_refused_with_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two folders of one file system share its free space: 600 + 500 > 1,000."""

    def reserve(folder: Path, num_bytes: int) -> None:
        if num_bytes > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(space, "_reserve", reserve)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2000, 1000, 1000))
    run = Place("run folder", tmp_path / "a" / "run", "", 600, "a smaller checkpoint.keep")
    cache = Place("reference cache", tmp_path / "b", "", 400, "DPO_CACHE elsewhere")
    models = Place("models", tmp_path, "", 0, "")
    check_places([models, run, cache])
    with pytest.raises(RunError) as failure:
        check_places([models, run, replace(cache, needed=500)])
    assert str(failure.value) == (
        f"{tmp_path}/a/run: run folder and reference cache need 1.1 KiB; 1.0 KiB are free there; "
        "what helps: a smaller checkpoint.keep"
    )
    with pytest.raises(RunError, match=r"run: run folder needs 1\.1 KiB; 1\.0 KiB are free there"):
        check_places([replace(run, needed=1100)])


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_proc", "threads", "expected"),
    [(None, None, None), (None, "3", 3), (2, "3", 2), (None, "", None), (None, "0", None), (None, "x", None)],
)
def test_processes_on_a_login_node(
    num_proc: int | None, threads: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    config = changed(run_of("m", "d", Path("run")), data__num_proc=num_proc)
    assert limited(config).data.num_proc == expected


def test_the_last_line_is_the_command_that_comes_next() -> None:
    line = next_line(["--config", "my run.yaml", "--quiet", "--loss.beta=0.5"])
    words = "--config 'my run.yaml' --loss.beta=0.5"
    assert line == (f"next: dpo train {words} --gpus 8, or dpo submit {words} --nodes N --gpus-per-node 8 --time TIME")


def test_the_guard_refuses_connections(place: Site) -> None:
    """What the other tests rest on: an address elsewhere, and a name, are refused in a program and told."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], 80), 1)"
    for host in ("192.0.2.1", "huggingface.co"):
        ended = place.python("-c", code, host)
        assert f"OSError: the guard refuses a connection to {host}" in ended.stderr and ended.returncode == 1
        assert place.reached == [host]


def test_offline_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="inside"), snapshots.offline():
        assert snapshots.constants.is_offline_mode()
        raise ValueError("inside")
    assert not snapshots.constants.is_offline_mode()


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client has no limit of its own: the first request carries ours, and its end is an error of the user."""
    asked = []

    class Silent:
        def model_info(self, repository: str, revision: str | None, timeout: float) -> None:
            asked.append((repository, revision, timeout))
            raise TimeoutError("timed out")

    monkeypatch.setattr(snapshots, "HfApi", Silent)
    with pytest.raises(snapshots.HubUnreachable) as failure:
        snapshots.find_snapshot("org/silent", MODEL)
    assert asked == [("org/silent", None, 20.0)]
    assert "org/silent: the cache" in failure.value.what and "lacks config.json, and the hub does" in failure.value.what
    assert failure.value.valid == PREPARE
