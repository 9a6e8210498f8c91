"""Pure functions of one step: initial state, training step, evaluation step. All of them can be vmapped.

A Program is the static part of a config: what is compiled. Everything else comes in as Hyperparameters.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from foundry_jax import optimizer
from foundry_jax.config import Config
from foundry_jax.losses import LOSSES, token_statistics
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.transformer import Transformer, init_params
from foundry_jax.optimizer import Hyperparameters
from foundry_jax.registry import lookup


@dataclasses.dataclass(frozen=True)
class Program:
    """What decides which executable is compiled; two configs with equal Programs share one."""

    model: ModelConfig
    optimizer: str
    decay_embeddings: bool
    loss: str
    use_dropout: bool
    accumulation_steps: int

    @classmethod
    def of(cls, config: Config) -> "Program":
        """Returns the program of a config whose model.vocab_size is known.

        Raises:
            UserError: an unknown loss or optimizer.
        """
        lookup(LOSSES, config.loss.name, "loss")
        lookup(optimizer.OPTIMIZERS, config.optimizer.name, "optimizer")
        return cls(
            model=dataclasses.replace(config.model, dropout=0.0),  # its rate is traced
            optimizer=config.optimizer.name,
            decay_embeddings=config.optimizer.decay_embeddings,
            loss=config.loss.name,
            use_dropout=config.model.dropout > 0,
            accumulation_steps=config.optimizer.accumulation_steps,
        )


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on from step `step`, besides its config."""

    step: jax.Array  # optimizer steps done, int32
    params: dict
    opt_state: optax.OptState
    ema_params: dict  # moving average of params
    skips: jax.Array  # non-finite steps in a row, int32
    total_skips: jax.Array  # non-finite steps so far, int32


def init_state(program: Program, hyper: Hyperparameters) -> TrainState:
    """Returns the state at step 0, its parameters boxed with their logical axis names (see unbox)."""
    key = jax.random.fold_in(jax.random.key(hyper.seed), 0)
    params = init_params(program.model, key)
    zero = jnp.zeros((), jnp.int32)
    opt_state = _optimizer(program, hyper, zero).init(params)
    return TrainState(zero, params, opt_state, jax.tree.map(jnp.copy, params), zero, zero)


def unbox(tree):
    """Returns the tree without logical axis names; unlike flax's unbox it lays nothing out, so shapes will do."""
    boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.unbox(apply_constraint=False) if boxed(x) else x, tree, is_leaf=boxed)


def train_step(program: Program, state: TrainState, batch: dict, hyper: Hyperparameters):
    """Returns (next state, metrics) for a batch of inputs, targets [B, L] and weights [B, L].

    A step whose loss or gradient is not finite changes nothing but the counters: old values are selected, never
    multiplied by zero, because 0 * NaN is NaN.
    """
    grads, metrics = _gradients(program, state.params, batch, hyper, state.step)
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = _optimizer(program, hyper, state.step).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = _average(state.ema_params, params, hyper.ema_decay, state.step)
    new = (params, opt_state, ema_params)
    old = (state.params, state.opt_state, state.ema_params)
    params, opt_state, ema_params = jax.tree.map(functools.partial(jnp.where, ok), new, old)
    skipped = jnp.where(ok, 0, 1)
    state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema_params=ema_params,
        skips=jnp.where(ok, 0, state.skips + 1),
        total_skips=state.total_skips + skipped,
    )
    metrics["grad_norm"] = grad_norm
    metrics["learning_rate"] = optimizer.learning_rate_at(state.step - 1, hyper)
    metrics["skips"] = state.skips
    return state, metrics


def eval_step(program: Program, params: dict, batch: dict):
    """Returns (sum of -log p(target) in nats, number of targets) of a batch, whatever the training loss."""
    logits_BLV, _ = Transformer(program.model).apply({"params": params}, batch["inputs"])
    statistics = token_statistics(logits_BLV, batch["targets"])
    return jnp.sum(statistics.nll * batch["weights"]), jnp.sum(batch["weights"])


def _optimizer(program: Program, hyper: Hyperparameters, step: jax.Array) -> optax.GradientTransformation:
    return optimizer.build(program.optimizer, hyper, step, decay_embeddings=program.decay_embeddings)


def _average(ema_params, params, decay, step):
    """Returns the moving average; early on its window grows with the step, or it would remember the init."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda ema, new: decay * ema + (1 - decay) * new, ema_params, params)


def _gradients(program, params, batch, hyper, step):
    """Returns (gradient of the mean loss over the batch's weights, metrics), accumulated over micro-batches."""
    total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(hyper.seed), 1), step)
    gradient = jax.value_and_grad(functools.partial(_loss, program, hyper=hyper, total=total), has_aux=True)
    if program.accumulation_steps == 1:
        (_, metrics), grads = gradient(params, batch, key=key)
        return grads, metrics | {"tokens": total}
    return _accumulate(program.accumulation_steps, gradient, params, batch, key, total)


def _accumulate(num_steps, gradient, params, batch, key, total):
    """Sums gradients over micro-batches and estimates the gradient noise scale from their spread.

    Micro-batch i holds rows i, i + A, i + 2A, ...: a batch sharded over devices stays where it is.
    """
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_steps, *x.shape[1:]), 0, 1), batch)

    def add(carry, inputs):
        index, rows = inputs
        (_, metrics), grads = gradient(params, rows, key=jax.random.fold_in(key, index))
        share = jnp.maximum(jnp.sum(rows["weights"]), 1.0) / total
        norm = jnp.square(optax.tree.norm(grads) / share)  # of this micro-batch's own mean gradient
        return jax.tree.map(jnp.add, carry, (grads, metrics, norm)), None

    first = jax.tree.map(lambda x: x[0], micro)
    (_, metrics), grads = jax.eval_shape(lambda: gradient(params, first, key=key))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics, jax.ShapeDtypeStruct((), total.dtype)))
    (grads, metrics, norms), _ = jax.lax.scan(add, zeros, (jnp.arange(num_steps), micro))
    big_norm = jnp.square(optax.tree.norm(grads))
    spread = noise_scale(norms / num_steps, big_norm, num_steps, batch["inputs"].shape[0])
    return grads, metrics | {"tokens": total} | spread


def noise_scale(small_norm2, big_norm2, num_parts, batch_size):
    """Returns unbiased estimates of |G|^2 and tr(Sigma), per sequence; their ratio of averages is the noise scale.

    McCandlish et al. 2018, 1812.06162, appendix A.1: small_norm2 is the mean squared norm of the gradients of
    num_parts equal parts of the batch, big_norm2 the squared norm of their mean.
    """
    small_size, big_size = batch_size / num_parts, batch_size
    signal = (big_size * big_norm2 - small_size * small_norm2) / (big_size - small_size)
    noise = (small_norm2 - big_norm2) / (1 / small_size - 1 / big_size)
    return {"gradient_signal": signal, "gradient_noise": noise}


def _loss(program, params, batch, *, key, hyper, total):
    """Returns (sum of the weighted training loss / total, metrics)."""
    dropout = {"dropout_rate": hyper.dropout, "rngs": {"dropout": key}} if program.use_dropout else {}
    logits_BLV, _ = Transformer(program.model).apply({"params": params}, batch["inputs"], **dropout)
    statistics = token_statistics(logits_BLV, batch["targets"])
    losses_BL = LOSSES[program.loss](statistics, hyper.loss)
    loss = jnp.sum(losses_BL * batch["weights"]) / total
    return loss, {"loss": loss, "cross_entropy": jnp.sum(statistics.nll * batch["weights"]) / total}
