"""Mutations: pure functions (config, *values) -> {dotted key: new value}.

A config argument such as "mla,lr=3e-4" is a comma-separated list of `mutation=value` and bare variant names.
A mutation of several values takes them separated by colons: "adam_betas=0.9:0.98". One whose values all have defaults
may be named alone: "sliding_window".
"""

import inspect
import re

from ml_collections import ConfigDict

from foundry_jax.config import LOSSES, OPTIMIZERS, SCHEDULES, set_values
from foundry_jax.errors import UserError
from foundry_jax.mutate import architecture, training
from foundry_jax.registry import lookup, unknown

MUTATIONS = {
    "attention": architecture.attention,
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
    "label_smoothing": training.label_smoothing,
    "z_loss": training.z_loss,
    "lora_rank": training.lora_rank,
    "lora_alpha": training.lora_alpha,
    "lora_dropout": training.lora_dropout,
    "steps": training.steps,
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
}

# All names that the mutations know, bare or not, with what they mean and where they come from.
CHOICES = VARIANTS | {
    "bias": architecture.BIAS_VARIANTS,
    "qk_norm": architecture.QK_NORM_VARIANTS,
    "moe": architecture.ROUTER_VARIANTS,
    "rope_scaling": architecture.SCALING_VARIANTS,
    "embedding": architecture.EMBEDDING_VARIANTS,
}


def apply(config: ConfigDict, argument: str) -> ConfigDict:
    """Returns a copy of config with the comma-separated mutations of `argument` applied in order.

    Raises:
        UserError: an unknown mutation or variant, a wrong number of values, or a key the config does not have.
    """
    for item in filter(None, re.split(r",\s*(?![^(]*\))", argument)):  # not at the commas of "yarn(factor=4, ...)"
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
        if all(p.default is not p.empty for p in list(inspect.signature(MUTATIONS[name]).parameters.values())[1:]):
            return name, []
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
