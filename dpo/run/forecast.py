"""What a run needs of a cluster, as `dpo.estimate` writes it for `launch.submit`, which has no torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dpo.base.files import write_atomically


@dataclass(frozen=True)
class Forecast:
    """The needs of a run, by the estimate."""

    device: str
    lengths: str
    """Where the lengths of the pairs come from, for the user."""
    fits: bool
    verdict: str
    step_seconds: float
    num_steps: int | None
    """None where the data was not read."""
    reference_seconds: float | None
    """Seconds to compute the log-probabilities of the reference, 0 for a loss without one; None as above."""
    evaluation_seconds: float | None
    """Seconds of all evaluations together; None as above."""
    checkpoint_bytes: int
    """Bytes of one checkpoint, written by all ranks together."""
    disk_bytes: int
    """Bytes that a fresh run needs in its run folder at the same time; a lower bound where the number of steps is not
    known and all checkpoints are kept.
    """
    copy_bytes: float
    """Host memory of a node for the copy of weights and optimizer from which a checkpoint is written."""
    step_bytes: float
    """Host memory of a node for tensors of a step: on CPUs all, on GPUs those of `parallel.cpu_offload`."""
    process_bytes: float
    """Host memory of a node for the processes of its ranks."""
    write_rate: float | None = None
    """Bytes per second at which the ranks of a measured run wrote; None where nothing was measured."""

    @property
    def seconds(self) -> float | None:
        """Returns the seconds of the whole run; None where the number of steps is not known."""
        if self.num_steps is None:
            return None
        return self.num_steps * self.step_seconds + (self.reference_seconds or 0) + (self.evaluation_seconds or 0)


def write_forecast(file: Path, found: Forecast) -> None:
    """Writes a forecast as a JSON object."""
    write_atomically(file, json.dumps(asdict(found), indent=1).encode())


def read_forecast(file: Path) -> Forecast:
    """Reads a file of `write_forecast`; keys of a later version are left out."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    return Forecast(**{field.name: facts[field.name] for field in fields(Forecast) if field.name in facts})
