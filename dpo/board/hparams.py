"""The entry of a run in TensorBoard's HParams tab: its config in columns, beside its newest metrics; without torch.

The entry is an event file with a fixed name, so that a later start replaces it. It lies beside the run's other event
files: TensorBoard looks for metrics in the folder of the entry, whatever folder it was started on. So the tab shows
metrics of running and of interrupted runs too. TensorBoard takes the list of columns from the first entry that it
finds.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

from dpo.board.event_files import PREFIX, write_events_atomically
from dpo.board.values import Value
from dpo.board.words import PAIR_METRICS
from dpo.config.effects import CHANGING

ENTRY = f"{PREFIX}.0000000000.hparams"
"""The name of the entry's file. It sorts before all other event files: TensorBoard does not return to a file once it
has read a later one."""

NUM_SHOWN = 5
"""The number of columns of keys that TensorBoard shows at first; the user can select the others."""

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "loss_sft")
"""The columns of metrics: their names after eval/ or train/."""


def write_entry(folder: Path, part: str, values: Mapping[str, Value], columns: Sequence[str] = CHANGING) -> None:
    """Writes the run's entry, replacing an earlier entry. Raises OSError.

    Args:
        folder: RUN/tensorboard.
        part: the metrics that are shown, eval or train.
        values: the values of all keys, as `values.flat` returns them.
        columns: the keys that the tab can show, the most important first.
    """
    experiment = Experiment(hparam_infos=_key_columns(columns, values), metric_infos=_metric_columns(part))
    contents = {
        metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=_session(values)),
    }
    summary = Summary(value=[_value(tag, content) for tag, content in contents.items()])
    write_events_atomically(folder / ENTRY, [Event(file_version="brain.Event:2"), Event(summary=summary)])


def _session(values: Mapping[str, Value]) -> SessionStartInfo:
    """Returns the values of all keys, without a group name: two runs with the same config stay two rows."""
    start = SessionStartInfo(start_time_secs=time.time())
    for key, value in values.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, str):
            start.hparams[key].string_value = value.encode(errors="replace").decode()  # a path may hold any byte
        else:
            start.hparams[key].number_value = value
    return start


def _key_columns(columns: Sequence[str], values: Mapping[str, Value]) -> list[HParamInfo]:
    """Returns the columns for which the run has a value: the tab's other views omit runs that lack one."""
    kinds = {bool: DATA_TYPE_BOOL, int: DATA_TYPE_FLOAT64, float: DATA_TYPE_FLOAT64, str: DATA_TYPE_STRING}
    return [
        HParamInfo(name=key, type=kinds[type(values[key])], differs=number < NUM_SHOWN)
        for number, key in enumerate(columns)  # TensorBoard sorts: those with `differs` first, then by name
        if key in values
    ]


def _metric_columns(part: str) -> list[MetricInfo]:
    return [
        MetricInfo(name=MetricName(tag=f"{part}/{name}"), display_name=f"{part} {PAIR_METRICS[name].long}")
        for name in METRICS
    ]


def _value(tag: str, content: HParamsPluginData) -> Summary.Value:
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)
