"""MLPs in which one half gates the other."""

import flax.linen as nn
import jax

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Linear, constrain, output_std


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x). Shazeer 2020, 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns y_BLD."""
        c = self.config
        gate_BLF = Linear((c.model_dim,), (c.mlp_dim,), ("embed", "mlp"), c.dtype, name="gate")(x_BLD)
        up_BLF = Linear((c.model_dim,), (c.mlp_dim,), ("embed", "mlp"), c.dtype, name="up")(x_BLD)
        y_BLF = constrain(nn.silu(gate_BLF) * up_BLF, "activation_batch", "activation_length", "activation_mlp")
        down = Linear((c.mlp_dim,), (c.model_dim,), ("mlp", "embed"), c.dtype, output_std(c.num_layers), name="down")
        return down(y_BLF)

    @staticmethod
    def num_params(config: ModelConfig) -> int:
        """Returns the number of parameters of one layer."""
        return 3 * config.model_dim * config.mlp_dim

    @staticmethod
    def flops_per_token(config: ModelConfig) -> float:
        """Returns the forward FLOPs of one layer for one token."""
        return 2 * SwiGLU.num_params(config)
