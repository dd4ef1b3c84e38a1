"""Damages to files: which, and how."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS: Mapping[str, Sequence[str]] = {
    "model": ["model/*"],
    "rows": ["hf/datasets/dpo/rows-*/**/*"],
    "tokens": ["hf/datasets/dpo/tokens-*/*"],
    "pairs": ["hf/datasets/dpo/pairs-*/**/*"],
    "reference": ["cache/*/*"],
    "run folder": ["RUN/*", "RUN/answers/*", "RUN/eval/*", "RUN/tensorboard/*"],
    "checkpoint": ["RUN/checkpoints/*/*"],
    "final": ["RUN/final/*"],
}
"""Kind -> patterns of the files below the root; RUN: the run folder."""
WAYS = ("cut", "flip", "delete", "swap")


@dataclass(frozen=True)
class Damage:
    """What happens to one file, or to two."""

    run: str
    """The run folder that is started: dead, or finished."""
    kind: str
    way: str
    file: str
    """Below the root."""
    other: str = ""
    """The file that it changes places with."""
    place: int = 0
    """The bit that is flipped, or the length to which the file is cut."""

    def __str__(self) -> str:
        return f"{self.run:8} {self.kind:10} {self.way:6} {self.file}{f' with {self.other}' if self.other else ''}"

    def apply(self, root: Path) -> None:
        """Does it to the files below `root`."""
        path = root / self.file
        content = path.read_bytes()
        match self.way:
            case "cut":
                path.write_bytes(content[: self.place])
            case "flip":
                byte, bit = divmod(self.place, 8)
                path.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :])
            case "delete":
                path.unlink()
            case "swap":
                path.write_bytes((root / self.other).read_bytes())
                (root / self.other).write_bytes(content)


FOUND: Sequence[Damage] = (
    Damage("dead", "model", "flip", "model/tokenizer_config.json", place=8 * 83),
    Damage("finished", "model", "flip", "model/model.safetensors.index.json", place=8 * 158),
)
"""Damages that once were used in silence or told without a name: of a key that no reader needs, of a file's name."""


def draw(root: Path, rng: random.Random) -> Damage:
    """Returns a damage of files below `root`; each kind, way and file is as likely as another of its sort."""
    run = rng.choice(("dead", "finished"))
    kind = rng.choice([kind for kind in KINDS if files_of(root, run, kind)])
    files = files_of(root, run, kind)
    file, way = rng.choice(files), rng.choice(WAYS)
    size = (root / file).stat().st_size
    others = [other for other in files if (root / other).read_bytes() != (root / file).read_bytes()]
    if way == "swap" and others:
        return Damage(run, kind, way, file, rng.choice(others))
    if way in ("swap", "delete") or not size:
        return Damage(run, kind, "delete", file)
    return Damage(run, kind, way, file, place=rng.randrange(8 * size if way == "flip" else size))


def files_of(root: Path, run: str, kind: str) -> list[str]:
    """Returns the files of a kind below the root, sorted."""
    found = [path for pattern in KINDS[kind] for path in root.glob(pattern.replace("RUN", run)) if path.is_file()]
    return sorted({path.relative_to(root).as_posix() for path in found if path.suffix != ".lock"})
