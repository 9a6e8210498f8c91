"""The one "unknown X; did you mean Y; choose from Z" error."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from foundry_jax.errors import UserError

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns table[name].

    Raises:
        UserError: the name is not in the table; names the nearest one and all choices.
    """
    if name not in table:
        raise UserError(unknown(name, table, what))
    return table[name]


def unknown(name: str, choices: Iterable[str], what: str) -> str:
    """Returns the message for a name that is not among the choices."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Unknown {what} {name!r}.{hint} Choose from: {', '.join(choices)}."
