"""Answers that follow a principle, in JSONL files: the preferred one of each pair, as a conversation to learn.

    {"principle": "Be polite.", "prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "Go away."}

The principle, if there is one, is the system's message. Prompts and answers are texts, or lists of messages. A prompt
of Anthropic's hh-rlhf ("\n\nHuman: How are you?\n\nAssistant:") is split into its turns. A document is a conversation;
its id is what the prompt says, so that it is held out where its pair is.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.sources import chat, files, jsonl
from foundry_jax.data.sources.rows import Row
from foundry_jax.schema import require

SHAPE = '{"principle": ..., "prompt": ..., "chosen": ..., "rejected": ...}'
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, Any]]


class Pair(NamedTuple):
    """What was asked, the principle first, and two ways to go on: the preferred one and the other."""

    prompt: Messages
    chosen: Messages
    rejected: Messages

    @property
    def said(self) -> str:
        """What the prompt says, the principle left out."""
        spoken = [message for message in self.prompt if message["role"] != "system"]
        return chat.document(Conversation(spoken)).text


@dataclasses.dataclass(frozen=True)
class PrincipledFiles(files.Files):
    """The preferred answers of some files."""

    def fingerprint(self) -> list:
        """Returns a hash of the files."""
        return ["constitution", super().fingerprint()]

    def __iter__(self) -> Iterator[Document]:
        for _, path in sorted(self.paths.items()):
            for row in jsonl.rows(path, SHAPE):
                found = pair(row)
                yield chat.document(Conversation(found.prompt + found.chosen))._replace(id=prompt_key(found.said))


def find(path: str) -> PrincipledFiles:
    """Returns the pairs at a path: of a file, of the .jsonl files of a folder, or of a glob's matches.

    Raises:
        UserError: nothing is there.
    """
    found = files.at(path, "constitution", suffixes=jsonl.SUFFIXES)
    return PrincipledFiles(found.name, found.paths)


def pair(row: Row) -> Pair:
    """Returns the pair of a line.

    Raises:
        UserError: it has none, or its two answers are one.
    """
    where, fields = row.where, row.fields
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in fields]
    require(not missing, f"{where}: no field {missing and missing[0]!r}; a line is {SHAPE}.")
    principle = fields.get("principle")
    require(principle is None or isinstance(principle, str), f"{where}: principle must be text.")
    prompt = fields["prompt"]
    prompt = turns(prompt) if isinstance(prompt, str) else chat.messages(prompt, f"{where}: prompt")
    require(
        prompt[-1]["role"] != "assistant", f"{where}: the prompt ends with the assistant, but must ask it something."
    )
    chosen, rejected = (_answer(fields[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    require(chosen != rejected, f"{where}: chosen and rejected are the same, which prefers nothing; leave it out.")
    system = [{"role": "system", "content": principle}] if principle else []
    return Pair(system + prompt, chosen, rejected)


def prompt_key(said: str) -> str:
    """Returns what a prompt says without who says it, so that it is the same in every shape."""
    return " ".join(re.sub(r"\b(Human|Assistant):", " ", said).split())


def turns(prompt: str) -> Messages:
    """Returns the messages of a prompt of hh-rlhf; any other text is one message of the user."""
    before, *parts = TURN.split(prompt.strip())
    speakers, said = parts[::2], parts[1::2]
    if before or speakers[:1] != ["Human"] or speakers[-1] != "Assistant" or said[-1].strip():
        return [{"role": "user", "content": prompt}]
    pairs = zip(speakers[:-1], said[:-1], strict=True)
    return [{"role": SPEAKERS[speaker], "content": text.strip()} for speaker, text in pairs]


def _answer(value: Any, where: str) -> Messages:
    """Returns the messages of an answer; hh-rlhf's texts begin with the space that follows "Assistant:"."""
    if isinstance(value, str):
        require(bool(value.strip()), f"{where} is empty.")
        return [{"role": "assistant", "content": value.strip()}]
    found = chat.messages(value, where)
    last = found[-1]["role"]
    require(last == "assistant", f"{where} ends with {last!r}; its last message must be the assistant's.")
    return found
