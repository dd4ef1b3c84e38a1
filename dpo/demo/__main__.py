"""Runs `python -m dpo.demo`."""

import sys

from dpo.demo.program import main
from dpo.distributed.program import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
