"""Which keys a query may see: one spec that attention, the FLOP count and the leak check all read."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

EMPTY = -1  # position of a cache slot that holds no token


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """A static rule over absolute positions. Today there is one: causal."""

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns whether position `query` may see position `key`, elementwise with broadcasting."""
        return key <= query

    def mean_visible_keys(self, length: int) -> float:
        """Returns how many keys a query sees on average over a sequence of `length` tokens."""
        return (length + 1) / 2


@flax.struct.dataclass
class Placement:
    """Where tokens stand: absolute positions [B or 1, L] and optional document ids [B or 1, L]."""

    positions_BL: jax.Array
    segments_BL: jax.Array | None = None


@flax.struct.dataclass
class Mask:
    """A spec with the queries and keys it applies to; matrix() is made where it is used, never stored.

    contiguous: the keys are the queries, at positions 0..L-1 of one document, so that a fused causal
    kernel needs no matrix.
    """

    queries: Placement
    keys: Placement
    spec: MaskSpec = flax.struct.field(pytree_node=False)
    contiguous: bool = flax.struct.field(pytree_node=False)

    def matrix(self) -> jax.Array:
        """Returns mask_BLS, True where the query may see the key; B is 1 if all rows are alike."""
        query, key = self.queries.positions_BL[:, :, None], self.keys.positions_BL[:, None, :]
        mask_BLS = self.spec.visible(query, key) & (key != EMPTY)
        if self.queries.segments_BL is not None:
            mask_BLS &= self.queries.segments_BL[:, :, None] == self.keys.segments_BL[:, None, :]
        return mask_BLS


def whole_sequence(length: int) -> Placement:
    """Returns the placement of one document at positions 0..length-1, shared by all rows."""
    return Placement(jnp.arange(length, dtype=jnp.int32)[None, :])
