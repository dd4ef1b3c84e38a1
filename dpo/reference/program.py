"""Computes the reference's log-probabilities of a run's pairs into the cache, and does not train.

    torchrun --standalone --nproc-per-node 8 -m dpo.reference --config FILE

The training program does the same before its first step.
"""

from dpo.base.errors import UserError
from dpo.batch.packer import make_packer
from dpo.config import Config
from dpo.config.loss_facts import losses_that
from dpo.disk.storage import check_cache
from dpo.distributed.preemption import listen_for_stop
from dpo.distributed.startup import open_world, start_devices
from dpo.model.build import read_start
from dpo.model.policy import Policy
from dpo.model.warm_up import load_and_warm
from dpo.ref_logps.cache import open_cache
from dpo.ref_logps.fill import fill
from dpo.reference.arguments import read_arguments
from dpo.run.inputs import read_inputs


def fill_alone(config: Config) -> None:
    """Computes the rows that the cache lacks for the data of a config. Every rank must get here, or the rest hang.

    Raises UserError where the loss has no reference or the input is wrong, and Preempted where a rank is asked to stop.
    """
    if not config.loss.facts.uses_reference:
        valid = ", ".join(losses_that(lambda facts: facts.uses_reference))
        raise UserError("loss.name", f"{config.loss.name} has no reference to compute", valid)
    parallel = config.parallel
    with (
        listen_for_stop() as stop_requested,
        open_world(parallel.setup_timeout_seconds, parallel.replicate) as world,
    ):
        check_cache(config, world)
        inputs = read_inputs(config, world)
        start_devices(world, config.parallel.timeout_seconds)
        source = inputs.reference
        packer = make_packer(config, world, source.config)

        def reference() -> Policy:
            policy = load_and_warm(config, world, source, packer, (False,))
            read_start(policy)
            return policy

        sets = [inputs.data.train, inputs.data.eval]
        fill(open_cache(config, source.hash, world), sets, reference, packer, world, stop_requested)


def main() -> None:
    """Runs `python -m dpo.reference`."""
    fill_alone(read_arguments())
