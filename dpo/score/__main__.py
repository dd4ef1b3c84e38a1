"""`python -m dpo.score`."""

from dpo.base.command import check_words
from dpo.score.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    from dpo.distributed.program import exit_program
    from dpo.score.program import main

    exit_program(main)
