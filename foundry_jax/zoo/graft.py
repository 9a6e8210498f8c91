"""The parameters of one architecture from a trained model of another: where each comes from, and whether that is exact.

| the model has | its parameters | computes the same |
| --- | --- | --- |
| more layers | the last layer again, with what it adds to the residual stream set to zero | yes |
| more key/value heads | each head repeated (Ainslie et al. 2023, 2305.13245, the other way) | yes |
| fewer key/value heads | the mean of each group of heads (the same) | no |
| an output map of its own | the embedding transposed | yes |
| biases | zeros | yes |
| a wider MLP | hidden units again, whose outputs have weight zero | yes |

Whatever else differs in shape is drawn anew, if that is asked for. A number that shapes no parameter (a window, the
base of the rotary frequencies) changes what is computed; that is noted.
"""

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.errors import UserError
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.stacking import stacking_of
from foundry_jax.model.transformer import init_params
from foundry_jax.train_step import unbox
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.load import Reader, load
from foundry_jax.zoo.settings import meaningful
from foundry_jax.zoo.source import EVERYTHING, Source, origins, param_shapes, path_of

log = logging.getLogger(__name__)

LISTED = 8  # groups of parameters that a message names

Shape = tuple[int, ...]
# Settings whose change is seen in the shapes of parameters, or changes no number that is computed.
SHAPING = ("vocab_size", "context_length", "num_layers", "num_kv_heads", "mlp_dim", "bias", "tie_embeddings", "pattern")
# What a layer must have at zero to be the identity. The norm after a sub-layer would scale up what little its kernels
# hold after the first step, so there its scale is zero, and not the kernel before it.
OUTPUTS = re.compile(r"(attention/out|mlp/down|mlp/shared/down|mlp/experts/down)/(kernel|bias)")
OUTPUT_NORMS = re.compile(r"(attention_post_norm|mlp_post_norm)/(scale|bias)")


