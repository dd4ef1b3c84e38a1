"""Runs in containers: the folders that they must see, and a run in one that sees nothing else.

bubblewrap stands in for Apptainer: its image has this machine's system, the interpreter and this project, and of all
other folders only those that are bound.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.config import Config, SourceConfig, to_yaml
from launch.arguments import Request, read_arguments
from launch.checks import is_active
from launch.containers import Bound, bound_folders, interpreter, lines_of, make_folders, pyxis_arguments
from launch.reports import Submission, history, submissions
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, make_config, train_lines

ROOT = Path(__file__).parents[2]

APPTAINER = f"""#!{sys.executable}
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # the real one is a Go program, which resets ignored signals
words = sys.argv[1:]
assert words.pop(0) == "exec" and words.pop(0) == "--nv" and words.pop(0) == "--bind"
binds = [bind.partition(":")[0] for bind in words.pop(0).split(",")]
assert words.pop(0) == "--pwd"
here, image, command = words[0], words[1], words[2:]
assert image == "image.sif"
system = [f"/{{name}}" for name in ("usr", "bin", "lib", "lib64", "etc", "sys") if os.path.exists(f"/{{name}}")]
system += [sys.base_prefix, sys.prefix, os.path.realpath(sys.prefix)]  # which may be a link
box = ["bwrap", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--setenv", "CONTAINER", "yes"]
for path in system:
    box += ["--ro-bind", path, path]
for path in binds:
    box += ["--bind", path, path]
child = subprocess.Popen([*box, "--chdir", here, *command])  # the real one stays above its container too
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
sys.exit(child.wait())
"""


def request(*words: str) -> Request:
    """A request for two ranks on the CPUs of this machine."""
    return read_arguments(["--config", "my.yaml", "--cluster", "local", "--ranks-per-node", "2", *words])


def paths(folders: list[Bound]) -> dict[str, str]:
    """Path -> reason."""
    return {str(bound.path): bound.reason for bound in folders}


def config_in(folder: Path) -> Config:
    """A run whose model is a link into another folder, and whose data is a file."""
    for name in ("models/tiny", "data", "links", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "pairs.jsonl").touch()
    (folder / "links" / "model").symlink_to(folder / "models" / "tiny")
    return make_config(folder / "links" / "model", folder / "data" / "pairs.jsonl", "runs/my")


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_folder_that_options_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both Apptainer and pyxis take FROM:TO,FROM:TO. A folder inside of a bound folder is not named."""
    config = config_in(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert bound_folders([config], (), {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^model.path: {tmp_path}/{name}/links/model has a comma or a colon"):
        bound_folders([config], (), {})


def test_the_folders_that_a_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder lies in the working directory, and needs no place of its own."""
    config = config_in(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    environment = {"DPO_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": "/hub"}
    assert paths(bound_folders([config], (), environment)) == {
        str(tmp_path / "work"): "the working directory",
        str(tmp_path / "links" / "model"): "model.path",
        str(tmp_path / "models" / "tiny"): "model.path",
        str(tmp_path / "data"): "data.train[0].path",
        str(tmp_path / "cache"): "reference.cache_dir",
        str(tmp_path / "hf"): "HF_HOME: models and tokenized rows",
        "/hub": "HF_HUB_CACHE",
    }


def test_ids_of_the_hub_lie_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = changed(make_config("org/model", "org/data", "runs/my"), reference__cache_dir="/shared/cache")
    found = paths(bound_folders([config], (), {"DPO_CACHE": "/cache", "HF_HOME": "/hf"}))
    assert set(found) == {str(tmp_path), "/shared/cache", "/cache", "/hf"}


def test_a_folder_inside_another_is_bound_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(config_in(tmp_path), train__run_dir=str(tmp_path / "runs" / "my"))
    monkeypatch.chdir(tmp_path)
    assert list(paths(bound_folders([config], (), {"DPO_CACHE": "/cache", "HF_HOME": "/cache/hf"}))) == [
        str(tmp_path),
        "/cache",
    ]


def test_the_config_and_the_folders_behind_links_are_bound_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder, inside the working directory, and the cache are links to another disk."""
    config = config_in(tmp_path)
    for name in ("disk/runs", "disk/hf", "configs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "configs" / "my.yaml").touch()
    (tmp_path / "work" / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "hf").symlink_to(tmp_path / "disk" / "hf")
    monkeypatch.chdir(tmp_path / "work")
    words = ("--config", "../configs/my.yaml", "--loss.beta", "0.5")
    found = paths(bound_folders([config], words, {"DPO_CACHE": "/cache", "HF_HOME": str(tmp_path / "hf")}))
    assert {str(tmp_path / name) for name in ("hf", "disk/hf", "disk/runs/my", "configs")} <= found.keys()
    assert found[str(tmp_path / "configs")] == "--config"


def test_the_command_that_enters_apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Bound(Path("/work"), "the working directory"), Bound(Path("/data"), "data")]
    words = interpreter(request("--apptainer", "image.sif", "--container-mounts", "/a:/b"), folders)
    entered = ("apptainer", "exec", "--nv", "--bind", "/work,/data,/a:/b", "--pwd", str(tmp_path), "image.sif")
    assert words == (*entered, "sh", "-c", 'trap "" USR2; exec "$@"', "sh", "python3")
    own = interpreter(request("--apptainer", "i", "--python", "/opt/bin/python"), folders)
    assert own[-1] == "/opt/bin/python" and own[4] == "/work,/data"
    assert interpreter(request(), folders) == ()


def test_the_arguments_of_pyxis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Bound(tmp_path, "the working directory"), Bound(Path("/data"), "data")]
    assert pyxis_arguments(request("--container-image", "nvcr.io#x", "--container-mounts", "/a:/b"), folders) == [
        "--container-image=nvcr.io#x",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/a:/b",
        f"--container-workdir={tmp_path}",
    ]
    assert pyxis_arguments(request(), folders) == []


def test_folders_are_made_before_they_are_bound(tmp_path: Path) -> None:
    make_folders([Bound(tmp_path / "new" / "cache", "DPO_CACHE")])
    assert (tmp_path / "new" / "cache").is_dir()
    assert lines_of([Bound(Path("/data"), "data.train[0].path")]) == ["bound   /data  (data.train[0].path)"]


# --- a run in a container ---------------------------------------------------------------------------------------------


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with my.yaml, and `apptainer` on PATH; model and data lie in folders of their own."""
    if shutil.which("bwrap") is None or subprocess.run(["bwrap", "--ro-bind", "/", "/", "true"]).returncode:
        pytest.skip("needs bubblewrap, and the right to make namespaces (make tools)")
    for name in ("bin", "work", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "apptainer").write_text(APPTAINER)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    config = make_config(
        save_model(tmp_path / "model", "llama"),
        "",
        "runs/my",
        data__train=[SourceConfig(str(save_pairs(tmp_path / "data" / "pairs.jsonl", 40)))],
        batch__pairs_per_step=4,
        train__eval_every=None,
        eval__samples=0,
    )
    (tmp_path / "work" / "my.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


RUN = Path("runs/my")


def launch_in_box(*words: str) -> tuple[Path, Submission]:
    """Starts the run in the background, in the container; the folder of its reports, and the job."""
    before = {folder for folder, _ in submissions(RUN)}
    own = ["--config", "my.yaml", "--cluster", "local", "--ranks-per-node", "2", "--apptainer", "image.sif"]
    own += ["--python", sys.executable, "--container-mounts", f"{ROOT}:{ROOT}", "--env", f"PYTHONPATH={ROOT}"]
    subprocess.run([sys.executable, "-m", "launch.submit", *own, *words], check=True, capture_output=True)
    (new,) = [(folder, job) for folder, job in submissions(RUN) if folder not in before]
    return new


def wait_until(is_so: Callable[[], bool], job: Submission) -> None:
    """Returns when `is_so()`; fails with the job's log where the job ends before."""
    while not is_so():
        ended = not is_active(job)
        assert is_so() or not ended, Path(job.log).read_text()
        time.sleep(0.2)


def last_step() -> int:
    """The number of steps that the run has made."""
    return len(train_lines(RUN))


def test_a_run_in_a_container_is_preempted_and_resumes(box: Path) -> None:
    """SIGUSR2 reaches the ranks below Apptainer, and no other process in between. The run has more steps than it can
    make, until the last start.
    """
    folder, job = launch_in_box("--train.steps", "1000000")
    wait_until(lambda: last_step() >= 2, job)
    os.kill(int(job.job), signal.SIGUSR2)
    wait_until(lambda: history(folder) == ["preempted"], job)
    saved = last_step()
    wait_until(lambda: last_step() > saved, job)
    os.killpg(int(job.job), signal.SIGTERM)
    while is_active(job):
        time.sleep(0.2)
    assert history(folder) == ["preempted", "stopped"]
    log = Path(job.log).read_text()
    assert f"resumes from runs/my/checkpoints/step-{saved:06d}" in log and "apptainer exec --nv --bind" in log
    last = last_step() + 4
    folder, job = launch_in_box("--train.steps", str(last))
    wait_until(lambda: history(folder) != [], job)
    assert history(folder) == ["done"]
    assert [line["step"] for line in train_lines(RUN)] == list(range(1, last + 1))


def test_a_folder_that_is_not_bound_is_not_seen(box: Path) -> None:
    """So the test above shows that the folders are those that a run needs."""
    look = ["sh", "-c", f"echo $CONTAINER; ls {box / 'model'}"]
    words = ["apptainer", "exec", "--nv", "--bind", str(box / "work"), "--pwd", str(box / "work"), "image.sif", *look]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout == "yes\n" and done.returncode != 0
