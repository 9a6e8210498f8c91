"""Hugging Face folders: config.json, one or many safetensors files, tokenizer.json. Nothing is ever unpickled."""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from foundry_jax.data.tokenize import Tokenizer, load_tokenizer
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.schema import require
from foundry_jax.zoo.families import FAMILIES, Family
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.settings import Keys, model_of, read_json
from foundry_jax.zoo.source import NamedSource, TensorInfo

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLE, SAMPLES = 4096, 64  # bytes; how many of them tell two files of one size apart
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Files of a folder besides weights and config.json that an export takes along.
TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


class SafetensorsFiles:
    """The tensors of model.safetensors, or of all files that its index names."""

    def __init__(self, folder: pathlib.Path):
        """Reads the headers.

        Raises:
            UserError: no such files, or one that is damaged, missing, or not what the index says.
        """
        self.files: list[pathlib.Path] = []
        self.infos: dict[str, TensorInfo] = {}
        self._open: dict[str, Any] = {}
        self._starts: dict[str, int] = {}  # where the numbers of a tensor begin in its file
        index = _read_index(folder)
        names = sorted(set(index.values())) if index else [WEIGHTS]
        for name in names:
            self._add(folder / name)
        for tensor, name in (index or {}).items():
            found = self.infos.get(tensor)
            if found is None or found.file != str(folder / name):
                raise UserError(f"{folder / INDEX} says that {tensor} is in {name}, but it is not there.")
        unlisted = self.infos.keys() - (index.keys() if index else self.infos.keys())
        require(not unlisted, f"{folder / INDEX} does not list {min(unlisted, default='')}, which is in the files.")

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a tensor, or the part of it that one slice for each axis names."""
        info = self.infos[name]
        try:
            (start, stop), *rest = [part.indices(size)[:2] for part, size in zip(index, info.shape, strict=True)]
            if all(span == (0, size) for span, size in zip(rest, info.shape[1:], strict=True)):
                return self._rows(name, info, start, stop)
            return self._open[info.file].get_slice(name)[index]
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{info.file}: {name} cannot be read: {error}.") from None

    def _rows(self, name: str, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Returns whole rows, read as they lie: get_slice takes 3 to 5 times as long (64 MB, safetensors 0.8)."""
        dtype, row = DTYPES[info.dtype], math.prod(info.shape[1:])
        offset = self._starts[name] + start * row * dtype.itemsize
        x = np.fromfile(info.file, dtype, (stop - start) * row, offset=offset)
        return x.reshape(stop - start, *info.shape[1:])

    def _add(self, path: pathlib.Path) -> None:
        try:
            file = safetensors.safe_open(path, framework="np")
            starts = _starts(path)
            for name in file.keys():
                part = file.get_slice(name)
                if name in self.infos:
                    raise UserError(f"{path}: {name} is also in {self.infos[name].file}.")
                self.infos[name] = TensorInfo(str(path), str(part.get_dtype()), tuple(part.get_shape()))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: copy or download the whole folder again.") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}.") from None
        self.files.append(path)
        self._open[str(path)] = file
        self._starts |= starts


def _starts(path: pathlib.Path) -> dict[str, int]:
    """Returns where each tensor begins, of a file whose head safetensors has found right."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + facts["data_offsets"][0] for name, facts in header.items() if name != "__metadata__"}


def _read_index(folder: pathlib.Path) -> dict[str, str] | None:
    """Returns {tensor: file} of the index; None if there is a single file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / WEIGHTS).exists():
            _refuse(folder)
        return None
    index = read_json(path).get("weight_map")
    valid = isinstance(index, dict) and index and all(isinstance(name, str) for name in index.values())
    require(valid, f"{path} has no weight_map from tensors to files.")
    for name in index.values():  # as an attacker may write it
        require(pathlib.PurePath(name).name == name, f"{path}: {name!r} is not the name of a file beside it.")
        require(name.endswith(".safetensors"), f"{path}: {name!r} must be a safetensors file; nothing is unpickled.")
    return index


def _refuse(folder: pathlib.Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when read and is refused; "
            f"get the model's safetensors."
        )
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")


class HuggingFaceFolder(NamedSource):
    """A folder that transformers' save_pretrained wrote, or one downloaded from the hub."""

    def __init__(self, path: pathlib.Path):
        """Reads config.json and the headers of the weights.

        Raises:
            UserError: an architecture that is not supported, or files that are damaged or do not fit together.
        """
        self.path = path
        self.keys = Keys(read_json(path / "config.json"), str(path / "config.json"))
        family = family_of(self.keys)
        self._files = SafetensorsFiles(path)
        super().__init__(str(path), model_of(family.read(self.keys)), family, self._files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of config.json and, of all files with weights, the size and samples spread evenly over them."""
        digest = hashlib.sha256(json.dumps(self.keys.values, sort_keys=True).encode())
        for path in self._files.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for i in range(SAMPLES):
                    file.seek(size * i // SAMPLES)
                    digest.update(file.read(SAMPLE))
        return digest.hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """eos_token_id of generation_config.json, or else of config.json: a number or a list."""
        path = self.path / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
        found = generation.get("eos_token_id", self.keys.values.get("eos_token_id"))
        ids = found if isinstance(found, list) else [] if found is None else [found]
        require(all(isinstance(i, int) for i in ids), f"{self.name}: eos_token_id={found!r} must be whole numbers.")
        return tuple(ids)

    def tokenizer(self) -> Tokenizer | None:
        path = self.path / "tokenizer.json"
        if not path.exists():
            return None
        tokenizer = load_tokenizer(path, end_id=self.stop_ids[0] if self.stop_ids else None)
        require_vocabulary(tokenizer, self.model.vocab_size, str(path))
        return tokenizer

    def texts(self) -> Mapping[str, str]:
        found = [self.path / name for name in TEXTS]
        return {path.name: path.read_text("utf-8") for path in found if path.exists()}


def family_of(keys: Keys) -> Family:
    """Returns the family that config.json names in architectures, or else by model_type.

    Raises:
        UserError: it is not one of FAMILIES.
    """
    names = keys.values.get("architectures")
    if isinstance(names, list) and names:
        return lookup(FAMILIES, str(names[0]), f"architecture in {keys.where}:")
    by_type = {family.model_type: family for family in FAMILIES.values()}
    return lookup(by_type, str(keys.values.get("model_type")), f"model_type in {keys.where}:")


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises UserError if the tokenizer has ids that the model has no embedding for."""
    require(
        tokenizer.vocab_size <= vocab_size,
        f"{where} has {tokenizer.vocab_size} tokens, but the model only vocab_size={vocab_size}: they do not belong "
        f"together.",
    )
