"""The MLP of a dense layer."""

import flax.linen as nn
import jax

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Linear, constrain, output_std
from foundry_jax.model.mlp import MLPS
from foundry_jax.registry import lookup


class MLP(nn.Module):
    """Two or three matrices around the activation that config.mlp names; biases with config.bias="all"."""

    config: ModelConfig
    mlp_dim: int | None = None  # None: config.mlp_dim

    @nn.compact
    def __call__(self, x_BLD: jax.Array, real_BL: jax.Array | None = None) -> jax.Array:
        """Returns y_BLD. Padding (not real) is computed like any token."""
        c = self.config
        activation = lookup(MLPS, c.mlp, "mlp")
        F, use_bias = self.mlp_dim or c.mlp_dim, c.bias == "all"
        inputs = [
            Linear((c.model_dim,), (F,), ("embed", "mlp"), c.dtype, use_bias=use_bias, name=name)(x_BLD)
            for name in activation.names
        ]
        y_BLF = constrain(activation(*inputs), "activation_batch", "activation_length", "activation_mlp")
        std = output_std(c.num_layers)
        return Linear((F,), (c.model_dim,), ("mlp", "embed"), c.dtype, std, use_bias=use_bias, name="down")(y_BLF)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError if the activation is unknown."""
        lookup(MLPS, config.mlp, "mlp")

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer."""
        activation = MLPS[config.mlp]
        biases = len(activation.names) * config.mlp_dim + config.model_dim if config.bias == "all" else 0
        return activation.num_params(config.model_dim, config.mlp_dim) + biases

    num_active_params = num_params

    @staticmethod
    def flops_per_token(config: ModelConfig) -> int:
        """Returns the forward FLOPs of the matrix products of one layer for one token."""
        return 2 * MLPS[config.mlp].num_params(config.model_dim, config.mlp_dim)
