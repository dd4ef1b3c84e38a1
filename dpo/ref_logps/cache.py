"""The cache of one reference: its folder, the facts that its rows depend on, and how this run computes rows.

The value of a row depends on the reference's weights, on the numerics, and on the tokens of prompt and completion, and
on nothing else. The first two name the folder:

    ROOT/3f9a.../about.json        the facts: {"model": hash by content, "dtype": ..., "attention": ...}
                 rows-51c2....bin  rows by the key of their tokens (`blocks.py`)
                 table-....npy     the rows of a run's data, sorted (`table.py`)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo.base.errors import UserError
from dpo.base.files import default_cache_dir, write_atomically
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes
from dpo.config import Config
from dpo.distributed.collectives import all_gather
from dpo.distributed.world import World
from dpo.model.parallelize import compute_dtype, is_compiled
from dpo.ref_logps.blocks import ROW, Circumstances, reference_key
from dpo.ref_logps.circumstances import circumstances_here, joined_circumstances, numerics

ABOUT = "about.json"


def _nothing() -> int:
    """Returns the bytes of no other files."""
    return 0


@dataclass(frozen=True)
class RefCache:
    """Names the part of the cache that holds the rows of one reference under the numerics of one run."""

    root: Path
    """`reference.cache_dir`."""
    facts: Mapping[str, str]
    """The reference's hash by content, and the numerics (see `circumstances.numerics`)."""
    circumstances: Circumstances
    """How this run computes rows; not part of their key."""
    beside: Callable[[], int] = _nothing
    """Returns the bytes that the run writes later, and cannot do without, on the file system of the cache."""

    @property
    def folder(self) -> Path:
        """Returns the folder of the rows."""
        return self.root / reference_key(self.facts)

    def check_own(self) -> None:
        """Raises UserError where the folder is that of another reference, by its facts: it was renamed or copied. Facts
        that are missing or damaged are passed over.
        """
        try:
            facts = json.loads((self.folder / ABOUT).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return
        if isinstance(facts, dict) and reference_key(facts) != self.folder.name:
            what = f"{self.folder} holds log-probabilities of another reference, {reference_key(facts)} by its {ABOUT}"
            raise UserError("reference.cache_dir", what, "the folder under its own name; without it they are computed")

    def begin(self, num_rows: int) -> None:
        """Writes the facts beside the rows. Raises UserError where `num_rows` more rows, and what the run
        writes later, do not fit on the disk.
        """
        beside = self.beside()
        shortage = find_shortage(self.folder, num_rows * ROW.itemsize + beside)
        if shortage:
            later = f", with {shown_bytes(beside)} that the run needs on this disk," if beside else ""
            what = shortage.message(f"a cache of {num_rows:,} rows{later}")
            raise UserError(
                "reference.cache_dir", what, "a folder with room (DPO_CACHE names it where the key is null)"
            )
        write_atomically(self.folder / ABOUT, json.dumps(self.facts, indent=1).encode())


def open_cache(config: Config, reference_hash: str, world: World) -> RefCache:
    """Returns the cache of a reference under the numerics of the config. Creates nothing.

    Every rank must get here, or the rest hang.

    Args:
        config: gives `reference.cache_dir` and the numerics.
        reference_hash: the hash of the reference by content (`weights.hash_model`).
        world: the ranks.
    """
    compute = compute_dtype(config.parallel, getattr(torch, config.model.dtype), world.device)
    facts = {"model": reference_hash} | numerics(config.model.dtype, compute, world.device, config.parallel.tf32)
    own = circumstances_here(world.device, is_compiled(config.parallel, world.device))
    return RefCache(cache_root(config), facts, joined_circumstances(all_gather(own)))


def cache_root(config: Config) -> Path:
    """Returns the folder of the cached log-probabilities of all references: `reference.cache_dir` or the default."""
    return Path(config.reference.cache_dir).expanduser() if config.reference.cache_dir else default_cache_dir()
