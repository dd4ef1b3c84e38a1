"""A hub's data set in the cache of `datasets`, which all programs of a user share: damage is told, all stays."""

import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.hub.snapshots import PREPARE
from dpo.sources.hub_sets import download, prepared_folder
from dpo.sources.kept import trust
from dpo.sources.source import open_source
from tests.support.hub import Hub, environment
from tests.surroundings import ROOT

pytest_plugins = ["tests.support.data_plugin"]
KEY = "data.train[0]"
TRAIN, TEST = SourceConfig("org/Pairs"), SourceConfig("org/Pairs", split="test")
ROWS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(20)]
OPEN = """
from dpo.config import SourceConfig
from dpo.sources.source import open_source
for split in ("train", "test"):
    rows = open_source(SourceConfig("org/Pairs", split=split), "data.train[0]").rows
rows.map(lambda row: {"length": len(row["prompt"])})  # the user's own program
"""


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `datasets` after a program that asked a hub for two splits, and a map of the user's."""
    root = tmp_path_factory.mktemp("hub")
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        datasets.Dataset.from_list(rows).to_json(str(root / "pairs" / f"{split}.jsonl"))
    hub = Hub()
    hub.add("datasets", "org/Pairs", root / "pairs")
    words, env = [sys.executable, "-c", OPEN], environment(hub, root)
    ended = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    hub.stop()
    assert ended.returncode == 0, ended.stderr
    return root / "hf" / "datasets"


@pytest.fixture
def folder(downloaded: Path, hf_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the rows in a copy of that cache, with files of other programs; every request fails."""
    shutil.copytree(downloaded, hf_cache / "datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: pytest.fail("the hub is asked"))
    found = prepared_folder(TRAIN)
    assert found and list(found.glob("cache-*.arrow"))
    (found / "tmp1234").write_bytes(b"of a map that runs")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fault(config: SourceConfig) -> str:
    with pytest.raises(UserError) as error:
        open_source(config, KEY)
    return str(error.value)


def flip(path: Path) -> None:
    """Changes a bit: of a prompt in a file of the rows, so that it can still be read."""
    content = bytearray(path.read_bytes())
    if b"p3p4" in content:
        path.write_bytes(content.replace(b"p3p4", b"p3p5"))
        return
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_nothing_is_written_or_removed_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the files of `datasets` and of the user there are none; a map that was interrupted is no damage."""
    before = contents(folder)
    flip(next(folder.glob("cache-*.arrow")))
    (folder / "tmp1234").unlink()
    assert len(open_source(TRAIN, KEY).rows) == 20 and len(open_source(TEST, KEY).rows) == 5
    assert capsys.readouterr().err == ""
    names = {"dataset_info.json", "pairs-train.arrow", "pairs-test.arrow", "tmp1234"}
    assert {name for name in before if not name.startswith("cache-")} == names
    assert before.keys() - {"tmp1234"} == contents(folder).keys()


@pytest.mark.parametrize("name", ["pairs-train.arrow", "dataset_info.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named_and_everything_stays(folder: Path, name: str, how: str) -> None:
    """Also of a rank that trusts the first of its node. The other split does not read the rows of this one."""
    file = folder / name
    if how == "gone":
        file.unlink()
    elif how == "flip":
        flip(file)
    else:
        file.write_bytes(file.read_bytes()[:-1])
    damaged = contents(folder)
    fact = f"{name} {'is missing' if how == 'gone' else 'has changed'}"
    what = f"{KEY}.path: org/Pairs: its rows in {folder} are damaged: {fact}"
    assert fault(TRAIN) == f"{what}; valid: that folder removed, then {PREPARE}"
    if name == "pairs-train.arrow":
        assert len(open_source(TEST, KEY).rows) == 5
    if (name, how) == ("pairs-train.arrow", "flip"):
        assert len(open_source(TRAIN, KEY, trust).rows) == 20
    assert contents(folder) == damaged


def test_the_remedy_helps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is downloaded then is what is right, though other bytes, as another version of `datasets` writes them."""
    flip(folder / "pairs-train.arrow")
    assert "pairs-train.arrow has changed" in fault(TRAIN)
    shutil.move(folder, folder.parent / "away")
    assert prepared_folder(TRAIN) is None

    def load_dataset(*words: object, **options: object) -> datasets.Dataset:
        shutil.copytree(folder.parent / "away", folder)
        return datasets.Dataset.from_file(str(folder / "pairs-train.arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    download(TRAIN, KEY)
    assert len(open_source(TRAIN, KEY).rows) == 20
    flip(folder / "pairs-train.arrow")
    assert "pairs-train.arrow has changed" in fault(TRAIN)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "another's"])
def test_damaged_digests_are_made_again(
    folder: Path, hf_cache: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows are not to blame: they are taken, which is told."""
    file, other = sorted(hf_cache.glob("datasets/dpo/hub-sums-*"))
    content = file.read_bytes()
    if how == "flip":
        flip(file)
    else:
        file.write_bytes({"cut": content[:-9], "empty": b"", "another's": other.read_bytes()}[how])
    for config in (TRAIN, TEST):
        open_source(config, KEY)
    assert f"cache: {file} is damaged and made again; the files of {folder} are taken" in capsys.readouterr().err
    assert file.read_bytes() == content


@pytest.mark.parametrize("note", [b"../../home", b"/", b"", b"\xff", b"a\0b", b"."])
def test_a_note_that_leaves_the_cache_names_no_folder(folder: Path, hf_cache: Path, note: bytes) -> None:
    """The rows are downloaded again; nothing is read or removed where it points."""
    home = hf_cache.parent / "home"
    home.mkdir()
    (home / "dataset_info.json").write_text("{}")
    (file,) = hf_cache.glob("datasets/dpo/hub-[!s]*")
    file.write_bytes(note)
    assert prepared_folder(TRAIN) is None
