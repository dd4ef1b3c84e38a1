"""`python -m dpo.replay`."""

from dpo.command.exits import check_words, slow_imports
from dpo.replay.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.distributed.program import exit_program
        from dpo.replay.program import main

    exit_program(main)
