"""`python -m dpo.reference`."""

from dpo.command.exits import check_words, slow_imports
from dpo.reference.arguments import read_arguments
from dpo.run_folder.advice import AFTER_REFERENCE

if __name__ == "__main__":
    check_words(read_arguments)
    with slow_imports():
        from dpo.distributed.program import exit_program
        from dpo.reference.program import main

    exit_program(main, AFTER_REFERENCE)
