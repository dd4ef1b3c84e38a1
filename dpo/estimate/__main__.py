"""`python -m dpo.estimate`."""

import sys

from dpo.distributed import run_program
from dpo.estimate.program import main

if __name__ == "__main__":
    sys.exit(run_program(main))
