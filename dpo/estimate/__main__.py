"""`python -m dpo.estimate`."""

import os
import sys

from dpo.distributed.program import run_program
from dpo.estimate.program import main

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tracing a layer asks a GPU for its random state, which starts CUDA there
    sys.exit(run_program(main))
