"""`python -m dpo.doctor`."""

from dpo.doctor.program import main
from dpo.program import exit_program

if __name__ == "__main__":
    exit_program(main)
