"""What is known of a run before it is queued: the estimate's answer, or why there is none."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import UserError
from dpo.config import Config, SourceConfig, to_yaml
from dpo.estimate.program import read_arguments as read_estimate
from dpo.run_folder.forecast import Forecast
from launch import forecast, known
from launch.arguments import Request, read_arguments
from launch.forecast import Unknown, ask_forecast
from launch.sweep import PlannedRun
from tests.launch.conftest import FakeSlurm
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, make_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of three steps of a tiny model, written to my.yaml."""
    model, pairs = save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "pairs.jsonl", 192)
    config = make_config(model, pairs, tmp_path / "run", train__eval_every=None)
    config = changed(config, data__train=[SourceConfig(str(pairs), format="tokens")])
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    return config


def request(folder: Path, *words: str) -> Request:
    """A request for two ranks on CPUs."""
    return read_arguments(["--config", str(folder / "my.yaml"), "--ranks-per-node", "2", "--time", "60", *words])


class FakeEstimate:
    """Stands in for `python -m dpo.estimate`: a program that writes a forecast, or fails."""

    def __init__(self, folder: Path, code: str):
        self.folder = folder
        (folder / "dpo").mkdir()
        (folder / "dpo" / "__init__.py").touch()
        note = f"open({str(self.calls_file)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
        (folder / "dpo" / "estimate.py").write_text(f"import json, sys, time\n{note}\n{code}\n")

    @property
    def calls_file(self) -> Path:
        """One line per call: its words."""
        return self.folder / "calls"

    @property
    def calls(self) -> list[list[str]]:
        """The words of each call."""
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a FakeEstimate that `python -m` finds first."""

    def make(code: str) -> FakeEstimate:
        (tmp_path / "fake").mkdir()
        monkeypatch.chdir(tmp_path / "fake")
        return FakeEstimate(tmp_path / "fake", code)

    return make


FACTS = {
    **dict.fromkeys(("step_seconds", "reference_seconds", "evaluation_seconds"), 1.0),
    **dict.fromkeys(("checkpoint_bytes", "disk_bytes", "copy_bytes", "step_bytes", "process_bytes"), 2**20),
    "device": "H100",
    "lengths": "",
    "fits": True,
    "verdict": "fits",
    "num_steps": 3,
}
WRITES = f"open(sys.argv[sys.argv.index('--json') + 1], 'w').write({json.dumps(FACTS)!r})"


def test_the_estimate_itself_answers(config: Config, tmp_path: Path) -> None:
    """On CPUs, from the pairs of the file: 192 pairs are three steps."""
    found = ask_forecast(request(tmp_path), ("--config", str(tmp_path / "my.yaml")), config)
    assert found.num_steps == 3 and found.device == "cpu" and found.fits
    assert found.checkpoint_bytes <= found.copy_bytes < 1.01 * found.checkpoint_bytes  # both ranks are on one node


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ([], "cpu"),
        (["--gpus-per-node", "2"], None),
        (["--gpus-per-node", "a100:2"], "a100"),
        (["--gpus-per-node", "a100:2", "--device", "h200"], "h200"),
        (["--sbatch", "gres=gpu:2"], None),
    ],
)
def test_the_device(fake: Any, config: Config, tmp_path: Path, words: list[str], device: str | None) -> None:
    """None: the default of dpo.estimate."""
    estimate = fake(WRITES)
    ask_forecast(request(tmp_path, "--nodes", "3", *words), ("--config", "my.yaml"), config)
    (call,) = estimate.calls
    assert call[call.index("--ranks") + 1] == "6" and call[call.index("--ranks-per-node") + 1] == "2"
    assert (call[call.index("--device") + 1] if "--device" in call else None) == device


def test_a_measured_file_takes_the_place_of_the_device(fake: Any, config: Config, tmp_path: Path) -> None:
    estimate, file = fake(WRITES), tmp_path / "report.json"
    file.touch()
    ask_forecast(request(tmp_path, "--measured", str(file)), (), config)
    assert estimate.calls[0][estimate.calls[0].index("--measured") + 1] == str(file)
    assert "--device" not in estimate.calls[0]


def test_data_that_takes_too_long_is_assumed(
    fake: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call reads the data and takes too long; the second assumes 256 and 512 - 256 tokens, the defaults."""
    estimate, run, asked = fake(WRITES), subprocess.run, []

    def run_or_wait(command: list[str], **options: Any) -> Any:
        asked.append(command)
        if "--prompt-tokens" not in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", run_or_wait)
    assert ask_forecast(request(tmp_path), (), config).num_steps == 3
    assert estimate.calls[-1][:4] == ["--prompt-tokens", "256", "--completion-tokens", "256"]
    assert len(asked) == 2 and len(estimate.calls) == 1


