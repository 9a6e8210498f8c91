"""From a source to parameters on the devices that a plan puts them on, read part by part."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.transformer import init_params
from foundry_jax.train_step import unbox
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.source import origins, path_of

PIECE_BYTES = 2**26  # of a parameter that are read at a time
TILE = 256  # rows and columns of a tile that is transposed at a time: both sides fit a core's cache

Reader = Callable[[str, Index | None], np.ndarray]


def abstract_params(config: ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, boxed with their logical axis names."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def load(
    read: Reader,
    config: ModelConfig,
    shardings: Any,
    dtype: Any = np.float32,
    progress: Callable[[int], None] = lambda _: None,
) -> dict:
    """Returns the parameters of a model, each laid out by its sharding; no device's part is read with another's.

    Args:
        read: (path, slices) -> that part of a parameter of the unscanned model, as Source.read.
        shardings: a tree like the parameters'.
        progress: called with the bytes of each part that was read.
    """

    def leaf(keys, abstract, sharding):
        part = functools.partial(_read, read, origins(path_of(keys), config), abstract.shape, np.dtype(dtype))
        return _placed(part, abstract.shape, sharding, progress)

    return jax.tree_util.tree_map_with_path(leaf, unbox(abstract_params(config)), shardings)


def _placed(
    part: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Any, progress: Callable[[int], None]
) -> jax.Array:
    """Returns the parameter whose parts are part(index), one device after another.

    jax.make_array_from_callback asks for all parts before it moves the first: the whole parameter would be held twice.
    """
    shards, last, x = [], None, None
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if index != last:  # copies on several devices are read once
            x = None  # before the next one is there too
            x, last = part(index), index
            progress(x.nbytes)
        shards.append(jax.device_put(x, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(read: Reader, origin: str | list[str], shape: tuple[int, ...], dtype: np.dtype, index: Index) -> np.ndarray:
    """Returns parameter[index], contiguous; a stacked one is filled layer by layer."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    out = np.empty(sizes, dtype)
    if isinstance(origin, str):
        _fill(out, read, origin, index, shape)
    else:
        for row, i in enumerate(range(*index[0].indices(shape[0]))):
            _fill(out[row], read, origin[i], index[1:], shape[1:])
    return out


def _fill(out: np.ndarray, read: Reader, path: str, index: Index, shape: tuple[int, ...]) -> None:
    """Writes parameter[index] to out, a few rows of its first axis at a time: no more is in memory twice."""
    first, stop, _ = index[0].indices(shape[0])
    step = max(1, len(out) * PIECE_BYTES // max(1, out.nbytes))
    for start in range(first, stop, step):
        end = min(start + step, stop)
        _copied(read(path, (slice(start, end), *index[1:])), out[start - first : end - first])


def _copied(source: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes the source's numbers to out and returns it; a transposed view is copied in tiles."""
    flat = _as_transposed(source)
    if flat is None:
        out[...] = source
        return out
    columns = out.reshape(flat.shape)
    for i in range(0, flat.shape[0], TILE):
        for j in range(0, flat.shape[1], TILE):
            # Numbers are converted in the order in which they lie: several times as fast as across it.
            tile = flat[i : i + TILE, j : j + TILE].T.astype(out.dtype)
            columns[i : i + TILE, j : j + TILE] = tile.T
    return out


def _as_transposed(source: np.ndarray) -> np.ndarray | None:
    """Returns a matrix whose columns are contiguous, if the source is a view of one; large ones only."""
    if source.ndim < 2 or source.flags.c_contiguous or source.size < TILE * TILE:
        return None
    for shape in ((source.shape[0], -1), (-1, source.shape[-1])):
        with contextlib.suppress(ValueError):  # the axes do not run together without a copy
            flat = np.reshape(source, shape, copy=False)
            if flat.strides[0] == flat.itemsize:
                return flat
    return None
