"""`python -m dpo.inspect`."""

import sys

from dpo.distributed.program import run_program
from dpo.inspect.program import main

if __name__ == "__main__":
    sys.exit(run_program(main))
