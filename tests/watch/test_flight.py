"""PyTorch's Flight Recorder is on, in words that the user may overrule."""

import tempfile
from pathlib import Path

import pytest
import torch

from dpo.watch.flight import Flight


@pytest.fixture
def flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flight:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Flight(Path("/dev/shm/dpo-slots-abc"))


def test_it_is_on_with_a_file_per_rank(flight: Flight, tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    flight.turn_on(environment)
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/dpo-flight-abc/rank-",
    }
    assert flight.found == ""
    Path(environment["TORCH_FR_DUMP_TEMP_FILE"] + "1").touch()
    assert flight.found == f"; the last collectives of this node's ranks are in {tmp_path}/dpo-flight-abc"
    flight.remove_if_empty()
    assert flight.folder.is_dir()
    (flight.folder / "rank-1").unlink()
    flight.remove_if_empty()
    assert not flight.folder.exists()


def test_a_later_run_of_the_process_has_a_folder_of_its_own(flight: Flight, tmp_path: Path) -> None:
    """The variables of the first are still set, and its folder is gone."""
    environment: dict[str, str] = {}
    flight.turn_on(environment)
    flight.remove_if_empty()
    later = Flight(Path("/dev/shm/dpo-slots-def"))
    later.turn_on(environment)
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/dpo-flight-def/rank-" and later.folder.is_dir()


@pytest.mark.parametrize("missing", ["this folder", "every temporary folder"])
def test_no_run_fails_for_want_of_a_temporary_folder(
    flight: Flight, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    if missing != "this folder":
        monkeypatch.setattr(tempfile, "gettempdir", none)
    flight.turn_on({})
    assert flight.found == ""
    flight.remove_if_empty()


@pytest.mark.parametrize("name", ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_what_the_user_has_set_stays(flight: Flight, name: str) -> None:
    """Under the older name too: torch would take ours before it."""
    environment = {name: "/mine", "TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}
    flight.turn_on(environment)
    assert environment == {name: "/mine", "TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert not flight.folder.exists()


def test_this_torch_knows_the_names() -> None:
    """They stand in its headers and libraries; a name that is no longer known would be ignored in silence."""
    folder = Path(torch.__file__).parent
    header = (folder / "include/torch/csrc/distributed/c10d/FlightRecorder.hpp").read_text()
    assert '{"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}' in header
    assert b"TORCH_FR_DUMP_TEMP_FILE" in (folder / "lib/libtorch_cpu.so").read_bytes()
