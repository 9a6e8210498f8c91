"""Pure functions of one step: initial state, training step, evaluation step. All of them can be vmapped.

A Program is the static part of a config: what is compiled. Everything else comes in as Hyperparameters.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from foundry_jax import optimizer
from foundry_jax.config import Config
from foundry_jax.losses import (
    LOSSES,
    PAIR_LOSSES,
    TOKEN_LOSSES,
    PairStatistics,
    TokenStatistics,
    chunked_statistics,
    num_chunks,
    token_statistics,
)
from foundry_jax.model import lora
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import batch_shards, constrain
from foundry_jax.model.mask import Placement
from foundry_jax.model.mlp.moe import router_losses, router_metrics, without_rates
from foundry_jax.model.stacking import is_boxed
from foundry_jax.model.transformer import Transformer, init_params, rebalance, router_stats
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
    lora_rank: int  # 0: all parameters are trained, otherwise adapters
    lora_targets: str
    use_lora_dropout: bool
    packed: bool  # whether sequences hold several documents, which do not see each other, or padding

    @property
    def learns_from_pairs(self) -> bool:
        """Whether batches hold pairs of completions."""
        return self.loss in PAIR_LOSSES

    @classmethod
    def of(cls, config: Config) -> "Program":
        """Returns the program of a config whose model.vocab_size is known.

        Raises:
            UserError: an unknown loss or optimizer.
        """
        lookup(LOSSES, config.loss.name, "loss")
        lookup(optimizer.OPTIMIZERS, config.optimizer.name, "optimizer")
        return cls(
            model=dataclasses.replace(config.model, dropout=0.0, moe=without_rates(config.model)),  # those are traced
            optimizer=config.optimizer.name,
            decay_embeddings=config.optimizer.decay_embeddings,
            loss=config.loss.name,
            use_dropout=config.model.dropout > 0,
            accumulation_steps=config.optimizer.accumulation_steps,
            lora_rank=config.lora.rank,
            lora_targets=config.lora.targets if config.lora.rank else "",
            use_lora_dropout=config.lora.dropout > 0,
            packed=config.data.packing != "stream" and config.loss.name not in PAIR_LOSSES,
        )


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on from step `step`, besides its config and, where adapters are trained, their base.

    What is trained is in params: all parameters, or adapters (model/lora.py).
    """

    step: jax.Array  # optimizer steps done, int32
    params: dict
    opt_state: optax.OptState
    ema_params: dict  # moving average of params
    skips: jax.Array  # non-finite steps in a row, int32
    total_skips: jax.Array  # non-finite steps so far, int32


def init_state(program: Program, hyper: Hyperparameters) -> TrainState:
    """Returns the state at step 0 with new parameters, boxed with their logical axis names (see unbox)."""
    if not program.lora_rank:
        return state_of(program, init_params(program.model, _key(hyper, 0)), hyper)
    adapters = lora.init(program.model, program.lora_rank, program.lora_targets, _key(hyper, 2))
    return state_of(program, adapters, hyper)


def init_base(program: Program, hyper: Hyperparameters) -> dict:
    """Returns new parameters under the adapters that are trained, boxed; {} if all parameters are trained."""
    return init_params(program.model, _key(hyper, 0)) if program.lora_rank else {}


def state_of(program: Program, params: dict, hyper: Hyperparameters) -> TrainState:
    """Returns the state at step 0 with these parameters."""
    zero = jnp.zeros((), jnp.int32)
    opt_state = _optimizer(program, hyper, zero).init(params)
    return TrainState(zero, params, opt_state, jax.tree.map(jnp.copy, params), zero, zero)


def _key(hyper: Hyperparameters, purpose: int) -> jax.Array:
    """Returns the key for parameters (0), dropout (1) or adapters (2)."""
    return jax.random.fold_in(jax.random.key(hyper.seed), purpose)


def unbox(tree):
    """Returns the tree without logical axis names; unlike flax's unbox it lays nothing out, so shapes will do."""
    return jax.tree.map(lambda x: x.unbox(apply_constraint=False) if is_boxed(x) else x, tree, is_leaf=is_boxed)


