"""Checkpoints are written by a thread while training goes on: the training thread only copies the state."""

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dpo.base.console import warn
from dpo.base.errors import Preempted, RunError
from dpo.checkpoint.host_copies import HostCopies
from dpo.checkpoint.store import RunState, Shelf, checkpoint_path, forget_plans, state_tensors, write_checkpoint
from dpo.distributed.world import World, use_device


class Saver:
    """Saves a run's checkpoints, at most one at a time. Every rank makes the same calls in the same order.

    From the first save on each rank keeps a copy in host memory of its part of weights and optimizer state (see
    `HostCopies`): 4 bytes a parameter for the weights in float32 and 4 for each buffer of the optimizer (RMSprop 1,
    with momentum 2; AdamW 2; SGD with momentum 1), divided by `parallel.shard` ranks.
    """

    def __init__(self, shelf: Shelf, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.shelf, self.model, self.optimizer = shelf, model, optimizer
        self.world = shelf.world
        self.copies = HostCopies(self.world.device)
        self.writing: Future[None] | None = None
        self.has_failed = False
        """Whether the last checkpoint that ended could not be written."""

    def save(self, state: RunState, before_commit: Callable[[], None]) -> None:
        """Copies weights and optimizer as they are after `state.step` updates, and has a thread write them.

        `before_commit` runs on rank 0 in that thread, before the checkpoint gets its name. One that cannot be written
        is told by rank 0 when that is known, and is no reason not to try this one; two in a row end the run: RunError,
        on every rank.
        """
        failure = self._ended()
        if failure is not None and (self.has_failed or not isinstance(failure, RunError)):
            raise failure
        self.has_failed = failure is not None
        tensors = self.copies.take(state_tensors(self.model, self.optimizer))

        def write() -> None:
            use_device(self.world.device)
            self.copies.wait()
            try:
                write_checkpoint(self.shelf, state, tensors, before_commit)
            except RunError as failure:
                if self.world.is_main:
                    warn(f"a checkpoint was not written: {failure}")
                raise

        self.writing = _start(write, checkpoint_path(self.shelf.run_dir, state.step).name)

    def finish(self) -> None:
        """Waits until the checkpoint is committed. Raises RunError, on every rank, where that failed."""
        failure = self._ended()
        if failure is not None:
            raise failure

    def _ended(self) -> BaseException | None:
        """Waits for the checkpoint that is being written, and says why it failed."""
        writing, self.writing = self.writing, None
        return writing.exception() if writing else None

    def leave(self, seconds: float) -> None:
        """Waits where the run has failed by then: what is being written is of before, and good, and the other ranks'
        threads may need this one's; not for ever, since a rank may be gone. Says so where it was in vain.
        """
        writing, self.writing = self.writing, None
        if writing is None:
            return
        wait([writing], seconds)
        failure = writing.exception() if writing.done() else f"it took over {seconds} seconds"
        if failure and self.world.is_main:
            warn(f"the last checkpoint was not written: {failure}")


@contextmanager
def open_saver(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int | None,
    world: World,
    timeout_seconds: int,
) -> Iterator[Saver]:
    """A saver whose last checkpoint is committed when this ends, be it that the run was preempted. Every rank must get
    here, and to its end.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    shelf = Shelf(run_dir, keep, uuid.uuid4().hex, world, group)
    saver = Saver(shelf, model, optimizer)
    hook = optimizer.register_step_pre_hook(lambda *_: saver.copies.hold())
    try:
        yield saver
        saver.finish()
    except Preempted:
        saver.finish()
        raise
    except Exception:
        saver.leave(timeout_seconds)
        raise
    finally:
        hook.remove()
        saver.copies.buffers.clear()
        forget_plans(shelf.plans)
    dist.destroy_process_group(group)


def _start(work: Callable[[], None], name: str) -> Future[None]:
    """When a thread has done `work`, or how it failed. The thread keeps no process from ending."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            work()
            result.set_result(None)
        except BaseException as failure:
            result.set_exception(failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
