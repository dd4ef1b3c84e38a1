"""How a program of the launcher ends: as `dpo.distributed.program.run_program` says, without torch."""

import sys
from collections.abc import Callable

from dpo.base.console import set_quiet
from dpo.base.errors import RunError, UserError


def run_program(main: Callable[[], None]) -> int:
    """The exit code of a program: 0 done, 2 the user's input is wrong, 1 something found while running, 130 Ctrl-C."""
    set_quiet("--quiet" in sys.argv)
    try:
        main()
    except (UserError, RunError) as failure:
        tell_error(str(failure))
        return 2 if isinstance(failure, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as failure:
        tell_error(f"{type(failure).__name__}: {failure}")
        return 1
    return 0


def tell_error(message: str) -> None:
    """The one line that says why a program ends."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