def test_an_estimate_that_always_takes_too_long_is_left_out(
    fake: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("time.sleep(600)")
    monkeypatch.setattr(forecast, "PATIENCE_SECONDS", 1.0)
    for words in ((), ("--prepare",)):
        with pytest.raises(Unknown, match="the estimate took more than 1 s"):
            ask_forecast(request(tmp_path, *words), (), config)


def test_a_type_of_gpu_that_is_not_in_the_table_is_no_wrong_input(fake: Any, config: Config, tmp_path: Path) -> None:
    """SLURM's administrators choose the names of types; a name that the user gave must be known."""
    with pytest.raises(UserError) as failure:
        read_estimate(["--config", str(tmp_path / "my.yaml"), "--ranks", "2", "--device", "big_one"])
    fake(f"sys.exit(print({'error: ' + str(failure.value)!r}, file=sys.stderr) or 2)")
    with pytest.raises(Unknown, match="--device: no such device: big_one"):
        ask_forecast(request(tmp_path, "--gpus-per-node", "big_one:2"), (), config)
    with pytest.raises(UserError, match=r"the estimate refuses the run: .*--device: no such device: big_one"):
        ask_forecast(request(tmp_path, "--gpus-per-node", "2", "--device", "big_one"), (), config)


def test_data_that_a_job_prepares_later_is_assumed(fake: Any, config: Config, tmp_path: Path) -> None:
    estimate = fake(WRITES)
    ask_forecast(request(tmp_path, "--prepare"), (), config)
    assert len(estimate.calls) == 1 and "--prompt-tokens" in estimate.calls[0]


def test_wrong_input_is_refused_before_the_queue(fake: Any, config: Config, tmp_path: Path) -> None:
    fake("sys.exit(print('error: my.yaml: model.path: bloom models are not supported', file=sys.stderr) or 2)")
    with pytest.raises(UserError, match=r"the estimate refuses the run: my.yaml: model.path: bloom .*\(--no-estimate"):
        ask_forecast(request(tmp_path), (), config)
    with pytest.raises(Unknown, match=r"my\.yaml: model.path: bloom"):  # it may only be missing until then
        ask_forecast(request(tmp_path, "--prepare"), (), config)


REFUSALS = [
    "error: command line: data.train: 4 pairs to train on, fewer than batch.pairs_per_step 64; valid: more pairs",
    "error: my.yaml: model.path: bloom models are not supported: ALiBi biases attention by distance",
    "error: pairs.jsonl:3: not JSON",
    "error: my.yaml: reference.path: its vocabulary has 200 tokens",
]


@pytest.mark.parametrize("line", REFUSALS)
def test_a_dry_run_tells_a_refusal_that_a_submission_raises(
    fake: Any, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    fake(f"sys.exit(print({line!r}, file=sys.stderr) or 2)")
    run = PlannedRun(tmp_path / "run", (), config)
    assert known.learn(request(tmp_path, "--dry-run"), run) is None
    told = f"WARNING: launch.submit would refuse this run: the estimate refuses the run: {line.removeprefix('error: ')}"
    assert told in capsys.readouterr().err
    with pytest.raises(UserError, match="the estimate refuses the run"):
        known.learn(request(tmp_path), run)


def test_data_without_known_lengths_is_no_wrong_input(fake: Any, config: Config, tmp_path: Path) -> None:
    """Of the hub, before a run downloads it, with data.max_length null."""
    fake("sys.exit(print('error: command line: --prompt-tokens, --completion-tokens: x', file=sys.stderr) or 2)")
    with pytest.raises(Unknown, match="--prompt-tokens"):
        ask_forecast(request(tmp_path), (), config)


def test_a_failure_of_the_estimate_queues_the_job_all_the_same(
    fake: Any, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("raise ZeroDivisionError('by zero')")
    run = PlannedRun(tmp_path / "run", (), config)
    assert known.learn(request(tmp_path), run) is None
    err = capsys.readouterr().err
    assert "WARNING: the run's needs are not known, so --time, --mem and --signal-delay are not checked: " in err
    assert "ZeroDivisionError: by zero" in err


def test_what_is_learned(fake: Any, config: Config, slurm: FakeSlurm, tmp_path: Path) -> None:
    """The disk is measured beside a run folder that does not exist yet, and nothing stays there."""
    fake(WRITES)
    run = PlannedRun(tmp_path / "new" / "run", (), config)
    before = set(tmp_path.iterdir())
    found = known.learn(request(tmp_path), run)
    assert found and found.write_rate > 1e6 and found.rate_source == "one process here, now"
    assert found.steps_done == 0 and set(tmp_path.iterdir()) == before
    assert [call.split()[:2] for call in slurm.calls("scontrol")] == [["show", "partition"], ["show", "config"]]


def test_a_disk_that_cannot_be_written_is_assumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(file: Path, num_bytes: int) -> float:
        raise OSError(28, "No space left on device")

    def read_only(file: Path, **_: Any) -> None:
        raise OSError(30, "Read-only file system")  # from Linux, also where there is no such file

    monkeypatch.setattr(known, "timed_write", full)
    answer = Forecast(**FACTS)
    assert known.write_rate(tmp_path, answer) == (known.ASSUMED_RATE, "assumed: No space left on device")
    monkeypatch.setattr(Path, "unlink", read_only)
    assert known.write_rate(tmp_path, answer)[0] == known.ASSUMED_RATE
    measured = Forecast(**FACTS, write_rate=7.0)
    assert known.write_rate(tmp_path, measured) == (7.0, "measured there")


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    for name in ("step-000100", "step-1000000", "step-3000000.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    (tmp_path / "checkpoints" / "step-2000000").mkdir()
    assert known.steps_done(tmp_path) == 1_000_000
    assert known.steps_done(tmp_path / "new") == 0
