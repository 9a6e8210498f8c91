"""Shows and saves mutations of a config: python -m foundry_jax.mutate attention mla"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foundry_jax import command, mutate
from foundry_jax.errors import UserError

if TYPE_CHECKING:  # --help must not wait for JAX
    from foundry_jax.mutate.explain import Explanation

PROGRAM = "python -m foundry_jax.mutate"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} TYPE VALUE... | MUTATION... | --list [TYPE]",
        description="Shows what mutations change of a config and what that costs, and saves the result as a config.",
        epilog="Such as: attention mla; adam_betas 0.9 0.99; several on top of each other: mla lr=3e-4.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="a type and its values, or mutations")
    parser.add_argument(
        "--config", default="configs/tiny.py", metavar="FILE[:MUTATIONS]", help="the parent (default: configs/tiny.py)"
    )
    saving = parser.add_mutually_exclusive_group()
    saving.add_argument("--save", metavar="FILE", help="the child (default: in children/ beside the parent)")
    saving.add_argument("--no-save", action="store_true", help="only show it")
    parser.add_argument("--list", action="store_true", help="explain all types, or one, with variants and papers")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_intermixed_args(argv)
    if not flags.words and not flags.list:
        parser.error("name a mutation, such as attention mla, or --list")
    if flags.list and len(flags.words) > 1:
        parser.error(f"--list explains all types or one, not {' '.join(flags.words)!r}")
    return flags


def items_of(words: Sequence[str]) -> list[str]:
    """Returns the mutations of a command line: "attention mla" is one, "mla lr=3e-4" are two.

    Raises:
        UserError: an unknown name, or several variants that exclude each other.
    """
    items = [item for word in words for item in mutate.items(word)]
    number = next((i for i, item in enumerate(items) if _has_value(item)), len(items))
    names = items[:number]
    if len(names) > 1 and names[0] in mutate.MUTATIONS and not all(map(mutate.stands_alone, names)):
        items = [f"{names[0]}={':'.join(names[1:])}", *items[number:]]
    for item in items:
        _require_one_variant(*mutate.parse(item))
    return items


def _has_value(item: str) -> bool:
    return "=" in item.partition("(")[0]  # "yarn(factor=4)" is a value, and has none


def _require_one_variant(name: str, values: Sequence[str]) -> None:
    if len(values) > 1 and all(value in mutate.VARIANTS.get(name, ()) for value in values):
        raise UserError(
            f"{name} can be {' or '.join(values)}, not all at once: mutate to one of them, or compare them with "
            f"python -m foundry_jax.cli.sweep {name} {' '.join(values)}."
        )


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    if flags.list:
        from foundry_jax.mutate.explain import explain

        show_list(explain(*flags.words), as_json=flags.json)
        return
    report = mutated(flags.config, items_of(flags.words), flags)
    if flags.json:
        print(json.dumps(report))
    else:
        show(report)


def mutated(parent: str, items: list[str], flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what the child is, after saving it.

    Raises:
        UserError: an unknown name, mutations at odds, a child that equals its parent or cannot be one model.
    """
    # Imported here: --help must not wait for JAX, which may not take a GPU for this.
    import jax

    from foundry_jax import config, schema
    from foundry_jax.mutate.stack import changes, stack
    from foundry_jax.search import children, describe

    jax.config.update("jax_platforms", "cpu")
    before = config.load_dict(parent)
    stacked = stack(before, items)
    pair = schema.build(config.Config, before), schema.build(config.Config, stacked.config)
    if not describe.changes(*pair):
        raise UserError(f"{', '.join(items)} changes nothing: that is what {parent} is already.")
    found = describe.describe(*pair)
    path, saved = pathlib.Path(flags.save or children.default_path(parent, items)), False
    if not flags.no_save:
        place = [f"--save={path}"] if flags.save else []
        typed = shlex.join([*PROGRAM.split(), *items, f"--config={parent}", *place])
        text = children.render(parent, items, path, changes(before, stacked.config), typed)
        saved = children.save(path, text)
    spec = f"{parent}{',' if ':' in parent else ':'}{','.join(items)}" if flags.no_save else str(path)
    return {
        "parent": parent,
        "argument": ",".join(items),
        "changes": found.changes,
        "figures": found.figures,
        "notes": stacked.notes,
        "config": spec,
        "saved": saved,
        "command": shlex.join(["python", "-m", "foundry_jax.main", f"--config={spec}"]),
    }


def show(report: dict[str, Any]) -> None:
    """Prints a child for people."""
    import rich.console
    import rich.table

    from foundry_jax.search.describe import FIGURES

    console = rich.console.Console(
        soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 160
    )
    console.print(f"{report['parent']} with {report['argument']}")
    table = rich.table.Table("key", "parent", "child", box=None)
    for key, (old, new) in report["changes"].items():
        table.add_row(key, str(old), str(new))
    console.print(table)
    table = rich.table.Table("figure", box=None)
    for column in ("parent", "child", "change"):
        table.add_column(column, justify="right")
    for name, (old, new) in report["figures"].items():
        table.add_row(FIGURES[name], f"{old:,.0f}", f"{new:,.0f}", f"{new / old - 1:+.1%}" if old else "")
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}")
    if report["saved"]:
        console.print(f"saved: {report['config']}")
    console.print(f"train it: {report['command']}")


def show_list(explained: "list[Explanation]", *, as_json: bool) -> None:
    """Prints what mutations are."""
    import dataclasses
    import textwrap

    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in explained]))
        return
    for one in explained:
        print(one.usage)
        print(textwrap.indent(textwrap.fill(one.meaning, 110), "    "))
        for name, meaning in one.variants.items():
            print(f"        {name if one.bare else f'{one.name}={name}'}: {meaning}")


if __name__ == "__main__":
    command.run(main)
