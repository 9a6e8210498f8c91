"""Variants with numbers of their own, written as calls."""

import dataclasses

import pytest

from foundry_jax.errors import UserError
from foundry_jax.schema import variant


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Numbers of two kinds, with defaults."""

    factor: float = 4.0
    length: int = 3


TABLE = {"none": None, "ramp": Ramp}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("ramp", Ramp()),
        ("ramp()", Ramp()),
        ("ramp(8)", Ramp(8.0)),
        ("ramp(8, 5)", Ramp(8.0, 5)),
        ("ramp(8, length=5)", Ramp(8.0, 5)),
        (" ramp( length = 5 )", Ramp(4.0, 5)),
    ],
)
def test_a_call_is_its_class_with_its_numbers(text, expected):
    assert variant(text, TABLE, "model.scaling") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rump", "Unknown model.scaling 'rump'. Did you mean 'ramp'"),
        ("ramp(lenght=2)", "Unknown number of model.scaling=ramp 'lenght'. Did you mean 'length'"),
        ("ramp(length=2.5)", "model.scaling=ramp: length=2.5 must be a whole number, not a number"),
        ("ramp(1, 2, 3)", r"has 3 numbers, but ramp takes 2: ramp\(factor=4.0, length=3\)"),
        ("none(1)", "has 1 numbers, but none takes 0: none"),
        ("ramp(1, factor=2)", "gives factor twice"),
        ("ramp(factor=x)", "must be a name, or a name with numbers such as"),
        ("ramp(", "must be a name, or a name with numbers such as"),
        ("", "must be a name, or a name with numbers such as"),
        ("3", "must be a name, or a name with numbers such as"),
        ("ramp(**{'factor': 1})", "must be a name, or a name with numbers such as"),
    ],
)
def test_what_is_no_such_call_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        variant(text, TABLE, "model.scaling")
    assert "\n" not in str(caught.value)