def train_step(program: Program, state: TrainState, batch: dict, hyper: Hyperparameters, base: dict):
    """Returns (next state, metrics) for a batch of inputs, targets and weights [B, L].

    base has the parameters under the adapters, which no step changes; {} where all parameters are trained.

    It may have positions, and the segments of packed documents, [B, L]: tokens then stand there instead of at 0..L-1.
    Batches of pairs are those of data/preferences.py.

    A step whose loss or gradient is not finite changes nothing but the counters: old values are selected, never
    multiplied by zero, because 0 * NaN is NaN.
    """
    grads, metrics = gradients(program, state.params, batch, hyper, base, state.step)
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = _optimizer(program, hyper, state.step).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if sown := metrics.pop("router", None):
        metrics |= _router_figures(router_stats(sown))
        if not program.lora_rank:
            params = rebalance(params, sown, hyper.router_bias_rate)
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


def eval_step(program: Program, params: dict, batch: dict, hyper: Hyperparameters, base: dict):
    """Returns (sums of -log p(target) in nats, numbers of targets) of the sequences of a batch, [B] each.

    Whatever the training loss is.
    """
    statistics, _ = _statistics(program, _variables(program, params, hyper, base), batch)
    return jnp.sum(statistics.nll * batch["weights"], axis=-1), jnp.sum(batch["weights"], axis=-1)


def reference_step(program: Program, params: dict, batch: dict, hyper: Hyperparameters, base: dict):
    """Returns the log-probabilities of the completions of a batch of pairs, [P, 2], in nats."""
    statistics, _ = _statistics(program, _variables(program, params, hyper, base), batch)
    return _log_probs(statistics, batch)


def _variables(program, params, hyper, base, lora_dropout=None) -> dict:
    """Returns what the model is applied to: the parameters, or the base and its adapters."""
    if not program.lora_rank:
        return {"params": params}
    return {"params": base, "lora": lora.scaled(params, hyper.lora_scale, lora_dropout)}


def _optimizer(program: Program, hyper: Hyperparameters, step: jax.Array) -> optax.GradientTransformation:
    return optimizer.build(program.optimizer, hyper, step, decay_embeddings=program.decay_embeddings)


def _average(ema_params, params, decay, step):
    """Returns the moving average; early on its window grows with the step, or it would remember the init."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda ema, new: decay * ema + (1 - decay) * new, ema_params, params)


def gradients(program: Program, params: dict, batch: dict, hyper: Hyperparameters, base: dict, step: jax.Array):
    """Returns (gradient of the batch's mean loss, metrics), accumulated over micro-batches."""
    counts = _counts(program, batch["weights"])
    tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    key = jax.random.fold_in(_key(hyper, 1), step)
    loss = functools.partial(_loss, program, hyper=hyper, base=base, counts=counts)
    gradient = jax.value_and_grad(loss, has_aux=True)
    if program.accumulation_steps == 1:
        (_, metrics), grads = gradient(params, batch, key=key)
        return grads, metrics | {"tokens": tokens}
    share = lambda rows: _counts(program, rows["weights"])["loss"] / counts["loss"]  # noqa: E731
    grads, metrics = _accumulate(program.accumulation_steps, gradient, params, batch, key, share)
    return grads, metrics | {"tokens": tokens}


def _accumulate(num_steps, gradient, params, batch, key, share):
    """Sums gradients over micro-batches and estimates the gradient noise scale from their spread.

    Micro-batch i holds rows i, i + A, i + 2A, ...: a batch sharded over devices stays where it is.
    """
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_steps, *x.shape[1:]), 0, 1), batch)

    def add(carry, inputs):
        index, rows = inputs
        (_, metrics), grads = gradient(params, rows, key=jax.random.fold_in(key, index))
        norm = jnp.square(optax.tree.norm(grads) / share(rows))  # of this micro-batch's own mean gradient
        return jax.tree.map(jnp.add, carry, (grads, metrics, norm)), None

    first = jax.tree.map(lambda x: x[0], micro)
    (_, metrics), grads = jax.eval_shape(lambda: gradient(params, first, key=key))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics, jax.ShapeDtypeStruct((), jnp.float32)))
    (grads, metrics, norms), _ = jax.lax.scan(add, zeros, (jnp.arange(num_steps), micro))
    big_norm = jnp.square(optax.tree.norm(grads))
    spread = noise_scale(norms / num_steps, big_norm, num_steps, batch["inputs"].shape[0])
    return grads, metrics | spread


def noise_scale(small_norm2, big_norm2, num_parts, batch_size):
    """Returns unbiased estimates of |G|^2 and tr(Sigma), per row; their ratio of averages is the noise scale.

    McCandlish et al. 2018, 1812.06162, appendix A.1: small_norm2 is the mean squared norm of the gradients of
    num_parts equal parts of the batch, big_norm2 the squared norm of their mean.
    """
    small_size, big_size = batch_size / num_parts, batch_size
    signal = (big_size * big_norm2 - small_size * small_norm2) / (big_size - small_size)
    noise = (small_norm2 - big_norm2) / (1 / small_size - 1 / big_size)
    return {"gradient_signal": signal, "gradient_noise": noise}


