"""The reference's log-probabilities of a run's pairs, from the cache or computed into it.

    torchrun --standalone --nproc-per-node 8 -m dpo.reference --config FILE

fills the cache alone; the training program does the same before its first step.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo.base.console import say
from dpo.base.errors import UserError
from dpo.batch.packer import Packer, make_packer
from dpo.config import Config, load_config
from dpo.data.pair_set import PairSet
from dpo.distributed.preemption import StopRequest, listen_for_stop
from dpo.distributed.program import exit_program
from dpo.distributed.world import World, all_gather, open_world, start_devices
from dpo.model.parallelize import compute_dtype, is_compiled
from dpo.model.policy import Policy
from dpo.model.warm_up import load_and_warm
from dpo.ref_logps.blocks import default_cache_dir, reference_key
from dpo.ref_logps.fill import ReferencePass, fill, joined_making, making, numerics
from dpo.ref_logps.table import RefTable
from dpo.run.inputs import read_inputs
from dpo.step.objective import has_reference


def fill_cache(
    config: Config,
    world: World,
    reference_hash: str,
    sets: Sequence[PairSet],
    reference: Callable[[], Policy],
    packer: Packer,
    stop_requested: StopRequest,
) -> tuple[RefTable, ReferencePass]:
    """The rows of all pairs of `sets`, and what it took to have them. Every rank must get here.

    `reference()` gives the model, whose hash by content is `reference_hash`; it is called only where a row is missing.
    """
    compute = compute_dtype(config.parallel, packer.dtype, world.device)
    facts = {"model": reference_hash} | numerics(config.model.dtype, compute, world.device, config.parallel.tf32)
    root = cache_root(config)
    head_bytes = config.parallel.head_memory_mib * 2**20
    now = joined_making(all_gather(making(world.device, is_compiled(config.parallel, world.device))))
    rows, done = fill(
        sets, root / reference_key(facts), facts, now, reference, packer, head_bytes, world, stop_requested
    )
    if world.is_main:
        say(f"reference: {done.rows_computed} log-probabilities computed, {done.rows_reused} from the cache {root}")
    return rows, done


def cache_root(config: Config) -> Path:
    """The folder of the cached log-probabilities, those of all references."""
    return Path(config.reference.cache_dir).expanduser() if config.reference.cache_dir else default_cache_dir()


def fill_alone(config: Config) -> None:
    """Fills the cache and ends."""
    if not has_reference(config.loss):
        raise UserError("loss.name: sft has no reference to compute; valid: dpo, ipo, hinge, robust")
    with listen_for_stop() as stop_requested, open_world(config.parallel.setup_timeout_seconds) as world:
        inputs = read_inputs(config, world)
        start_devices(world, config.parallel.timeout_seconds)
        source = inputs.reference
        packer = make_packer(config, world, source.config)

        def reference() -> Policy:
            return load_and_warm(config, world, source.config, source.folder, packer, (False,))

        sets = [inputs.data.train, inputs.data.eval]
        fill_cache(config, world, source.hash, sets, reference, packer, stop_requested)


def main() -> None:
    """`python -m dpo.reference`."""
    fill_alone(load_config(sys.argv[1:], "dpo.reference", "Computes the reference's log-probabilities into the cache."))


if __name__ == "__main__":
    exit_program(main)
