"""Mutations: pure functions (config, *values) -> {dotted key: new value}.

A config argument such as "mla,lr=3e-4" is a comma-separated list of `mutation=value` and bare variant names.
A mutation of several values takes them separated by colons: "adam_betas=0.9:0.98".
"""

import inspect

from ml_collections import ConfigDict

from foundry_jax.config import OPTIMIZERS, SCHEDULES, set_values
from foundry_jax.errors import UserError
from foundry_jax.mutate import architecture, training
from foundry_jax.registry import lookup, unknown

MUTATIONS = {
    "attention": architecture.attention,
    "dropout": architecture.dropout,
    "lr": training.lr,
    "schedule": training.schedule,
    "optimizer": training.optimizer,
    "batch_size": training.batch_size,
    "warmup": training.warmup,
    "grad_clip": training.grad_clip,
    "weight_decay": training.weight_decay,
    "adam_betas": training.adam_betas,
    "ema": training.ema,
    "label_smoothing": training.label_smoothing,
    "steps": training.steps,
}

# A bare name in a config argument stands for "mutation=name"; a name may appear once only.
VARIANTS = {
    "attention": architecture.ATTENTION_VARIANTS,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
}


def apply(config: ConfigDict, argument: str) -> ConfigDict:
    """Returns a copy of config with the comma-separated mutations of `argument` applied in order.

    Raises:
        UserError: an unknown mutation or variant, a wrong number of values, or a key the config does not have.
    """
    for item in filter(None, argument.split(",")):
        name, values = parse(item)
        config = set_values(config, call(name, config, *values))
    return config


def parse(item: str) -> tuple[str, list[str]]:
    """Returns (mutation name, values) of "lr=3e-4", "adam_betas=0.9:0.98" or a bare variant such as "mla"."""
    name, equals, text = item.partition("=")
    if equals:
        return name, text.split(":")
    for mutation, variants in VARIANTS.items():
        if name in variants:
            return mutation, [name]
    if name in MUTATIONS:
        raise UserError(f"Mutation {name!r} needs a value: {name}={_signature(name)}.")
    names = [f"{mutation}=" for mutation in MUTATIONS] + [v for group in VARIANTS.values() for v in group]
    raise UserError(unknown(name, names, "variant or mutation"))


def call(name: str, config: ConfigDict, *values: str) -> dict[str, object]:
    """Returns the overrides that mutation `name` makes for these values; config is not edited."""
    mutation = lookup(MUTATIONS, name, "mutation")
    try:
        inspect.signature(mutation).bind(config, *values)
    except TypeError:
        raise UserError(f"Mutation {name!r} takes {_signature(name)}, not {':'.join(values)!r}.") from None
    return mutation(config, *values)


def _signature(name: str) -> str:
    return ":".join(list(inspect.signature(MUTATIONS[name]).parameters)[1:])
