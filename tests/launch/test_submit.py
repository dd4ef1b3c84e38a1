"""`python -m launch.submit` with SLURM's commands mocked: what is queued, what is said, and what is refused first."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from dpo.command.exits import run_program
from launch import submit
from launch.node import NodeJob
from launch.reports import Outcome, write_outcome
from tests.launch.conftest import FakeSlurm
from tests.launch.test_resources import KNOWN

Launch = Callable[..., int]
NO_CPUS = (
    "cpus    not asked for: no answer from SLURM; where SLURM gives a task one CPU, the 2 ranks of a node share it; to"
    " ask for more: --cpus-per-gpu N\n"
)
"""What is said where neither the user nor SLURM tells the CPUs of a node."""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """The exit code of the program in this process, in a folder with my.yaml and its data; two nodes of two ranks.

    Nothing is known of the run, unless a test says so.
    """
    monkeypatch.setattr(submit, "learn", lambda request, run: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("pairs.jsonl").touch()
    Path("my.yaml").write_text("model: {path: org/model}\ndata: {train: [{path: pairs.jsonl}]}\n")
    usual = ("--config", "my.yaml", "--nodes", "2", "--gpus-per-node", "2", "--time", "60")

    def run(*argv: str, usual: tuple[str, ...] = usual) -> int:
        monkeypatch.setattr(sys, "argv", ["launch.submit", *usual, *argv])
        return run_program(submit.main)

    return run


@pytest.mark.parametrize("name", ["dpo.py", "launch.py", "dpo/__init__.py"])
def test_a_file_that_hides_the_package_is_refused(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """TRL's example script is dpo.py: the ranks, which `python -m` starts in this folder, would import it."""
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    assert launch() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {Path(name).absolute()}: a rank would import it in place of the package ")
    assert not slurm.calls("sbatch")


def test_a_folder_without_code_hides_no_package(launch: Launch, slurm: FakeSlurm) -> None:
    Path("dpo").mkdir()
    assert launch("--dry-run") == 0


