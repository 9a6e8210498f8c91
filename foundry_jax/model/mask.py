"""Which keys a query may see: one spec that attention, the FLOP count and the leak check all read."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.model.layout import Blocks, Layout, Residues, Summaries
from foundry_jax.schema import require

EMPTY = -1  # position of padding, and of a cache slot that holds no token
# Cutting pays from this share of all pairs down. XLA:CPU, 2026-11, 8x256x6x64: 0.36 of the pairs take 0.70 of the time,
# 0.75 take 0.91, 0.89 in two parts take 1.13; at 4096 tokens 0.76 in two parts take 0.95.
PAYS = 0.8


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """A static rule over the positions of one document.

    A rule is its visible(). A layout, or parts that have layouts, make it save work; a closed form of visible_keys()
    makes long contexts quick to count.
    """

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns whether position `query` may see position `key`, elementwise with broadcasting."""
        raise NotImplementedError

    def __and__(self, other: "MaskSpec") -> "MaskSpec":
        """Returns the spec of the pairs that both allow."""
        return Both(self, other)

    def visible_keys(self, length: int) -> np.ndarray:
        """Returns how many keys each query sees in one document of `length` tokens."""
        at = np.arange(length)
        return np.array([np.count_nonzero(self.visible(i, at)) for i in at])

    def mean_visible_keys(self, length: int) -> float:
        """Returns how many keys a query sees on average in one document of `length` tokens."""
        return int(self.visible_keys(length).sum()) / length

    def computed_keys(self, length: int) -> float:
        """Returns how many keys a query is computed against on average, hidden ones included, without a cache."""
        return _pairs(self.arrangement(length), length) / length

    def parts(self) -> "tuple[MaskSpec, ...]":
        """Returns specs that have no pair in common and together are this one, each with its own layout."""
        return (self,)

    def layout(self, length: int) -> Layout:
        """Returns an arrangement that brings together, once, all pairs this spec can allow; only asked of parts."""
        return Layout()

    def arrangement(self, length: int) -> "tuple[tuple[MaskSpec, Layout], ...]":
        """Returns the parts to compute with their layouts; the whole with all pairs if cutting does not pay."""
        parts = tuple((part, part.layout(length)) for part in self.parts())
        return parts if _pairs(parts, length) <= PAYS * length**2 else ((self, Layout()),)


def _pairs(parts: tuple[tuple[MaskSpec, Layout], ...], length: int) -> int:
    return sum(layout.pairs(length) for _, layout in parts)


@dataclasses.dataclass(frozen=True)
class Causal(MaskSpec):
    """A token sees itself and all before it."""

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return key <= query

    def visible_keys(self, length: int) -> np.ndarray:
        return np.arange(length) + 1


@dataclasses.dataclass(frozen=True)
class Window(MaskSpec):
    """A token sees the last `size` tokens, itself included.

    Mistral, 2310.06825.
    """

    size: int

    def __post_init__(self):
        require(self.size >= 1, f"model.window={self.size} must be at least 1, the token itself; try window=256.")

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return (key <= query) & (query - key < self.size)

    def visible_keys(self, length: int) -> np.ndarray:
        return np.minimum(np.arange(length) + 1, self.size)

    def layout(self, length: int) -> Layout:
        return Blocks.of_reach(self.size - 1)


class Sparse(MaskSpec):
    """A near and a far part, both seen by every head.

    Child et al. 2019, 1904.10509: "merged heads". Through two such layers every token reaches all before it.
    """

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        near, far = self.parts()
        return near.visible(query, key) | far.visible(query, key)


@dataclasses.dataclass(frozen=True)
class Strided(Sparse):
    """A token sees the last `stride` tokens, and of those before every one that is a multiple of `stride` away."""

    stride: int = 16

    def __post_init__(self):
        given = f"model.sparse=strided(stride={self.stride})"
        require(self.stride >= 1, f"{given}: stride must be at least 1; try strided(stride=16).")

    def visible_keys(self, length: int) -> np.ndarray:
        at = np.arange(length)
        return np.minimum(at + 1, self.stride) + at // self.stride

    def parts(self) -> tuple[MaskSpec, ...]:
        return Window(self.stride), _Column(self.stride)


