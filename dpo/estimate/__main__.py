"""`python -m dpo.estimate`."""

import os
import sys

from dpo.command.exits import check_words, slow_imports
from dpo.estimate.arguments import read_arguments

if __name__ == "__main__":
    check_words(read_arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tracing a layer asks a GPU for its random state, which starts CUDA there
    with slow_imports():
        from dpo.distributed.program import run_program
        from dpo.estimate.program import main

    sys.exit(run_program(main))