def options(script: str) -> dict[str, str]:
    """The options in a script for sbatch."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


def test_a_job_is_queued(launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert launch("--partition", "p", "--loss.beta", "0.5") == 0
    log = tmp_path / "work/runs/my/jobs/4242_0_log.out"
    assert capsys.readouterr().out == (
        f"{NO_CPUS}job     4242\nrun     runs/my\nfollow  tail -F {log}\ncancel  scancel 4242\n"
    )
    found = options(slurm.script(1))
    assert {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "2",
        "partition": "p",
        "time": "60",
        "signal": "USR2@120",
        "requeue": "",
        "job-name": "my",
        "open-mode": "append",
    }.items() <= found.items()
    assert "--kill-on-bad-exit=0 --wait=0" in slurm.script(1)
    assert slurm.script(1).count("submitit.core._submit") == 1 and sys.executable in slurm.script(1)
    (submitted,) = Path("runs/my/jobs").glob("*/submitted.json")
    assert json.loads(submitted.read_text()) == {"cluster": "slurm", "job": "4242", "log": str(log)}
    assert Path("runs/my/jobs/4242_submitted.pkl").is_file()


def test_a_dry_run_prints_the_same_script_without_slurm(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch("--qos", "high") == 0
    capsys.readouterr()
    shutil.rmtree("runs")
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("--qos", "high", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {NO_CPUS}{slurm.script(1)}")
    assert "--nnodes 2 --node-rank THIS_NODE --master-addr FIRST_NODE" in out
    assert out.rstrip().endswith("-m dpo.train --config my.yaml")
    assert not Path("runs").exists() and len(slurm.calls("sbatch")) == 1


def test_what_goes_through(launch: Launch, slurm: FakeSlurm) -> None:
    words = ("--mail-user", "me@x.org", "--mail-type", "END,FAIL", "--constraint", "a|b", "--mem", "64G")
    flags = ("--account", "acc", "--cpus-per-gpu", "4", "--sbatch", "exclude=n[1-2]", "--sbatch", "exclusive")
    image = ("--container-image", "docker://x", "--container-mounts", "/data:/data")
    assert launch(*words, *flags, *image, "--setup", "module load cuda", "--setup", "ulimit -l unlimited") == 0
    script, found = slurm.script(1), options(slurm.script(1))
    assert found["mail-user"] == "me@x.org" and found["mail-type"] == "END,FAIL" and found["constraint"] == "'a|b'"
    assert found["mem"] == "64G" and found["account"] == "acc" and found["exclusive"] == ""
    assert found["exclude"] == "'n[1-2]'" and found["cpus-per-task"] == "8"
    assert "\nmodule load cuda\nulimit -l unlimited\n" in script
    here = Path.cwd()
    assert " python3 -u -m submitit.core._submit " in script  # of the image
    mounts = rf"--container-image=docker://x --container-mounts={here}:{here},(\S+:\S+,)*/data:/data"
    assert re.search(rf"{mounts} --container-workdir={here}", script)


def test_a_sweep_is_an_array_behind_its_reference_pass(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--sweep", "loss.beta=0.1,0.5", "optim.lr=5e-7,1e-6", "--max-parallel", "3") == 0
    assert len(slurm.calls("sbatch")) == 2
    first, array = options(slurm.script(1)), options(slurm.script(2))
    assert "array" not in first and "dependency" not in first
    assert array["array"] == "0-3%3"
    assert array["dependency"] == "afterok:4242" and array["kill-on-invalid-dep"] == "yes"
    out = capsys.readouterr().out
    assert out.startswith(
        f"{NO_CPUS}job     4242  fills the reference cache first\njob     4242_0\nrun     runs/my/beta=0.1,lr=5e-7\n"
    )
    assert out.endswith("cancel  scancel 4242\n")
    assert len(list(Path("runs/my/jobs").glob("4242_?_submitted.pkl"))) == 4
    assert len(list(Path("runs/my").glob("beta=*/jobs/*/submitted.json"))) == 4


def test_the_needs_of_a_run_decide_what_is_asked_for(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of `test_resources`; the ranks learn the delay too."""
    monkeypatch.setattr(submit, "learn", lambda request, run: KNOWN)
    assert launch("--signal-delay", "100") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        *("signal", "memory", "cpus", "time"),
        *("job", "run", "follow", "cancel"),
    ]
    assert err.startswith("WARNING: --signal-delay 100 is too short to save, 200 would be enough: ")
    assert launch("--dry-run") == 0
    assert capsys.readouterr().out.startswith("# signal  200 s before the end of --time: ")
    shutil.rmtree("runs")
    assert launch() == 0
    found = options(slurm.script(2))
    assert (found["signal"], found["mem"], found["cpus-per-task"]) == ("USR2@200", "184320M", "16")
    assert [work.signal_delay for work in works()] == [200]


