"""Arrays on disk give what numpy gives, and nothing of them is mapped."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.base.arrays import open_array

DTYPES = {
    "numbers": np.arange(300, dtype=np.int32).reshape(100, 3),
    "keys": np.frombuffer(np.random.default_rng(0).bytes(16 * 100), "S16"),
    "rows": np.array([(i, 2**63 + i, -i / 3) for i in range(100)], [("high", "<u8"), ("low", "<u8"), ("logp", "<f8")]),
}


@pytest.fixture(scope="module", params=DTYPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(the array on disk, the array)."""
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    np.save(path, DTYPES[request.param])
    return open_array(path), DTYPES[request.param]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 110), st.integers(0, 110), st.lists(st.integers(0, 99), max_size=30), st.integers(0, 99))
def test_indexing_is_that_of_numpy(both, start: int, stop: int, numbers: list[int], number: int) -> None:
    found, array = both
    mask = np.isin(np.arange(100), numbers)
    for index in (slice(start, stop), slice(None), np.array(numbers, int), mask, number):
        assert found[index].tobytes() == array[index].tobytes()
        assert found[index].shape == array[index].shape
    assert np.asarray(found).tobytes() == array.tobytes() and len(found) == 100


@pytest.mark.parametrize("index", [100, -1, np.array([3, 100]), np.array([-1])])
def test_what_is_not_there_is_an_index_error(both, index) -> None:
    with pytest.raises(IndexError):
        both[0][index]


def test_an_empty_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.empty((0, 3), np.int64))
    array = open_array(tmp_path / "a.npy")
    assert np.asarray(array).shape == array[np.array([], int)].shape == array[0:5].shape == (0, 3)


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="are not an array of shape"):
        open_array(path)


@pytest.mark.parametrize("array", [np.array([[1], "two"], object), np.asfortranarray(np.arange(6).reshape(2, 3))])
def test_a_file_of_something_else_is_told(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "other.npy", array, allow_pickle=True)
    with pytest.raises(OSError, match=r"other\.npy: not an array of numbers in C order"):
        open_array(tmp_path / "other.npy")


def test_the_file_is_open_as_long_as_its_array(tmp_path: Path) -> None:
    """Also where its name is gone; then it is closed, without the ResourceWarning of a file that was forgotten."""
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10))
    array = open_array(path)
    path.unlink()
    assert array[9] == 9
    descriptor = array.file.descriptor
    assert _name_of(descriptor).startswith(str(path))
    del array
    assert not _name_of(descriptor).startswith(str(path))


def _name_of(descriptor: int) -> str:
    """The file that a descriptor of this process belongs to; empty where it is closed."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except FileNotFoundError:
        return ""


def test_nothing_is_mapped_and_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    np.save(path, np.arange(2**20))
    array, wrong = open_array(path), []

    def read(first: int) -> None:
        wrong.extend(i for i in range(first, 2**20, 4099) if array[i] != i)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert str(path) not in Path("/proc/self/maps").read_text()
