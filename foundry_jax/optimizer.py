"""Schedules, the decay mask, and one optax chain built from traced hyperparameters."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from foundry_jax.config import SCHEDULES, Config
from foundry_jax.losses import LossScales
from foundry_jax.registry import lookup


@flax.struct.dataclass
class Hyperparameters:
    """Every number of the recipe, as scalars handed to the compiled step: changing one recompiles nothing."""

    seed: jax.Array
    num_steps: jax.Array
    learning_rate: jax.Array
    min_learning_rate: jax.Array
    schedule: jax.Array  # index into config.SCHEDULES
    warmup_steps: jax.Array
    decay_fraction: jax.Array
    weight_decay: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    epsilon: jax.Array
    clip_norm: jax.Array
    ema_decay: jax.Array
    dropout: jax.Array
    loss: LossScales


def hyperparameters(config: Config) -> Hyperparameters:
    """Returns the traced inputs of the step as numpy scalars (int32 and float32)."""
    o, f32, i32 = config.optimizer, np.float32, np.int32
    return Hyperparameters(
        seed=i32(config.seed),
        num_steps=i32(config.num_steps),
        learning_rate=f32(o.learning_rate),
        min_learning_rate=f32(o.min_learning_rate),
        schedule=i32(SCHEDULES.index(o.schedule)),
        warmup_steps=i32(o.warmup_steps),
        decay_fraction=f32(o.decay_fraction),
        weight_decay=f32(o.weight_decay),
        beta1=f32(o.beta1),
        beta2=f32(o.beta2),
        epsilon=f32(o.epsilon),
        clip_norm=f32(o.clip_norm),
        ema_decay=f32(o.ema_decay),
        dropout=f32(config.model.dropout),
        loss=LossScales(f32(config.loss.label_smoothing), f32(config.loss.z_loss)),
    )


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
    """Returns a tree of booleans: weight decay reaches kernels, and embedding and output matrices if asked."""

    def decays(path, _):
        names = [getattr(key, "key", None) for key in path]
        if "embed" in names or "unembed" in names:
            return decay_embeddings
        return names[-1] == "kernel"

    return jax.tree_util.tree_map_with_path(decays, params)


def _adamw(h: Hyperparameters) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: Loshchilov & Hutter 2017, 1711.05101."""
    return optax.scale_by_adam(h.beta1, h.beta2, h.epsilon)


def _lion(h: Hyperparameters) -> optax.GradientTransformation:
    """Lion: Chen et al. 2023, 2302.06675. Wants a rate 3 to 10 times smaller than AdamW's."""
    return optax.scale_by_lion(h.beta1, h.beta2)


OPTIMIZERS: dict[str, Callable[[Hyperparameters], optax.GradientTransformation]] = {"adamw": _adamw, "lion": _lion}


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
