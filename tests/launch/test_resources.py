"""The values that the launcher derives, from hand-derived numbers."""

from dataclasses import replace
from typing import Any

import pytest

from dpo.base.errors import UserError
from dpo.run_folder.forecast import Forecast
from launch.arguments import Request, read_arguments
from launch.resources import GIB, Known, cpus_per_rank, memory, mib_of, signal_delay, time_needed, with_settings
from launch.site import Site
from tests.launch.conftest import changed

FORECAST = Forecast(
    device="H100",
    lengths="made up",
    fits=True,
    verdict="fits",
    step_seconds=6.0,
    num_steps=1000,
    reference_seconds=600.0,
    evaluation_seconds=400.0,
    checkpoint_bytes=64 * 10**9,
    disk_bytes=0,
    copy_bytes=120 * GIB,
    step_bytes=0,
    process_bytes=40 * GIB,
)
"""An 8B with RMSprop: 64 GB per checkpoint. 1,000 steps, the reference and the evaluations take 7,000 s."""
SITE = Site("gpu", cpus=96, memory_mib=500 * 1024, limits_memory=True, grace_seconds=None, max_minutes=2880)
KNOWN = Known(FORECAST, 1e9, "made up", SITE, steps_done=0)


def request(*words: str) -> Request:
    """A request for eight GPUs and two hours."""
    return read_arguments(changed(["--config", "my.yaml", "--gpus-per-node", "8", "--time", "120"], words))


def known(**changes: Any) -> Known:
    """KNOWN with changes of its forecast, its site or itself."""
    parts = {"forecast": FORECAST, "site": SITE}
    for name, part in parts.items():
        own = {key: value for key, value in changes.items() if hasattr(part, key)}
        parts[name] = replace(part, **own)
    return replace(KNOWN, **parts, **{key: value for key, value in changes.items() if hasattr(KNOWN, key)})


# --- the time to save ------------------------------------------------------------------------------------------------


def test_two_checkpoints_and_a_step_fit_into_three_quarters_of_the_delay() -> None:
    """2 x 64 GB at 1 GB/s, 6 s and 10 s: 144 s; 4/3 of them 192 s."""
    found = signal_delay(request(), KNOWN)
    assert (found.value, found.warning) == (200, "")
    assert "two checkpoints of 59.6 GiB at 1 GB/s (made up) and a step take 134 s" in found.line


@pytest.mark.parametrize(("rate", "delay"), [(1e10, 120), (5e8, 370), (1e8, 1730)])
def test_the_delay_follows_the_speed_of_the_disk(rate: float, delay: int) -> None:
    """(12.8 + 16) 4/3 = 38.4 is below the least; (256 + 16) 4/3 = 362.7; (1280 + 16) 4/3 = 1728."""
    assert signal_delay(request(), known(write_rate=rate)).value == delay


def test_a_delay_that_is_too_short_is_told_with_the_number_behind_it() -> None:
    found = signal_delay(request("--signal-delay", "120"), KNOWN)
    assert found.value == 120
    assert found.warning.startswith("--signal-delay 120 is too short to save, 200 would be enough: two checkpoints of")
    assert signal_delay(request("--signal-delay", "192"), KNOWN).warning == ""


def test_a_grace_time_that_is_too_short_is_told() -> None:
    assert "GraceTime of 60 s, and saving may take 144 s" in signal_delay(request(), known(grace_seconds=60)).warning
    assert signal_delay(request(), known(grace_seconds=0)).warning == ""  # no preemption with a time to save
    assert signal_delay(request(), known(grace_seconds=150)).warning == ""


def test_a_job_without_time_to_save_is_refused() -> None:
    with pytest.raises(UserError, match="--time: 180 s are not more than the 200 s for saving a checkpoint"):
        with_settings(request("--time", "3"), KNOWN)
    assert "half of --time or more" in signal_delay(request("--time", "6"), KNOWN).warning


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_node() -> None:
    """1.1 x (120 + 40) + 4 = 180 GiB."""
    found = memory(request(), KNOWN)
    assert (found.value, found.warning) == (180 * 1024, "")
    assert "the copies from which checkpoints are written 120.0 GiB, 8 processes 40.0 GiB" in found.line
    assert dict(with_settings(request(), KNOWN)[0].sbatch)["mem"] == "184320M"


