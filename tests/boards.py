"""What lies in a run's TensorBoard folder, as TensorBoard's own reader finds it."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo.charts import Place


def accumulators(folder: Path) -> dict[str, EventAccumulator]:
    """Sub-run -> its events, all of them."""
    sub_runs = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("events.out.tfevents.*")}
    everything = {"tensors": 0, "scalars": 0}
    boards = {name: EventAccumulator(str(folder / name), everything) for name in sorted(sub_runs)}
    for board in boards.values():
        board.Reload()
    return boards


def points_of(folder: Path) -> dict[Place, list[tuple[int, float]]]:
    """The lines of all charts: (sub-run, tag) -> [(step, value), ...] in the order of the files."""
    return {
        Place(sub_run, tag): [(event.step, event.value) for event in board.Scalars(tag)]
        for sub_run, board in accumulators(folder).items()
        for tag in board.Tags()["scalars"]
    }
