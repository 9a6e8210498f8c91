"""The parts every variant is made of: linear maps, the embedding, dropout, logical axis names."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

INIT_STD = 0.02  # GPT-2's; output projections divide it by sqrt(2 num_layers)


def output_std(num_layers: int) -> float:
    """Returns the init standard deviation of a projection that writes to the residual stream.

    2 num_layers such projections add up; Radford et al. 2019 (GPT-2), section 2.3.
    """
    return INIT_STD / math.sqrt(2 * num_layers)


def logical(init: Callable, *axes: str) -> Callable:
    """Returns `init` with the logical axis names of the parameter it makes; sharding.py maps them to a mesh."""
    return nn.with_logical_partitioning(init, axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x, laid out over the mesh as the current rules say for these logical axes; no mesh: x itself."""
    return nn.with_logical_constraint(x, axes)


def batch_shards() -> int:
    """Returns in how many parts the current rules cut the axis "activation_batch"; 1 without a mesh."""
    axes = dict(nn.get_logical_axis_rules()).get("activation_batch") or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


class Linear(nn.Module):
    """A linear map from the axes in_shape to the axes out_shape.

    The product runs on [tokens, in] x [in, out]: on XLA:CPU the backward pass of the same product on
    [B, L, D] is twice as slow, because it copies transposed operands (7.7 ms against 4.0 ms for one MLP).

    Where the collection "lora" has an adapter for this map (see lora.py), its product x a b is added.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names of in_shape + out_shape
    dtype: str
    std: float = INIT_STD
    use_bias: bool = False

    def setup(self):
        init = logical(nn.initializers.normal(self.std), *self.axes)
        self.weight = self.param("kernel", init, (*self.in_shape, *self.out_shape), jnp.float32)
        if self.use_bias:
            init = logical(nn.initializers.zeros, *self.axes[len(self.in_shape) :])
            self.bias = self.param("bias", init, self.out_shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *in_shape] to [..., *out_shape]."""
        leading = x.shape[: x.ndim - len(self.in_shape)]
        in_size, out_size = math.prod(self.in_shape), math.prod(self.out_shape)
        x = x.reshape(math.prod(leading), in_size)
        y = x @ self._kernel().reshape(in_size, out_size)
        if self.has_variable("lora", "a"):
            y = y + self._adapted(x)
        if self.use_bias:
            y = y + self.bias.reshape(1, out_size).astype(self.dtype)
        return y.reshape(*leading, *self.out_shape)

    def kernel(self) -> jax.Array:
        """Returns the kernel [*in_shape, *out_shape] in the compute dtype, an adapter's product added to it."""
        if not self.has_variable("lora", "a"):
            return self._kernel()
        a, b = self._adapter()
        return (self.weight + (a @ b).reshape(self.weight.shape)).astype(self.dtype)

    def _kernel(self) -> jax.Array:
        return self.weight.astype(self.dtype)

    def _adapted(self, x: jax.Array) -> jax.Array:
        """Returns x a b for rows x, in training with dropout before it."""
        if self.has_variable("lora", "rate"):
            x = dropped(x, self.get_variable("lora", "rate"), self.make_rng("dropout"))
        a, b = (factor.astype(self.dtype) for factor in self._adapter())
        return x @ a @ b

    def _adapter(self) -> tuple[jax.Array, jax.Array]:
        """Returns (a [in, R], b [R, out]), the axes of both sides run together."""
        a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
        return a.reshape(math.prod(self.in_shape), -1), b.reshape(-1, math.prod(self.out_shape))


class Embed(nn.Module):
    """A table of vectors: the token embedding, its transpose as the output map of a tied model; positions."""

    vocab_size: int
    model_dim: int
    dtype: str
    axis: str = "vocab"  # logical name of the axis that is looked up

    def setup(self):
        init = logical(nn.initializers.normal(INIT_STD), self.axis, "embed")
        self.embedding = self.param("embedding", init, (self.vocab_size, self.model_dim), jnp.float32)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns x_BLD in the compute dtype."""
        return jnp.take(self.embedding, tokens_BL, axis=0).astype(self.dtype)

    def output_kernel(self) -> jax.Array:
        """Returns the output map [D, V] in the compute dtype."""
        return self.embedding.T.astype(self.dtype)


class Dropout(nn.Module):
    """Inverted dropout whose rate is a traced number, so that changing it does not recompile."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None) -> jax.Array:
        """Returns x with a share `rate` of its entries zeroed and the rest scaled up; None: x itself."""
        return x if rate is None else dropped(x, rate, self.make_rng("dropout"))


def dropped(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Returns x with a share `rate` of its entries zeroed and the rest scaled up."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))
