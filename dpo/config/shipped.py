"""The configs that come with the package: in a wheel they lie in `dpo/configs`, in a clone beside `dpo`."""

from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_configs(package: Path = PACKAGE) -> Sequence[Path]:
    """Returns the shipped config files, sorted by name. `package`: the folder of `dpo`."""
    folders = (package / "configs", package.parent / "configs")
    return next((found for folder in folders if (found := sorted(folder.glob("*.yaml")))), [])


def valid_paths(files: Sequence[Path]) -> str:
    """Returns the text on valid paths of a config, which names the shipped files."""
    names = ", ".join(file.name for file in files)
    return f"the path of a YAML file, such as one of {files[0].parent}: {names}" if files else "the path of a YAML file"
