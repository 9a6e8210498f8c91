"""What every command does alike: overrides, plain logs, exit codes."""

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from foundry_jax.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted, UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line and exit code 1, like all others."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which `run` reports."""
        raise UserError(f"{message}; see {self.prog} --help.")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command line, and its overrides: "--config.seed=1" becomes "seed=1"."""
    flags, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return flags, [text.removeprefix("--config.") for text in rest]


def restart_with_huge_pages() -> None:
    """Restarts this process so that large arrays lie on huge pages, where Linux offers that on request.

    XLA:CPU takes fresh memory for every step; mapping it in pages of 4 KiB costs 40,000 page faults a step on
    configs/tiny.py. With huge pages a step takes 0.77 and 0.80 of the time there, 0.86 and 0.97 on the baseline
    with batch 8 (two runs, 2 cores, 2026-11).
    glibc reads the setting before Python starts, hence the restart. GLIBC_TUNABLES set by the user is left alone.
    """
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and switch.exists() and "[madvise]" in switch.read_text():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(command: Callable[[], None]) -> None:
    """Runs a command and exits: 0 done, 1 a mistake of the user in one line, 75 preempted and saved, 130 Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("foundry_jax").setLevel(logging.INFO)  # other packages only warn
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:  # a second Ctrl-C, or one before there is anything to save
        print("interrupted: nothing was saved since the last checkpoint", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
