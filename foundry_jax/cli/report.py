"""Writes the report of a finished sweep: python -m foundry_jax.cli.report runs/sweeps/norm-layernorm"""

import argparse
import json
import sys

from foundry_jax import command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.report",
        description="Writes report.html, report.md and report/*.png into the folder of a finished sweep.",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep's folder")
    parser.add_argument("--json", action="store_true", help="print the decision and the paths as JSON")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    from foundry_jax.search import report  # imported here: --help must not wait for matplotlib

    written = report.write(flags.sweep)
    if not flags.json:
        print(f"report: {written.html}\nlog entry: {written.markdown}")
        return
    sweep = written.sweep
    print(
        json.dumps(
            {
                "report": str(written.html),
                "markdown": str(written.markdown),
                "charts": [str(path) for path in written.pictures],
                "decision": sweep.facts["decision"],
            }
        )
    )


if __name__ == "__main__":
    command.run(main)
