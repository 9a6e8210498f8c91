"""Mixture of experts: each token is sent to a few of many MLPs, and none is dropped."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from foundry_jax.model.config import ModelConfig, divisors
from foundry_jax.model.layers import INIT_STD, batch_shards, constrain, logical, output_std
from foundry_jax.model.mlp import MLPS, ROUTERS
from foundry_jax.model.mlp.dense import MLP
from foundry_jax.model.mlp.grouped import Groups, arrange, grouped_matmul, over_shards, take_rows
from foundry_jax.model.mlp.router import Router, Routing
from foundry_jax.schema import require, require_range, variant


def moe_of(config: ModelConfig) -> Router | None:
    """Returns the router that config.moe names, None if all layers are dense.

    Raises:
        UserError: an unknown router, or a number that it does not have.
    """
    return variant(config.moe, ROUTERS, "model.moe")


RATES = ("balance", "z", "bias_rate")  # numbers of a router that weigh losses and updates, and shape no program


def without_rates(config: ModelConfig) -> str:
    """Returns config.moe written out in full, without the numbers in RATES."""
    moe = moe_of(config)
    if moe is None:
        return config.moe
    numbers = {name: value for name, value in dataclasses.asdict(moe).items() if name not in RATES}
    return f"{config.moe.partition('(')[0].strip()}({', '.join(f'{name}={value}' for name, value in numbers.items())})"


@flax.struct.dataclass
class RouterStats:
    """What a router did with the real tokens (no padding) of a batch: sums, in float32."""

    load: jax.Array  # tokens sent to each expert [E]
    prob: jax.Array  # the router's probabilities [E], differentiable
    z: jax.Array  # logsumexp(logits)^2, differentiable
    entropy: jax.Array  # of the probabilities, in nats
    tokens: jax.Array
    dropped: jax.Array  # assignments whose product was not made

    @classmethod
    def of(cls, logits: jax.Array, routing: Routing, real: jax.Array, computed: jax.Array) -> "RouterStats":
        """Returns the statistics of tokens [G, N]: logits [G, N, E], real [G, N], computed [G, N, k]."""
        real = real.astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=jnp.float32), axis=-2)
        entropy = jnp.sum(jax.scipy.special.entr(routing.probs), axis=-1)
        over_tokens = tuple(range(real.ndim))
        return cls(
            load=jnp.sum(chosen * real[..., None], axis=over_tokens),
            prob=jnp.sum(routing.probs * real[..., None], axis=over_tokens),
            z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real),
            entropy=lax.stop_gradient(jnp.sum(entropy * real)),
            tokens=jnp.sum(real),
            dropped=jnp.sum((1.0 - computed.astype(jnp.float32)) * real[..., None]),
        )


class MixtureOfExperts(nn.Module):
    """Top-k experts, weighted by a router, plus experts that see every token. config.moe names the router.

    Dropless: tokens are sorted by expert and multiplied in groups (grouped.py), so a token's output depends on no other
    token. The cost grows with top_k, not with the number of experts. Experts have the activation of config.mlp and no
    biases. The tokens of each device are sorted on their own, so sorting moves nothing between devices.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, real_BL: jax.Array) -> jax.Array:
        """Returns y_BLD and sows RouterStats as "stats" in the collection "router".

        Args:
            real_BL: True for a token, False for padding, [B or 1, L]; padding is computed but not counted.
        """
        c, moe = self.config, moe_of(self.config)
        B, L, D = x_BLD.shape
        G = batch_shards() if B % batch_shards() == 0 else 1
        x_GND = _lay_out(x_BLD.reshape(G, B * L // G, D))
        real_GN = jnp.broadcast_to(real_BL, (B, L)).reshape(G, B * L // G)
        logits, routing = RouterScores(c, name="router")(x_GND)
        y_GND, computed = Experts(c, name="experts")(x_GND, routing)
        if not self.is_initializing():
            stats = RouterStats.of(logits, routing, real_GN, computed)
            self.sow("router", "stats", stats, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        y_BLD = y_GND.reshape(B, L, D)
        if moe.shared:
            y_BLD = y_BLD + MLP(c, moe.shared * moe.width(c.mlp_dim), name="shared")(x_BLD)
        return y_BLD

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError if the numbers of the router do not fit together."""
        moe, inf = moe_of(config), float("inf")
        require_range(moe, "model.moe: ", experts=(1, inf), top_k=(1, inf), expert_dim=(0, inf), shared=(0, inf),
                      dense_layers=(0, config.num_layers), balance=(0, inf), z=(0, inf))  # fmt: skip
        require(moe.scale > 0, f"model.moe: scale={moe.scale:g} must be greater than 0; 1 leaves the weights alone.")
        E, k = moe.experts, moe.top_k
        require(k <= E, f"model.moe: top_k={k} must be at most experts={E}; try top_k={E}, or experts={k}.")
        if not hasattr(moe, "groups"):
            return
        groups, top_groups = moe.groups, moe.top_groups
        require_range(moe, "model.moe: ", groups=(1, inf), top_groups=(1, inf))
        require(
            E % groups == 0,
            f"model.moe: groups={groups} must divide experts={E}; try groups in {divisors(E)}.",
        )
        require(
            top_groups <= groups,
            f"model.moe: top_groups={top_groups} must be at most groups={groups}; try top_groups={groups}.",
        )
        left = top_groups * (E // groups)
        require(
            k <= left,
            f"model.moe: top_k={k} must be at most the {left} experts of top_groups={top_groups} of {groups} groups; "
            f"try top_k={left}, or top_groups={-(-k // (E // groups))}.",
        )
        if moe.uses_bias:
            require_range(moe, "model.moe: ", bias_rate=(0, inf))

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer."""
        moe = moe_of(config)
        router = moe.experts * (config.model_dim + (1 if moe.uses_bias else 0))
        return router + _num_mlp_params(config, moe.experts + moe.shared)

    @staticmethod
    def num_active_params(config: ModelConfig) -> int:
        """Returns how many parameters of one layer a token uses: all but those of the experts it is not sent to."""
        moe = moe_of(config)
        unused = moe.experts - moe.top_k
        return MixtureOfExperts.num_params(config) - _num_mlp_params(config, unused)

    @staticmethod
    def flops_per_token(config: ModelConfig) -> int:
        """Returns the forward FLOPs of the matrix products of one layer for one token, the filling of windows aside."""
        moe = moe_of(config)
        return 2 * (moe.experts * config.model_dim + _num_mlp_params(config, moe.top_k + moe.shared))


def _num_mlp_params(config: ModelConfig, num_experts: int) -> int:
    width = moe_of(config).width(config.mlp_dim)
    return num_experts * MLPS[config.mlp].num_params(config.model_dim, width)


class RouterScores(nn.Module):
    """The linear map to one logit an expert, in float32 whatever the compute dtype: choices hang on little."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_GND: jax.Array) -> tuple[jax.Array, Routing]:
        """Returns (logits [G, N, E] in float32, routing)."""
        c, moe = self.config, moe_of(self.config)
        init = logical(nn.initializers.normal(INIT_STD), "embed", "experts")
        kernel_DE = self.param("kernel", init, (c.model_dim, moe.experts), jnp.float32)
        bias_E = None
        if moe.uses_bias:
            init = logical(nn.initializers.zeros, "experts")
            bias_E = lax.stop_gradient(self.param("balance_bias", init, (moe.experts,), jnp.float32))
        G, N, D = x_GND.shape
        # Flat, like every product of the model; "highest", or GPUs and TPUs round the operands.
        logits = jnp.matmul(x_GND.reshape(G * N, D).astype(jnp.float32), kernel_DE, precision="highest")
        logits = _lay_out(logits.reshape(G, N, moe.experts))
        return logits, moe.route(logits, bias_E)


class Experts(nn.Module):
    """E MLPs, held as stacked matrices."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_GND: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """Returns (y_GND, computed [G, N, k]: whether the product of an assignment was made)."""
        c, moe = self.config, moe_of(self.config)
        activation = MLPS[c.mlp]
        D, F, E = c.model_dim, moe.width(c.mlp_dim), moe.experts
        kernels = {
            name: ExpertKernel((E, D, F), ("experts", "embed", "mlp"), c.dtype, INIT_STD, name=name)()
            for name in activation.names
        }
        kernels["down"] = ExpertKernel(
            (E, F, D), ("experts", "mlp", "embed"), c.dtype, output_std(c.num_layers), name="down"
        )()

        def run(x_ND, experts_NK, weights_NK, kernels):
            order = Order.of(experts_NK, E)
            x_PD = take_rows(x_ND, order.token_P, order.row_NK)
            h_PF = activation(*[grouped_matmul(x_PD, kernels[name], order.groups) for name in activation.names])
            y_PD = grouped_matmul(h_PF, kernels["down"], order.groups)
            y_NKD = take_rows(y_PD, order.row_NK.reshape(-1), order.assignment_P[:, None]).reshape(*experts_NK.shape, D)
            y_ND = jnp.sum(y_NKD.astype(jnp.float32) * weights_NK[..., None], axis=1).astype(x_ND.dtype)
            return y_ND, order.groups.computed(order.row_NK, experts_NK)

        G = x_GND.shape[0]
        kernels = jax.tree.map(lambda w_EDF: jnp.broadcast_to(w_EDF, (G, *w_EDF.shape)), kernels)
        y_GND, computed = over_shards(run, x_GND, routing.experts, routing.weights, kernels)
        return _lay_out(y_GND), computed


class ExpertKernel(nn.Module):
    """The matrices of all experts; each is its own draw."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    dtype: str
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the matrices in the compute dtype."""
        init = logical(nn.initializers.normal(self.std), *self.axes)
        return self.param("kernel", init, self.shape, jnp.float32).astype(self.dtype)


@flax.struct.dataclass
class Order:
    """How N tokens, k assignments each, lie as P rows sorted by expert (of one expert: in the order of the tokens)."""

    row_NK: jax.Array  # where an assignment lies
    token_P: jax.Array  # whose row it is; a spare row holds token 0
    assignment_P: jax.Array  # n * k + k'; a spare row: -1
    groups: Groups

    @classmethod
    def of(cls, experts_NK: jax.Array, num_experts: int) -> "Order":
        """Returns the order of the assignments to experts."""
        M, K = experts_NK.size, experts_NK.shape[1]
        expert_M = experts_NK.reshape(M)
        _, assignment_M = lax.sort((expert_M, jnp.arange(M, dtype=jnp.int32)), num_keys=1, is_stable=True)
        sizes_E = jnp.sum(jax.nn.one_hot(expert_M, num_experts, dtype=jnp.int32), axis=0)
        groups = arrange(sizes_E, M)
        spare = (0, groups.num_rows - M)
        return cls(
            row_NK=jnp.argsort(assignment_M).reshape(experts_NK.shape),
            token_P=jnp.pad(assignment_M // K, spare),
            assignment_P=jnp.pad(assignment_M, spare, constant_values=-1),
            groups=groups,
        )


def _lay_out(x_GNx: jax.Array) -> jax.Array:
    """Returns x with its parts on the devices that hold those rows of the batch."""
    return x_GNx if x_GNx.shape[0] == 1 else constrain(x_GNx, "activation_batch", None, None)


def router_losses(stats: RouterStats) -> tuple[jax.Array, jax.Array]:
    """Returns (load-balance loss, z-loss), without their weights, of one layer or of layers stacked on a leading axis.

    Load balance: E * sum_e f_e P_e with f_e the assignments and P_e the mean probability per token, all layers'
    tokens together (Switch, 2101.03961; as in Hugging Face's load_balancing_loss_func): top_k when all experts are
    alike. z: mean of logsumexp(logits)^2 (ST-MoE, 2202.08906).
    """
    tokens = jnp.maximum(jnp.sum(stats.tokens), 1.0)
    load_E, prob_E = _over_layers(stats.load), _over_layers(stats.prob)
    balance = load_E.shape[0] * jnp.sum(load_E / tokens * (prob_E / tokens))
    return balance, jnp.sum(stats.z) / tokens


def router_metrics(stats: RouterStats) -> dict[str, jax.Array]:
    """Returns the statistics of one layer, or of layers stacked on a leading axis, as figures.

    entropy: of the probabilities, mean in nats; load: share of the assignments of each expert [E], all layers together;
    load_max: the largest share over the mean one; dropped: share of assignments that were not computed.
    """
    load_E = _over_layers(stats.load)
    assignments = jnp.maximum(jnp.sum(load_E), 1.0)
    return {
        "entropy": jnp.sum(stats.entropy) / jnp.maximum(jnp.sum(stats.tokens), 1.0),
        "load": load_E / assignments,
        "load_max": jnp.max(load_E) / assignments * load_E.shape[0],
        "dropped": jnp.sum(stats.dropped) / assignments,
    }


def _over_layers(x: jax.Array) -> jax.Array:
    return jnp.sum(x.reshape(-1, x.shape[-1]), axis=0)


def balance_bias_update(load_E: jax.Array, rate: float) -> jax.Array:
    """Returns what to add to the balance bias [..., E] of a layer that sent load_E [..., E] tokens to its experts.

    Wang et al. 2024, 2408.15664; DeepSeek-V3, 2412.19437, section 2.1.2.
    """
    return rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
