"""Where the slots of a node are, and what is left of runs that were killed."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from dpo.watch import folders
from dpo.watch.folders import make_folder, remove_leftovers
from dpo.watch.slots import Slot, look


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """/dev/shm and the temporary folder."""
    memory, temporary = tmp_path / "shm", tmp_path / "tmp"
    memory.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(folders, "MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return memory, temporary


def fill(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has these places take no more bytes."""
    real = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        if any(place in self.parents for place in places):
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_place_without_room_is_passed_over(
    full: int, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left there."""
    fill(list(places[:full]), monkeypatch)
    folder = make_folder(4)
    assert (folder and folder.parent) == [*places, None][full]
    assert [path for place in places for path in place.iterdir()] == ([folder] if folder else [])
    assert folder is None or not list(folder.iterdir())


def test_no_memory_file_system_at_all(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MEMORY", places[0] / "none")
    folder = make_folder(1)
    assert folder is not None and folder.parent == places[1]


def age(folder: Path, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(folder, (at, at))


def end_process(folder: Path) -> None:
    """Has the rank be one whose process started at another time."""
    file, started = folder / "rank-0", look(folder)[0].started
    file.write_bytes(file.read_bytes().replace(f'"{started}"'.encode(), f'"{"9" * len(started)}"'.encode()))


def test_only_what_no_run_uses_any_more_is_removed(places: tuple[Path, Path]) -> None:
    made = {name: make_folder(1) for name in ("dead", "alive", "just dead", "starting", "abandoned", "foreign")}
    paths = {name: folder for name, folder in made.items() if folder}
    for name in ("dead", "alive", "just dead"):
        Slot(paths[name], {"rank": 0, "host": "n1", "error_file": ""}, 20.0)
    end_process(paths["dead"])
    end_process(paths["just dead"])
    (paths["foreign"] / "rank-0").write_text("{")
    flight = places[1] / paths["dead"].name.replace("slots", "flight")
    flight.mkdir()
    for name in ("dead", "alive", "abandoned", "foreign"):
        age(paths[name], 3700)
    remove_leftovers()
    assert [name for name in paths if paths[name].exists()] == ["alive", "just dead", "starting", "foreign"]
    assert not flight.exists()


def test_the_newest_dumps_are_kept(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of eight runs that a timeout ended, the oldest is three days old, one is of the last hour. The folder
    of a run that goes on is empty, however old it is.
    """
    for number in range(8):
        folder = places[1] / f"dpo-flight-{number}"
        folder.mkdir()
        (folder / "rank-0").write_text("collectives")
        age(folder, 3 * 86_400 - number * 36_000 if number < 7 else 60)
    running = places[1] / "dpo-flight-running"
    running.mkdir()
    age(running, 10 * 86_400)
    remove_leftovers()
    assert sorted(path.name for path in places[1].iterdir()) == [
        *(f"dpo-flight-{number}" for number in range(2, 8)),
        "dpo-flight-running",
    ]
    assert capsys.readouterr().err.count("the newest 5 of this node are kept") == 2
