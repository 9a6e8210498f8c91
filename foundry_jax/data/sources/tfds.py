"""Data sets of TensorFlow Datasets, prepared as array_record files and read without TensorFlow.

    data.source="tfds(path='/data/gsm8k/1.0.0', split='train', text='question')"
    data.source="tfds(path='gsm8k', split='train[:50%]', text='question')"

A name is looked for below ~/tensorflow_datasets, or $TFDS_DATA_DIR. To prepare one:
tfds.builder("gsm8k", file_format="array_record").download_and_prepare(). A document is a feature of an example.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry_jax.data.document import Document
from foundry_jax.data.sources.files import Files
from foundry_jax.data.sources.rows import Row, decoded, document, require_field
from foundry_jax.errors import UserError, first_line
from foundry_jax.schema import require

EXAMPLES = 256  # read at a time: 22 us each, 70 us one by one (2 busy cores, 2026-11)
PREPARE = 'tfds.builder(NAME, file_format="array_record").download_and_prepare() makes one'


@dataclasses.dataclass(frozen=True)
class Examples:
    """A document for each example of a split."""

    builder: Any
    split: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.builder.info.full_name}/{self.split}"

    def fingerprint(self) -> list:
        """Returns a hash of all files of the data set, and what is read of them."""
        folder = Path(self.builder.data_path)
        files = Files(self.name, {path.name: path for path in folder.iterdir() if path.is_file()})
        return ["tfds", files.fingerprint(), self.split, self.text]

    def undecodable(self) -> list[str]:
        """Returns nothing: what is not UTF-8 is an error."""
        return []

    def __iter__(self) -> Iterator[Document]:
        examples = _data_source(self.builder, self.split)
        for start in range(0, len(examples), EXAMPLES):
            numbers = range(start, min(start + EXAMPLES, len(examples)))
            for number, example in zip(numbers, examples.__getitems__(numbers), strict=True):
                where = f"{self.name}, example {number}"
                row = Row(where, number, {self.text: decoded(example[self.text], where)})
                yield document(row, self.name, text=self.text, id="", source="tfds")


def find(path: str, *, split: str = "train", text: str = "text") -> Examples:
    """Returns the examples of a prepared data set.

    Args:
        path: its folder, with dataset_info.json; or its name.
        split: as TFDS writes it: "train", "train[:50%]", "train+test".
        text: the feature that holds the text.

    Raises:
        UserError: no such data set, split or feature, or it was prepared for TensorFlow alone.
    """
    require(bool(path), f"data.path is empty; data.source=tfds needs the folder or the name of a data set; {PREPARE}.")
    builder = _builder(path)
    require_field(f"data.path={path!r}", text, "text", builder.info.features, "tfds")
    _data_source(builder, split)
    return Examples(builder, split, text)


def _builder(path: str) -> Any:
    tfds = importlib.import_module("tensorflow_datasets")  # takes a second
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return tfds.builder_from_directory(folder)
        return tfds.core.read_only_builder.builder_from_files(path)
    except (tfds.core.registered.DatasetNotFoundError, OSError, ValueError) as error:
        said = first_line(error)
        raise UserError(f"No data set of TFDS at data.path={path!r}: {said}; {PREPARE}.") from None


def _data_source(builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        said = first_line(error)
        raise UserError(f"Cannot read split={split!r} of {builder.info.full_name}: {said}.") from None
