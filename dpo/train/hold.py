"""Holds the run folder, so that no other start writes to it: before anything is written there, to the end of the run.

    refuse_if_in_use   first of all, to spare the user the wait: the input may take minutes to read
    holding_folder     when the input is right and steps are left: a start that is refused, or has nothing to do, makes
                       no folder and waits for no one
    contents_of        compared before and after: another start may have ended in between, which changes from where this
                       one resumes

Every rank must get to each function, or the rest hang.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dpo.checkpoint.folders import checkpoints_of
from dpo.config import Config
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.run_folder.files import FINAL
from dpo.run_folder.holder import this_process
from dpo.run_folder.lock import Lock, holding, refuse_if_held
from dpo.terminal.stalls import telling_stalls


def refuse_if_in_use(config: Config, world: World) -> None:
    """Raises UserError, on every rank, where another start holds the run folder. A folder with a model may be that of a
    finished run, which is told as such: there `holding_folder` refuses.
    """
    on_main(world, lambda: _refuse(Path(str(config.train.run_dir))))


def _refuse(run_dir: Path) -> None:
    with telling_stalls(run_dir):
        if not (run_dir / FINAL).exists():
            refuse_if_held(run_dir, this_process(os.environ))


@contextmanager
def holding_folder(config: Config, world: World) -> Iterator[Callable[[], None]]:
    """Holds the run folder during a with-block. Yields a function that raises FolderLost, on rank 0, where another
    start has taken the folder; on other ranks it does nothing.

    Raises:
        UserError: on every rank, where another start holds the folder.
    """
    run_dir, locks = Path(str(config.train.run_dir)), list[Lock]()
    with ExitStack() as stack:

        def take() -> None:
            with telling_stalls(run_dir):
                locks.append(stack.enter_context(holding(run_dir, this_process(os.environ))))

        on_main(world, take)
        yield locks[0].check if locks else _nothing_to_check


def _nothing_to_check() -> None:
    """Takes the place of `Lock.check` on the other ranks."""


def contents_of(config: Config, world: World) -> dict[str, int]:
    """Returns what decides from where a run resumes and whether it is done: the times of change of its checkpoints and
    of its model, by name; the same on every rank.
    """
    return on_main(world, lambda: _contents(Path(str(config.train.run_dir))))


def _contents(run_dir: Path) -> dict[str, int]:
    times = {}
    for path in (*checkpoints_of(run_dir), run_dir / FINAL):
        with suppress(FileNotFoundError):  # another start that holds the folder removes its older checkpoints
            times[str(path)] = path.stat().st_mtime_ns
    return times
