"""`python -m dpo.inspect`."""

import sys

from dpo.command.exits import check_words, slow_imports
from dpo.inspect.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.distributed.program import run_program
        from dpo.inspect.program import main

    sys.exit(run_program(main))
