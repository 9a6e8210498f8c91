"""Where the answers are in a conversation that a template has spelled, and in its tokens.

A template either says so itself, with {% generation %} and {% endgeneration %} around them, or it is asked twice: with
the conversation as it is, and with marks around what the assistant says. If nothing but the marks is new, the answers
are between them; to each belongs the control token that ends it.
"""

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from foundry_jax.data.chat import BEGIN, END, MARKED, Chat
from foundry_jax.errors import UserError
from foundry_jax.schema import require

log = logging.getLogger(__name__)

TAGS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARK = re.compile(f"[{BEGIN}{END}]")
# Whether a template drops the white space (before, after) what is said: the ways that are tried, in this order.
TRIMS = ((False, False), (False, True), (True, False), (True, True))


class Spelled(NamedTuple):
    """Marked text (see chat.py), and spans [S, 2]: each text[begin:end] is an answer and the token that ends it."""

    text: str
    spans: np.ndarray

    @property
    def num_bytes(self) -> int:
        """The UTF-8 bytes of the answers, control tokens not counted."""
        return sum(num_bytes(self.text[begin:end]) for begin, end in self.spans)


def answers(chat: Chat, messages: list[dict[str, Any]], **options) -> Spelled:
    """Returns hidden messages as marked text, and where the answers are in it; options as in Chat.spell.

    Raises:
        UserError: the template refuses them, or it cannot be said where the answers are.
    """
    if TAGS.search(chat.template):
        return _cut(chat.spell(messages, mark_generation=True, **options))
    plain = chat.spell(messages, **options)
    for before, after in TRIMS:
        marked = chat.spell([_between_marks(message, before, after) for message in messages], **options)
        if MARK.sub("", marked) == plain and BEGIN in marked:
            return _with_end_tokens(_cut(marked), chat.template)
    raise UserError(
        "The chat template changes what the assistant says, so that what to train on cannot be found; use "
        "data.format=chatml or another, or a template with {% generation %} around it."
    )


def overlapping(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Returns [n] bool: whether text[begin:end] of each of offsets [n, 2] shares a character with one of spans [S, 2].

    Both are in order, and no two spans overlap.
    """
    ending_later = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")
    begins = np.append(spans[:, 0], np.iinfo(np.int64).max)[ending_later]
    return offsets[:, 1] > begins


def num_bytes(marked: str) -> int:
    """Returns the UTF-8 bytes of marked text, control tokens not counted."""
    return len(MARKED.sub("", marked).encode())


def _between_marks(message: Mapping[str, Any], before: bool, after: bool) -> Mapping[str, Any]:
    """Returns a message of the assistant with marks around what a template leaves of it; others as they are."""
    if message["role"] != "assistant":
        return message
    content = message.get("content")
    require(
        content is not None and not message.get("tool_calls"),
        "The assistant calls a tool, and what to train on can then be found only by a template with {% generation %}.",
    )
    begin = len(content) - len(content.lstrip()) if before else 0
    end = max(begin, len(content.rstrip())) if after else len(content)
    return {**message, "content": f"{content[:begin]}{BEGIN}{content[begin:end]}{END}{content[end:]}"}


def _cut(marked: str) -> Spelled:
    """Returns text without its marks, and the spans between them."""
    pieces, marks = MARK.split(marked), MARK.findall(marked)
    require(
        marks == [BEGIN, END] * (len(marks) // 2) and len(marks) > 0,
        "The chat template says nothing of the assistant's, or not all of it, between {% generation %} and "
        "{% endgeneration %}.",
    )
    where = np.cumsum([len(piece) for piece in pieces])[:-1]
    return Spelled("".join(pieces), where.reshape(-1, 2))


def _with_end_tokens(spelled: Spelled, template: str) -> Spelled:
    """Returns the spans with the control token that follows: the one after the last answer, which begins nothing."""
    text, spans = spelled
    end = MARKED.match(text, spans[-1, 1])
    if end is None:
        _warn_of_no_end(template)
        return spelled
    more = [len(end[0]) * text.startswith(end[0], position) for position in spans[:, 1]]
    return Spelled(text, np.stack([spans[:, 0], spans[:, 1] + more], axis=1))


@functools.cache
def _warn_of_no_end(template: str) -> None:
    """Warns once of each template."""
    log.warning("No control token ends an answer in the chat template %.60r: a model will not learn to stop.", template)
