"""`python -m dpo.push`."""

import sys

from dpo.command.exits import check_words, run_program, slow_imports
from dpo.push.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.push.program import main

    sys.exit(run_program(main))
