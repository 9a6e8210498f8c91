"""Shows what a config trains on: python -m foundry_jax.cli.data inspect --config=configs/tiny.py:first_fit"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from foundry_jax import command
from foundry_jax.errors import UserError

PROGRAM = "python -m foundry_jax.cli.data"


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides of a command line."""
    parser = command.Parser(
        prog=PROGRAM,
        description="inspect decodes a training batch and shows what of it is trained on and where documents end. "
        "report says what there is, what the filters removed, and how well sequences are filled. Both build the "
        "token cache if need be.",
        epilog="Any config key can be set, such as --config.data.packing=pad.",
    )
    parser.add_argument("what", choices=("inspect", "report"))
    parser.add_argument("--config", required=True, metavar="FILE[:MUTATIONS]")
    parser.add_argument("--step", type=int, default=0, help="of which to show the batch (default: 0)")
    parser.add_argument("--rows", type=int, default=2, help="sequences to show (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags, overrides = command.parse(parser, argv)
    for name in ("step", "rows"):
        if getattr(flags, name) < 0:
            parser.error(f"--{name}={getattr(flags, name)} must be 0 or more")
    return flags, overrides


def main() -> None:
    """The command."""
    flags, overrides = parse_arguments(sys.argv[1:])
    from foundry_jax import config as config_lib  # --help must not wait for JAX
    from foundry_jax import data, train
    from foundry_jax.data import inspection
    from foundry_jax.data_tools import TOOLS

    config = config_lib.load(flags.config, overrides)
    if flags.what == "report" and config.data.preferences:
        raise UserError("report is about documents; of pairs, inspect shows what is trained on.")
    corpus = data.prepare(config.data, train.tokenizer_of(config, train.open_source(config)), TOOLS)
    batches = train.batches_of(config, corpus).train
    if flags.what == "report":
        report, show = inspection.report(corpus, batches), show_report
    else:
        report, show = inspected(batches.batch(flags.step), corpus, flags.rows), show_rows
    print(json.dumps(report)) if flags.json else show(report)


def inspected(batch: dict[str, Any], corpus, rows: int) -> dict[str, Any]:
    """Returns the first sequences of a batch as text; token ids where there is no tokenizer."""
    from foundry_jax.data import inspection

    decode = corpus.tokenizer.decode if corpus.tokenizer else lambda ids: " ".join(map(str, ids)) + " "
    found = inspection.sequences(batch, decode)[:rows]
    return {"shape": list(batch["inputs"].shape), "rows": [dataclasses.asdict(row) for row in found]}


def show_rows(report: dict[str, Any]) -> None:
    """Prints sequences: what is trained on in green, a bar where a document begins."""
    import rich.console
    import rich.text

    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print(f"A batch is {' x '.join(map(str, report['shape']))} tokens. [green]Trained on[/], [dim]not[/].")
    for number, row in enumerate(report["rows"]):
        sizes = " + ".join(str(piece["num_tokens"]) for piece in row["pieces"])
        padding = f" + {row['padding']} of padding" if row["padding"] else ""
        console.print(f"\n[bold]sequence {number}[/]: {sizes}{padding} tokens")
        text = rich.text.Text()
        for piece in row["pieces"]:
            text.append("▌", style="bold yellow")
            for said, trained in piece["runs"]:
                text.append(said, style="green" if trained else "dim")
        console.print(text)


def show_report(report: dict[str, Any]) -> None:
    """Prints what there is to train on."""
    import rich.console
    import rich.table

    from foundry_jax.data.filters.table import render

    console = rich.console.Console(soft_wrap=True, highlight=False)
    columns = ("source", "share", "documents", "tokens", "trained on", "sequences", "filled", "split")
    table = rich.table.Table(*columns, box=None)
    for part in report["parts"]:
        filled = f"{part['filled']:.1%}" if "filled" in part else ""
        counts = [f"{part[name]:,}" for name in ("documents", "tokens", "trained", "sequences")]
        table.add_row(part["name"], f"{part['share']:.1%}", *counts, filled, str(part.get("split_documents", "")))
    console.print(table)
    held = report["validation"]
    console.print(
        f"held out: {held['tokens']:,} tokens, {held['bytes'] or 'an unknown number of'} bytes, {held['hash'][:12]}"
    )
    for one in report["filters"]:
        console.print(render(one))


if __name__ == "__main__":
    command.run(main)
