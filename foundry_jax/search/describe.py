"""What a child is, beside its parent: what differs, and what that costs. Builds nothing on a device."""

import dataclasses
import functools
from typing import Any

import jax

from foundry_jax import compilation, data, forecast, train_step
from foundry_jax.config import Config, to_flat_dict
from foundry_jax.model import transformer
from foundry_jax.sharding import Plan
from foundry_jax.train_step import Program

# Values in result.json's `forecast` have the same names.
FIGURES = {
    "params": "parameters",
    "active_params": "parameters used per token",
    "trained_params": "parameters trained",
    "flops_per_token": "training FLOPs per token",
    "kv_bytes_per_token": "bytes of cache per token",
    "memory_bytes": "bytes of a training step on one device",
}
ONE_DEVICE = Plan("none", data=1, fsdp=1, tensor=1, reason="nothing is computed")


@dataclasses.dataclass(frozen=True)
class Description:
    """A child beside its parent.

    changes: {dotted key: (parent, child)}, sizes derived. figures: {name of FIGURES: (parent, child)}.
    """

    changes: dict[str, tuple[Any, Any]]
    figures: dict[str, tuple[float, float]]


def describe(parent: Config, child: Config) -> Description:
    """Returns how a child differs from its parent, after building the child abstractly.

    Raises:
        UserError: one of them cannot be one model.
    """
    parent, child = on_one_device(parent), on_one_device(child)
    before, after = figures(parent), figures(child)
    build(Program.of(child), child.batch_shape)
    return Description(changes(parent, child), {name: (before[name], after[name]) for name in FIGURES})


def changes(parent: Config, child: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (the parent's value, the child's)} of all that differs but the name."""
    old, new = to_flat_dict(parent), to_flat_dict(child)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key] and key != "name"}


def figures(config: Config) -> dict[str, float]:
    """Returns the values of FIGURES for a config whose vocabulary is known, on one device.

    Raises:
        UserError: it cannot be one model.
    """
    plan = forecast.plan_of(config, 1)
    return {
        "params": transformer.num_params(config.model),
        "active_params": transformer.num_active_params(config.model),
        "trained_params": forecast.num_trained_params(config),
        "flops_per_token": forecast.train_flops_per_token(config),
        "kv_bytes_per_token": transformer.kv_bytes_per_token(config.model),
        "memory_bytes": forecast.memory(config, plan).total,
    }


@functools.lru_cache(maxsize=32)
def build(program: Program, batch_shape: tuple[int, ...]) -> None:
    """Builds a training step abstractly: shapes and types of everything in it, forward and backward."""
    inputs = compilation.abstract_inputs(program, ONE_DEVICE, batch_shape)
    step = functools.partial(train_step.train_step, program)
    jax.eval_shape(step, inputs.state, inputs.batch, inputs.hyper, inputs.base)


def on_one_device(config: Config) -> Config:
    """Returns the config as it would be on one device, with the vocabulary that its data will probably have.

    To know that, they would have to be read. A fitted tokenizer has data.vocab_size or fewer, characters are fewer.
    """
    layout = dataclasses.replace(config.sharding, strategy="none", data=0, fsdp=0, tensor=0)
    config = dataclasses.replace(config, sharding=layout)
    if config.model.vocab_size:
        return config
    fixed = data.TOKENIZERS["byte"].vocab_size
    size = fixed if config.data.tokenizer == "byte" else config.data.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
