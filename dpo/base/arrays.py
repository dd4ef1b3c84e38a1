"""Arrays in .npy files of which only what is asked for is read, and no page is mapped into the process: its memory does
not grow with them, however much of them it has seen."""

import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

READ_WHOLE = 16  # numbers of more than so small a share of the rows are found in the whole array


@dataclass(frozen=True, eq=False)
class HeldFile:
    """A file that several threads read at places of their own, open for as long as something refers to this object."""

    name: str
    descriptor: int

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.descriptor).st_size


def hold_file(path: str | Path) -> HeldFile:
    """Opens a file, which is closed with the last reference to the result."""
    held = HeldFile(str(path), os.open(path, os.O_RDONLY))
    # Not at the exit of the program, where threads may still read: the system closes it then.
    weakref.finalize(held, os.close, held.descriptor).atexit = False
    return held


@dataclass(frozen=True, eq=False)
class DiskArray:
    """An array in an open file. Indexing reads: `array[a:b]` at once, `array[numbers]` row by row, `array[mask]`;
    `np.asarray(array)` reads all. The file may be removed meanwhile, and several threads may read.
    """

    file: HeldFile
    offset: int
    """Bytes before the first row."""
    dtype: np.dtype
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.rows(0, len(self)).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self.rows(start, max(stop, start))
        index = np.asarray(index)
        if index.ndim == 0:
            row: np.ndarray = self.rows(int(index), int(index) + 1)[0]
            return row
        if len(index) * READ_WHOLE > len(self):  # so it is with every mask
            chosen: np.ndarray = np.asarray(self)[index]
            return chosen
        rows = np.empty((len(index), *self.shape[1:]), self.dtype)
        for place, number in enumerate(index.tolist()):
            rows[place] = self.rows(number, number + 1)[0]
        return rows

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) in one read."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.file.name}: rows [{start}, {stop}) of {len(self)}")
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        read_into(self.file, rows, self.offset + start * self.dtype.itemsize * math.prod(self.shape[1:]))
        return rows


def open_array(path: Path) -> DiskArray:
    """The array that `np.save` wrote. Raises OSError or ValueError where the file is cut off."""
    file = hold_file(path)
    with os.fdopen(file.descriptor, "rb", closefd=False) as start:
        np.lib.format.read_magic(start)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(start)
        offset = start.tell()
    assert not is_fortran
    if file.size != offset + dtype.itemsize * math.prod(shape):
        raise OSError(f"{path}: {file.size} bytes are not an array of shape {shape}")
    return DiskArray(file, offset, dtype, shape)


def read_into(file: HeldFile, array: np.ndarray, position: int) -> None:
    """Fills a contiguous array from where it stands in a file, in bytes. Raises OSError where the file ends early."""
    left = array.reshape(-1).view(np.uint8)
    while len(left):
        count = os.preadv(file.descriptor, [left.data], position)
        if count == 0:
            raise OSError(f"{file.name}: ends at byte {position}, {len(left)} more are needed")
        left, position = left[count:], position + count
