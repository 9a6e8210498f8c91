"""What happens between the matrices of an MLP."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
    """One kind of MLP. Gated: down(function(gate x) * up x); plain: down(function(up x))."""

    function: Callable[[jax.Array], jax.Array]
    gated: bool
    description: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the matrices that read the input; "down" writes the output."""
        return ("gate", "up") if self.gated else ("up",)

    def num_params(self, model_dim: int, mlp_dim: int) -> int:
        """Returns the number of entries of the matrices of one MLP."""
        return (len(self.names) + 1) * model_dim * mlp_dim

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Returns what "down" reads, from the products with each matrix of `names`."""
        if not self.gated:
            return self.function(*inputs)
        gate, up = inputs
        return self.function(gate) * up


# jax.nn.gelu is the tanh approximation unless told otherwise; the two differ by up to 5e-4.
_erf_gelu = functools.partial(jax.nn.gelu, approximate=False)
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

SWIGLU = Activation(jax.nn.silu, True, "SiLU gate. Shazeer 2020, 2002.05202")
GEGLU = Activation(_erf_gelu, True, "GELU gate, exact. Shazeer 2020, 2002.05202")
GEGLU_TANH = Activation(_tanh_gelu, True, "GELU gate, tanh approximation, as in Gemma. Shazeer 2020, 2002.05202")
GLU = Activation(jax.nn.sigmoid, True, "sigmoid gate. Dauphin et al. 2016, 1612.08083; Shazeer 2020, 2002.05202")
GELU = Activation(_erf_gelu, False, "plain GELU, exact. Hendrycks & Gimpel 2016, 1606.08415")
GELU_TANH = Activation(_tanh_gelu, False, "plain GELU, tanh approximation, as in GPT-2. 1606.08415")
RELU2 = Activation(lambda x: jnp.square(jax.nn.relu(x)), False, "plain ReLU squared. So et al. 2021, 2109.08668")
