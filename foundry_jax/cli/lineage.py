"""Shows how configs came to be what they are, and takes a promotion back: python -m foundry_jax.cli.lineage"""

import argparse
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax import command
from foundry_jax.errors import UserError

PROGRAM = "python -m foundry_jax.cli.lineage"
TRIED = "tried"
STDIN = "-"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [CONFIG...] [--undo] [--json] | tried MUTATION... | -",
        description="Prints what was promoted, kept and undone, of all configs in configs/ or of some.",
        epilog="tried attention=mla lists what came of it in earlier sweeps. With - the config is that of a sweep's "
        "--json on the standard input.",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG", help="config files; or tried and mutations; or -")
    parser.add_argument("--undo", action="store_true", help="take the newest promotion of the config back")
    parser.add_argument("--sweeps", default="runs/sweeps", metavar="FOLDER", help="of tried (default: runs/sweeps)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_intermixed_args(argv)
    if flags.undo and (len(flags.words) > 1 or flags.words[:1] in ([TRIED], [STDIN])):
        parser.error("--undo takes the promotion of one config back: name that config only")
    if flags.words == [TRIED]:
        parser.error("tried what? Name a mutation, such as tried attention=mla")
    return flags


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    if flags.words[:1] == [TRIED]:
        report, show = tried(",".join(flags.words[1:]), flags), show_tried
    elif flags.undo:
        report, show = undo(flags.words), show_undone
    else:
        report, show = trees(specs_of(flags.words)), show_trees
    print(json.dumps(report)) if flags.json else show(report)


def specs_of(words: Sequence[str]) -> list[str]:
    """Returns the configs to show: those named, that of the sweep on the standard input, or all with a lineage.

    Raises:
        UserError: what is on the standard input is not a sweep's result.
    """
    from foundry_jax.search import history

    if not words:
        return [str(path) for path in history.lineage_files()]
    if list(words) != [STDIN]:
        return list(words)
    try:
        return [json.load(sys.stdin)["config"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("The standard input is not the result of a sweep: pipe `sweep --json` into it.") from None


def trees(specs: Sequence[str]) -> dict[str, Any]:
    """Returns the lineage of each config: its file, its head, the promotions in force, and the tree of its records."""
    from foundry_jax.search import lineage

    found = {}
    for spec in specs:
        path = lineage.file_of(spec)
        _require_config(path)
        found[config_of(path)] = {
            "file": str(path),
            "head": lineage.head(path),
            "in_force": [promotion.name for promotion in lineage.promotions(path)],
            "tree": [entry.to_json() for entry in lineage.tree(path)],
        }
    return {"configs": found}


def undo(words: Sequence[str]) -> dict[str, Any]:
    """Returns what was taken back, and what is in force now.

    Raises:
        UserError: no promotion is in force, or it is not clear of which config.
    """
    from foundry_jax.search import history, lineage

    specs = list(words) or [str(path) for path in history.lineage_files() if lineage.promotions(path)]
    if len(specs) != 1:
        names = ", ".join(config_of(lineage.file_of(spec)) for spec in specs)
        raise UserError(f"--undo of which config? {f'Name one of {names}' if specs else 'None has a promotion'}.")
    path = lineage.file_of(specs[0])
    undone = lineage.undo(path, shlex.join([*PROGRAM.split(), *sys.argv[1:]]))
    in_force = [promotion.name for promotion in lineage.promotions(path)]
    return {"config": config_of(path), "undone": dict(undone.record), "in_force": in_force}


def tried(query: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the earlier contestants that had all mutations of the query."""
    import dataclasses

    from foundry_jax.search import history

    attempts = history.tried(query, sweeps=pathlib.Path(flags.sweeps))
    return {"query": query, "tried": [dataclasses.asdict(attempt) for attempt in attempts]}


def config_of(path: pathlib.Path) -> str:
    """Returns the config file of a lineage file."""
    from foundry_jax.mutate.promotions import SUFFIX

    return str(path).removesuffix(SUFFIX) + ".py"


def _require_config(path: pathlib.Path) -> None:
    if not path.exists() and not pathlib.Path(config_of(path)).is_file():
        raise UserError(f"No config file {config_of(path)!r}, and no lineage beside it; try configs/tiny.py.")


def show_trees(report: Mapping[str, Any]) -> None:
    """Prints lineages for people."""
    import rich.tree

    if not report["configs"]:
        print("No lineage yet: sweeps with --promote write one beside the config.")
    for config, found in report["configs"].items():
        count = len(found["in_force"])
        root = rich.tree.Tree(f"{config}: {count} {'promotion' if count == 1 else 'promotions'} in force")
        _grow(root, found["tree"])
        _console().print(root)


def _grow(branch: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries:
        _grow(branch.add(line_of(entry["record"], entry["state"])), entry["children"])


def line_of(record: Mapping[str, Any], state: str) -> str:
    """Returns a record in one line."""
    when = time.strftime("%Y-%m-%d", time.gmtime(record["time"]))
    if state == "kept":
        return f"{record['id']} {when} nothing promoted: {record['why']} {record['sweep']}"
    undone = " (undone)" if state == "undone" else ""
    effect = effect_of(record["verdict"], record["metric"]["unit"])
    return f"{record['id']} {when} {record['name']}{undone}: {effect}, {len(record['seeds'])} seeds. {record['sweep']}"


def effect_of(verdict: Mapping[str, Any], unit: str) -> str:
    """Returns "better by 0.012 [0.008, 0.016] bits per byte", or the verdict alone if there is no effect."""
    if verdict["effect"] is None:
        return verdict["verdict"] or "no verdict"
    interval = f" [{', '.join(f'{bound:.4g}' for bound in verdict['interval'])}]" if verdict["interval"] else ""
    return f"{verdict['verdict']}, {verdict['effect']:+.4g}{interval} {unit}"


def show_undone(report: Mapping[str, Any]) -> None:
    """Prints what was taken back."""
    undone, left = report["undone"], ", ".join(report["in_force"]) or "none"
    print(f"{report['config']}: promotion {undone['id']}, {undone['name']}, is undone. In force: {left}.")


def show_tried(report: Mapping[str, Any]) -> None:
    """Prints earlier attempts for people."""
    import rich.table

    if not report["tried"]:
        print(f"No sweep here has tried {report['query']}.")
        return
    table = rich.table.Table("when", "config", "contestant", "outcome", "seeds", "where", box=None)
    for attempt in report["tried"]:
        when = time.strftime("%Y-%m-%d", time.gmtime(attempt["started"]))
        outcome = effect_of(attempt, attempt["unit"]) if attempt["verdict"] else attempt["status"]
        outcome += ", promoted" if attempt["promoted"] else f": {attempt['reason']}" if attempt["reason"] else ""
        table.add_row(when, attempt["config"], attempt["name"], outcome, str(attempt["seeds"]), attempt["source"])
    _console().print(table)


def _console() -> Any:
    import rich.console

    return rich.console.Console(
        soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200
    )


if __name__ == "__main__":
    command.run(main)
