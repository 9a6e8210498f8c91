"""How a checkpoint's tensor holds one of our parameters: named layouts, each with its inverse.

Every axis of theirs is one of ours, or several of ours run together. PyTorch keeps a linear map as [out, in]; we keep
it as [in, out], and heads as an axis of their own.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of our axes each axis of theirs runs together, the slowest first."""

    name: str
    axes: tuple[tuple[int, ...], ...]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of their tensor that holds a parameter of this shape."""
        return tuple(math.prod(shape[i] for i in group) for group in self.axes)

    def to_ours(self, read: Callable[[Index], np.ndarray], shape: tuple[int, ...], index: Index) -> np.ndarray:
        """Returns parameter[index] of a parameter of this shape, as a view of what read(slices of theirs) returns.

        Read is no more than the rows and columns that hold it.
        """
        theirs, sizes, rest = [], [], []
        for first, *inner in self.axes:
            start, stop, _ = index[first].indices(shape[first])
            size = math.prod(shape[i] for i in inner)
            theirs.append(slice(start * size, stop * size))
            sizes += [stop - start, *(shape[i] for i in inner)]
            rest += [slice(None), *(index[i] for i in inner)]
        x = read(tuple(theirs)).reshape(sizes)[tuple(rest)]
        return x.transpose(np.argsort(self._order))

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Returns their tensor of a parameter; a view where numpy can give one."""
        return x.transpose(self._order).reshape(self.their_shape(x.shape))

    @property
    def _order(self) -> list[int]:
        return [axis for group in self.axes for axis in group]


VECTOR = Layout("vector", ((0,),))  # D
TABLE = Layout("table", ((0,), (1,)))  # VD
LINEAR = Layout("linear", ((1,), (0,)))  # [out, in] -> [in, out]
TO_HEADS = Layout("to_heads", ((1, 2), (0,)))  # [N H, D] -> DNH
FROM_HEADS = Layout("from_heads", ((2,), (0, 1)))  # [D, N H] -> NHD
HEAD_VECTOR = Layout("head_vector", ((0, 1),))  # [N H] -> NH
