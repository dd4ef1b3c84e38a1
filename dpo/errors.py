"""The two ways in which a program of this package ends early; `dpo.distributed` turns them into exit codes."""


class UserError(ValueError):
    """The user's input is wrong: exit code 2.

    The message is one line that says where (`FILE or command line: KEY`, or `file:line`), what, and what would be
    right.
    """


class RunError(RuntimeError):
    """Something was found while running (a gradient that is not finite, a failed self-check): exit code 1."""
