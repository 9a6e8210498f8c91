"""From the words of a sweep to its contestants: the incumbent and its mutations. Imports no JAX.

attention mla gqa_2kv           a mutation and its values: two contestants
attention=mla,gqa_2kv lr=1e-3   several mutations: every combination of their values
mla moe                         names that stand alone: a contestant each
attention=mla lr=1e-3 (stack)   one after the other: attention=mla, and then both
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence

from foundry_jax import config as config_lib
from foundry_jax import mutate
from foundry_jax.config import Config, to_flat_dict
from foundry_jax.errors import UserError
from foundry_jax.schema import require

INCUMBENT = "incumbent"
SLUG_LENGTH = 60
_ASSIGNED = re.compile(r"(\w*)=(.*)")  # not "yarn(factor=4)", which is a value
_EXAMPLES = "attention mla gqa_2kv, or attention=mla lr=3e-4,1e-3"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A config that takes part, as an argument to the incumbent's; refusal says why it cannot be trained."""

    name: str
    argument: str
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A mutation and its values, as items of a config argument: "attention=mla". A name alone is its own only value."""

    mutation: str
    items: tuple[str, ...]
    stands_alone: bool


def contestants(
    spec: str, words: Sequence[str], *, stack: bool = False, overrides: Sequence[str] = ()
) -> tuple[Contestant, ...]:
    """Returns the contestants that words ask for, the incumbent first.

    One that cannot be built, or is the same run as one before it, has a refusal.

    Raises:
        UserError: an unknown mutation or variant, a value that its mutation cannot take, the same asked for twice, or
            nobody is left to compete with the incumbent.
    """
    axes = _axes(words)
    parent = config_lib.load_dict(spec, overrides)
    for item in itertools.chain.from_iterable(axis.items for axis in axes):
        mutate.apply(parent, item)  # what is wrong by itself is a slip of the pen, and known at once
    arguments = _stacked(axes) if stack else _combined(axes)
    found = [Contestant(INCUMBENT, "")]
    seen = {INCUMBENT: _flat(settings(spec, found[0], overrides))}
    for items in arguments:
        contestant = Contestant(",".join(map(_short, items)), ",".join(items))
        require(contestant.name not in [one.name for one in found], f"{contestant.name} is asked for twice.")
        try:
            flat = _flat(settings(spec, contestant, overrides))
        except UserError as error:
            found.append(dataclasses.replace(contestant, refusal=str(error)))
            continue
        found.append(dataclasses.replace(contestant, refusal=_twin(flat, seen)))
        seen[contestant.name] = flat
    reasons = "; ".join(f"{one.name}: {one.refusal}" for one in found if one.refusal)
    require(any(one.refusal is None for one in found[1:]), f"There is nothing to compare the incumbent with. {reasons}")
    return tuple(found)


def settings(spec: str, contestant: Contestant, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of a contestant: its argument follows that of the spec, and overrides win over both.

    Raises:
        UserError: as config.load does.
    """
    path, _, argument = spec.partition(":")
    arguments = ",".join(filter(None, (argument, contestant.argument)))
    return config_lib.load(f"{path}:{arguments}" if arguments else path, overrides)


def slug(name: str) -> str:
    """Returns a file name of 60 characters at most for a contestant's name; different names have different ones."""
    safe = re.sub(r"[^\w.=+,-]+", "-", name, flags=re.ASCII)
    if safe == name and len(safe) <= SLUG_LENGTH and safe[:1].isalnum():
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{safe.strip('-.')[: SLUG_LENGTH - len(digest) - 1]}-{digest}"


def _axes(words: Sequence[str]) -> list[_Axis]:
    """Returns the mutations that words name, and their values.

    A word without "=" is a value of the mutation named before it; but names that stand alone do so, unless they follow
    a mutation that needs a value.
    """
    require(bool(words), f"Name what to change: {_EXAMPLES}.")
    axes: list[_Axis] = []
    opened: str | None = None  # a mutation that takes the words that follow
    for word, following in itertools.zip_longest(words, words[1:]):
        if assigned := _ASSIGNED.fullmatch(word):
            name, values = assigned[1], mutate.items(assigned[2])
            require(bool(values), f"{word!r} has no value: {_EXAMPLES}.")
            axes.append(_Axis(name, tuple(f"{name}={value}" for value in values), False))
            opened = None
        elif opened and (not mutate.stands_alone(word) or not mutate.stands_alone(opened)):
            values = tuple(f"{opened}={value}" for value in mutate.items(word))
            axes[-1] = dataclasses.replace(axes[-1], items=axes[-1].items + values)
        elif word in mutate.MUTATIONS and _is_value(following, word):
            axes.append(_Axis(word, (), False))
            opened = word
        else:
            mutation, values = mutate.parse(word)
            axes.append(_Axis(mutation, (f"{mutation}={word}" if values else word,), True))
            opened = None
    return axes


def _is_value(word: str | None, mutation: str) -> bool:
    """Returns whether the word after the name of a mutation is a value of it."""
    return (
        word is not None
        and not _ASSIGNED.fullmatch(word)
        and not (mutate.stands_alone(mutation) and mutate.stands_alone(word))
    )


def _combined(axes: Sequence[_Axis]) -> list[tuple[str, ...]]:
    """Returns the arguments, as items: names that stand alone by themselves, and all combinations of the others."""
    grid = [axis for axis in axes if not axis.stands_alone]
    names = [axis.mutation for axis in grid]
    again = [name for name in names if names.count(name) > 1]
    require(not again, f"{again and again[0]} is named twice: give all its values at once, {again and again[0]}=A,B.")
    alone = [axis.items for axis in axes if axis.stands_alone]
    return alone + (list(itertools.product(*(axis.items for axis in grid))) if grid else [])


def _stacked(axes: Sequence[_Axis]) -> list[tuple[str, ...]]:
    """Returns the arguments of a stack: the first item, the first two, ..."""
    several = [axis for axis in axes if len(axis.items) > 1]
    require(
        not several,
        f"A stack adds one change at a time: give {several and several[0].mutation} one value, not "
        f"{several and len(several[0].items)}.",
    )
    items = [axis.items[0] for axis in axes]
    return [tuple(items[: i + 1]) for i in range(len(items))]


def _short(item: str) -> str:
    """Returns what users call a mutation: "mla" for "attention=mla"."""
    name, equals, value = item.partition("=")
    return value if equals and value in mutate.VARIANTS.get(name, ()) else item


def _flat(config: Config) -> dict:
    """Returns all that decides what a run comes to."""
    return {key: value for key, value in to_flat_dict(config).items() if key != "name"}


def _twin(flat: dict, seen: dict[str, dict]) -> str | None:
    """Returns why a config is not worth training: it is that of one before it."""
    for name, other in seen.items():
        if other == flat:
            if name == INCUMBENT:
                return "it is the incumbent: the config, or a --config override, says all of it already."
            return f"it is the same as {name}."
    return None
