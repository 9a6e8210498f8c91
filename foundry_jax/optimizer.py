"""Schedules, the decay mask, and one optax chain built from traced hyperparameters."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from foundry_jax.config import SCHEDULES, Config
from foundry_jax.losses import LossScales
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.registry import lookup


@flax.struct.dataclass
class Hyperparameters:
    """Every number of the recipe, as scalars handed to the compiled step: changing one recompiles nothing."""

    seed: jax.Array
    num_steps: jax.Array
    learning_rate: jax.Array
    min_learning_rate: jax.Array
    schedule: jax.Array  # index into config.SCHEDULES
    decay_fraction: jax.Array  # of wsd
    warmup_steps: jax.Array
    weight_decay: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    epsilon: jax.Array
    clip_norm: jax.Array
    ema_decay: jax.Array
    dropout: jax.Array
    lora_scale: jax.Array  # factor of the adapters' product
    lora_dropout: jax.Array
    load_balance: jax.Array  # weight of the routers' load-balance loss
    router_z: jax.Array  # weight of the routers' z-loss
    router_bias_rate: jax.Array  # how far a balancing bias moves a step
    loss: LossScales


LOSS_SCALES = [field.name for field in dataclasses.fields(LossScales)]  # each is a key of the config's section loss
_INTEGERS = frozenset({"seed", "num_steps", "schedule", "warmup_steps"})


def hyperparameters(config: Config) -> Hyperparameters:
    """Returns the traced inputs of the step as numpy scalars (int32 and float32)."""
    o, moe = config.optimizer, moe_of(config.model)
    wsd = o.schedule_numbers()
    numbers = {
        "seed": config.seed,
        "num_steps": config.num_steps,
        "learning_rate": o.learning_rate,
        "min_learning_rate": o.min_learning_rate,
        "schedule": list(SCHEDULES).index(o.schedule_name),
        "warmup_steps": o.warmup_steps,
        "decay_fraction": wsd.decay_fraction if wsd else 0.0,
        "weight_decay": o.weight_decay,
        "beta1": o.beta1,
        "beta2": o.beta2,
        "epsilon": o.epsilon,
        "clip_norm": o.clip_norm,
        "ema_decay": o.ema_decay,
        "dropout": config.model.dropout,
        "lora_scale": config.lora.scale,
        "lora_dropout": config.lora.dropout,
        "load_balance": moe.balance if moe else 0.0,
        "router_z": moe.z if moe else 0.0,
        "router_bias_rate": moe.bias_rate if moe else 0.0,
    }
    loss = LossScales(**{name: np.float32(getattr(config.loss, name)) for name in LOSS_SCALES})
    return Hyperparameters(loss=loss, **{name: _dtype(name)(number) for name, number in numbers.items()})


def abstract_hyperparameters() -> Hyperparameters:
    """Returns the shapes and dtypes of `hyperparameters`, which are the same for every config."""
    names = [field.name for field in dataclasses.fields(Hyperparameters) if field.name != "loss"]
    number = jax.ShapeDtypeStruct((), np.float32)
    loss = LossScales(**dict.fromkeys(LOSS_SCALES, number))
    return Hyperparameters(loss=loss, **{name: jax.ShapeDtypeStruct((), _dtype(name)) for name in names})


def _dtype(name: str) -> type:
    return np.int32 if name in _INTEGERS else np.float32


def learning_rate_at(step: jax.Array, h: Hyperparameters) -> jax.Array:
    """Returns the learning rate of 0-based step `step`: linear warm-up to the peak, then the schedule.

    Cosine and linear reach the minimum at the last step; wsd holds the peak and falls linearly to the minimum over
    the last decay_fraction of all steps; constant holds the peak.
    """
    step = step.astype(jnp.float32)
    peak, low = h.learning_rate, h.min_learning_rate
    last, warmup = h.num_steps.astype(jnp.float32) - 1, h.warmup_steps.astype(jnp.float32)
    progress = jnp.clip((step - warmup) / jnp.maximum(last - warmup, 1), 0, 1)
    decay_steps = jnp.maximum(h.decay_fraction * (last + 1), 1)
    tail = jnp.clip((step - (last - decay_steps)) / decay_steps, 0, 1)
    shapes = {
        "cosine": low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "linear": peak + (low - peak) * progress,
        "wsd": peak + (low - peak) * tail,
        "constant": peak,
    }
    shape = jnp.select([h.schedule == i for i in range(len(SCHEDULES))], [shapes[name] for name in SCHEDULES])
    return shape * jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1)


def decay_mask(params, *, decay_embeddings: bool):
    """Returns a tree of booleans: weight decay reaches kernels, adapters and, if asked, embedding and output map."""

    def decays(path, _):
        names = [getattr(key, "key", None) for key in path]
        if "embed" in names or "unembed" in names:
            return decay_embeddings
        return names[-1] in ("kernel", "a", "b")

    return jax.tree_util.tree_map_with_path(decays, params)


def _adamw(h: Hyperparameters) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: Loshchilov & Hutter 2017, 1711.05101."""
    return optax.scale_by_adam(h.beta1, h.beta2, h.epsilon)


def _lion(h: Hyperparameters) -> optax.GradientTransformation:
    """Lion: Chen et al. 2023, 2302.06675. Wants a rate 3 to 10 times smaller than AdamW's."""
    return optax.scale_by_lion(h.beta1, h.beta2)


OPTIMIZERS: dict[str, Callable[[Hyperparameters], optax.GradientTransformation]] = {"adamw": _adamw, "lion": _lion}
NUM_MOMENTS = {"adamw": 2, "lion": 1}  # copies of the parameters that the optimizer keeps


def build(name: str, h: Hyperparameters, step: jax.Array, *, decay_embeddings: bool) -> optax.GradientTransformation:
    """Returns the update rule for one step: clip, precondition, decay, scale by -learning rate.

    Its state depends on the parameters alone, so it may be rebuilt from new hyperparameters at every step.
    """
    max_norm = jnp.where(h.clip_norm > 0, h.clip_norm, jnp.inf)
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        lookup(OPTIMIZERS, name, "optimizer")(h),
        optax.add_decayed_weights(h.weight_decay, lambda params: decay_mask(params, decay_embeddings=decay_embeddings)),
        optax.scale(-learning_rate_at(step, h)),
    )
