"""What lies in a run's TensorBoard folder, as TensorBoard's own reader finds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata


def board_of(folder: Path) -> EventAccumulator:
    """All events of a run; TensorBoard would show the files of a folder below as another run."""
    assert {path.parent for path in folder.rglob("*tfevents*")} <= {folder}
    board = EventAccumulator(str(folder), {"tensors": 0, "scalars": 0})
    board.Reload()
    return board


def points_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The lines of all charts: tag -> [(step, value), ...] in the order of the files."""
    board = board_of(folder)
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def steps_of(folder: Path, tag: str) -> list[int]:
    """The steps at which a histogram or a text was written, in the order of the files."""
    return [event.step for event in board_of(folder).Tensors(tag)]


@dataclass(frozen=True)
class HParamsEntry:
    """What a run shows in the HParams tab."""

    values: Mapping[str, object]
    columns: list[str]
    """Keys of the config."""
    metrics: list[str]
    """Tags."""


def hparams_entry(folder: Path) -> HParamsEntry:
    """The entry of a run."""
    contents = board_of(folder).PluginTagToContent("hparams")
    session = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    return HParamsEntry(
        {key: getattr(value, value.WhichOneof("kind")) for key, value in session.hparams.items()},
        [info.name for info in experiment.hparam_infos],
        [info.name.tag for info in experiment.metric_infos],
    )
