"""POSITIONS: how the order of tokens reaches attention; ROPE_SCALINGS: how rotary frequencies stretch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.model.config import ModelConfig
from foundry_jax.registry import lookup
from foundry_jax.schema import require, require_range, variant


class NoPosition:
    """No position at all: the causal mask alone tells order (NoPE). Kazemnejad et al. 2023, 2305.19466.

    The other positions override what they do differently.
    """

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError if the config's dims do not allow this position."""

    @staticmethod
    def rotate(config: ModelConfig, x_BLNH: jax.Array, positions_BL: jax.Array, *, interleaved: bool = False):
        """Returns queries or keys as attention compares them."""
        return x_BLNH

    @staticmethod
    def slopes(num_heads: int) -> np.ndarray | None:
        """Returns slopes_N of a bias slope * (key position - query position) on the logits, or None."""
        return None

    @staticmethod
    def table_length(config: ModelConfig) -> int:
        """Returns how many position vectors are learned and added to the embedding."""
        return 0


class Rotary(NoPosition):
    """Rotary position embedding of queries and keys. Su et al. 2021, 2104.09864."""

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raises UserError unless the rotated dims come in pairs."""
        key = "qk_rope_head_dim" if config.attention == "mla" else "head_dim"
        dim = getattr(config, key)
        require(dim % 2 == 0, f"model.{key}={dim} must be even for RoPE; try {dim + 1}.")

    @staticmethod
    def rotate(config: ModelConfig, x_BLNH: jax.Array, positions_BL: jax.Array, *, interleaved: bool = False):
        """Returns x rotated by its position, with the config's base and scaling."""
        frequencies, magnitude = rotary_frequencies(config, x_BLNH.shape[-1])
        return rope(x_BLNH, positions_BL, frequencies, magnitude, interleaved=interleaved)


class Alibi(NoPosition):
    """Attention with linear biases: keys further back score lower. Press et al. 2021, 2108.12409."""

    @staticmethod
    def slopes(num_heads: int) -> np.ndarray:
        """Returns slopes_N: 2^(-8 i / n) for a power of two; else those of the next smaller power and every other
        one of the next larger, as the paper's code does."""

        def geometric(n):
            return [2 ** (-8 * i / n) for i in range(1, n + 1)]

        power = 2 ** math.floor(math.log2(num_heads))
        slopes = geometric(power) + geometric(2 * power)[::2][: num_heads - power]
        return np.asarray(slopes, np.float32)


class Learned(NoPosition):
    """One learned vector for each position, added to the embedding. Vaswani et al. 2017, 1706.03762; GPT-2."""

    @staticmethod
    def table_length(config: ModelConfig) -> int:
        """Returns context_length: later positions do not exist."""
        return config.context_length


POSITIONS = {"rope": Rotary, "alibi": Alibi, "learned": Learned, "none": NoPosition}


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation: all frequencies divided by factor. Chen et al. 2023, 2306.15595."""

    factor: float = 4.0

    def __post_init__(self):
        require_range(self, "model.rope_scaling=linear: ", factor=(1, math.inf))

    def scale(self, frequencies: jax.Array, theta: float) -> tuple[jax.Array, float]:
        """Returns (frequencies, factor on cosine and sine)."""
        return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: slow dims divided by factor, fast ones kept, a ramp between. Dubey et al. 2024, 2407.21783.

    low and high count turns over original_length tokens: fewer than low is slow, more than high is fast.
    """

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        where = "model.rope_scaling=llama3: "
        require_range(self, where, factor=(1, math.inf), original_length=(1, math.inf), low=(0, math.inf))
        require(self.low < self.high, f"{where}low={self.low} must be smaller than high={self.high}.")

    def scale(self, frequencies: jax.Array, theta: float) -> tuple[jax.Array, float]:
        """Returns (frequencies, factor on cosine and sine)."""
        turns = self.original_length / (2 * math.pi / frequencies)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies, 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: a ramp over dims between interpolation and none, and a temperature. Peng et al. 2023, 2309.00071.

    beta_fast and beta_slow count turns over original_length tokens. mscale and mscale_all_dim are DeepSeek's: the
    first scales cosine and sine, the second all logits of multi-head latent attention instead (2405.04434).
    """

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        where = "model.rope_scaling=yarn: "
        require_range(self, where, factor=(1, math.inf), original_length=(1, math.inf), beta_slow=(1e-6, math.inf))
        fast, slow = self.beta_fast, self.beta_slow
        require(fast > slow, f"{where}beta_fast={fast} must be larger than beta_slow={slow}.")

    def scale(self, frequencies: jax.Array, theta: float) -> tuple[jax.Array, float]:
        """Returns (frequencies, factor on cosine and sine)."""
        dim = 2 * frequencies.shape[0]

        def dim_of(turns):
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(dim_of(self.beta_fast)), 0), min(math.ceil(dim_of(self.beta_slow)), dim - 1)
        index = jnp.arange(dim // 2, dtype=jnp.float32)
        slow = jnp.clip((index - low) / (high - low if high > low else 1e-3), 0, 1)
        magnitude = self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return frequencies / self.factor * slow + frequencies * (1 - slow), magnitude

    def temperature(self, mscale: float) -> float:
        """Returns the paper's 0.1 ln(factor) + 1, its logarithm weighted by mscale."""
        return 0.1 * mscale * math.log(self.factor) + 1


ROPE_SCALINGS = {"none": None, "linear": Linear, "llama3": Llama3, "yarn": Yarn}


def position_of(config: ModelConfig) -> type[NoPosition]:
    """Returns the config's entry of POSITIONS."""
    return lookup(POSITIONS, config.position, "position")


def scaling_of(config: ModelConfig) -> Linear | Llama3 | Yarn | None:
    """Returns the config's rope_scaling with its numbers, or None."""
    return variant(config.rope_scaling, ROPE_SCALINGS, "model.rope_scaling")


def rotary_frequencies(config: ModelConfig, dim: int) -> tuple[jax.Array, float]:
    """Returns (radians per token of each of dim / 2 pairs, factor on cosine and sine).

    Computed as torch does, in float32, so that the tables agree to the bit (float64 rounded to float32 moves a cosine
    by 4.6e-4 at position 8191).
    """
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    scaling = scaling_of(config)
    return (frequencies, 1.0) if scaling is None else scaling.scale(frequencies, config.rope_theta)


def logit_temperature(config: ModelConfig) -> float:
    """Returns the factor that YaRN's mscale_all_dim puts on all attention logits of DeepSeek's models, squared."""
    scaling = scaling_of(config)
    return scaling.temperature(scaling.mscale_all_dim) ** 2 if isinstance(scaling, Yarn) else 1.0


def rope(
    x_BLNH: jax.Array, positions_BL: jax.Array, frequencies_H: jax.Array, magnitude: float, *, interleaved: bool
) -> jax.Array:
    """Returns x turned by position * frequency, times magnitude.

    Dims (i, i + H/2) turn together, as in Hugging Face's Llama; `interleaved` pairs (2i, 2i + 1), as in
    DeepSeek and Meta's own Llama files.
    """
    half = x_BLNH.shape[-1] // 2
    angles_BLH = positions_BL.astype(jnp.float32)[..., None] * frequencies_H[None, None, :]
    cos, sin = (magnitude * f(angles_BLH)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    x = x_BLNH.astype(jnp.float32)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return y.astype(x_BLNH.dtype)
