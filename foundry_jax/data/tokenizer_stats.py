"""What a tokenizer makes of some texts, in figures."""

import dataclasses
import time
from collections.abc import Iterable

import numpy as np

from foundry_jax.data.tokenize import Tokenizer, batched
from foundry_jax.errors import UserError

BATCH_CHARACTERS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Stats:
    """Figures of a tokenizer on some texts.

    words: parts between white space.
    used: how many different ids occur.
    unknown: tokens that stand for text the tokenizer does not know, which is lost.
    changed: documents that are another text after encoding and decoding.
    seconds: of encoding alone.
    """

    documents: int
    bytes: int
    words: int
    tokens: int
    vocab_size: int
    used: int
    unknown: int
    changed: int
    seconds: float

    @property
    def ratios(self) -> dict[str, float]:
        """Figures that compare tokenizers; words per document is 1 at least, for languages that have no spaces."""
        return {
            "bytes_per_token": self.bytes / self.tokens,
            "tokens_per_word": self.tokens / max(self.words, 1),
            "share_used": self.used / self.vocab_size,
            "share_unknown": self.unknown / self.tokens,
            "megabytes_per_second": self.bytes / 1e6 / self.seconds,
        }


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Stats:
    """Returns the figures of a tokenizer on texts, which are read once.

    Raises:
        UserError: there is no text, or a character that a char tokenizer does not have.
    """
    counts = dict.fromkeys(("documents", "bytes", "words", "tokens", "unknown", "changed"), 0)
    seen, seconds = np.zeros(tokenizer.vocab_size, bool), 0.0
    for batch in batched(filter(None, texts), BATCH_CHARACTERS):
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(batch)
        seconds += time.perf_counter() - start
        for text, ids in zip(batch, encoded, strict=True):
            seen[ids] = True
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            counts["words"] += len(text.split())
            counts["tokens"] += len(ids)
            counts["unknown"] += int((ids == tokenizer.unknown_id).sum()) if tokenizer.unknown_id is not None else 0
            counts["changed"] += tokenizer.decode(ids) != text
    if not counts["tokens"]:
        raise UserError("The data holds no text: there is nothing in --path, or only empty files.")
    return Stats(**counts, vocab_size=tokenizer.vocab_size, used=int(seen.sum()), seconds=seconds)
