"""From a source to parameters on the devices that a plan puts them on, read part by part."""

import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.transformer import init_params
from foundry_jax.train_step import unbox
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.source import origins, path_of

PIECE_BYTES = 2**20  # of a parameter that a thread reads at a time; larger ones would be new memory each time
TILE = 256  # rows and columns of a tile that is transposed at a time: both sides fit a core's cache
THREADS = min(8, os.cpu_count() or 1)
ALIGNMENT = 64  # bytes: on CPU, JAX takes over an array that begins there, and copies any other

Reader = Callable[[str, Index | None], np.ndarray]


@functools.lru_cache(maxsize=8)
def abstract_params(config: ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, boxed with their logical axis names."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def load(
    read: Reader,
    config: ModelConfig,
    shardings: Any,
    dtype: Any = np.float32,
    progress: Callable[[int], None] = lambda _: None,
    slowest: Callable[[str], int] = lambda _: 0,
) -> dict:
    """Returns the parameters of a model, each laid out by its sharding; no device's part is read with another's.

    Args:
        read: (path, slices) -> that part of a parameter of the unscanned model, as Source.read.
        shardings: a tree like the parameters'.
        progress: called with the bytes of each part that was read.
        slowest: as Source.slowest: along which axis of a parameter to read it in pieces.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:

        def leaf(keys, abstract, sharding):
            fill = functools.partial(_fill, pool, read, slowest)
            part = functools.partial(_read, fill, origins(path_of(keys), config), abstract.shape, np.dtype(dtype))
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


def _read(
    fill: Callable[..., None], origin: str | list[str], shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    """Returns parameter[index], contiguous; a stacked one is filled layer by layer."""
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    out = _aligned(tuple(sizes), dtype)
    if isinstance(origin, str):
        fill(out, origin, index, shape)
    else:
        for row, i in enumerate(range(*index[0].indices(shape[0]))):
            fill(out[row], origin[i], index[1:], shape[1:])
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that begins where JAX wants it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _fill(pool, read: Reader, slowest: Callable[[str], int], out: np.ndarray, path: str, index: Index, shape) -> None:
    """Writes parameter[index] to out in pieces, several at a time: no more than those are in memory twice."""
    axis = slowest(path)
    first, stop, _ = index[axis].indices(shape[axis])
    step = max(1, out.shape[axis] * PIECE_BYTES // max(1, out.nbytes))

    def piece(start: int) -> None:
        end = min(start + step, stop)
        part, to = list(index), [slice(None)] * out.ndim
        part[axis], to[axis] = slice(start, end), slice(start - first, end - first)
        _copy(read(path, tuple(part)), out[tuple(to)])

    list(pool.map(piece, range(first, stop, step)))


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Writes the source's numbers to out; a large transposed view is copied in tiles."""
    flat = _as_transposed(source)
    columns = None if flat is None else _reshaped(out, flat.shape)
    if columns is None:
        out[...] = source
        return
    for i in range(0, flat.shape[0], TILE):
        for j in range(0, flat.shape[1], TILE):
            # Numbers are converted in the order in which they lie: several times as fast as across it.
            tile = flat[i : i + TILE, j : j + TILE].T.astype(out.dtype)
            columns[i : i + TILE, j : j + TILE] = tile.T


def _as_transposed(source: np.ndarray) -> np.ndarray | None:
    """Returns a matrix whose columns are contiguous, if the source is a view of one; large ones only."""
    if source.ndim < 2 or source.flags.c_contiguous or source.size < TILE * TILE:
        return None
    shapes = (source.shape[0], math.prod(source.shape[1:])), (math.prod(source.shape[:-1]), source.shape[-1])
    flats = [_reshaped(source, shape) for shape in shapes]
    return next((flat for flat in flats if flat is not None and flat.strides[0] == flat.itemsize), None)


def _reshaped(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """Returns a view of x as a matrix; None if its axes do not run together."""
    with contextlib.suppress(ValueError):
        return np.reshape(x, shape, copy=False)
    return None
