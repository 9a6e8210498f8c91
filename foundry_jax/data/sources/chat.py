"""Conversations in JSONL files, one a line, as OpenAI or ShareGPT writes them. A document is a conversation.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}

Each is spelled by the chat template of the tokenizer, which must bring one. A line may also have "tools", which the
template is given. The loss is on all tokens, those of the user and of the template too.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from foundry_jax.data.chat import Chat
from foundry_jax.data.sources import text
from foundry_jax.data.sources.text import Document, TextFiles
from foundry_jax.errors import UserError
from foundry_jax.registry import unknown
from foundry_jax.schema import require

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
SHAPE = '{"messages": [{"role": ..., "content": ...}]} or {"conversations": [{"from": ..., "value": ...}]}'
# What a template takes for today: tokens must not depend on the day they were made. It is the date that Llama 3.1's
# template writes when it is given none.
TODAY = datetime.datetime(2024, 7, 26)


class Conversation(NamedTuple):
    """The messages of one line and the tools it offers."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None

    @property
    def id(self) -> str:
        """A hash of the content, so that copies of a conversation never stand on both sides of the split."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ChatFiles:
    """The conversations of some files."""

    files: TextFiles

    def __iter__(self) -> Iterator[tuple[str, Conversation]]:
        """Yields (where it stands, conversation)."""
        for _, path in sorted(self.files.paths.items()):
            yield from _read(path)

    def spelled_by(self, chat: Chat) -> "SpelledChats":
        """Returns the conversations as documents of marked text."""
        return SpelledChats(self, chat)


@dataclasses.dataclass(frozen=True)
class SpelledChats:
    """The documents of some conversations: marked text (see chat.py), which `chat` encodes."""

    source: ChatFiles
    chat: Chat

    @property
    def name(self) -> str:
        return self.source.files.name

    @property
    def paths(self) -> Mapping[str, Path]:
        return self.source.files.paths

    def fingerprint(self) -> list[str]:
        """Returns hashes of the files and of the template."""
        return [self.source.files.fingerprint(), self.chat.fingerprint]

    def undecodable(self) -> list[str]:
        """Returns nothing: a line that is not UTF-8 is an error."""
        return []

    def __iter__(self) -> Iterator[Document]:
        for where, conversation in self.source:
            try:
                marked = self.chat.marked(conversation.messages, tools=conversation.tools, now=TODAY)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            yield Document(conversation.id, marked)


def find(path: str) -> ChatFiles:
    """Returns the conversations at a path: of a file, of the .jsonl files of a folder, or of a glob's matches.

    Raises:
        UserError: nothing is there.
    """
    require(bool(path), "data.path is empty; data.source=chat needs a JSONL file, a folder of them or a glob.")
    files = text.find(path)
    if Path(path).expanduser().is_dir():
        kept = {name: file for name, file in files.paths.items() if name.endswith(".jsonl")}
        require(bool(kept), f"No .jsonl files at data.path={path!r}.")
        files = dataclasses.replace(files, paths=kept)
    return ChatFiles(files)


def _read(path: Path) -> Iterator[tuple[str, Conversation]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse(line, where)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def parse(line: bytes, where: str) -> Conversation:
    """Returns the conversation of a line.

    Raises:
        UserError: it is none.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}.") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); a line is {SHAPE}.") from None
    require(isinstance(row, dict), f"{where}: {type(row).__name__} instead of an object; a line is {SHAPE}.")
    key = next((key for key in ("messages", "conversations") if key in row), None)
    require(key is not None, f"{where}: neither messages nor conversations; a line is {SHAPE}.")
    rows, read = row[key], _openai if key == "messages" else _sharegpt
    require(isinstance(rows, list) and len(rows) > 0, f"{where}: {key} must be a list of one message or more.")
    tools = row.get("tools")
    require(tools is None or isinstance(tools, list), f"{where}: tools must be a list.")
    messages = [read(message, f"{where}: {key}[{i}]") for i, message in enumerate(rows)]
    require(_is_unicode([messages, tools]), f"{where}: holds one half of a surrogate pair, which is no character.")
    return Conversation(messages, tools)


def _openai(message: Any, where: str) -> dict[str, Any]:
    """Returns a message with its content as one text; whatever else it has is the template's."""
    require(isinstance(message, dict), f"{where} must be an object with role and content.")
    role = message.get("role")
    require(isinstance(role, str), f"{where} has no role.")
    if role not in ROLES:
        raise UserError(f"{where}: {unknown(role, ROLES, 'role')}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        is_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        require(is_text, f"{where}: content has parts that are no text.")
        return message | {"content": "".join(texts)}
    require(isinstance(content, str), f"{where}: content must be text.")
    return message


def _sharegpt(message: Any, where: str) -> dict[str, Any]:
    require(isinstance(message, dict), f"{where} must be an object with from and value.")
    speaker, value = message.get("from"), message.get("value")
    require(isinstance(speaker, str), f"{where} has no from: the name of who speaks.")
    if speaker not in SHAREGPT_ROLES:
        raise UserError(f"{where}: {unknown(speaker, SHAREGPT_ROLES, 'from')}")
    require(isinstance(value, str), f"{where}: value must be text.")
    return {"role": SHAREGPT_ROLES[speaker], "content": value}


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
