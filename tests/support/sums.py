"""SHA256SUMS for a folder of a test."""

from pathlib import Path

from dpo.base.sums import SUMS, sha256_of, sums_text


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS for all files in a folder and below."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (folder / SUMS).write_text(sums_text({name: sha256_of(folder / name) for name in names if name != SUMS}))
