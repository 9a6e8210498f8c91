"""Looks at contestants before anything is trained: python -m foundry_jax.search.probe SWEEP/probes/task.json

A process of its own, because the sweep's must not take the devices. task.json, and what it leaves of each contestant at
its "path" (see looking.py):

    {"spec": "configs/tiny.py", "overrides": [], "params": null,
     "contestants": [{"name": "mla", "argument": "attention=mla", "path": "SWEEP/probes/mla.json"}]}
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from foundry_jax import command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.search.probe", description="Looks at the contestants of a sweep, for the sweep."
    )
    parser.add_argument("task", type=pathlib.Path, metavar="TASK", help="a task.json")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    # Imported here: --help must not wait for JAX.
    from foundry_jax import compilation
    from foundry_jax.runfolder import write_json_atomic
    from foundry_jax.search.looking import look_at
    from foundry_jax.search.space import Contestant

    task = json.loads(flags.task.read_text(encoding="utf-8"))
    compilation.enable_cache()
    for entry in task["contestants"]:
        contestant = Contestant(entry["name"], entry["argument"])
        write_json_atomic(entry["path"], look_at(task["spec"], contestant, task["overrides"], task["params"]))


if __name__ == "__main__":
    command.restart_with_huge_pages()  # as the training process does: it is what the steps are timed for
    command.run(main)
