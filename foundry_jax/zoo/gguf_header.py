"""The header of a GGUF file: metadata, and which tensors lie where. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    GGUF | version | number of tensors | number of keys
    keys:     "llama.block_count" | uint32 | 30
    tensors:  "blk.0.attn_q.weight" | 2 axes | 576, 576 | Q4_1 | offset
    the tensors' bytes

The gguf package can read this too, with a numpy view for each string and number: 2.3 s and 159 MB for SmolLM2's 98 MB
file, where this takes 0.07 s and 11 MB (2 cores, 2026-11). A wrong length in a damaged file can keep it busy for ever.
"""

import dataclasses
import math
import mmap
import os
import struct
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from foundry_jax.errors import UserError
from foundry_jax.schema import require

VERSIONS = (2, 3)
MAX_AXES = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
KINDS = set(GGMLQuantizationType)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is, and how it is written there. shape: the slowest axis first, as numpy has it."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: blocks of a few numbers along the fastest axis."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its first tensor.

    data: the whole file, mapped.
    data_start: where the tensors begin.
    """

    name: str
    data: mmap.mmap
    data_start: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | os.PathLike) -> Header:
    """Returns the header of a file.

    Raises:
        UserError: it cannot be read, is no GGUF file of a version we know, or is damaged or cut off.
    """
    data = _mapped(path)
    cursor = _Cursor(data, str(path))
    require(data[:4] == b"GGUF", f"{path} is no GGUF file: it does not begin with GGUF.")
    cursor.skip(4)
    version = cursor.number("I")
    require(version & 0xFFFF != 0, f"{path} is a big-endian GGUF file; convert it to little-endian first.")
    require(
        version in VERSIONS, f"{path} is a GGUF file of version {version}; only {VERSIONS} are read: convert it again."
    )
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        require(key not in metadata, f"{path} is damaged: it has the key {key!r} twice.")
        metadata[key] = cursor.value(cursor.number("I"), key)
    infos = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    require(isinstance(alignment, int) and alignment > 0, f"{path} is damaged: general.alignment={alignment!r}.")
    start = -(-cursor.at // alignment) * alignment
    return Header(str(path), data, start, metadata, _placed(infos, start, len(data), str(path)))


def _mapped(path: str | os.PathLike) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{path} is no GGUF file: it is empty.") from None


class _Cursor:
    """A place in the header that moves on with what is read."""

    def __init__(self, data: mmap.mmap, name: str):
        self._data, self._name, self.at = data, name, 0

    def skip(self, size: int) -> int:
        """Moves on by some bytes, all of them inside the file, and returns where they begin."""
        start = self.at
        self.at = start + size
        if self.at > len(self._data):
            raise UserError(f"{self._name} is cut off or damaged: its header goes on beyond its end; get it again.")
        return start

    def number(self, letter: str) -> Any:
        """Returns one number of a type of the struct module."""
        return struct.unpack_from(f"<{letter}", self._data, self.skip(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        """Returns a text, which has its length before it."""
        size = self.number("Q")
        start = self.skip(size)
        try:
            return self._data[start : self.at].decode()
        except UnicodeDecodeError:
            raise UserError(f"{self._name} is damaged: it has a text at byte {start} that is not UTF-8.") from None

    def value(self, kind: int, key: str) -> Any:
        """Returns the value of a key: a number, a text, true or false, or a list of such."""
        if kind == STRING:
            return self.string()
        if kind == FLOAT32:  # 1e-5, not 9.999999747378752e-06: what was rounded to float32
            return float(str(np.float32(self.number("f"))))
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        require(kind == ARRAY, f"{self._name} is damaged: {key} has the unknown type {kind}.")
        inner, length = self.number("I"), self.number("Q")
        if inner == STRING:
            return [self.string() for _ in range(length)]
        require(inner in SCALARS, f"{self._name}: {key} is a list of the unknown type {inner}.")
        dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
        start = self.skip(length * dtype.itemsize)
        return np.frombuffer(self._data, dtype, length, start).tolist()

    def tensor(self) -> tuple[str, Tensor]:
        """Returns a tensor's name and place, still counted from the first tensor's."""
        name, num_axes = self.string(), self.number("I")
        where = f"{self._name}: the tensor {name!r}"
        require(num_axes <= MAX_AXES, f"{where} has {num_axes} axes; the file is damaged.")
        shape = tuple(self.number("Q") for _ in range(num_axes))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        require(kind in KINDS, f"{where} has the type {kind}, which the gguf package does not know.")
        kind = GGMLQuantizationType(kind)
        block = GGML_QUANT_SIZES[kind][0]
        valid = shape and shape[-1] % block == 0
        require(valid, f"{where} has the shape {list(shape)}, but {kind.name} needs rows of multiples of {block}.")
        return name, Tensor(kind, shape, offset)


def _placed(infos: list[tuple[str, Tensor]], start: int, size: int, path: str) -> dict[str, Tensor]:
    """Returns the tensors by name, counted from the file's beginning: none twice, overlapping, or beyond its end."""
    tensors: dict[str, Tensor] = {}
    end, before = start, ""
    for name, tensor in sorted(infos, key=lambda item: item[1].start):
        require(name not in tensors, f"{path} is damaged: it has the tensor {name!r} twice.")
        tensors[name] = tensor = dataclasses.replace(tensor, start=start + tensor.start)
        require(tensor.start >= end, f"{path} is damaged: the tensors {before!r} and {name!r} overlap.")
        end, before = tensor.start + tensor.num_bytes, name
        require(end <= size, f"{path} is cut off: {name!r} ends at byte {end}, but the file has {size}; get it again.")
    return {name: tensors[name] for name, _ in infos}
