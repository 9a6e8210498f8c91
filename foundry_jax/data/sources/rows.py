"""Records that know where they stand: what sources of rows have in common."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from foundry_jax.data.document import Document
from foundry_jax.errors import UserError
from foundry_jax.schema import require


class Row(NamedTuple):
    """The fields of one record, and where it stands: Row("stories.jsonl, line 3", 3, {"text": ...})."""

    where: str
    number: int
    fields: dict[str, Any]


def document(row: Row, file: str, *, text: str, id: str, source: str) -> Document:
    """Returns the document of a record of a file.

    Raises:
        UserError: it has no such text, or no such id.
    """
    for option, field in (("text", text), ("id", id)):
        require_field(row.where, field, option, row.fields, source)
    said = row.fields[text]
    require(isinstance(said, str), f"{row.where}: {text!r} must be text, not {type(said).__name__}.")
    name = row.fields[id] if id else f"{file}:{row.number}"
    require(isinstance(name, str | int), f"{row.where}: {id!r} must be text or a whole number to name a document.")
    return Document(str(name), said)


def require_field(where: str, field: str, option: str, present: Iterable[str], source: str) -> None:
    """Raises UserError if an option of a source names a field that is not there; an empty name is none."""
    if field and field not in present:
        raise UserError(
            f"{where}: no field {field!r}; it has {', '.join(map(repr, present)) or 'none'}. "
            f"Say which one it is: data.source=\"{source}({option}='...')\"."
        )


def decoded(value: Any, where: str) -> Any:
    """Returns text for bytes, and anything else as it is.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise not_utf8(where, error, "text") from None


def not_utf8(where: str, error: UnicodeDecodeError, part: str) -> UserError:
    """Returns what to raise for bytes that are not UTF-8; `part` is what the offset counts from."""
    return UserError(
        f"{where}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of the {part}."
    )
