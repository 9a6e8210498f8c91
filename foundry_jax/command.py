"""What every command does alike: overrides, plain logs, exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from foundry_jax.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted, UserError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command line, and its overrides: "--config.seed=1" becomes "seed=1"."""
    flags, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return flags, [text.removeprefix("--config.") for text in rest]


def run(command: Callable[[], None]) -> None:
    """Runs a command and exits: 0 done, 1 the user's mistake in one line, 75 preempted with a checkpoint."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("foundry_jax").setLevel(logging.INFO)  # other packages only warn
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
