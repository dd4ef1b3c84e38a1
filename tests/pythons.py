"""Other Pythons on this machine: `python -m tests.pythons 3.12` prints the path of one, or ends with 1."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def interpreter(version: str) -> str | None:
    """Finds a Python that runs: one of pyenv's own, or on PATH, where pyenv puts names also of versions that are not
    chosen.
    """
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*map(str, sorted(folder.glob(f"{version}.*/bin/python"))), shutil.which(f"python{version}")]
    return next((python for python in found if python and _runs(python)), None)


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def main() -> int:
    """Prints the path of the version that the command line names; 1 where none is found."""
    found = interpreter(sys.argv[1])
    if found is not None:
        print(found)
    return int(found is None)


if __name__ == "__main__":
    sys.exit(main())
