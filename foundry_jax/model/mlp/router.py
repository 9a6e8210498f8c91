"""Which experts a token is sent to, and with what weight: pure functions of the router's logits.

Each router is a frozen dataclass: its fields are the numbers that config.moe may set.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Router:
    """The numbers every router has.

    With expert_dim=0 the width of an expert is derived so that the parameters ONE TOKEN uses (its top_k experts and
    the shared ones) are as many as those of the dense MLP: mlp_dim / (top_k + shared), to the nearest multiple of 8.
    """

    experts: int = 8
    top_k: int = 2  # experts a token is sent to
    expert_dim: int = 0  # width of one expert; 0: derived
    shared: int = 0  # experts that see every token, held as one MLP of that many times the width
    dense_layers: int = 0  # leading layers that have a dense MLP instead
    balance: float = 0.01  # weight of the load-balance loss
    z: float = 0.001  # weight of the router z-loss
    scale: float = 1.0  # factor on the weights of the experts

    uses_bias = False  # whether a bias outside the gradient steers the choice
    bias_rate = 0.0  # how far that bias moves a step

    def width(self, mlp_dim: int) -> int:
        """Returns expert_dim, or the width derived from that of the dense MLP."""
        return self.expert_dim or max(8, int(mlp_dim / (self.top_k + self.shared) / 8 + 0.5) * 8)

    def route(self, logits: jax.Array, bias_E: jax.Array | None = None) -> "Routing":
        """Returns the routing of tokens with float32 logits [..., E]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where tokens go: chosen experts and their weights [..., k], and the router's probabilities [..., E]."""

    experts: jax.Array
    weights: jax.Array
    probs: jax.Array  # sum to one; read by the statistics


@dataclasses.dataclass(frozen=True)
class Softmax(Router):
    """Mixtral (2401.04088): softmax over all experts, the best top_k, whose weights are scaled to sum to `scale`."""

    def route(self, logits: jax.Array, bias_E: jax.Array | None = None) -> Routing:
        probs = jax.nn.softmax(logits, axis=-1)
        experts = _best(probs, self.top_k)
        weights = jnp.take_along_axis(probs, experts, axis=-1)
        return Routing(experts, weights / jnp.sum(weights, axis=-1, keepdims=True) * self.scale, probs)


@dataclasses.dataclass(frozen=True)
class SoftmaxUnnormalized(Router):
    """DeepSeek-V2 (2405.04434): softmax over all experts; the weights of the best top_k are `scale` times theirs.

    With groups, experts are chosen within the top_groups groups whose best expert is best.
    """

    groups: int = 1
    top_groups: int = 1

    def route(self, logits: jax.Array, bias_E: jax.Array | None = None) -> Routing:
        probs = jax.nn.softmax(logits, axis=-1)
        experts = _best(_within_best_groups(probs, self.groups, self.top_groups, members=1), self.top_k)
        return Routing(experts, jnp.take_along_axis(probs, experts, axis=-1) * self.scale, probs)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Router):
    """DeepSeek-V3 (2412.19437): sigmoid scores, chosen by score plus bias, weighted by score alone.

    The bias of an expert grows by bias_rate a step while the expert has less than the mean load, and shrinks while it
    has more, outside the gradient. A group is as good as the sum of its two best biased scores.
    """

    balance: float = 0.0
    z: float = 0.0
    groups: int = 1
    top_groups: int = 1
    bias_rate: float = 0.001

    uses_bias = True

    def route(self, logits: jax.Array, bias_E: jax.Array | None = None) -> Routing:
        scores = jax.nn.sigmoid(logits)
        biased = scores if bias_E is None else scores + jnp.expand_dims(bias_E, range(scores.ndim - 1))
        experts = _best(_within_best_groups(biased, self.groups, self.top_groups, members=2), self.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20) * self.scale
        return Routing(experts, weights, scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20))


def _best(scores: jax.Array, k: int) -> jax.Array:
    """Returns the indices of the k largest scores, best first; of equal ones the first. A choice has no gradient.

    Not lax.top_k: when tokens are spread over devices, XLA gathers them all for it.
    """
    scores, chosen = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        chosen.append(jnp.argmax(scores, axis=-1))
        scores = jnp.where(jax.nn.one_hot(chosen[-1], scores.shape[-1], dtype=bool), -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)


def _within_best_groups(scores: jax.Array, groups: int, top_groups: int, members: int) -> jax.Array:
    """Returns the scores with -inf outside the top_groups groups with the largest sum of their best `members`."""
    if top_groups == groups:
        return scores
    parts = scores.reshape(*scores.shape[:-1], groups, -1)
    best = _best(parts, min(members, parts.shape[-1]))
    group_scores = jnp.sum(jnp.take_along_axis(parts, best, axis=-1), axis=-1)
    chosen = jnp.any(jax.nn.one_hot(_best(group_scores, top_groups), groups, dtype=bool), axis=-2)
    return jnp.where(chosen[..., None], parts, -jnp.inf).reshape(scores.shape)
