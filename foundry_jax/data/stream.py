"""Tokens of documents end to end, memory-mapped: what batches are cut from."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Separator, document, separator, document, ...: document i is tokens[starts[i] : starts[i + 1]].

    tokens: [number of tokens] uint16 or uint32.
    starts: [number of documents + 1] int64, where each begins, with its separator if there is one, and the end.
    trained: [number of tokens] uint8, 1 where a token counts as a target; None: everywhere.
    """

    tokens: np.ndarray
    starts: np.ndarray
    trained: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1
