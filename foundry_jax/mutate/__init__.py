"""Mutations: pure functions (config, *values) -> {dotted key: new value}.

A config argument such as "mla,lr=3e-4" is a comma-separated list of `mutation=value` and bare variant names.
A mutation of several values takes them separated by colons: "adam_betas=0.9:0.98". One whose values all have defaults
may be named alone: "sliding_window". A mutation that bears the name of a variant means the same alone, and adds numbers
to it: "mla=64".
"""

import inspect
import os
import re

from ml_collections import ConfigDict

from foundry_jax.config import LOSSES, OPTIMIZERS, SCHEDULES, set_values
from foundry_jax.errors import UserError
from foundry_jax.mutate import architecture, data, promotions, training
from foundry_jax.registry import lookup, unknown

MUTATIONS = {
    "attention": architecture.attention,
    "mla": architecture.mla,
    "bias": architecture.bias,
    "qk_norm": architecture.qk_norm,
    "softcap": architecture.softcap,
    "pattern": architecture.pattern,
    "sliding_window": architecture.sliding_window,
    "sparse": architecture.sparse,
    "activation": architecture.activation,
    "mlp_dim": architecture.mlp_dim,
    "moe": architecture.moe,
    "norm": architecture.norm,
    "norm_placement": architecture.norm_placement,
    "position": architecture.position,
    "rope_theta": architecture.rope_theta,
    "rope_scaling": architecture.rope_scaling,
    "embedding": architecture.embedding,
    "tie_embeddings": architecture.tie_embeddings,
    "depth": architecture.depth,
    "width": architecture.width,
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
    "loss": training.loss,
    "dpo": training.dpo,
    "label_smoothing": training.label_smoothing,
    "z_loss": training.z_loss,
    "lora_rank": training.lora_rank,
    "lora_alpha": training.lora_alpha,
    "lora_dropout": training.lora_dropout,
    "steps": training.steps,
    "conversation_format": data.conversation_format,
    "data_filter": data.data_filter,
    "packing": data.packing,
    "curriculum": data.curriculum,
    "constitution": data.constitution,
}

# A bare name in a config argument stands for "mutation=name"; a name may appear once only.
VARIANTS = {
    "attention": architecture.ATTENTION_VARIANTS,
    "sparse": architecture.SPARSE_VARIANTS,
    "activation": architecture.MLP_VARIANTS,
    "norm": architecture.NORM_VARIANTS,
    "norm_placement": architecture.PLACEMENT_VARIANTS,
    "position": architecture.POSITION_VARIANTS,
    "loss": LOSSES,
    "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "conversation_format": data.FORMAT_VARIANTS,
    "packing": data.PACKING_VARIANTS,
}

# All names that the mutations know, bare or not, with what they mean and where they come from.
CHOICES = VARIANTS | {
    "bias": architecture.BIAS_VARIANTS,
    "qk_norm": architecture.QK_NORM_VARIANTS,
    "moe": architecture.ROUTER_VARIANTS,
    "rope_scaling": architecture.SCALING_VARIANTS,
    "embedding": architecture.EMBEDDING_VARIANTS,
    "curriculum": data.CURRICULUM_VARIANTS,
    "data_filter": data.FILTER_VARIANTS,
}


def apply(config: ConfigDict, argument: str, *, lineage: str | os.PathLike | None = None) -> ConfigDict:
    """Returns a copy of config with the comma-separated mutations of `argument` applied in order.

    With `lineage`, the path of the config's own file, what was promoted for it is applied before them.

    Raises:
        UserError: an unknown mutation or variant, a wrong number of values, or a key the config does not have; or a
            lineage that was damaged.
    """
    if lineage is not None:
        config = promotions.replay(config, lineage)
    for item in items(argument):
        name, values = parse(item)
        config = set_values(config, call(name, config, *values))
    return config


def items(argument: str) -> list[str]:
    """Returns the mutations of an argument: "mla,lr=3e-4" is two; the commas of "yarn(factor=4, ...)" divide none."""
    return [item for item in re.split(r",\s*(?![^(]*\))", argument) if item]


def parse(item: str) -> tuple[str, list[str]]:
    """Returns (mutation name, values) of "lr=3e-4", "adam_betas=0.9:0.98" or a bare variant such as "mla"."""
    name, equals, text = item.partition("=")
    if equals:
        return name, text.split(":")
    for mutation, variants in VARIANTS.items():
        if name in variants:
            return mutation, [name]
    if name in MUTATIONS:
        if stands_alone(name):
            return name, []
        raise UserError(f"Mutation {name!r} needs a value: {name}={signature(name)}.")
    names = [f"{mutation}=" for mutation in MUTATIONS] + [v for group in VARIANTS.values() for v in group]
    raise UserError(unknown(name, names, "variant or mutation"))


def call(name: str, config: ConfigDict, *values: str) -> dict[str, object]:
    """Returns the overrides that mutation `name` makes for these values; config is not edited."""
    mutation = lookup(MUTATIONS, name, "mutation")
    try:
        inspect.signature(mutation).bind(config, *values)
    except TypeError:
        raise UserError(f"Mutation {name!r} takes {signature(name)}, not {':'.join(values)!r}.") from None
    return mutation(config, *values)


def stands_alone(name: str) -> bool:
    """Returns whether a name may stand in an argument without a value."""
    if any(name in variants for variants in VARIANTS.values()):
        return True
    return name in MUTATIONS and all(p.default is not p.empty or p.kind is p.VAR_POSITIONAL for p in _values(name))


def signature(name: str) -> str:
    """Returns the names of a mutation's values, as they are written: "beta1:beta2"."""
    return ":".join(parameter.name for parameter in _values(name))


def _values(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(MUTATIONS[name]).parameters.values())[1:]
