"""Writes checkpoints in a thread while training continues.

With `checkpoint.save_every` 2, on every rank:

    training thread      step 2   save(2)   step 3        step 4   save(4)                   step 5 ...
    copy stream, CUDA             copies of step 2                           copies of step 4
    checkpoint thread 2           waits for the copies, writes files, commits
    checkpoint thread 4                                                      waits for the copies, writes ...

`save(2)` enqueues copies of the state to host memory and starts thread 2. The forward and backward passes of step 3
overlap with the copies; its update waits for them on the device (`HostCopies.hold`, called before each update).
`save(4)` first waits until thread 2 has ended, since there is one set of buffers and one checkpoint in flight.

A checkpoint thread runs collectives: all ranks write their shards, rank 0 commits (`store.write_checkpoint`). It uses a
process group of its own, so that they do not mix with those of the training thread.

Where thread 2 fails with RunError, rank 0 warns at once, and training continues: `save(4)` tries again. Where thread 4
fails as well, `save(6)` raises its RunError on every rank. `finish` raises the error of the last checkpoint.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from dpo.base.errors import Preempted, RunError
from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.host_copies import HostCopies
from dpo.checkpoint.plans import forget_plans
from dpo.checkpoint.state import RunState
from dpo.checkpoint.store import Shelf, state_tensors, write_checkpoint
from dpo.distributed.world import use_device
from dpo.terminal.console import warn
from dpo.terminal.stalls import telling_stalls

SECONDS_OF_A_CHECKPOINT = 600.0
"""Rank 0 warns where a checkpoint takes longer to be written: a large one may take minutes."""


class Saver:
    """Saves a run's checkpoints; at most one is in flight. Every rank must make the same calls in the same order.

    From the first save on, each rank keeps a copy of its shards of weights and optimizer state in host memory (see
    `HostCopies`): with float32 master weights 4 bytes per parameter for the weights, and 4 for each element that the
    optimizer keeps per parameter (RMSprop 1, with momentum 2; AdamW 2; SGD with momentum 1), divided by
    `parallel.shard` ranks.
    """

    def __init__(self, shelf: Shelf, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.shelf, self.model, self.optimizer = shelf, model, optimizer
        self.world = shelf.world
        self.copies = HostCopies(self.world.device)
        self.writing: Future[None] | None = None
        self.has_failed = False
        """Whether the last checkpoint whose thread has ended failed."""

    def save(self, state: RunState, before_commit: Callable[[], None]) -> None:
        """Waits for the checkpoint in flight, enqueues the copies of the state, and starts the thread that writes them.

        Every rank must get here, or the rest hang. A checkpoint that cannot be written does not end the run; two in
        succession do.

        Args:
            state: the step and identity; `state.step` updates were made.
            before_commit: called on rank 0, in the checkpoint thread, before the checkpoint gets its final name.

        Raises:
            RunError: on every rank, where the last two checkpoints could not be written.
        """
        failure = self._wait_for_writing()
        if failure is not None and (self.has_failed or not isinstance(failure, RunError)):
            raise failure
        self.has_failed = failure is not None
        tensors = self.copies.take(state_tensors(self.model, self.optimizer))
        target = checkpoint_path(self.shelf.run_dir, state.step)

        def write() -> None:
            use_device(self.world.device)
            self.copies.wait()
            try:
                with telling_stalls(target, SECONDS_OF_A_CHECKPOINT) if self.world.is_main else nullcontext():
                    write_checkpoint(self.shelf, state, tensors, before_commit)
            except RunError as failure:
                if self.world.is_main:
                    warn(f"a checkpoint was not written: {failure}")
                raise

        self.writing = _start(write, target.name)

    def finish(self) -> None:
        """Waits until the checkpoint in flight is committed. Raises RunError, on every rank, where it failed."""
        failure = self._wait_for_writing()
        if failure is not None:
            raise failure

    def _wait_for_writing(self) -> BaseException | None:
        """Waits for the checkpoint in flight; returns its failure, or None."""
        writing, self.writing = self.writing, None
        return writing.exception() if writing else None

    def leave(self, seconds: float) -> None:
        """Waits at most `seconds` for the checkpoint in flight of a failed run; warns where it is not written by then.

        That checkpoint predates the failure and is valid, and the threads of other ranks may need this rank's thread to
        complete it. If those ranks are gone, it never completes: hence the limit.
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
    shelf: Shelf, model: nn.Module, optimizer: torch.optim.Optimizer, timeout_seconds: int
) -> Iterator[Saver]:
    """Yields a saver. The end of the context commits its last checkpoint, also after a preemption.

    Every rank must get here, and to the end of the context, or the rest hang.

    Args:
        shelf: where the checkpoints go, by which ranks; its process group is destroyed at the end.
        model: the sharded model.
        optimizer: its optimizer; a hook makes each update wait for the copies.
        timeout_seconds: of the wait for the last checkpoint after a failed run.

    Raises:
        RunError: on every rank, where the last checkpoint could not be written.
    """
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
    dist.destroy_process_group(shelf.group)


def _start(work: Callable[[], None], name: str) -> Future[None]:
    """Starts a daemon thread that does `work`; returns a future of its end or its failure."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            work()
            result.set_result(None)
        except BaseException as failure:
            result.set_exception(failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
