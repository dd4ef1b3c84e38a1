"""What lies in a run's TensorBoard folder, as TensorBoard's own reader finds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from dpo.board.charts import Place


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


@dataclass(frozen=True)
class HParamsEntry:
    """What a sub-run shows in the HParams tab."""

    values: Mapping[str, object]
    columns: list[str]
    """Keys of the config."""
    metrics: list[Place]


def hparams_entry(folder: Path, sub_run: str) -> HParamsEntry:
    """The entry in a sub-run."""
    contents = accumulators(folder)[sub_run].PluginTagToContent("hparams")
    session = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    return HParamsEntry(
        {key: getattr(value, value.WhichOneof("kind")) for key, value in session.hparams.items()},
        [info.name for info in experiment.hparam_infos],
        [Place(sub_run, info.name.tag) for info in experiment.metric_infos],
    )
