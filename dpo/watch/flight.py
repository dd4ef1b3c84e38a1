"""PyTorch's Flight Recorder: the last collectives of each rank, written to a file when NCCL has waited in vain.

It is on unless the user has set its variables. All versions of torch that this package runs with know these names, and
take the older ones, TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE, with a warning. torch has a
program that reads the files: `python -m torch.distributed.flight_recorder.fr_trace`.

Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SIZE, _DUMP, _FILE = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"
_OLDER = {_SIZE: "TORCH_NCCL_TRACE_BUFFER_SIZE", _FILE: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
_ENTRIES = "2000"
"""Collectives that are kept of each rank: those of tens of micro-batches; torch's default from 2.10 on."""


DUMPS = "dpo-flight-"
"""The beginning of the names of the folders of files, in the temporary folder of a node."""


@dataclass(frozen=True)
class Flight:
    """The files of the Flight Recorder of the ranks of a node."""

    slots: Path
    """The folder of the node's slots, whose name is that of the run."""

    @property
    def folder(self) -> Path:
        """Returns the folder of the files, which stays where there are any: in the temporary folder of the node."""
        return Path(tempfile.gettempdir(), self.slots.name.replace("slots", "flight"))

    def turn_on(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variables that the user has not set. Must be called before NCCL starts."""
        with suppress(OSError):  # there is no temporary folder that takes files: the run needs none
            self._turn_on(environment)

    def _turn_on(self, environment: MutableMapping[str, str]) -> None:
        if _is_ours(environment.get(_FILE, "")):  # of a run before this one, whose folder is gone
            del environment[_FILE]
        values = {_SIZE: _ENTRIES, _DUMP: "1", _FILE: str(self.folder / "rank-")}
        for name, value in values.items():
            if name not in environment and _OLDER.get(name) not in environment:
                environment[name] = value
        if environment.get(_FILE) == values[_FILE]:
            self.folder.mkdir(exist_ok=True)

    @property
    def found(self) -> str:
        """Returns where the files are, as the end of an error line; empty where there are none."""
        with suppress(OSError):  # it is not there
            if any(self.folder.iterdir()):
                return f"; the last collectives of this node's ranks are in {self.folder}"
        return ""

    def remove_if_empty(self) -> None:
        """Removes the folder where no file was written."""
        with suppress(OSError):
            self.folder.rmdir()


def _is_ours(prefix: str) -> bool:
    return Path(prefix).match(f"{tempfile.gettempdir()}/{DUMPS}*/rank-")
