"""The user's mistakes, and the exit codes of every command."""

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130  # as shells say it of SIGINT
EXIT_BROKEN_PIPE = 141  # as shells say it of SIGPIPE
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint is on disk, run the same command again


class UserError(ValueError):
    """A mistake the user can fix. The message is one line: what was given, what is allowed, what to do."""


class MachineError(UserError):
    """What the machine refuses, such as room on a disk: nothing is wrong with what was asked, so it may work later."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it had; the message says where."""


def first_line(error: Exception) -> str:
    """Returns what a library says of an error, without what it says on further lines."""
    said = str(error).strip()
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__
