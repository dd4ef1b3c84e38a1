"""`python -m dpo.report`."""

import sys

from dpo.command.exits import run_program
from dpo.report.program import main

if __name__ == "__main__":
    sys.exit(run_program(main))
