"""From parameters to a folder that transformers loads: config.json, safetensors (with an index if many), the tokenizer.

Tensors are written one after another, so that no more than one is in memory; the folder appears when it is whole.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from foundry_jax.errors import UserError
from foundry_jax.model.config import ModelConfig
from foundry_jax.registry import lookup
from foundry_jax.schema import require
from foundry_jax.zoo.families import FAMILIES, Family
from foundry_jax.zoo.folder import INDEX, WEIGHTS
from foundry_jax.zoo.settings import Keys, meaningful, model_of
from foundry_jax.zoo.source import Part, Source, num_bytes, parts_of

T = TypeVar("T")

DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained had it for years
_PIECE_BYTES = 2**20  # larger ones would be new memory each time: with 8 MB it takes three times as long


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write, and the parameter it is, or an expert's part of it."""

    path: str
    part: Part
    shape: tuple[int, ...]


def export(
    source: Source,
    destination: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> Family:
    """Writes a folder for transformers and returns its family.

    Args:
        progress: called with the bytes of each tensor that was written.

    Raises:
        UserError: no family has this architecture, or the destination exists or cannot be written; nothing is left.
    """
    spelled, numpy_dtype = lookup(DTYPES, dtype, "dtype")
    family, described = family_for(source.model)
    tensors = list(tensors_of(source, family))
    shards = _shards(tensors, numpy_dtype, shard_bytes)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **described,
        "torch_dtype": dtype,
    }
    if source.stop_ids:
        config["eos_token_id"] = source.stop_ids[0] if len(source.stop_ids) == 1 else list(source.stop_ids)
    texts = source.texts()
    with new_folder(destination) as folder:
        for name, shard in shards.items():
            _write_shard(folder / name, shard, source, spelled, numpy_dtype, progress)
        if len(shards) > 1:
            total = sum(num_bytes(tensor.shape, numpy_dtype) for tensor in tensors)
            weight_map = {tensor.part.name: name for name, shard in shards.items() for tensor in shard}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(folder / "config.json", config)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
    return family


def family_for(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that has this architecture, and its keys of config.json.

    Raises:
        UserError: there is none; names what the nearest one cannot have.
    """
    wanted, nearest = meaningful(config), None
    for family in FAMILIES.values():
        described = family.write(config)
        with contextlib.suppress(UserError):  # a value that this family cannot spell, or needs and does not get
            found = meaningful(model_of(family.read(Keys(described, family.architecture))))
            different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if not different:
                return family, described
            if nearest is None or len(different) < len(nearest[1]):
                nearest = family, different
    assert nearest is not None, "LlamaForCausalLM reads whatever it writes"
    family, different = nearest
    settings = ", ".join(f"model.{name}={getattr(config, name)}" for name in different)
    raise UserError(
        f"No architecture of transformers is like this model: the nearest, {family.architecture}, cannot have "
        f"{settings}. It runs in foundry_jax only."
    )


def tensors_of(source: Source, family: Family) -> Iterator[Tensor]:
    """Yields all tensors of an export in the order of the model's parameters."""
    for path, shape in source.shapes.items():
        for part in parts_of(path, shape, family):
            ours = shape if part.expert is None else shape[1:]
            yield Tensor(path, part, part.layout.their_shape(ours))


def _shards(tensors: list[Tensor], dtype: np.dtype, limit: int) -> dict[str, list[Tensor]]:
    """Returns {file name: tensors}; a file ends before the tensor that would make it larger than the limit."""
    groups, size = [[]], 0
    for tensor in tensors:
        more = num_bytes(tensor.shape, dtype)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += more
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_shard(path, tensors: list[Tensor], source: Source, spelled: str, dtype: np.dtype, progress) -> None:
    shapes = {tensor.part.name: tensor.shape for tensor in tensors}
    with open(path, "wb") as file:
        write_header(file, shapes, spelled, dtype)
        pieces = itertools.chain.from_iterable(_pieces(tensor, source, dtype) for tensor in tensors)
        for piece in _ahead(pieces):
            file.write(piece)
            progress(len(piece))


def write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]], spelled: str, dtype: np.dtype) -> None:
    """Writes the head of a safetensors file: its length in 8 bytes, and JSON that says where each tensor begins.

    The library has no way to write a file whose tensors are not all in memory. transformers asks for the format "pt".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + num_bytes(shape, dtype)
        header[name] = {"dtype": spelled, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _pieces(tensor: Tensor, source: Source, dtype: np.dtype) -> Iterator[memoryview]:
    """Yields the bytes of a tensor, a few rows of theirs at a time."""
    part = tensor.part
    shape = source.shapes[tensor.path]
    lead = () if part.expert is None else (slice(part.expert, part.expert + 1),)
    ours = shape[len(lead) :]
    first = part.layout.axes[0][0]  # the slowest of our axes in their rows
    step = max(1, ours[first] * _PIECE_BYTES // max(1, num_bytes(ours, dtype)))
    for start in range(0, ours[first], step):
        index = [slice(None)] * len(ours)
        index[first] = slice(start, min(start + step, ours[first]))
        x = source.read(tensor.path, (*lead, *index))
        x = part.layout.to_theirs(x[0] if lead else x)
        yield np.ascontiguousarray(x, dtype).view(np.uint8).reshape(-1).data


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields the items; while one is used the next is made."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


@contextlib.contextmanager
def new_folder(destination: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a folder to fill, which takes its name when all is written; on an error nothing is left.

    As with cp, the system may keep what was written in memory for a while.

    Raises:
        UserError: the destination exists and is not an empty folder, or cannot be written to.
    """
    destination = pathlib.Path(destination).expanduser().absolute()
    is_free = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    require(is_free, f"{destination} exists already; delete it, or name another folder.")
    folder = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder
        if destination.exists():
            destination.rmdir()
        folder.rename(destination)
    except OSError as error:
        raise UserError(f"Cannot write {destination}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file as people like to read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
