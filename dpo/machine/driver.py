"""The NVIDIA driver of a machine and the GPUs that torch finds with it: pure functions of `Facts`."""

from dataclasses import dataclass

from dpo.base.errors import UserError, render
from dpo.machine.facts import Facts
from dpo.machine.job import why_no_gpu

OLDEST_DRIVER = {"11": "450.80", "12": "525.60", "13": "580.65"}
"""Oldest NVIDIA driver for each major version of CUDA, on Linux:
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""


@dataclass(frozen=True)
class Problem:
    """A problem that would stop a run on a machine or keep it from the GPU, and the remedy."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return render(self.what, self.remedy)


def check_asked(facts: Facts) -> None:
    """Raises UserError where a job asked for GPUs, and torch finds none that it can use on this machine."""
    problem = problem_of_job(facts)
    if problem:
        raise UserError(facts.host, str(problem))


def unused_gpus(facts: Facts) -> str | None:
    """Returns the warning about GPUs that torch cannot use, where no job asked for them."""
    if facts.driver is None or facts.is_hidden or facts.asked or facts.gpu_index is not None:
        return None
    if facts.cuda is None:
        what = f"there are NVIDIA GPUs, and torch {facts.torch} is a build without CUDA: it uses the CPU"
        return f"{what}; for the GPUs install a CUDA build (https://pytorch.org/get-started/locally)"
    broken = broken_driver(facts)
    return (
        f"there are NVIDIA GPUs, and torch uses the CPU: {broken.what}; for the GPUs: {broken.remedy}"
        if broken
        else None
    )


def broken_driver(facts: Facts) -> Problem | None:
    """Returns the problem of a driver that does not start CUDA. torch may then report no GPU at all, and the rank
    computes on the CPU.
    """
    if facts.cuda_error is None or facts.driver is None or facts.is_hidden:
        return None
    major = facts.cuda.split(".")[0] if facts.cuda else ""
    oldest = OLDEST_DRIVER.get(major)
    newer = f"driver {oldest} or newer, or a torch built for an older CUDA" if oldest else "a newer driver"
    wanted = (
        f"{newer} (https://pytorch.org/get-started/locally)"
        if "too old" in facts.cuda_error
        else ("a job that asked for GPUs (sbatch --gpus-per-node), `nvidia-smi` without an error")
    )
    what = f"CUDA does not start: driver {facts.driver}, torch {facts.torch} for CUDA {facts.cuda}: {facts.cuda_error}"
    return Problem(what, f"{wanted}; {_ON_CPU}")


_ON_CPU = "CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"


def problem_of_job(facts: Facts) -> Problem | None:
    """Returns the problem of a job that asked for GPUs, and whose node has none that torch can use."""
    if facts.asked is None or facts.is_hidden or facts.gpu_index is not None:
        return None
    why = why_no_gpu(facts.torch, facts.cuda, facts.driver)
    found = Problem(why, f"a CUDA build of torch on a node with GPUs; {_ON_CPU}")
    cause = broken_driver(facts) or found
    return Problem(f"the job asked for GPUs ({facts.asked}), and torch finds none: {cause.what}", cause.remedy)
