"""The wheel, built without network: all files of the rooms, the shipped configs, no tests; it runs without a clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpo import DISTRIBUTION

ROOT = Path(__file__).parents[2]
FOLDERS = {"dpo": "dpo", "launch": "launch", "configs": "dpo/configs"}
"""The folders of the clone, and where the wheel has them."""
FILES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
"""The call that pip makes, in the environment of the tests, which has setuptools because torch needs it."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, built from a copy: setuptools writes beside the sources, and packs what an earlier
    build left there.
    """
    sources, out, unpacked = (tmp_path_factory.mktemp(name) for name in ("sources", "out", "unpacked"))
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, sources)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=sources, check=True, capture_output=True)
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def run(unpacked: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS` in a folder, with the unpacked wheel before all that is installed."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def files_of(folder: Path) -> set[str]:
    """All files below a folder but compiled ones, relative to it."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_the_wheel_has_the_rooms_and_the_configs(unpacked: Path) -> None:
    files = {f"{there}/{name}" for here, there in FOLDERS.items() for name in files_of(ROOT / here)}
    expected = {name for name in files if not name.endswith("/README.md")}
    assert {"dpo/py.typed", "launch/py.typed", "dpo/inspect/page.html", "dpo/configs/pythia-2.8b_hh.yaml"} <= expected
    assert {name for name in files_of(unpacked) if ".dist-info/" not in name} == expected


def test_programs_run_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    for module in ("dpo", "dpo.train", "dpo.demo", "launch.submit"):
        done = run(unpacked, tmp_path, "-m", module, "--help")
        assert done.returncode == 0, done.stderr
        assert f"python -m {module}" in done.stdout or module in done.stdout
    assert not any(tmp_path.iterdir())


def test_the_shipped_configs_are_found(unpacked: Path, tmp_path: Path) -> None:
    """By the error of a path that is not there, and as `dpo.configs`; their text is that of the clone, where
    `tests/config` reads them.
    """
    configs = unpacked / "dpo" / "configs"
    done = run(unpacked, tmp_path, "-m", "dpo.train", "--config", "configs/pythia-2.8b_hh.yaml")
    assert done.returncode == 2
    assert f"did you mean {configs / 'pythia-2.8b_hh.yaml'}?" in done.stderr
    done = run(unpacked, tmp_path, "-c", "import dpo.configs; print(*dpo.configs.__path__)")
    assert done.stdout.split() == [str(configs)]
    for path in configs.rglob("*.yaml"):
        assert path.read_bytes() == (ROOT / "configs" / path.relative_to(configs)).read_bytes()


def test_the_command_dpo(unpacked: Path, tmp_path: Path) -> None:
    """pip makes a script of the entry point; a config is copied from the wheel into an empty folder."""
    (metadata,) = unpacked.glob("*.dist-info")
    assert "dpo = dpo.__main__:main" in (metadata / "entry_points.txt").read_text()
    assert metadata.name.startswith(DISTRIBUTION.replace("-", "_"))
    done = run(unpacked, tmp_path, "-m", "dpo", "configs", "data/hh", "my.yaml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my.yaml").read_bytes() == (ROOT / "configs/data/hh.yaml").read_bytes()


def test_a_file_of_the_user_hides_no_module(unpacked: Path, tmp_path: Path) -> None:
    """A dpo.py in the current folder, as scripts of other trainers are named: the script `dpo` does not import it."""
    (tmp_path / "dpo.py").write_text("raise SystemExit('the wrong dpo')\n")
    script = tmp_path / "bin" / "dpo"
    script.parent.mkdir()
    script.write_text("import sys\nfrom dpo.front.main import main\nsys.exit(main())\n")  # as pip writes it
    done = run(unpacked, tmp_path, str(script), "train", "--ranks", "2", "--config", "my.yaml")
    assert done.returncode == 2 and "cannot read 'my.yaml'" in done.stderr
