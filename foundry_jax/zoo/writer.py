"""A model that goes on with requests (see data/synthetic.py), many at once: as a chat, or as plain text.

As in tasks/scoring.py, what is written depends on its request alone, bit by bit, and not on the others or the batch.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from foundry_jax import generate
from foundry_jax.data.chat import Chat, TextStream
from foundry_jax.data.conversation import TODAY
from foundry_jax.data.synthetic import Request, Written
from foundry_jax.generate import Prompt, Reader, Sampling
from foundry_jax.model.layers import batch_shards
from foundry_jax.schema import require
from foundry_jax.zoo.pretrained import Pretrained

SHORTEST_CACHE = 512  # tokens; longer ones are powers of two, so that few programs are compiled
ROWS_AT_ONCE = 8  # a batch is rounded up to a multiple: programs of fewer rows would round in other places


class Writer:
    """Answers requests, in their order."""

    def __init__(self, model: Pretrained, chat: Chat | None, sampling: Sampling, batch_size: int):
        """Compiles nothing yet.

        Args:
            chat: how the model is talked to; None: it is given plain text.
            sampling: how tokens are drawn; a request brings its own seed.
            batch_size: texts that are written at once, rounded up.
        """
        self._model, self._chat, self._sampling, self._batch_size = model, chat, sampling, batch_size

    def __call__(self, requests: Sequence[Request]) -> list[Written]:
        """Returns what the model writes for each request.

        Raises:
            UserError: a request does not fit in the model's context.
        """
        prompts = [self._prompt(request) for request in requests]
        ends = [_End(self._model, request.until) for request in requests]
        length = self._cache_length(max(len(prompt.ids) + prompt.max_tokens for prompt in prompts))
        found: list[Written | None] = [None] * len(requests)
        with self._model._context():
            reader = Reader(self._model.config, self._model.variables, batch_shards(), length)
            new = generate.continued(prompts, reader, rows=self._num_rows(), is_end=lambda i, index: ends[i].add(index))
            for i, _ in new:
                found[i] = ends[i].written()
        return found

    def ids(self, request: Request) -> Sequence[int]:
        """Returns what the model is given. Control tokens that a text spells stay text."""
        if self._chat is None:
            turns = "".join(f"{question}\n{answer}\n\n" for question, answer in request.turns)
            return self._model.encode(f"{turns}{request.question}\n{request.start}")
        said = [text for turn in request.turns for text in turn] + [request.question]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        marked = self._chat.marked(messages, add_generation_prompt=True, now=TODAY)
        return self._chat.encode_batch([marked + request.start])[0]

    def _prompt(self, request: Request) -> Prompt:
        ids = self.ids(request)
        room = self._model.config.context_length - request.max_tokens
        require(
            len(ids) <= room,
            f"A prompt has {len(ids)} tokens, but beside {request.max_tokens} to write {self._model.name} "
            f"reads {room}; let it write less, show it fewer examples, or take a model with a longer context.",
        )
        sampling = dataclasses.replace(self._sampling, seed=request.seed)
        return Prompt(np.array(ids, np.int32), request.max_tokens, sampling)

    def _num_rows(self) -> int:
        """Returns a number of rows that the devices share evenly."""
        unit = math.lcm(ROWS_AT_ONCE, batch_shards())
        return -(-self._batch_size // unit) * unit

    def _cache_length(self, needed: int) -> int:
        """Returns a power of two, or all of the context if that is less."""
        return min(max(SHORTEST_CACHE, 1 << (needed - 1).bit_length()), self._model.config.context_length)


class _End:
    """What is written for one request, token by token, and whether it has come to its end."""

    def __init__(self, model: Pretrained, until: Sequence[str]):
        tokenizer = model.tokenizer
        self._ids = {*model.stop_ids, *tokenizer.control_ids.values(), tokenizer.separator_id}
        self._stream = TextStream(functools.partial(tokenizer.decode, skip_special=True))
        self._until, self._text, self._is_whole = until, "", False

    def add(self, index: int) -> bool:
        """Returns whether one more token ends the text."""
        if index in self._ids:
            self._is_whole = True
        else:
            self._text += self._stream.add(index)
            self._is_whole = any(stop in self._text for stop in self._until)
        return self._is_whole

    def written(self) -> Written:
        """Returns the text without what ends it."""
        text = self._text + self._stream.end()
        for stop in self._until:
            text = text.partition(stop)[0]
        return Written(text, self._is_whole)
