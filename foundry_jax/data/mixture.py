"""What data.source says: one source, or several with weights.

    pystdlib
    jsonl(path='stories.jsonl', text='body', weight=2), text(path='books', weight=1, held_out=False)

Every source also takes weight, its share of what is trained on relative to the others', and held_out: with False all
its documents are for training, and none for validation. One that names no path takes data.path.
"""

import dataclasses
import inspect
import math
import typing
from typing import Any

from foundry_jax.data.document import Source
from foundry_jax.data.sources import SOURCES
from foundry_jax.data.sources.bin import TokenFiles
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup, unknown
from foundry_jax.schema import calls, coerce, require

COMMON = {"path": str, "weight": float, "held_out": bool}


@dataclasses.dataclass(frozen=True)
class Part:
    """A source, and how it takes part."""

    source: Source | TokenFiles
    weight: float
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """What is said of a source in data.source; a path of None is data.path."""

    name: str
    path: str | None
    weight: float
    held_out: bool
    options: dict[str, Any]


def parse(source: str) -> list[Call]:
    """Returns the sources that data.source names.

    Raises:
        UserError: an unknown source or option, a weight that is none, or nothing to hold out.
    """
    given = calls(source, "data.source")
    require(bool(given), f"data.source is empty; choose from: {', '.join(sorted(SOURCES))}.")
    found = [_call(name, options) for name, options in given]
    require(
        any(call.held_out for call in found),
        f"data.source={source!r} holds nothing out, and validation needs text; leave held_out=False away somewhere.",
    )
    return found


def opened(source: str, path: str) -> list[Part]:
    """Returns what data.source and data.path stand for.

    Raises:
        UserError: as in parse, or data that is not there.
    """
    return [_part(call, path) for call in parse(source)]


def _call(name: str, given: dict[str, Any]) -> Call:
    find = lookup(SOURCES, name, "data.source")
    kinds = COMMON | {key: kind for key, kind in typing.get_type_hints(find).items() if key in own_options(find)}
    for key in given:
        if key not in kinds:
            raise UserError(unknown(key, kinds, f"option of data.source={name}"))
    options = {key: coerce(value, kinds[key], f"data.source={name}: {key}") for key, value in given.items()}
    weight, held_out = options.pop("weight", 1.0), options.pop("held_out", True)
    require(
        math.isfinite(weight) and weight > 0,
        f"data.source={name}: weight={weight:g} must be a finite number above 0; leave the source out instead.",
    )
    return Call(name, options.pop("path", None), weight, held_out, options)


def _part(call: Call, path: str) -> Part:
    source = SOURCES[call.name](path if call.path is None else call.path, **call.options)
    return Part(source, call.weight, call.held_out)


def own_options(find: typing.Callable) -> list[str]:
    """Returns the names of the options of a source, besides those that all have."""
    return [name for name in inspect.signature(find).parameters if name != "path"]
