"""Several mutations on top of each other: what they change together, and where they are at odds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from foundry_jax import mutate
from foundry_jax.config import set_values
from foundry_jax.errors import UserError

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Stack:
    """A config with mutations applied. notes: one line for each that replaces a part of another, or changes nothing."""

    config: ConfigDict
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One mutation of a stack: {key: value} that it changed, and which of them it sets whatever came before it."""

    item: str
    kind: str
    values: tuple[str, ...]
    changed: dict[str, Any]
    fixed: dict[str, Any]


def stack(parent: ConfigDict, items: Sequence[str]) -> Stack:
    """Returns the parent with mutations such as "mla" and "lr=3e-4" applied in order.

    A mutation may build on those before it (a width follows the heads), and may replace a part of what they set.

    Raises:
        UserError: as in mutate.apply; or two of them choose the same thing, or one leaves nothing of another.
    """
    config, layers, notes = parent, [], []
    for item in items:
        after = mutate.apply(config, item)
        layer = _layer(parent, config, after, item)
        for earlier in layers:
            notes += _conflict(earlier, layer)
        if not layer.changed:
            notes.append(f"{item} changes nothing: that is what it is already.")
        layers.append(layer)
        config = after
    return Stack(config, tuple(notes))


def changes(before: ConfigDict, after: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (value before, value after)} of the keys whose values differ."""
    old, new = flatten(before), flatten(after)
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key, _ABSENT) != value}


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of a config that is not built yet, in order."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def canonical(item: str) -> tuple[str, tuple[str, ...]]:
    """Returns what a mutation is about, and its values: "mla" and "attention=mla" are ("attention", ("mla",)).

    A mutation that bears the name of a variant adds numbers to it: "mla=64" is ("attention", ("mla", "64")).

    Raises:
        UserError: as in mutate.parse.
    """
    name, values = mutate.parse(item)
    for kind, variants in mutate.VARIANTS.items():
        if name in variants:
            return kind, (name, *values)
    return name, tuple(values)


def _layer(parent: ConfigDict, before: ConfigDict, after: ConfigDict, item: str) -> _Layer:
    name, values = mutate.parse(item)
    flat = flatten(after)
    try:
        alone = flatten(set_values(parent, mutate.call(name, parent, *values)))
    except UserError:  # it can only be applied after those before it, so it follows them
        alone = {}
    returned = mutate.call(name, before, *values)
    kind, choice = canonical(item)
    return _Layer(
        item,
        kind,
        choice,
        changed={key: new for key, (_, new) in changes(before, after).items()},
        fixed={key: flat[key] for key in returned if alone.get(key, _ABSENT) == flat[key]},
    )


def _conflict(earlier: _Layer, later: _Layer) -> list[str]:
    """Returns what to note of a mutation that replaces a part of what an earlier one set.

    Raises:
        UserError: nothing of the earlier one is left.
    """
    if earlier.kind == later.kind and earlier.values != later.values:
        raise UserError(f"{earlier.item} and {later.item} both choose {earlier.kind}: leave one out.")
    lost = {key: value for key, value in earlier.changed.items() if later.fixed.get(key, value) != value}
    if not lost:
        return []
    told = ", ".join(f"{key}={later.fixed[key]} instead of {value}" for key, value in lost.items())
    if len(lost) == len(earlier.changed):
        raise UserError(f"{later.item} sets {told}, so nothing is left of {earlier.item} before it: leave one out.")
    return [f"{later.item} sets {told} of {earlier.item}."]
