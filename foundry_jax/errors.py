"""The user's mistakes, the exit codes, and how a command reports both."""

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint is on disk, run the same command again


class UserError(ValueError):
    """A mistake the user can fix. The message is one line: what was given, what is allowed, what to do."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it had; the message says where."""


def run_command(command: Callable[[], None]) -> None:
    """Runs a command and exits: 0 done, 1 the user's mistake in one line, 75 preempted."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
