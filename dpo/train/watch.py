"""Progress bar, profiler and warnings around the steps of a run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from dpo.model.kernels import describe_graphs, num_graphs
from dpo.run_folder.files import PROFILE
from dpo.terminal.console import Progress, progress, warn
from dpo.train.profiling import StepHook, profiled
from dpo.train.setup import Run


def step_bar(run: Run) -> AbstractContextManager[Progress]:
    """Returns the progress bar of a terminal. Without a terminal it prints nothing; logged steps have lines."""
    steps = run.inputs.last_step
    return progress("train", steps, "steps", run.world.is_main, done=run.start.step, lines_elsewhere=False)


def profiled_steps(run: Run) -> AbstractContextManager[tuple[StepHook, StepHook]]:
    """Records the steps of `train.profile_steps` on rank 0 (see `profiled`); warns where none of them will be run."""
    steps = run.config.train.profile_steps if run.world.is_main else None
    first, last = run.start.step + 1, run.inputs.last_step
    if steps is not None and (steps[1] < first or steps[0] > last):
        warn(f"train.profile_steps {list(steps)}: no step is profiled: this start runs steps {first} to {last}")
    return profiled(steps, run.dir / PROFILE, run.world.device)


@contextmanager
def telling_new_graphs(run: Run, what: str) -> Iterator[None]:
    """Warns if the with-block compiled graphs: all ranks waited for them. `what` names the block."""
    before = num_graphs()
    yield
    new = num_graphs() - before
    if new and run.world.is_main:
        kinds = f" ({describe_graphs(run.policy.graphs)} in all)" if run.policy.graphs else ""
        warn(f"{what}: {new} more graphs were compiled, while every rank waited{kinds}")