@dataclasses.dataclass(frozen=True)
class Fixed(Sparse):
    """A token sees those before it in its block of `stride`, and the last `summary` tokens of every earlier block."""

    stride: int = 16
    summary: int = 4

    def __post_init__(self):
        given = f"model.sparse=fixed(stride={self.stride}, summary={self.summary})"
        require(self.stride >= 1, f"{given}: stride must be at least 1; try fixed(stride=16, summary=4).")
        nearby = min(max(self.summary, 1), self.stride)
        require(
            self.summary == nearby,
            f"{given}: summary must be between 1 and stride={self.stride}; try summary={nearby}.",
        )

    def visible_keys(self, length: int) -> np.ndarray:
        at = np.arange(length)
        return at % self.stride + 1 + self.summary * (at // self.stride)

    def parts(self) -> tuple[MaskSpec, ...]:
        return _OwnBlock(self.stride), _Summary(self.stride, self.summary)


SPARSE = {
    "strided": Strided,
    "fixed": Fixed,
}


@dataclasses.dataclass(frozen=True)
class Both(MaskSpec):
    """The pairs that two specs allow: `a & b`."""

    a: MaskSpec
    b: MaskSpec

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.a.visible(query, key) & self.b.visible(query, key)

    def parts(self) -> tuple[MaskSpec, ...]:
        parts = tuple(Both(a, b) for a in self.a.parts() for b in self.b.parts())
        return parts if len(parts) > 1 else (self,)

    def layout(self, length: int) -> Layout:
        return min(self.a.layout(length), self.b.layout(length), key=lambda layout: layout.pairs(length))


# Remainders and quotients below are taken of each position, not of each pair: divisions do not vectorise.


@dataclasses.dataclass(frozen=True)
class _Column(MaskSpec):
    """The far part of Strided."""

    stride: int

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return (query - key >= self.stride) & (query % self.stride == key % self.stride)

    def layout(self, length: int) -> Layout:
        return Residues(self.stride)


@dataclasses.dataclass(frozen=True)
class _OwnBlock(MaskSpec):
    """The near part of Fixed. Packed documents start anywhere in a row, so its layout is that of a window."""

    stride: int

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return (key <= query) & (query // self.stride == key // self.stride)

    def layout(self, length: int) -> Layout:
        return Blocks.of_reach(self.stride - 1)


@dataclasses.dataclass(frozen=True)
class _Summary(MaskSpec):
    """The far part of Fixed."""

    stride: int
    summary: int

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return (key // self.stride < query // self.stride) & (key % self.stride >= self.stride - self.summary)

    def layout(self, length: int) -> Layout:
        return Summaries(self.stride, self.summary)


@flax.struct.dataclass
class Placement:
    """Where tokens stand: positions in their documents [B or 1, L] and optional document ids [B or 1, L]."""

    positions_BL: jax.Array
    segments_BL: jax.Array | None = None


@flax.struct.dataclass
class Mask:
    """A spec with the queries and keys it applies to; matrix() is made where it is used, never stored.

    contiguous: the keys are the queries, at positions 0..L-1 of one document, so that a fused kernel needs no matrix.
    aligned: the keys are the queries, index by index, and two tokens of a document are as many indices as positions
        apart, so that only some pairs need be computed. Positions may restart with each segment or be EMPTY.
    """

    queries: Placement
    keys: Placement
    spec: MaskSpec = flax.struct.field(pytree_node=False)
    contiguous: bool = flax.struct.field(pytree_node=False)
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    def matrix(self) -> jax.Array:
        """Returns mask_BLS, True where the query may see the key; B is 1 if all rows are alike."""
        query, key = self.queries.positions_BL[..., :, None], self.keys.positions_BL[..., None, :]
        mask_BLS = self.spec.visible(query, key) & (key != EMPTY)
        if self.queries.segments_BL is not None:
            mask_BLS &= self.queries.segments_BL[..., :, None] == self.keys.segments_BL[..., None, :]
        return mask_BLS

    def distance(self) -> jax.Array:
        """Returns float32 [B, L, S]: by how much the key's position exceeds the query's."""
        query, key = self.queries.positions_BL[..., :, None], self.keys.positions_BL[..., None, :]
        return (key - query).astype(jnp.float32)


def whole_sequence(length: int) -> Placement:
    """Returns the placement of one document at positions 0..length-1, shared by all rows."""
    return Placement(jnp.arange(length, dtype=jnp.int32)[None, :])
