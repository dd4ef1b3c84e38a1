"""`python -m dpo.demo`."""

import sys

from dpo.command.exits import check_words, slow_imports
from dpo.demo.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.demo.program import main
        from dpo.distributed.program import run_program

    sys.exit(run_program(main))
