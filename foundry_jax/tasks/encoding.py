"""Texts to token ids as lm-eval makes them of a Hugging Face tokenizer (TemplateLM and HFLM of lm-eval 0.4.13).

Unlike in training, text that spells a control token is that token, and what a tokenizer's own template puts before a
text, such as Llama 3's <|begin_of_text|>, is put there unless the text begins with it already.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from foundry_jax.data.tokenize import BPETokenizer, Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.schema import require
from foundry_jax.tasks.requests import Continuation

TEXTS_AT_ONCE = 512  # the library keeps much more of an encoding than its ids


class Encoder:
    """A tokenizer, and which of its tokens begin and end a text.

    prefix_id: what stands for an empty context: the first of a text, or else the one that ends it; None: neither is.
    end_id: the token that ends a text; None: there is none.
    end_text: how that is spelled; "" without it.
    control_ids: the ids of control tokens by their spelling.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_ids: Sequence[int], name: str):
        """`name` is the model in errors.

        Raises:
            UserError: the model has no tokenizer.
        """
        require(tokenizer is not None, f"{name} has no tokenizer, and can be asked nothing about text.")
        self._tokenizer, self._name = tokenizer, name
        self._library = _library_of(tokenizer)
        self.control_ids = tokenizer.control_ids
        named = {key: self.control_ids.get(text) for key, text in tokenizer.special_tokens.items()}
        self.end_id = _first(named.get("eos_token"), *stop_ids, tokenizer.separator_id)
        self.prefix_id = _first(named.get("bos_token"), *tokenizer.start_ids, self.end_id)
        self.end_text = "" if self.end_id is None else tokenizer.decode([self.end_id])
        self._prefix_text = "" if self.prefix_id is None else tokenizer.decode([self.prefix_id])

    def encode(self, texts: Sequence[str], *, start: bool = True) -> list[np.ndarray]:
        """Returns the ids of each text, int32; with `start` the tokens that the tokenizer puts before a text, too."""
        found: list[np.ndarray] = [None] * len(texts)
        for begins in (False, True):
            rows = [i for i, text in enumerate(texts) if (start and not self._begins(text)) == begins]
            for row, ids in zip(rows, self._encode([texts[i] for i in rows], begins), strict=True):
                found[row] = ids
        return found

    def pairs(self, requests: Sequence[Continuation]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids of the context, ids of the continuation) of each request, neither of them empty.

        They are encoded as one text, and white space that ends the context is moved to the continuation before. So a
        token in which both have a part is the context's.

        Raises:
            UserError: a continuation without a token of its own, or an empty context that nothing stands for.
        """
        moved = [_move_space(request) for request in requests]
        contexts = self._encoded((context for context, _ in moved if context), start=True)
        wholes = self._encoded((context + continuation for context, continuation in moved if context), start=True)
        alone = self._encoded((continuation for context, continuation in moved if not context), start=False)
        return [
            self._split(request, contexts[context], wholes[context + continuation])
            if context
            else self._after_prefix(request, alone[continuation])
            for request, (context, continuation) in zip(requests, moved, strict=True)
        ]

    def windows(self, text: str, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (context, continuation) pairs of at most length + 1 ids that score each token of a text once: the
        first after prefix_id, and those of a later window after as many as fit before them.

        Raises:
            UserError: there is no prefix_id.
        """
        [ids] = self.encode([text])
        if len(ids) == 0:
            return []
        self._require_prefix("The first token of a text")
        ids = np.concatenate([[self.prefix_id], ids]).astype(np.int32)
        ends = [*range(1 + length, len(ids), length), len(ids)]
        starts = [1, *ends[:-1]]
        return [
            (ids[max(0, end - length - 1) : start], ids[start:end]) for start, end in zip(starts, ends, strict=True)
        ]

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """Returns the ids of a text to continue, which are at least one."""
        if len(ids):
            return ids
        self._require_prefix("An empty context")
        return np.array([self.prefix_id], np.int32)

    def _begins(self, text: str) -> bool:
        """Returns whether a text spells its first token itself."""
        return bool(self._prefix_text) and text.startswith(self._prefix_text)

    def _encoded(self, texts: Iterable[str], *, start: bool) -> dict[str, np.ndarray]:
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self.encode(unique, start=start), strict=True))

    def _encode(self, texts: Sequence[str], start: bool) -> list[np.ndarray]:
        if self._library is None:
            before = np.array(self._tokenizer.start_ids if start else (), np.int32)
            return [np.concatenate([before, ids]).astype(np.int32) for ids in self._tokenizer.encode_batch(texts)]
        found = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[first : first + TEXTS_AT_ONCE]
            encodings = self._library.encode_batch_fast(part, add_special_tokens=start)
            found += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return found

    def _split(self, request: Continuation, context: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(context) == 0:  # the tokenizer drops its characters
            return self._after_prefix(request, whole)
        return context, self._required(request, whole[len(context) :])

    def _after_prefix(self, request: Continuation, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._require_prefix("A continuation of an empty context")
        if len(ids) and ids[0] == self.prefix_id:
            return ids[:1], self._required(request, ids[1:])
        return np.array([self.prefix_id], np.int32), self._required(request, ids)

    def _required(self, request: Continuation, ids: np.ndarray) -> np.ndarray:
        if len(ids) == 0:
            raise UserError(
                f"The continuation {request.continuation!r} has no token of its own after {request.context[-40:]!r}: "
                f"there is nothing to score; make it longer, or end the context elsewhere."
            )
        return ids

    def _require_prefix(self, what: str) -> None:
        require(
            self.prefix_id is not None,
            f"{what} has nothing to follow: the tokenizer of {self._name} has neither a token that begins a text nor "
            f"one that ends it; give a context.",
        )


def _library_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """Returns the tokenizer as its file describes it; None: it has neither control tokens nor a template."""
    if not isinstance(tokenizer, BPETokenizer):
        return None
    return tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json())


def _first(*ids: int | None) -> int | None:
    return next((index for index in ids if index is not None), None)


def _move_space(request: Continuation) -> tuple[str, str]:
    """Returns (context, continuation), the white space between them at the beginning of the continuation."""
    context = request.context.rstrip()
    return context, request.context[len(context) :] + request.continuation
