"""What sources give: documents, each a text or a conversation."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Conversation(NamedTuple):
    """The messages of a conversation and the tools it offers.

    A message is {"role": "user", "content": "Hello"}; one of the user may also have "input", the text that its
    instruction is about.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def id(self) -> str:
        """A hash of the content, so that copies of a conversation never stand on both sides of the split."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()


class Document(NamedTuple):
    """One text and the name it keeps wherever its folder lies: Document("json/decoder.py", "import re ...").

    A conversation has a text too, what is said in it: filters and curricula look at that.
    """

    id: str
    text: str
    conversation: Conversation | None = None


class Source(Protocol):
    """Documents in an order that never changes; can be read again and again, without being held in memory."""

    name: str

    def fingerprint(self) -> Any:
        """Returns JSON that is another if a document is another."""

    def undecodable(self) -> list[str]:
        """Returns the ids that iterating leaves out because they are not UTF-8."""

    def __iter__(self) -> Iterator[Document]: ...
