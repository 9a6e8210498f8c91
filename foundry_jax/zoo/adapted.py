"""A source with LoRA adapters on it: reads as the merged weights."""

import functools
import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.source import EVERYTHING, Source


class Adapted(Source):
    """W + scale a b wherever there are adapters, in float32; the rest as the base has it."""

    def __init__(self, name: str, base: Source, adapters: dict, scale: float, words: Source | None = None):
        """Reads no weights of the base.

        Args:
            adapters: {"block_0": {"attention": {"query": {"a": [*in_shape, r], "b": [r, *out_shape]}}}}, layers not
                scanned.
            scale: alpha / r, or alpha / sqrt(r).
            words: whose tokenizer, chat template and ends it has, if not the base's.
        """
        self.name, self.base, self.adapters, self.scale = name, base, adapters, scale
        self.model, self.words = base.model, words or base

    def slowest(self, path: str) -> int:
        return self.base.slowest(path)

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        weight = self.base.read(path, index)
        node = self.adapters
        for name in path.removesuffix("/kernel").split("/"):
            node = node.get(name, {})
        if "a" not in node or not path.endswith("/kernel"):
            return weight
        a, b = (np.asarray(node[name], np.float32) for name in ("a", "b"))
        index = index or (EVERYTHING,) * (a.ndim + b.ndim - 2)
        a, b = a[index[: a.ndim - 1]], b[(EVERYTHING, *index[a.ndim - 1 :])]
        return np.asarray(weight, np.float32) + np.float32(self.scale) * np.tensordot(a, b, axes=1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the base's and of all adapters."""
        digest = hashlib.sha256(f"{self.base.fingerprint} {self.scale}".encode())
        for leaf in jax.tree.leaves(self.adapters):
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
        return digest.hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.words.stop_ids

    def tokenizer(self) -> Tokenizer | None:
        return self.words.tokenizer()

    def texts(self) -> Mapping[str, str]:
        return self.words.texts()
