"""Conversations in JSONL files, one or more a line. A document is a conversation. A line is one of these:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}          OpenAI
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}              ShareGPT
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"}                             Alpaca
    {"instruction": "Name the capital.", "instances": [{"input": "France", "output": "Paris"}, ...]}       self-instruct

The first two may also have "tools", which the template is given. How a conversation becomes tokens is data.format's
business; that of Alpaca needs to know what the input was, so it stays a field of its own of the user's message.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.sources import files, jsonl
from foundry_jax.data.sources.rows import Row
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
SHAPE = (
    '{"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]}, '
    '{"instruction": ..., "input": ..., "output": ...} or {"instruction": ..., "instances": [{"input": ..., '
    '"output": ...}]}'
)


@dataclasses.dataclass(frozen=True)
class ChatFiles(files.Files):
    """The conversations of some files."""

    def fingerprint(self) -> list:
        """Returns a hash of the files."""
        return ["chat", super().fingerprint()]

    def __iter__(self) -> Iterator[Document]:
        for _, path in sorted(self.paths.items()):
            for row in jsonl.rows(path, SHAPE):
                yield from map(document, conversations(row))


def find(path: str) -> ChatFiles:
    """Returns the conversations at a path: of a file, of the .jsonl files of a folder, or of a glob's matches.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "chat", suffixes=jsonl.SUFFIXES)
    return ChatFiles(found.name, found.paths)


def document(conversation: Conversation) -> Document:
    """Returns the document of a conversation, whose text is all that is said in it."""
    said = [message.get(key) for message in conversation.messages for key in ("content", "input")]
    return Document(conversation.id, "\n\n".join(filter(None, said)), conversation)


def conversations(row: Row) -> list[Conversation]:
    """Returns the conversations of a line.

    Raises:
        UserError: there is none, or one that does not end with the assistant.
    """
    fields, where = row.fields, row.where
    key = next((key for key in READERS if key in fields), None)
    require(key is not None, f"{where}: neither {' nor '.join(READERS)}; a line is {SHAPE}.")
    tools = fields.get("tools")
    require(tools is None or isinstance(tools, list), f"{where}: tools must be a list.")
    found = [Conversation(talk, tools) for talk in READERS[key](fields, where)]
    for conversation in found:
        last = conversation.messages[-1]["role"]
        require(
            last == "assistant",
            f"{where}: the conversation ends with {last!r}, but the assistant's answer is what is learned; add it.",
        )
    return found


def messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns a list of OpenAI's messages, each content as one text; whatever else they have is the template's.

    Raises:
        UserError: it is none.
    """
    return [_openai(message, f"{where}[{i}]") for i, message in enumerate(_list(value, where))]


def instruction(fields: Mapping[str, Any], instance: Any, where: str) -> list[dict[str, Any]]:
    """Returns what is said for an instruction: the user's message, with its input if there is one, and the answer."""
    require(isinstance(instance, Mapping), f"{where} must be an object with input and output.")
    asked, about, answer = fields.get("instruction"), instance.get("input"), instance.get("output")
    require(isinstance(asked, str) and bool(asked.strip()), f"{where}: instruction must be text, and not empty.")
    require(about is None or isinstance(about, str), f"{where}: input must be text.")
    require(isinstance(answer, str), f"{where}: output must be text.")
    user = {"role": "user", "content": asked} | ({"input": about} if about else {})
    return [user, {"role": "assistant", "content": answer}]


def _instances(fields: Mapping[str, Any], where: str) -> list[list[dict[str, Any]]]:
    where = f"{where}: instances"
    return [instruction(fields, one, f"{where}[{i}]") for i, one in enumerate(_list(fields["instances"], where))]


def _list(value: Any, where: str) -> Sequence[Any]:
    require(isinstance(value, list) and len(value) > 0, f"{where} must be a list of one or more.")
    return value


def _openai(message: Any, where: str) -> dict[str, Any]:
    require(isinstance(message, dict), f"{where} must be an object with role and content.")
    role, content = message.get("role"), message.get("content")
    require(isinstance(role, str), f"{where} has no role.")
    if role not in ROLES:
        raise UserError(f"{where}: {unknown(role, ROLES, 'role')}")
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


def _turns(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    where = f"{where}: conversations"
    return [_sharegpt(turn, f"{where}[{i}]") for i, turn in enumerate(_list(fields["conversations"], where))]


# What a line's conversations are made from, by the field that gives its shape away: the first that it has.
READERS = {
    "messages": lambda fields, where: [messages(fields["messages"], f"{where}: messages")],
    "conversations": lambda fields, where: [_turns(fields, where)],
    "instances": _instances,
    "instruction": lambda fields, where: [instruction(fields, fields, where)],
}
