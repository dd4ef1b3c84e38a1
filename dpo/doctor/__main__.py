"""`python -m dpo.doctor`."""

from dpo.distributed.program import exit_program
from dpo.doctor.program import main

if __name__ == "__main__":
    exit_program(main)
