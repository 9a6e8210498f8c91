"""Typed construction of frozen dataclasses from untyped mappings, with one-line errors."""

import ast
import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from foundry_jax.errors import UserError
from foundry_jax.registry import lookup, unknown

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Returns cls(**values) with every value coerced to its field's type.

    A field that is itself a dataclass takes a nested mapping. `where` is the dotted prefix shown in errors.

    Raises:
        UserError: an unknown key (with the nearest known one), a missing key, or a wrong type.
    """
    types = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise UserError(unknown(f"{where}{name}", [f"{where}{known}" for known in names], "config key"))
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"Missing config key {where}{missing[0]}; configs/baseline.py has them all.")
    coerced = {}
    for name in names:
        dotted = f"{where}{name}"
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(values[name], Mapping) and not hasattr(values[name], "items"):
                raise UserError(f"{dotted}={values[name]!r} must be a section with keys, not a value.")
            coerced[name] = build(types[name], dict(values[name].items()), f"{dotted}.")
        else:
            coerced[name] = coerce(values[name], types[name], dotted)
    return cls(**coerced)


def variant(text: str, table: Mapping[str, type | None], what: str) -> Any:
    """Returns what a call such as "yarn(factor=4, original_length=2048)" stands for: table["yarn"](**numbers).

    Each class of the table is a frozen dataclass, whose fields are the numbers of its variant; a name alone takes all
    defaults, and numbers without a name come in the order of the fields. None in the table means there is nothing to
    say: "none" gives None.

    Raises:
        UserError: an unknown name or number, a wrong type, or text that is no such call.
    """
    name, positional, named = _parse_call(text, what)
    cls = lookup(table, name, what)
    fields = {field.name: field.default for field in dataclasses.fields(cls)} if cls else {}
    require(
        len(positional) <= len(fields),
        f"{what}={text!r} has {len(positional)} numbers, but {name} takes {len(fields)}: {_call(name, fields)}.",
    )
    given = dict(zip(fields, positional, strict=False))
    for key in named:
        if key not in fields:
            raise UserError(unknown(key, fields, f"number of {what}={name}"))
        require(key not in given, f"{what}={text!r} gives {key} twice; write {_call(name, fields)}.")
    return build(cls, fields | given | named, f"{what}={name}: ") if cls else None


def calls(text: str, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, {key: value}) of each of some calls with commas between them: "a(key=1), b, c(text='x')".

    Raises:
        UserError: text that is no such list, or a value without a key.
    """
    try:
        found = [_call_of(node) for node in ast.parse(f"[{text}]", mode="eval").body.elts]
    except (SyntaxError, ValueError, AttributeError):
        found = [None]
    if any(call is None or call[1] for call in found):
        raise UserError(f"{what}={text!r} must be names, each perhaps with options: first(key=2), second(path='x').")
    return [(name, named) for name, _, named in found]


def _parse_call(text: str, what: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Returns (name, numbers without a name, numbers by name) of "name" or "name(1, key=2)"."""
    call = None
    with contextlib.suppress(SyntaxError, ValueError):
        call = _call_of(ast.parse(text.strip(), mode="eval").body)
    if call is None:
        raise UserError(f"{what}={text!r} must be a name, or a name with numbers such as name(key=2, other=0.5).")
    return call


def _call_of(node: ast.expr) -> tuple[str, list[Any], dict[str, Any]] | None:
    """Returns what _parse_call does; None if it is neither a name nor a call with literals.

    Raises:
        ValueError: an argument is no literal, or there twice.
    """
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        if len(named) < len(node.keywords):
            raise ValueError("an option is given twice")
        return node.func.id, [ast.literal_eval(value) for value in node.args], named
    return None


def _call(name: str, fields: Mapping[str, Any]) -> str:
    inner = ", ".join(f"{key}={value}" for key, value in fields.items())
    return f"{name}({inner})" if inner else name


def coerce(value: Any, kind: type, dotted: str) -> Any:
    """Returns value as `kind` (bool, int, float or str); text such as "6e-4" is parsed.

    Raises:
        UserError: the value is not of that type and cannot be read as one.
    """
    try:
        if kind is bool:
            return _as_bool(value)
        if kind is int:
            return _as_int(value)
        if kind is float:
            return _as_float(value)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{dotted}={value!r} must be {_article(kind)}, not {_article(type(value))}.")


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_range(owner: Any, prefix: str, **bounds: tuple[float, float]) -> None:
    """Checks that numeric fields are finite and within closed (low, high) bounds.

    Raises:
        UserError: names the dotted key, the value and the allowed range.
    """
    for name, (low, high) in bounds.items():
        value = getattr(owner, name)
        if not (math.isfinite(value) and low <= value <= high):
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{prefix}{name}={value!r} must be a finite number {limit}.")


def _as_bool(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    if not isinstance(value, bool):
        raise TypeError
    return value


def _as_int(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError
    return int(value)


def _as_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _article(kind: type) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, kind.__name__)
