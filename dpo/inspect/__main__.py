"""`python -m dpo.inspect`."""

import sys

from dpo.inspect.program import main
from dpo.program import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
