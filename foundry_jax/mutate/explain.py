"""What every mutation is, for people and for machines."""

import dataclasses
import inspect

from foundry_jax import mutate
from foundry_jax.registry import lookup


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One type of mutation.

    usage: how it is written in an argument, "adam_betas=beta1:beta2"; values in brackets may be left out.
    variants: {name: what it means and where it comes from}; bare: whether a name alone stands for the mutation.
    """

    name: str
    usage: str
    meaning: str
    variants: dict[str, str]
    bare: bool


def explain(name: str = "") -> list[Explanation]:
    """Returns what there is to say of one type of mutation, or of all.

    Raises:
        UserError: an unknown type.
    """
    if name:
        lookup(mutate.MUTATIONS, name, "mutation")
    return [_explanation(known) for known in mutate.MUTATIONS if known == name or not name]


def _explanation(name: str) -> Explanation:
    mutation = mutate.MUTATIONS[name]
    return Explanation(
        name=name,
        usage=_usage(name),
        meaning=" ".join(inspect.getdoc(mutation).split()),
        variants=dict(mutate.CHOICES.get(name, {})),
        bare=name in mutate.VARIANTS,
    )


def _usage(name: str) -> str:
    required, optional = [], []
    for parameter in list(inspect.signature(mutate.MUTATIONS[name]).parameters.values())[1:]:
        is_required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        (required if is_required else optional).append(parameter.name)
    tail = ""
    for value in reversed(optional):
        tail = f"[:{value}{tail}]"
    return f"{name}={':'.join(required)}{tail}" if required else f"{name}{tail.replace(':', '=', 1)}"