@pytest.mark.parametrize(("limits", "reason"), [(False, "SLURM does not limit memory here"), (None, "no answer")])
def test_memory_that_slurm_does_not_limit_is_not_asked_for(limits: bool | None, reason: str) -> None:
    found = memory(request(), known(limits_memory=limits))
    assert found.value is None and reason in found.line
    assert "mem" not in dict(with_settings(request(), known(limits_memory=limits))[0].sbatch)


def test_a_node_that_is_too_small_gives_all_that_it_has() -> None:
    found = memory(request(), known(memory_mib=100 * 1024))
    assert found.value == 0
    assert "a node of partition gpu has 100 GiB of memory, and the ranks on it need 180 GiB" in found.warning
    assert dict(with_settings(request(), known(memory_mib=100 * 1024))[0].sbatch)["mem"] == "0"


@pytest.mark.parametrize(("given", "is_short"), [("100G", True), ("180G", False), ("0", False), ("184319", True)])
def test_memory_that_was_given_stays(given: str, is_short: bool) -> None:
    found = memory(request("--mem", given), KNOWN)
    assert found.value is None and f"--mem {given}" in found.line
    assert ("less than the 180 GiB" in found.warning) == is_short
    assert dict(with_settings(request("--mem", given), KNOWN)[0].sbatch)["mem"] == given


def test_memory_per_cpu_takes_the_place_of_memory_per_node() -> None:
    """sbatch refuses both together."""
    asked = with_settings(request("--sbatch", "mem-per-cpu=4G"), KNOWN)[0]
    assert "mem" not in dict(asked.sbatch)


@pytest.mark.parametrize(("text", "mib"), [("1024", 1024), ("1G", 1024), ("1t", 2**20), ("1025K", 2), ("x", None)])
def test_the_forms_of_memory(text: str, mib: int | None) -> None:
    assert mib_of(text) == mib


# --- CPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpus", "per_rank"), [(96, 8), (32, 4), (4, 1), (None, None)])
def test_the_cpus_of_a_rank_with_a_gpu(cpus: int | None, per_rank: int | None) -> None:
    assert cpus_per_rank(request(), known(cpus=cpus).site).value == per_rank


def test_ranks_on_cpus_share_all_of_them() -> None:
    asked = read_arguments(["--config", "my.yaml", "--ranks-per-node", "4", "--time", "60"])
    assert cpus_per_rank(asked, SITE).value == 24


def test_cpus_that_were_given_stay() -> None:
    assert cpus_per_rank(request("--cpus-per-gpu", "12"), SITE).value == 12
    assert "asks for 128 CPUs, a node has 96" in cpus_per_rank(request("--cpus-per-gpu", "16"), SITE).warning
    assert with_settings(request("--sbatch", "cpus-per-task=32"), KNOWN)[0].cpus_per_gpu is None


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minutes", "delay", "restarts"),
    [("120", "200", 0), ("60", "200", 2), ("119", "140", 0), ("119", "141", 1)],
)
def test_restarts(minutes: str, delay: str, restarts: int) -> None:
    """7,000 s in parts of 7,000, 3,400, 7,000 and 6,999 s."""
    assert time_needed(request("--time", minutes, "--signal-delay", delay), KNOWN).value == restarts


def test_more_restarts_than_are_allowed_are_told() -> None:
    found = time_needed(request("--time", "20", "--signal-delay", "200", "--max-timeouts", "5"), KNOWN)
    assert found.value == 6  # parts of 1,000 s
    assert found.warning == (
        "the run takes about 117 min, 6 restarts of 20 min, and --max-timeouts allows 5: a longer --time, or"
        " --max-timeouts 12"
    )


def test_a_run_that_resumes_has_less_to_do() -> None:
    """250 steps, a quarter of the evaluations, no reference: 1,600 s."""
    found = time_needed(request(), known(steps_done=750))
    assert (
        "about 27 min by the estimate for H100, after step 750: 250 steps of 6.00 s: 25 min, evaluations: 100.0 s"
        in found.line
    )


def test_a_run_that_is_done_is_told_so() -> None:
    assert time_needed(request(), known(steps_done=1000)).line == "time    no step is left after step 1,000"


def test_a_number_of_steps_that_is_not_known() -> None:
    assert "6.00 s per step; the number of steps is not known" in time_needed(request(), known(num_steps=None)).line


def test_more_time_than_the_partition_gives_is_told() -> None:
    found = time_needed(request("--time", "3-0"), KNOWN)
    assert found.warning == "--time is over the limit of partition gpu, 48.0 h: the job may never start"
