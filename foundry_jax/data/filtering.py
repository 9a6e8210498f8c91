"""What data.filters says, and what it does to documents.

kept, report = filtered(documents, "length(min=200), exact, near(threshold=0.8)", Tools())
for document in kept: ...
report.to_json()                              # what each filter removed, complete once `kept` is exhausted
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.filters import FILTERS, RECIPES
from foundry_jax.data.filters.base import Filter
from foundry_jax.data.filters.running import Report, run
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup, unknown
from foundry_jax.schema import build, calls

KEY = "data.filters"


def filtered(documents: Iterable[Document], spec: str, tools: Tools) -> tuple[Iterator[Document], Report]:
    """Returns the documents that all filters keep, in order, read as they are asked for, and the report on the others.

    Documents without text are left out and not counted.

    Raises:
        UserError: as in parse; a filter lacks something it needs; or, at the end, none of the documents was kept.
    """
    return run(parse(spec), documents, tools)


def parse(spec: str) -> list[Filter]:
    """Returns the filters of "exact, near(threshold=0.8)", in order; none of "".

    Raises:
        UserError: an unknown filter or option, or a value that is not allowed.
    """
    return [filter for name, options in calls(spec, KEY) for filter in _called(name, options)]


def fingerprint(spec: str, tools: Tools) -> list[Any]:
    """Returns JSON that is another whenever other documents may be kept: options, models, items of tasks, versions."""
    return [filter.fingerprint(tools) for filter in parse(spec)]


def _called(name: str, options: dict[str, Any]) -> list[Filter]:
    if name in RECIPES:
        if options:
            raise UserError(f"{KEY}={name} takes no options; it is: {RECIPES[name]}.")
        return parse(RECIPES[name])
    lookup(FILTERS | RECIPES, name, KEY)
    defaults = {field.name: field.default for field in dataclasses.fields(FILTERS[name])}
    for option in options:
        if option not in defaults:
            raise UserError(unknown(option, defaults, f"option of {KEY}={name}") if defaults else _none(name, option))
    return [build(FILTERS[name], defaults | options, f"{KEY}={name}: ")]


def _none(name: str, option: str) -> str:
    return f"{KEY}={name} takes no options, and was given {option}; write {name}."
