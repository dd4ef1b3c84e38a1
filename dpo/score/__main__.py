"""`python -m dpo.score`."""

from dpo.command.exits import check_words, slow_imports
from dpo.score.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.distributed.program import exit_program
        from dpo.score.program import main

    exit_program(main)
