"""What was tried before: contestants of earlier sweeps, in lineage files and in sweeps' folders. Imports no JAX."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from foundry_jax import mutate
from foundry_jax.errors import UserError
from foundry_jax.mutate.promotions import SUFFIX
from foundry_jax.mutate.stack import canonical
from foundry_jax.registry import lookup
from foundry_jax.runfolder import read_result
from foundry_jax.search import lineage

CONFIGS = pathlib.Path("configs")
SWEEPS = pathlib.Path("runs/sweeps")

Query = tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A contestant of an earlier sweep, and what came of it.

    effect and interval are in the metric's unit, positive where the contestant was better; None without a verdict.
    source: the lineage file or the sweep's folder that says so; promoted: whether it was, undone or not.
    """

    config: str
    name: str
    argument: str
    status: str
    reason: str | None
    verdict: str | None
    effect: float | None
    interval: tuple[float, float] | None
    metric: str
    unit: str
    seeds: int
    promoted: bool
    started: float
    source: str


def tried(query: str, configs: pathlib.Path = CONFIGS, sweeps: pathlib.Path = SWEEPS) -> list[Attempt]:
    """Returns the earlier contestants that had all mutations of a query, the oldest first.

    Args:
        query: "attention=mla", "mla", "lr=3e-4,moe", or a type alone for all its values: "attention".
        configs: a folder whose lineage files are read, also in folders of it.
        sweeps: a folder of sweeps' folders.

    Raises:
        UserError: an unknown mutation, or a damaged file.
    """
    wanted = parse(query)
    found = {(a.started, a.name): a for a in (*_in_lineages(configs), *_in_sweeps(sweeps))}  # a folder says the same
    return sorted((a for a in found.values() if _has(a.argument, wanted)), key=lambda a: (a.started, a.name))


def parse(query: str) -> Query:
    """Returns the (type, first values) that a query asks for; no values where all will do.

    Raises:
        UserError: an unknown mutation or variant, or nothing at all.
    """
    items = mutate.items(query)
    if not items:
        raise UserError(f"{query!r} names no mutation; ask for one such as attention=mla.")
    return tuple(_wanted(item) for item in items)


def lineage_files(configs: pathlib.Path = CONFIGS) -> list[pathlib.Path]:
    """Returns the lineage files in a folder and its folders, sorted."""
    return sorted(configs.rglob(f"*{SUFFIX}"))


def _wanted(item: str) -> tuple[str, tuple[str, ...]]:
    name, equals, _ = item.partition("=")
    is_type = name in mutate.MUTATIONS and not any(name in variants for variants in mutate.VARIANTS.values())
    if not equals and is_type:
        return name, ()
    kind, values = canonical(item)
    lookup(mutate.MUTATIONS, kind, "mutation")
    return kind, values


def _has(argument: str, wanted: Query) -> bool:
    given = [_given(item) for item in mutate.items(argument)]
    return all(any(kind == k and _begins(values, v) for k, values in given) for kind, v in wanted)


def _given(item: str) -> tuple[str, tuple[str, ...]]:
    """Returns what a contestant's mutation was, also if this version no longer knows it."""
    with contextlib.suppress(UserError):
        return canonical(item)
    name, _, text = item.partition("=")
    return name, tuple(text.split(":"))


def _begins(values: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return len(values) >= len(wanted) and all(map(_same, values, wanted))


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _in_lineages(configs: pathlib.Path) -> Iterator[Attempt]:
    for path in lineage_files(configs):
        for record in lineage.records(path):
            if record["kind"] != "undo":
                promoted = record["name"] if record["kind"] == "promotion" else None
                yield from _attempts(record, record["contestants"], promoted, str(path))


def _in_sweeps(sweeps: pathlib.Path) -> Iterator[Attempt]:
    for path in sorted(sweeps.glob("*/result.json")):
        result = read_result(path.parent)
        decision = result["decision"] or {}
        summaries = {name: lineage.summary(contestant) for name, contestant in result["contestants"].items()}
        yield from _attempts(result, summaries, decision.get("promoted"), str(path.parent))


def _attempts(
    facts: Mapping[str, Any], contestants: Mapping[str, Mapping[str, Any]], promoted: str | None, source: str
) -> Iterable[Attempt]:
    """Yields the contestants of one sweep but the incumbent; `facts` is a record or a result."""
    for name, its in contestants.items():
        if its["status"] != "incumbent":
            yield Attempt(
                config=facts["config"],
                name=name,
                argument=its["argument"],
                status=its["status"],
                reason=its["reason"],
                verdict=its["verdict"],
                effect=its["effect"],
                interval=tuple(its["interval"]) if its["interval"] else None,
                metric=facts["metric"]["name"],
                unit=facts["metric"]["unit"],
                seeds=len(facts["seeds"]),
                promoted=name == promoted,
                started=facts["started"],
                source=source,
            )