class Move(Protocol):
    """How a parameter is made of the source's, if it is made of one."""

    source: str | None

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        """Returns parameter[index] of a parameter of this shape; read(path, slices) gives what the source has."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """The source's parameter as it is."""

    source: str

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        return read(self.source, index)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The source's matrix transposed."""

    source: str

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        return read(self.source, index[::-1]).T


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Nothing of the source's."""

    source: None = None

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        return np.broadcast_to(np.float32(0), _extent(shape, index))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Key or value heads along one axis: the mean of each group, or each repeated.

    have, want: number of heads, one of which divides the other. Heads may share the axis with their own dims.
    """

    source: str
    axis: int
    have: int
    want: int

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        before, after = index[: self.axis], index[self.axis + 1 :]
        x = read(self.source, (*before, EVERYTHING, *after))
        lead, rest = x.shape[: self.axis], x.shape[self.axis + 1 :]
        dim = shape[self.axis] // self.want
        if self.want < self.have:
            groups = x.reshape(*lead, self.want, self.have // self.want, dim, *rest)
            x = np.mean(groups, axis=self.axis + 1, dtype=np.float32)
        else:
            x = np.repeat(x.reshape(*lead, self.have, dim, *rest), self.want // self.have, self.axis)
        return x.reshape(*lead, shape[self.axis], *rest)[(EVERYTHING,) * self.axis + (index[self.axis],)]


@dataclasses.dataclass(frozen=True)
class Again:
    """Rows along one axis from the first again, once all `have` are used up."""

    source: str
    axis: int
    have: int

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        x = read(self.source, (*index[: self.axis], EVERYTHING, *index[self.axis + 1 :]))
        return np.take(x, np.arange(shape[self.axis])[index[self.axis]] % self.have, self.axis)


@dataclasses.dataclass(frozen=True)
class Padded:
    """Rows along one axis, then zeros once all `have` are used up."""

    source: str
    axis: int
    have: int

    def read(self, read: Reader, shape: Shape, index: Index) -> np.ndarray:
        start, stop, _ = index[self.axis].indices(shape[self.axis])
        inside = slice(min(start, self.have), min(stop, self.have))
        x = read(self.source, (*index[: self.axis], inside, *index[self.axis + 1 :]))
        missing = stop - start - x.shape[self.axis]
        return np.pad(x, [(0, missing if axis == self.axis else 0) for axis in range(x.ndim)])


@dataclasses.dataclass(frozen=True)
class Graft:
    """Where the parameters of a model come from, by path in an unscanned model.

    missing: parameters that nothing of the source can be.
    unused: parameters of the source that the model has no use for.
    notes: what was changed, and what will be computed differently; one line each.
    """

    moves: Mapping[str, Move]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def graft(source: ModelConfig, model: ModelConfig) -> Graft:
    """Returns how a model of one architecture starts from a trained one of another."""
    theirs, ours = param_shapes(source), param_shapes(model)
    found = {path: _move(path, shape, source, model) for path, shape in ours.items()}
    moves = {path: move for path, move in found.items() if move}
    used = {move.source for move in moves.values()}
    return Graft(
        moves=moves,
        missing=tuple(path for path in ours if path not in moves),
        unused=tuple(path for path in theirs if path not in used),
        notes=tuple(_notes(source, model, moves)),
    )


def _move(path: str, shape: Shape, source: ModelConfig, model: ModelConfig) -> Move | None:
    """Returns where a parameter comes from, None if it must be drawn."""
    theirs = param_shapes(source)
    origin, rest = path, path.partition("/")[2]
    if _layer(path) >= source.num_layers:
        origin = f"block_{source.num_layers - 1}/{rest}"
        if (OUTPUTS if model.norm_placement == "pre" else OUTPUT_NORMS).fullmatch(rest):
            return Zeros()
    have = theirs.get(origin)
    if have == shape:
        return Copy(origin)
    if have is None:
        return _absent(path, shape, source, model)
    changed = [axis for axis, sizes in enumerate(zip(have, shape, strict=False)) if sizes[0] != sizes[1]]
    if len(have) != len(shape) or len(changed) != 1:
        return None
    return _heads(rest, changed[0], origin, source, model) or _wider(rest, changed[0], have, shape, origin)


def _layer(path: str) -> int:
    """Returns the layer of a parameter, -1 for one outside the layers."""
    block = path.partition("/")[0]
    return int(block.removeprefix("block_")) if block.startswith("block_") else -1


def _absent(path: str, shape: Shape, source: ModelConfig, model: ModelConfig) -> Move | None:
    """Returns what stands for a parameter that the source has none of: an output map, or biases of linear maps."""
    if path == "unembed/kernel" and param_shapes(source)["embed/embedding"] == shape[::-1]:
        return Transposed("embed/embedding")
    parent, _, last = path.rpartition("/")
    return Zeros() if last == "bias" and f"{parent}/kernel" in param_shapes(model) else None


def _heads(rest: str, axis: int, origin: str, source: ModelConfig, model: ModelConfig) -> Move | None:
    have, want = source.num_kv_heads, model.num_kv_heads
    if not re.fullmatch(r"attention/((key|value)/(kernel|bias)|key_norm/(scale|bias))", rest):
        return None
    same = (source.num_heads, source.head_dim) == (model.num_heads, model.head_dim)
    fits = same and have != want and (have % want == 0 or want % have == 0)
    return Heads(origin, axis, have, want) if fits else None


def _wider(rest: str, axis: int, have: Shape, shape: Shape, origin: str) -> Move | None:
    if have[axis] > shape[axis]:
        return None
    if re.fullmatch(r"mlp/(gate|up)/(kernel|bias)", rest):
        return Again(origin, axis, have[axis])
    return Padded(origin, axis, have[axis]) if rest == "mlp/down/kernel" else None


def _extent(shape: Shape, index: Index) -> Shape:
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


def _notes(source: ModelConfig, model: ModelConfig, moves: Mapping[str, Move]) -> Iterable[str]:
    """Yields what is done, with whether it is exact, and which settings alone make a difference."""
    kinds = {type(move) for move in moves.values()}
    more = model.num_layers - source.num_layers
    if more > 0:
        yield (
            f"model.num_layers={model.num_layers}: {more} layers follow the source's {source.num_layers}; they are its "
            f"last one, but add nothing yet: exact (as in LLaMA Pro, 2401.02415)."
        )
    if Heads in kinds:
        have, want = source.num_kv_heads, model.num_kv_heads
        pooled = f"each is the mean of {have // want}: approximate, to be trained (Ainslie et al. 2023, 2305.13245)"
        repeated = f"each of the source's {have} is repeated: exact"
        yield f"model.num_kv_heads={want}: {pooled if want < have else repeated}."
    if Transposed in kinds:
        yield "model.tie_embeddings=False: the output map begins as the embedding: exact."
    if any(isinstance(move, Zeros) and _layer(path) < source.num_layers for path, move in moves.items()):
        yield f"model.bias={model.bias}: biases that the source does not have begin at zero: exact."
    if Again in kinds:
        yield f"model.mlp_dim={model.mlp_dim}: more hidden units than {source.mlp_dim}, which add nothing yet: exact."
    if different := _different(source, model):
        yield f"computes differently from the source: {', '.join(different)}."


def _different(source: ModelConfig, model: ModelConfig) -> Iterable[str]:
    """Returns the settings that differ and are not told by the shapes of parameters."""
    theirs, ours = meaningful(source), meaningful(model)
    names = [name for name in ours if name in theirs and name not in SHAPING and ours[name] != theirs[name]]
    both = min(source.num_layers, model.num_layers)
    if stacking_of(source).letters[:both] != stacking_of(model).letters[:both]:
        names.append("pattern")
    return [f"model.{name}={getattr(model, name)} (source: {getattr(source, name)})" for name in sorted(names)]


# ------------------------------------------------------------------------------------------------ parameters


def start(source: Source, model: ModelConfig, shardings: Any, *, fresh: bool, seed: int) -> dict:
    """Returns the parameters that training starts from, in float32, each laid out by its sharding.

    Args:
        shardings: a tree like the parameters'.
        fresh: draw what the source does not have, as a run from scratch with this seed does, and drop what is unused.

    Raises:
        UserError: parameters do not match and `fresh` is false; or files that cannot be read.
    """
    found = graft(source.model, model)
    if not fresh:
        _require_whole(found, source, model)
    for note in found.notes:
        log.info("%s: %s", source.name, note)
    if found.unused:
        log.warning("%s: dropped: %s.", source.name, _listed(found.unused))
    if found.missing:
        log.info("%s: drawn from seed %d: %s.", source.name, seed, _listed(found.missing))
    shapes = param_shapes(model)

    def slowest(path: str) -> int:
        move = found.moves.get(path)
        return source.slowest(move.source) if isinstance(move, Copy) else 0

    def read(path: str, index: Index | None) -> np.ndarray:
        index = index or (EVERYTHING,) * len(shapes[path])
        return found.moves.get(path, Zeros()).read(source.read, shapes[path], index)

    return _with_drawn(load(read, model, shardings, slowest=slowest), set(found.missing), model, shardings, seed)


def _with_drawn(params: dict, missing: set[str], model: ModelConfig, shardings: Any, seed: int) -> dict:
    """Returns the parameters with those drawn that are missing: whole ones, or layers of stacked ones.

    One program draws them and no others: XLA leaves out what nothing reads.
    """
    if not missing:
        return params
    tree = jax.tree.structure(params)
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    del params  # so that those that are drawn are not held twice
    rows = {path: _rows(origins(path, model), missing, leaf.ndim) for path, leaf in leaves.items()}
    rows = {path: row for path, row in rows.items() if row.any()}
    where = {path_of(keys): sharding for keys, sharding in jax.tree_util.tree_leaves_with_path(shardings)}
    loaded = {path: leaves[path] for path, row in rows.items() if not row.all()}

    @functools.partial(jax.jit, out_shardings={path: where[path] for path in rows})
    def draw(seed, loaded):
        key = jax.random.fold_in(jax.random.key(seed), 0)  # as train_step.init_state
        drawn = {path_of(k): x for k, x in jax.tree_util.tree_leaves_with_path(unbox(init_params(model, key)))}
        return {path: jnp.where(rows[path], drawn[path], loaded.get(path, drawn[path])) for path in rows}

    leaves |= dict.fromkeys(rows)
    leaves |= draw(seed, loaded)
    return tree.unflatten(leaves.values())


def _rows(names: str | list[str], missing: set[str], ndim: int) -> np.ndarray:
    """Returns which rows of a stacked parameter are missing, or whether a single one is, with ndim axes."""
    flags = np.array([name in missing for name in ([names] if isinstance(names, str) else names)])
    return flags.reshape(-1, *[1] * (ndim - 1))


def _require_whole(found: Graft, source: Source, model: ModelConfig) -> None:
    if not found.missing and not found.unused:
        return
    theirs, ours = param_shapes(source.model), param_shapes(model)
    parts, remedies = [], []
    if found.missing:
        shapes = {path: f" {list(ours[path])}, only {list(theirs[path])}" for path in ours.keys() & theirs.keys()}
        parts.append(f"has no {_listed(path + shapes.get(path, '') for path in found.missing)}")
        remedies.append("draws what is missing from the seed")
    if unused := [path for path in found.unused if path not in found.missing]:
        parts.append(f"has {_listed(unused)}, which this model has no use for")
        remedies.append("drops what is unused")
    raise UserError(f"{source.name} {', and '.join(parts)}; init.fresh=true {' and '.join(remedies)}.")


def _listed(names: Iterable[str]) -> str:
    """Returns paths in one line, those of several layers as one: "block_*/mlp/up/kernel (12 layers)"."""
    groups = collections.defaultdict(list)
    for name in names:
        groups[re.sub(r"^block_\d+", "block_*", name)].append(name)
    found = [
        f"{group} ({len(members)} layers)" if len(members) > 1 else members[0] for group, members in groups.items()
    ]
    more = [f"{len(found) - LISTED} more"] if len(found) > LISTED else []
    return ", ".join(found[:LISTED] + more)
