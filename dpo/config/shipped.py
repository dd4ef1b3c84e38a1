"""The configs that come with the package: in a wheel they lie in `dpo/configs`, in a clone beside `dpo`."""

from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_configs(package: Path = PACKAGE) -> Sequence[Path]:
    """Returns the shipped config files, sorted by name, those of subfolders last. `package`: the folder of `dpo`."""
    folders = (package / "configs", package.parent / "configs")
    found = (sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file)) for folder in folders)
    return next((files for files in found if files), [])


def valid_paths(files: Sequence[Path]) -> str:
    """Returns the text on valid paths of a config, which names the shipped files, the first of which is in no subfolder
    of theirs.
    """
    if not files:
        return "the path of a YAML file"
    folder = files[0].parent
    names = ", ".join(file.relative_to(folder).as_posix() for file in files)
    return f"the path of a YAML file, such as one of {folder}: {names}"
