"""`python -m dpo.train`. A single rank checks its command line before torch is imported, which takes seconds."""

import os
import sys

from dpo.command.exits import run_program, slow_imports
from dpo.command.rank import is_rank
from dpo.machine.job import check_tasks
from dpo.train.words import read_arguments


def check_words() -> None:
    """Raises UserError where the command line is wrong. The ranks of torchrun check it later, when they can end
    together.
    """
    if not is_rank(os.environ):
        read_arguments()
        check_tasks(os.environ)


if __name__ == "__main__":
    code = run_program(check_words)
    if code:
        sys.exit(code)
    with slow_imports():
        from dpo.distributed.program import exit_program
        from dpo.run_folder.advice import AFTER_TRAINING
        from dpo.train.program import main

    exit_program(main, AFTER_TRAINING)
