"""A trained model on disk seen as our parameters: nothing is read before it is asked for, and then no more than that.

Paths are those of the parameters of a model whose layers are not scanned: "block_3/attention/query/kernel".
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np

from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.stacking import stacking_of
from foundry_jax.model.transformer import init_params
from foundry_jax.schema import require
from foundry_jax.train_step import unbox
from foundry_jax.zoo.families import Family
from foundry_jax.zoo.layouts import Index, Layout

FLOATS = ("F32", "F16", "BF16")
EVERYTHING = slice(None)


class Source(abc.ABC):
    """A trained model on disk.

    name: what to call it in messages, a path.
    model: its architecture, layers not scanned.
    """

    name: str
    model: ModelConfig

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by path."""
        return param_shapes(self.model)

    @abc.abstractmethod
    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Returns a parameter, or the part of it that one slice for each axis names, in the dtype of the file.

        Raises:
            UserError: the file cannot be read.
        """

    def slowest(self, path: str) -> int:
        """Returns the axis of a parameter along which the file has it in one piece after another."""
        return 0

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """What changes when the weights do."""

    @property
    @abc.abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end what the model writes."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer; None if there is none beside the weights.

        Raises:
            UserError: it cannot be read, or has more tokens than the model.
        """

    @abc.abstractmethod
    def texts(self) -> Mapping[str, str]:
        """Returns the files that belong to an export besides weights and config.json: {"tokenizer.json": "{...}"}."""


@functools.lru_cache(maxsize=32)
def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of a model, by path; layers are not scanned."""
    config = dataclasses.replace(config, scan_layers=False)
    tree = unbox(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))
    return {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_of(keys: tuple) -> str:
    """Returns the path of a leaf from the keys that lead to it."""
    return "/".join(key.key for key in keys)


def origins(path: str, config: ModelConfig) -> str | list[str]:
    """Returns which unscanned parameter a parameter of `config` is, or which ones it stacks on its first axis."""
    first, _, rest = path.partition("/")
    if first != "blocks":
        return path
    member, _, rest = rest.partition("/")
    layers = stacking_of(config).member(int(member.removeprefix("layer_")))
    return [f"block_{layer}/{rest}" for layer in layers]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: the file, the dtype as safetensors spells it, the shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Tensors(Protocol):
    """Named tensors in files."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a tensor, or the part of it that one slice for each axis names."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The tensor that holds a parameter, or what one expert has of it."""

    name: str
    layout: Layout
    expert: int | None = None


def parts_of(path: str, shape: tuple[int, ...], family: Family) -> list[Part]:
    """Returns the tensors that hold a parameter: one, or one for each expert.

    Raises:
        UserError: the family has no such parameter.
    """
    block, _, rest = path.partition("/")
    is_layer = block.startswith("block_")
    row = family.weights.get(f"block_{{i}}/{rest}" if is_layer else path)
    if row is None:
        raise UserError(f"{family.architecture} has no parameter {path}.")
    name, layout = row
    name = name.replace("{i}", block.removeprefix("block_")) if is_layer else name
    if "{e}" not in name:
        return [Part(name, layout)]
    return [Part(name.replace("{e}", str(e)), layout, e) for e in range(shape[0])]


class NamedSource(Source):
    """Tensors under the names of one of FAMILIES, all of them and all parameters accounted for when it is opened."""

    def __init__(self, name: str, model: ModelConfig, family: Family, tensors: Tensors):
        """Reads no weights.

        Raises:
            UserError: a tensor that is missing, not expected, or of another shape or dtype.
        """
        self.name, self.model, self.family, self._tensors = name, model, family, tensors
        self._account()

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        shape = self.shapes[path]
        index = index or (EVERYTHING,) * len(shape)
        parts = parts_of(path, shape, self.family)
        if parts[0].expert is None:
            return self._read_part(parts[0], shape, index)
        rows = [self._read_part(part, shape[1:], index[1:]) for part in parts[index[0]]]
        return np.stack(rows)

    def slowest(self, path: str) -> int:
        part = parts_of(path, self.shapes[path], self.family)[0]
        return part.layout.axes[0][0] if part.expert is None else 0

    def _read_part(self, part: Part, shape: tuple[int, ...], index: Index) -> np.ndarray:
        return part.layout.to_ours(functools.partial(self._tensors.read, part.name), shape, index)

    def _account(self) -> None:
        infos = self._tensors.infos
        require(  # before shapes are derived for each of a billion layers
            self.model.num_layers <= len(infos),
            f"{self.name} has {len(infos)} tensors, too few for num_hidden_layers={self.model.num_layers}.",
        )
        expected = dict(self._expected())
        for name, shape in expected.items():
            if name not in infos:
                raise UserError(
                    f"{self.name} has no tensor {name}{_shape(shape)}, which {self.family.architecture} needs."
                )
            info = infos[name]
            if info.shape != shape:
                raise UserError(
                    f"{info.file}: {name} has the shape {_shape(info.shape)}, but the model's settings ask for "
                    f"{_shape(shape)}."
                )
            if info.dtype not in FLOATS:
                raise UserError(
                    f"{info.file}: {name} is {info.dtype}, but must be {', '.join(FLOATS)}: quantised checkpoints are "
                    f"read from GGUF files only."
                )
        for name in infos.keys() - expected.keys():
            if not self._is_redundant(name):
                raise UserError(
                    f"{infos[name].file}: {name}{_shape(infos[name].shape)} is no part of a {self.family.architecture} "
                    f"with this config.json."
                )

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for path, shape in self.shapes.items():
            for part in parts_of(path, shape, self.family):
                yield part.name, part.layout.their_shape(shape if part.expert is None else shape[1:])

    def _is_redundant(self, name: str) -> bool:
        """Returns whether a tensor says nothing new: rotary frequencies, and the output map of a tied model."""
        if name.endswith("rotary_emb.inv_freq"):
            return True
        if name != "lm_head.weight" or not self.model.tie_embeddings:
            return False
        same = self._equal(name, "model.embed_tokens.weight")
        if not same:
            raise UserError(
                f"{self._tensors.infos[name].file}: {name} differs from model.embed_tokens.weight, but config.json has "
                f"tie_word_embeddings=true; set it to false."
            )
        return True

    def _equal(self, one: str, other: str) -> bool:
        rows, columns = self._tensors.infos[one].shape
        if self._tensors.infos[other].shape != (rows, columns):
            return False
        step = max(1, 2**22 // columns)
        spans = [(slice(start, min(start + step, rows)), EVERYTHING) for start in range(0, rows, step)]
        return all(np.array_equal(self._tensors.read(one, i), self._tensors.read(other, i)) for i in spans)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the size of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
