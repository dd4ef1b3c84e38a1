"""`python -m dpo.prepare`."""

import os
import sys

from dpo.command.exits import check_words, slow_imports
from dpo.prepare.arguments import read_arguments

NICENESS = 10
"""Added to the priority number of this process: other users of a login node come first."""
AFTER_STOP = "the same command continues: downloads and rows so far are in the caches"

if __name__ == "__main__":
    check_words(read_arguments)
    os.nice(NICENESS)
    with slow_imports():
        from dpo.distributed.program import run_program
        from dpo.prepare.program import main

    sys.exit(run_program(main, AFTER_STOP))