def _counts(program, weights):
    """Returns over how many targets, or pairs, the mean of the loss and of each metric goes ("loss": the default)."""
    if program.learns_from_pairs:
        return {"loss": jnp.float32(weights.shape[0]), "cross_entropy": jnp.maximum(jnp.sum(weights[:, 0]), 1.0)}
    return {"loss": jnp.maximum(jnp.sum(weights), 1.0)}


def _loss(program, params, batch, *, key, hyper, base, counts):
    """Returns (training loss, metrics): of a micro-batch its share of the whole batch's means."""
    variables = _variables(program, params, hyper, base, hyper.lora_dropout if program.use_lora_dropout else None)
    dropout = {"dropout_rate": hyper.dropout} if program.use_dropout else {}
    rngs = {"rngs": {"dropout": key}} if program.use_dropout or program.use_lora_dropout else {}
    statistics, sown = _statistics(program, variables, batch, **dropout, **rngs)
    sums = (_pair_sums if program.learns_from_pairs else _token_sums)(program, statistics, batch, hyper.loss)
    metrics = {name: total / counts.get(name, counts["loss"]) for name, total in sums.items()}
    if stats := router_stats(sown.get("router")):
        share = _counts(program, batch["weights"])["loss"] / counts["loss"]
        balance, z = (share * loss for loss in router_losses(stats))
        metrics["loss"] += hyper.load_balance * balance + hyper.router_z * z
        metrics |= {"load_balance": balance, "router_z": z, "router": sown["router"]}
    return metrics["loss"], metrics


def _router_figures(stats):
    """Returns what the metrics say of the routers, each expert's share of the load as a number of its own."""
    figures = router_metrics(stats)
    loads = {f"load_{expert}": share for expert, share in enumerate(figures.pop("load"))}
    return {f"router_{name}": value for name, value in (figures | loads).items()}


def _token_sums(program, statistics, batch, scales):
    losses_BL = TOKEN_LOSSES[program.loss](statistics, scales)
    return {
        "loss": jnp.sum(losses_BL * batch["weights"]),
        "cross_entropy": jnp.sum(statistics.nll * batch["weights"]),
    }


def _pair_sums(program, statistics, batch, scales):
    log_probs_P2 = _log_probs(statistics, batch)
    pairs = PairStatistics(log_probs_P2 - batch["reference"], jnp.sum(batch["weights"], axis=-1))
    return {
        "loss": jnp.sum(PAIR_LOSSES[program.loss](pairs, scales)),
        "reward_accuracy": jnp.sum(pairs.margin > 0, dtype=jnp.float32),
        "reward_margin": jnp.sum(scales.dpo_beta * pairs.margin),
        "cross_entropy": -jnp.sum(log_probs_P2[:, 0]),
    }


def _log_probs(statistics, batch):
    """Returns log pi(completion | prompt) of pairs, [P, 2]: the sum over the completion's tokens and its end."""
    return -jnp.sum(statistics.nll * batch["weights"], axis=-1)


def _statistics(program, variables, batch, **dropout) -> tuple[TokenStatistics, dict]:
    """Returns (statistics of all targets, what the layers have sown): the one place where a step runs the model.

    Sequences are the last axis of the batch; the axes before it are rows to the model.
    """
    shape = batch["targets"].shape
    rows = {name: x.reshape(-1, shape[-1]) for name, x in batch.items() if x.shape == shape}
    placement = Placement(rows["positions"], rows.get("segments")) if "positions" in rows else None
    run = functools.partial(
        Transformer(program.model).apply, variables, rows["inputs"], placement, mutable=["router"], **dropout
    )
    shards = batch_shards() if len(rows["inputs"]) % batch_shards() == 0 else 1
    chunks = num_chunks(rows["inputs"].size // shards, shape[-1], program.model.vocab_size)
    if chunks == 1:
        (logits_BLV, _), sown = run()
        statistics = token_statistics(logits_BLV, rows["targets"])
    else:
        (x_BLD, kernel_DV), sown = run(method="hidden_and_kernel")
        statistics = chunked_statistics(
            x_BLD, kernel_DV, rows["targets"], num_chunks=chunks, shards=shards, constrain=constrain
        )
    return jax.tree.map(lambda x: x.reshape(shape), statistics), sown
