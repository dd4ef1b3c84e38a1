"""A program as one rank: `python -m dpo.front.rank PARENT MODULE WORDS`, which `dpo.front.parent` starts.

PARENT is the process that started it. The rank ends with it, however it ends: `kill -9` leaves no rank behind.
"""

import runpy
import sys

from dpo.base.workers import end_with
from dpo.front.stops import take_stops


def main() -> None:
    """Runs MODULE as `python -m` does."""
    parent, module, *words = sys.argv[1:]
    end_with(int(parent))
    take_stops()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
