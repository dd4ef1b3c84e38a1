"""A home folder that cannot be written to, as on the compute nodes of some clusters: the caches lie elsewhere."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo.config import to_yaml
from tests.support.runs import error_lines, save_six_steps, six_steps

RIGHTS = "-dac_override,-dac_read_search,-fowner"
"""Capabilities by which root writes everywhere."""


def train_at_home(folder: Path, caches: Mapping[str, Path]) -> subprocess.CompletedProcess[str]:
    """A run of two steps as a user who may not write to the home folder, which is empty; skips where this user may."""
    home = folder / "home"
    home.mkdir()
    prefix: list[str] = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root needs setpriv to give up its rights")
        os.chown(home, 65534, 65534)
        prefix = ["setpriv", "--bounding-set", RIGHTS, "--inh-caps", RIGHTS]
    home.chmod(0o555)
    config = six_steps(save_six_steps(folder), folder / "run", reference__cache_dir=None, train__steps=2)
    (folder / "run.yaml").write_text(to_yaml(config))
    foreign = ("HF_HOME", "DPO_CACHE", "HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment |= {"HOME": str(home)} | {name: str(path) for name, path in caches.items()}
    command = [*prefix, sys.executable, "-m", "dpo.train", "--config", str(folder / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert list(home.iterdir()) == []
    return done


def test_a_run_writes_nothing_to_the_home_folder(tmp_path: Path) -> None:
    done = train_at_home(tmp_path, {"HF_HOME": tmp_path / "hf", "DPO_CACHE": tmp_path / "cache"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("DPO_CACHE", "reference.cache_dir: cannot write to {home}/.cache/dpo: Permission denied; valid: "),
        ("HF_HOME", "HF_HOME: cannot write to {home}/.cache/huggingface/datasets: Permission denied; valid: "),
    ],
)
def test_a_cache_at_home_is_one_line_with_its_variable(tmp_path: Path, missing: str, line: str) -> None:
    caches = {"HF_HOME": tmp_path / "hf", "DPO_CACHE": tmp_path / "cache"}
    done = train_at_home(tmp_path, {name: path for name, path in caches.items() if name != missing})
    assert done.returncode == 2
    (error,) = error_lines(done.stderr)
    assert line.format(home=tmp_path / "home") in error
    assert missing in error