@pytest.mark.parametrize("flag", ["--no-estimate", "--quiet"])
def test_the_cpus_of_a_node_are_asked_for_without_an_estimate(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """A node with 96 CPUs and 2 GPUs: 8 for each of its ranks. The estimate fails, or is not wanted."""
    slurm.answer("scontrol", "PartitionName=gpu Default=YES GraceTime=0 MaxTime=2-00:00:00\n")
    slurm.answer("sinfo", "96|1031000|gpu:h100:2|n1\n")
    assert launch(flag) == 0
    assert options(slurm.script(1))["cpus-per-task"] == "16"
    assert capsys.readouterr().out.startswith("cpus    8 per rank: a node of partition gpu has 96 for 2 ranks, ")


def test_the_user_asks_for_cpus_without_an_estimate(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--cpus-per-gpu", "4", "--no-estimate") == 0
    assert options(slurm.script(1))["cpus-per-task"] == "8"
    assert capsys.readouterr().out.startswith("cpus    4 per rank, as given\n")


def test_a_wckey_is_only_that_of_the_user(launch: Launch, slurm: FakeSlurm) -> None:
    """Where SLURM tracks them, sbatch refuses a job with an unknown one, as submitit's default is."""
    assert launch() == 0
    assert launch("--sbatch", "wckey=mine") == 0
    assert "wckey" not in options(slurm.script(1)) and options(slurm.script(2))["wckey"] == "mine"


@pytest.mark.parametrize(
    "words", [("--sweep", "loss.beta=0.1,0.5"), ("--prepare",), ("--container-image", "docker://x")], ids=str
)
def test_no_script_of_a_dry_run_has_a_wckey(
    launch: Launch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert launch(*words, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "#SBATCH --job-name=my" in out and "wckey" not in out


def test_no_estimate(launch: Launch, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "learn", None)  # to call it would fail
    assert launch("--no-estimate") == 0
    assert options(slurm.script(1))["signal"] == "USR2@120"


def test_a_job_prepares_models_and_data_first(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without GPUs, and the run waits for it."""
    slurm.answer("scontrol", "PartitionName=cpu Default=NO GraceTime=0 MaxTime=30\n")
    slurm.answer("sinfo", "16|64000|(null)|a\n6|64000|(null)|b\n")
    gpu_options = ("--mem", "900G", "--constraint", "h100", "--sbatch", "exclusive", "--account", "me")
    gpu_options += ("--sbatch", "cpus-per-gpu=4", "--sbatch", "tres-per-task=gres/gpu:1")
    assert launch("--prepare", "--prepare-partition", "cpu", "--partition", "gpu", *gpu_options) == 0
    first, second = options(slurm.script(1)), options(slurm.script(2))
    assert first["partition"] == "cpu" and second["partition"] == "gpu"
    assert first["nodes"] == "1" and first["cpus-per-task"] == "6" and first["time"] == "30" and first["mem"] == "16G"
    assert first["account"] == second["account"] == "me"
    assert not {"gpus-per-node", "cpus-per-gpu", "tres-per-task", "constraint", "exclusive"} & set(first)
    assert "dependency" not in first
    assert second["dependency"] == "afterok:4242"
    out = capsys.readouterr().out.partition("as given\n")[2]
    assert out.startswith("job     4242  prepares models and data first\njob     4242\n")
    assert launch("--prepare", "--dry-run") == 0
    assert "--nproc-per-node 1 -m dpo.prepare --config my.yaml" in capsys.readouterr().out
    slurm.answer("sinfo", "128|64000|gpu:8|a\n")
    assert launch("--prepare", "--partition", "cpu") == 0
    assert options(slurm.script(3))["cpus-per-task"] == "8"
    slurm.answer("sinfo", "")
    assert launch("--prepare", "--partition", "cpu") == 0
    assert "cpus-per-task" not in options(slurm.script(5))


def test_the_reference_of_a_sweep_waits_for_its_preparation(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sets of data are prepared by two jobs, which do not wait for each other."""
    Path("other.jsonl").touch()
    sources = "data.train=[{path: pairs.jsonl}],[{path: other.jsonl}]"
    assert launch("--prepare", "--sweep", sources, "loss.beta=0.1,0.5", "--dry-run") == 0
    out = capsys.readouterr().out
    waits = re.findall("^#SBATCH --dependency=(.*)$", out, re.MULTILINE)
    both = "afterok:PREPARE_JOB:PREPARE_JOB"
    assert waits == [both, both, f"{both}:REFERENCE_JOB:REFERENCE_JOB"]
    assert out.count("-m dpo.prepare") == out.count("-m dpo.reference") == 2 and out.count("-m dpo.train") == 4


def works() -> list[NodeJob]:
    """The jobs that were queued."""
    pickles = Path("runs/my/jobs").glob("*_submitted.pkl")
    return [submitit.core.utils.DelayedSubmission.load(path).function.job for path in pickles]


def test_a_job_in_the_run_folder_is_not_disturbed(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused while the job waits or runs, or may do so; free again once SLURM has forgotten it or it says "done"."""
    assert launch() == 0
    slurm.answer("squeue", "PENDING\n")
    assert launch() == 2
    assert "error: train.run_dir: job 4242 is running or queued for runs/my; valid: " in capsys.readouterr().err
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n")
    assert launch() == 2  # the controller starts anew; its jobs work on
    assert "WARNING: squeue: slurm_load_jobs error: Unable to contact" in capsys.readouterr().err
    (slurm.folder / "squeue.refusal").unlink()
    slurm.answer("squeue", "CANCELLED\n")
    assert launch() == 0
    slurm.answer("squeue", "COMPLETING\n")
    for submitted in Path("runs/my/jobs").glob("*/submitted.json"):
        write_outcome(submitted.parent, Outcome("done"))
    assert launch() == 0
    slurm.refuse("squeue", "slurm_load_jobs error: Invalid job id specified\n")
    assert launch() == 0
    assert len(slurm.calls("sbatch")) == 4


def test_sbatchs_refusal_is_one_line(launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.refuse("sbatch", "sbatch: error: Batch job submission failed: Invalid partition name specified\n")
    assert launch() == 1
    err = capsys.readouterr().err
    assert err == "error: sbatch refuses the job: Batch job submission failed: Invalid partition name specified\n"


def test_a_refused_array_names_the_reference_pass_that_waits(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse("sbatch", "sbatch: error: Invalid job array specification\n", after=1)
    assert launch("--sweep", "loss.beta=0.1,0.5") == 1
    err = capsys.readouterr().err
    refused = "error: sbatch refuses the job: Invalid job array specification"
    assert err == f"{refused}; to cancel queued jobs: scancel 4242\n"


def test_a_dry_run_on_this_machine_is_the_torchrun_line(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ("--config", "my.yaml", "--ranks-per-node", "2", "--cluster", "local")
    assert launch("--dry-run", usual=usual) == 0
    out = capsys.readouterr().out
    assert "SBATCH" not in out
    assert out.endswith("-m torch.distributed.run --standalone --nproc-per-node 2 -m dpo.train --config my.yaml\n\n")


def test_a_sweep_on_this_machine_is_one_job(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process starts its runs, so that there is one job to follow and to cancel."""
    monkeypatch.setattr(submit, "start_in_background", lambda *_: 77)
    usual = ("my.yaml", "--ranks-per-node", "2", "--cluster", "local", "loss.name=sft")
    assert launch("--sweep", "optim.lr=1e-6,5e-7", usual=usual) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["job", "run", "run", "follow", "cancel"]
    assert out[:3] == ["job     77", "run     runs/my/lr=1e-6", "run     runs/my/lr=5e-7"]


def test_no_sbatch(launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch() == 2
    assert capsys.readouterr().err.startswith("error: command line: --cluster: no sbatch on PATH; valid: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--loss.beta", "-1"], "command line: loss.beta: must be > 0, got -1"),
        (["--loss.bta", "1"], "command line: loss.bta: unknown key"),
        (["--config", "other.yaml"], "command line: config: given twice"),
        (["other.yaml"], "command line: config: given twice"),
        (["--nodes", "3"], "command line: --nodes: given twice, '2' and '3'"),
        (["--sbatch", "partitoin=gpu"], "command line: --sbatch: partitoin is not an option of sbatch; did you mean"),
        (["--num_train_epochs", "3"], "command line: --num_train_epochs: unknown key; TRL's num_train_epochs is"),
        (
            ["--data.train", "[{path: gone.jsonl}]"],
            "command line: data.train[0].path: no such file or folder: gone.jsonl",
        ),
        (["--data.eval", "[{path: /gone}]"], "command line: data.eval[0].path: no such file or folder: /gone"),
        (["--model.path", "./gone"], "command line: model.path: no such file or folder: ./gone"),
        (["--model.path", "runs/gone/final"], "command line: model.path: no such file or folder: runs/gone/final"),
        (["--cluster", "local"], "command line: --nodes: --cluster local is one machine, got 2 nodes"),
    ],
)
def test_nothing_is_queued_where_the_input_is_wrong(
    launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert launch(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1
    assert not slurm.calls("sbatch") and not Path("runs").exists()


def test_the_configs_file_is_named(launch: Launch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").unlink()
    assert launch() == 2
    assert capsys.readouterr().err.startswith("error: my.yaml: data.train[0].path: no such file or folder: pairs.jsonl")


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import launch.submit, launch.node"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_no_gpus_here(
    launch: Launch, cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight ranks would share the CPUs, and a person would wonder why it is slow."""
    monkeypatch.setattr("launch.executors.GPU_DRIVERS", ("/nowhere",))
    usual = ("--config", "my.yaml", "--gpus-per-node", "8", "--cluster", cluster)
    assert launch(usual=usual) == 2
    assert capsys.readouterr().err.startswith("error: command line: --gpus-per-node: this machine has none; valid: 0")
