"""What a run needs of a cluster, as `dpo.estimate` writes it for `launch.submit`, which has no torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dpo.base.files import write_atomically

ASSUMED_RATE = 5e8
"""Bytes per second at which all ranks together write a checkpoint, where nothing was measured."""


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
    """Seconds of all evaluations together, without sampled answers; None as above."""
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
    num_ranks: int = 1
    checkpoint_seconds: float | None = None
    """Seconds in which the run waits for checkpoints and for the export of the model; None where the number of steps is
    not known.
    """
    keep: int | None = None
    """`checkpoint.keep`; None: all."""
    final_bytes: int = 0
    """Bytes of the exported model."""
    answers_seconds: float | None = None
    """Maximum of the seconds in which all sampled answers are generated; None where the data was not read."""
    cache_bytes: int | None = None
    """Maximum number of bytes of the reference's log-probabilities, 0 for a loss without one; None where the data was
    not read.
    """

    @property
    def seconds(self) -> float | None:
        """Returns the seconds of the whole run; None where the number of steps is not known, and a lower bound where
        those of the reference, of evaluations and of answers are not.
        """
        if self.num_steps is None:
            return None
        others = (self.reference_seconds, self.evaluation_seconds, self.answers_seconds, self.checkpoint_seconds)
        return self.num_steps * self.step_seconds + sum(part or 0 for part in others)

    @property
    def device_hours(self) -> float | None:
        """Returns the hours of the run times its ranks; None as `seconds`."""
        return None if self.seconds is None else self.seconds * self.num_ranks / 3600


def write_forecast(file: Path, found: Forecast) -> None:
    """Writes a forecast as a JSON object, with the `seconds` and `device_hours` of the run."""
    facts = asdict(found) | {"seconds": found.seconds, "device_hours": found.device_hours}
    write_atomically(file, json.dumps(facts, indent=1).encode())


def read_forecast(file: Path) -> Forecast:
    """Reads a file of `write_forecast`; keys of a later version are left out."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    return Forecast(**{field.name: facts[field.name] for field in fields(Forecast) if field.name in facts})
