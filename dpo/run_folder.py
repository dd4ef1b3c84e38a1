"""The folder of a run: what lies in it decides whether a start is fresh, goes on, or has nothing to do.

    config.yaml  metrics.jsonl  tensorboard/  checkpoints/step-000100/  final/

Every function here is for rank 0 alone, which tells the others (`distributed.on_main`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.checkpoint import RunState, newest_checkpoint, read_state
from dpo.config import Config, to_yaml
from dpo.errors import UserError
from dpo.metrics import drop_metrics_after
from dpo.progress import say

KEY = "checkpoint.resume"


@dataclass(frozen=True)
class Start:
    """Where a run begins: from `checkpoint`, after `state.step` updates; both None for a fresh start."""

    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """Updates that were made already."""
        return self.state.step if self.state else 0


def find_start(config: Config) -> Start:
    """What `checkpoint.resume` means for the run folder as it is; writes nothing. Raises UserError."""
    run_dir = Path(str(config.train.run_dir))
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"train.run_dir: {run_dir} is a file; valid: a folder, or a name that is free")
    resume = config.checkpoint.resume
    if resume == "never":
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UserError(f"train.run_dir: {run_dir} is not empty; valid: a new folder, or {KEY} auto")
        return Start()
    checkpoint = newest_checkpoint(run_dir) if resume == "auto" else _named_checkpoint(Path(resume))
    return Start(checkpoint, read_state(checkpoint, KEY)) if checkpoint else Start()


def is_finished(config: Config, start: Start, last_step: int) -> bool:
    """Whether nothing is left to do: the last step's checkpoint is there, and so is the exported model."""
    return start.step >= last_step and (Path(str(config.train.run_dir)) / "final" / "config.json").is_file()


def _named_checkpoint(folder: Path) -> Path:
    """A checkpoint, or the newest one of a run folder."""
    if not folder.is_dir():
        raise UserError(
            f"{KEY}: no such folder: {folder}; valid: auto, never, a run folder or RUN/checkpoints/step-000100"
        )
    return newest_checkpoint(folder) or folder


def identity_of(config: Config, data_hash: str, reference_hash: str) -> dict[str, Any]:
    """What may not change between the parts of one run, by config key; the rest may, and is logged."""
    return {
        "data.train": data_hash,
        "data.order": config.data.order,
        "train.seed": config.train.seed,
        "batch.group_by_prompt": config.batch.group_by_prompt,
        "batch.pairs_per_step": config.batch.pairs_per_step,
        "reference.path": reference_hash,
        "optim.name": config.optim.name,
    } | {f"loss.{name}": value for name, value in asdict(config.loss).items()}


def check_identity(start: Start, identity: Mapping[str, Any]) -> None:
    """Raises UserError, naming the key, where a resumed run would not be the same run."""
    if start.state is None:
        return
    for key, value in identity.items():
        before = start.state.identity.get(key)
        if before != value:
            what = f"{before!r} when the checkpoint was written, {value!r} now"
            if key in ("data.train", "reference.path"):
                what = f"its content is not what it was when the checkpoint was written (hash {before}, now {value})"
            raise UserError(
                f"{key}: cannot go on from {start.checkpoint}: {what};"
                " valid: the same as before, or another train.run_dir"
            )


def open_run_folder(config: Config, start: Start) -> Path:
    """Makes the folder ready: config.yaml written, metrics after the start removed, those of a dead run put aside."""
    run_dir = Path(str(config.train.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    _log_changes(run_dir / "config.yaml", to_yaml(config), resumed=start.checkpoint is not None)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if start.checkpoint is None:
        _put_aside(run_dir)
    elif start.checkpoint.is_relative_to(run_dir):
        drop_metrics_after(run_dir, start.step)
    return run_dir


def _log_changes(path: Path, now: str, resumed: bool) -> None:
    if not resumed or not path.exists():
        return
    before = path.read_text(encoding="utf-8").splitlines()
    for line in [line for line in now.splitlines() if line not in before]:
        say(f"changed since the checkpoint: {line.strip()}")


def _put_aside(run_dir: Path) -> None:
    """A run that left no checkpoint is started over; its metrics are kept as *.old."""
    for name in ("metrics.jsonl", "tensorboard"):
        path = run_dir / name
        if path.exists():
            number = next(i for i in range(10**6) if not _old(path, i).exists())
            say(f"{path} is of a run that left no checkpoint: moved to {path.rename(_old(path, number))}")


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.old" + (f"-{number}" if number else ""))
