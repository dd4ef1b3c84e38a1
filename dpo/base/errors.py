"""The ways in which a program of this package ends early; `dpo.distributed.program` turns them into exit codes."""


class UserError(ValueError):
    """The user's input is wrong: exit code 2.

    The message is one line that says where (`FILE or command line: KEY`, or `file:line`), what, and what would be
    right.
    """


class RunError(RuntimeError):
    """Something was found while running (a gradient that is not finite, a failed self-check): exit code 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it had, after `step` updates: exit code 0."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from here")
        self.step = step
