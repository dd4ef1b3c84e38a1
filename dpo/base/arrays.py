"""Arrays in .npy files that are read in parts with pread, not mapped into memory.

The pages of a memory-mapped file count as memory of the process as soon as they are touched. Here the memory of the
process stays the same, however much of the array it has read.

Example, with an array of 1,000,000 rows of 3 int32 (12 bytes per row, after a header of 128 bytes):

    array = open_array(path)   # reads the header alone
    array[10:20]               # one read of 120 bytes at byte 128 + 10 * 12 = 248
    array[[5, 999_999]]        # two reads of 12 bytes
    array[mask]                # reads all 12 MB, then selects: so does any index of more than 62,500 rows
"""

import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

READ_WHOLE = 16  # an index of more than 1/16 of the rows reads the whole array at once, instead of row by row


@dataclass(frozen=True, eq=False)
class HeldFile:
    """An open file that several threads may read at different positions. It is open while this object is referenced."""

    name: str
    descriptor: int

    @property
    def size(self) -> int:
        """Returns the size of the file in bytes."""
        return os.fstat(self.descriptor).st_size


def hold_file(path: str | Path) -> HeldFile:
    """Opens a file for reading. It is closed when the last reference to the result goes away."""
    held = HeldFile(str(path), os.open(path, os.O_RDONLY))
    # Not closed at interpreter exit, since threads may still read it; the system closes it then.
    weakref.finalize(held, os.close, held.descriptor).atexit = False
    return held


@dataclass(frozen=True, eq=False)
class DiskArray:
    """An array in an open file, read by indexing: `array[a:b]` (step 1) in one read, `array[row_idxs]` row by row,
    `array[mask]` and `np.asarray(array)` as a whole.

    Several threads may read, and the file may be removed while the array is in use.
    """

    file: HeldFile
    offset: int
    """Bytes in the file before the first row."""
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
        if len(index) * READ_WHOLE > len(self):  # always true of a mask, which is as long as the array
            chosen: np.ndarray = np.asarray(self)[index]
            return chosen
        rows = np.empty((len(index), *self.shape[1:]), self.dtype)
        for i, row_idx in enumerate(index.tolist()):
            rows[i] = self.rows(row_idx, row_idx + 1)[0]
        return rows

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop), with one read. Raises IndexError where they are not all in the array."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.file.name}: rows [{start}, {stop}) of {len(self)}")
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        read_into(self.file, rows, self.offset + start * self.dtype.itemsize * math.prod(self.shape[1:]))
        return rows


def open_array(path: Path) -> DiskArray:
    """Opens an array that `np.save` wrote in C order. Raises OSError or ValueError if the file is truncated,
    or holds something else than numbers.
    """
    file = hold_file(path)
    with os.fdopen(file.descriptor, "rb", closefd=False) as header:
        np.lib.format.read_magic(header)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
        offset = header.tell()
    if is_fortran or dtype.hasobject:  # the bytes of objects would be taken for addresses
        raise OSError(f"{path}: not an array of numbers in C order")
    if file.size != offset + dtype.itemsize * math.prod(shape):
        raise OSError(f"{path}: {file.size} bytes are not an array of shape {shape}")
    return DiskArray(file, offset, dtype, shape)


def read_into(file: HeldFile, array: np.ndarray, position: int) -> None:
    """Fills an array with the bytes of a file.

    Args:
        file: the open file.
        array: a contiguous array of any shape and dtype, which is filled.
        position: the first byte to read, from 0.

    Raises:
        OSError: the file ends early.
    """
    left = array.reshape(-1).view(np.uint8)
    while len(left):
        count = os.preadv(file.descriptor, [left.data], position)
        if count == 0:
            raise OSError(f"{file.name}: ends at byte {position}, {len(left)} more are needed")
        left, position = left[count:], position + count
