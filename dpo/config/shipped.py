"""The configs that come with the package: in a wheel they lie in `dpo/configs`, in a clone beside `dpo`."""

from collections.abc import Sequence
from pathlib import Path

from dpo.command.likeness import closest

PACKAGE = Path(__file__).parents[1]


def shipped_configs(package: Path = PACKAGE) -> Sequence[Path]:
    """Returns the shipped config files, sorted by name, those of subfolders last. `package`: the folder of `dpo`."""
    folders = (package / "configs", package.parent / "configs")
    found = (sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file)) for folder in folders)
    return next((files for files in found if files), [])


def near_config(path: str, shipped: Sequence[Path]) -> str | None:
    """Returns the config that a path was probably meant to be: a YAML file of the same folder, or a shipped one; None
    where none is like it.

    Args:
        path: a file that does not exist.
        shipped: the shipped configs.
    """
    beside = sorted(Path(path).parent.glob("*.y*ml"))
    files = {file.stem: str(file) for file in (*shipped, *beside)}
    stem = closest(Path(path).stem, files)
    return files[stem] if stem else None
