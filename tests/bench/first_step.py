"""A run of `dpo.train` that measures itself: `python -m tests.bench.first_step --config FILE`, under torchrun too.

Rank 0 prints one JSON object as its last line: seconds of the imports; seconds from entering `main` to the end of the
first step, and of the processor in them, which other programs on the machine disturb less; and the private memory of
the process (Private_Clean + Private_Dirty of /proc/self/smaps_rollup, bytes) after the first step and after the last.
With `--profile` among the words, cProfile's table of the way to the first step comes before it.
"""

import cProfile
import json
import os
import pstats
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

from dpo.distributed.program import run_program  # noqa: E402
from dpo.train import loop, program  # noqa: E402  (what importing takes is measured)

IMPORTED = time.perf_counter()


@dataclass(frozen=True)
class FirstStep:
    """What a run tells of itself."""

    import_seconds: float
    seconds: float
    cpu_seconds: float
    private_bytes: int
    private_bytes_at_end: int


def private_bytes() -> int:
    """Pages that this process alone maps, clean ones included: memory-mapped files that it has looked at count."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


def measured(profile: cProfile.Profile | None) -> FirstStep | None:
    """Trains as the command line says; None where the run came to no step."""
    found: list[FirstStep] = []
    step_of_a_run = loop._step

    def step(*args: Any) -> Any:
        result = step_of_a_run(*args)
        seconds, cpu, memory = time.perf_counter() - entered, time.process_time() - cpu_before, private_bytes()
        if not found and profile:
            profile.disable()
        first = found[0] if found else FirstStep(IMPORTED - STARTED, seconds, cpu, memory, memory)
        found[:] = [replace(first, private_bytes_at_end=memory)]
        return result

    loop._step = step
    entered, cpu_before = time.perf_counter(), time.process_time()
    if profile:
        profile.enable()
    program.main()
    return found[0] if found else None


def main() -> None:
    profile = cProfile.Profile() if "--profile" in sys.argv else None
    sys.argv = [word for word in sys.argv if word != "--profile"]
    result = measured(profile)
    if result and os.environ.get("RANK", "0") == "0":
        if profile:
            pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    code = run_program(main)
    sys.stdout.flush()
    os._exit(code)
