"""The key/value cache: which slot a new token takes, and what a query then reads.

A full cache has a slot for every position. A rolling one has a slot for each token of the window: position p takes slot
p % window, and the token that stood there is out of every later query's sight.
"""

import flax.struct
import jax
import jax.numpy as jnp

from foundry_jax.model.mask import EMPTY


@flax.struct.dataclass
class Slots:
    """Where the new tokens of a batch go; num_slots stands for nowhere (padding)."""

    slots_BL: jax.Array
    fresh_BS: jax.Array | None  # rolling: whether an old slot may be read; the new tokens replace the others
    rolling: bool = flax.struct.field(pytree_node=False)

    def update(self, cache_BSx: jax.Array, new_BLx: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (the cache with new_BLx stored, what to read: [B, S, ...]); the cache's dtype is kept.

        Of a rolling cache the old slots and then the new tokens are read: several new tokens at once may push out
        what the first of them still sees.
        """
        new_BLx = new_BLx.astype(cache_BSx.dtype)
        rows = jnp.arange(cache_BSx.shape[0])[:, None]
        written_BSx = cache_BSx.at[rows, self.slots_BL].set(new_BLx, mode="drop")
        return written_BSx, jnp.concatenate([cache_BSx, new_BLx], axis=1) if self.rolling else written_BSx

    def update_positions(self, positions_BS: jax.Array, new_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the same for the position that each slot holds; an old slot that may not be read reads EMPTY."""
        written_BS, read_BS = self.update(positions_BS, new_BL)
        if self.rolling:
            fresh_BS = jnp.pad(self.fresh_BS, ((0, 0), (0, new_BL.shape[1])), constant_values=True)
            read_BS = jnp.where(fresh_BS, read_BS, EMPTY)
        return written_BS, read_BS


def full_slots(cached_BS: jax.Array, new_BL: jax.Array) -> Slots:
    """Returns the slots of a cache with one slot a position, for tokens at positions new_BL."""
    return Slots(jnp.where(new_BL == EMPTY, cached_BS.shape[1], new_BL), None, rolling=False)


def rolling_slots(cached_BS: jax.Array, new_BL: jax.Array) -> Slots:
    """Returns the slots of a cache of the last S tokens: of the new ones only the last S are kept.

    An old slot at or after the first new position is not read: the same tokens are fed a second time.
    """
    size = cached_BS.shape[1]
    last_B1 = jnp.max(new_BL, axis=1, keepdims=True)
    first_B1 = jnp.min(jnp.where(new_BL == EMPTY, jnp.iinfo(jnp.int32).max, new_BL), axis=1, keepdims=True)
    kept_BL = (new_BL != EMPTY) & (new_BL > last_B1 - size)
    return Slots(jnp.where(kept_BL, new_BL % size, size), cached_BS < first_B1, rolling=True)
