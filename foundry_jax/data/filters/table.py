"""A report of filters for people."""

from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table
import rich.text

from foundry_jax.data.filters.running import Report, Tally


def render(report: Mapping[str, Any]) -> rich.console.Group:
    """Returns a table of what each filter removed, and below it the samples, for a rich console to print.

    Args:
        report: what Report.to_json gave.
    """
    tallies = Report.from_json(report).filters
    table = rich.table.Table(rich.table.Column("filter", overflow="fold"), box=None)
    for heading in ("documents in", "removed", "share", "bytes in", "removed", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tally in tallies:
        table.add_row(rich.text.Text(tally.filter), *_numbers(tally))
    return rich.console.Group(table, *(line for tally in tallies for line in _samples(tally)))


def _numbers(tally: Tally) -> list[str]:
    pairs = ((tally.documents_in, tally.documents_removed), (tally.bytes_in, tally.bytes_removed))
    return [text for whole, part in pairs for text in (f"{whole:,}", f"{part:,}", f"{part / max(whole, 1):.1%}")]


def _samples(tally: Tally) -> list[rich.text.Text]:
    """Returns lines in which control characters of a text do nothing to the terminal."""
    title = [rich.text.Text(f"\n{tally.filter} removed, for example")] if tally.samples else []
    lines = [rich.text.Text(f"  {id!r}: {why}\n    {text!r}") for id, why, text in tally.samples]
    return title + lines
