"""How a sequence is cut so that a narrow mask costs what it shows: which queries are computed against which keys.

A layout arranges queries [B, L, ...] as [B, C, T, ...] and keys [B, L, ...] as [B, C, S, ...]: C groups, in each of
which T queries meet S keys. Which of those pairs count is then asked of the arranged positions, so a layout only has
to bring every pair that its mask can allow together once. Shapes follow from the length alone, never from the data.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """One group: all queries against all keys."""

    def pairs(self, length: int) -> int:
        """Returns how many query-key pairs are computed for a sequence of `length` tokens, padding included."""
        return length * length

    def queries(self, x_BLx: jax.Array, fill: int = 0) -> jax.Array:
        """Returns x_BCTx; places that hold no token get `fill`."""
        return x_BLx[:, None]

    def keys(self, x_BLx: jax.Array, positions_BL: jax.Array, fill: int = 0) -> jax.Array:
        """Returns x_BCSx; places that hold no token get `fill`. positions_BL are those of the keys."""
        return x_BLx[:, None]

    def restore(self, y_BCTx: jax.Array, length: int) -> jax.Array:
        """Returns y_BLx, in the order of the sequence, from what was computed for the arranged queries."""
        return y_BCTx[:, 0]


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of `size` queries, each against its own block of keys and the `previous` ones before it."""

    size: int
    previous: int

    @classmethod
    def of_reach(cls, reach: int) -> "Blocks":
        """Returns blocks in which every token meets itself and the `reach` tokens before it.

        Small blocks compute few hidden pairs, large ones copy each key less often. Measured on XLA:CPU, 2026-11: half
        the reach for reaches up to 128; 64 at 256 (a forward and backward pass over 4096 tokens: 0.24 s of CPU time,
        against 0.25 s with 32, 0.29 s with 128, 0.43 s with 256, and 4.5 s for all pairs).
        """
        size = max(1, min(math.ceil(reach / 2), 64), math.ceil(reach / 4))
        return cls(size, math.ceil(reach / size))

    def pairs(self, length: int) -> int:
        return math.ceil(length / self.size) * self.size * self.size * (self.previous + 1)

    def queries(self, x_BLx: jax.Array, fill: int = 0) -> jax.Array:
        return _cut(x_BLx, self.size, 0, fill)

    def keys(self, x_BLx: jax.Array, positions_BL: jax.Array, fill: int = 0) -> jax.Array:
        x_BCSx = _cut(x_BLx, self.size, self.previous, fill)
        count = x_BCSx.shape[1] - self.previous
        return jnp.concatenate([x_BCSx[:, i : i + count] for i in range(self.previous + 1)], axis=2)

    def restore(self, y_BCTx: jax.Array, length: int) -> jax.Array:
        return _join(y_BCTx)[:, :length]


@dataclasses.dataclass(frozen=True)
class Residues(Layout):
    """`stride` groups: tokens whose indices leave the same remainder, against each other."""

    stride: int

    def pairs(self, length: int) -> int:
        return self.stride * math.ceil(length / self.stride) ** 2

    def queries(self, x_BLx: jax.Array, fill: int = 0) -> jax.Array:
        return _cut(x_BLx, self.stride, 0, fill).swapaxes(1, 2)

    def keys(self, x_BLx: jax.Array, positions_BL: jax.Array, fill: int = 0) -> jax.Array:
        return self.queries(x_BLx, fill)

    def restore(self, y_BCTx: jax.Array, length: int) -> jax.Array:
        return _join(y_BCTx.swapaxes(1, 2))[:, :length]


@dataclasses.dataclass(frozen=True)
class Summaries(Layout):
    """One group: all queries against the keys at the last `summary` of every `stride` positions of a document."""

    stride: int
    summary: int

    def count(self, length: int) -> int:
        """Returns the most such keys that a row can hold.

        Documents that start at position 0 have at most summary / stride of their tokens each; a first one that starts
        elsewhere, in the middle of a block, up to `summary` more.
        """
        return min(length, length * self.summary // self.stride + self.summary)

    def pairs(self, length: int) -> int:
        return length * self.count(length)

    def keys(self, x_BLx: jax.Array, positions_BL: jax.Array, fill: int = 0) -> jax.Array:
        chosen_BL = (positions_BL >= 0) & (positions_BL % self.stride >= self.stride - self.summary)
        index_BS = jnp.argsort(~chosen_BL, axis=1, stable=True)[:, : self.count(x_BLx.shape[1])]
        if len(index_BS) == 1:
            return _take(x_BLx, index_BS[0])[:, None]
        x_BLx = jnp.broadcast_to(x_BLx, (len(index_BS), *x_BLx.shape[1:]))
        return jax.vmap(lambda x_Lx, index_S: _take(x_Lx[None], index_S))(x_BLx, index_BS)


def _cut(x_BLx: jax.Array, size: int, before: int, fill: int) -> jax.Array:
    """Returns x in blocks of `size`, with `before` empty blocks in front and the last one filled up."""
    padding = [(0, 0), (before * size, -x_BLx.shape[1] % size)] + [(0, 0)] * (x_BLx.ndim - 2)
    x_BLx = jnp.pad(x_BLx, padding, constant_values=fill)
    return x_BLx.reshape(x_BLx.shape[0], -1, size, *x_BLx.shape[2:])


def _join(x_BCTx: jax.Array) -> jax.Array:
    return x_BCTx.reshape(x_BCTx.shape[0], -1, *x_BCTx.shape[3:])


def _take(x_BLx: jax.Array, index_S: jax.Array) -> jax.Array:
    return x_BLx.at[:, index_S].get(mode="promise_in_bounds", unique_indices=True)
