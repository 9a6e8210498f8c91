"""Talking to a model: its answers to messages, each with as much of what was said before as fits."""

import datetime
import logging
from collections.abc import Iterator
from typing import Any

from foundry_jax.data.chat import Chat, streamed
from foundry_jax.errors import UserError
from foundry_jax.generate import Sampling
from foundry_jax.zoo.pretrained import Pretrained

log = logging.getLogger(__name__)


class Conversation:
    """What a user and a model have said.

    messages: [{"role": "user", "content": "Hello"}, ...].
    """

    def __init__(self, model: Pretrained, *, system: str | None = None):
        """Begins with a system message, if there is one.

        Raises:
            UserError: the model has no chat template.
        """
        self._model = model
        self._chat = Chat.of(model.tokenizer, model.name)
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, said: str, *, max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Yields the answer to a message piece by piece; what was yielded is then part of the conversation.

        Raises:
            UserError: the message is too long, or the template refuses it; it is then forgotten.
        """
        length, pieces = self._model.config.context_length, []
        self.messages.append({"role": "user", "content": said})
        try:
            ids = self._fitting(length - min(max_tokens, length // 2))
        except UserError:
            self.messages.pop()
            raise
        new = self._model.stream_ids(ids, max_tokens=min(max_tokens, length - len(ids)), sampling=sampling)
        try:
            for piece in streamed(new, self._model.tokenizer.decode):
                pieces.append(piece)
                yield piece
        finally:  # also where the reader has had enough
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _fitting(self, room: int) -> list[int]:
        """Returns the ids of the conversation; what does not fit is forgotten, the oldest question and answer first."""
        kept, first = list(self.messages), int(self.messages[0]["role"] == "system")
        while len(ids := self._chat.encode(kept, add_generation_prompt=True, now=datetime.datetime.now())) > room:
            if len(kept) - first < 3:
                raise UserError(
                    f"The message has {len(ids)} tokens with the system message, but there is room for {room} beside "
                    f"an answer; use a shorter one, or fewer tokens for the answer."
                )
            del kept[first : first + 2]
        if len(kept) < len(self.messages):
            log.warning("The conversation is too long for the model; its beginning is forgotten.")
        self.messages = kept
        return ids
