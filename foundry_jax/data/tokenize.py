"""Between text and token ids: characters, bytes, or byte-level BPE.

Text that spells a control token ("<|endoftext|>") is encoded as the plain text it is; only the library itself puts
the separator between documents. Every tokenizer is one JSON file, and its hash is the sha256 of that JSON.
"""

import abc
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.template import CONFIG, Spelling, as_config, read_spelling
from foundry_jax.errors import UserError

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
SEPARATOR = "<|endoftext|>"
# What a tokenizer made elsewhere calls its end of document: GPT-2, SmolLM and Qwen; Llama 3; Mistral; Gemma.
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>")
WORD_END = re.compile(r"(?<=\S)[ \n]")
# Longer texts are cut, so that one file of a gigabyte neither fills memory nor one core.
PIECE_CHARACTERS = 1 << 14
# Encoded at a time: the library's encodings take 200 bytes a token, and rare characters are a token a byte.
GROUP_BYTES = 1 << 20


class Tokenizer(abc.ABC):
    """What every tokenizer offers.

    vocab_size: one more than the largest id.
    separator_id: the id put before, between and after documents; None where there is none.
    token_bytes: [vocab_size] int64, the UTF-8 bytes each id stands for (0 for control tokens); None if unknown.
    control_ids: the ids of the control tokens of BPE, by their spelling; encode never returns one of them.
    unknown_id: the id of any text that the tokenizer has no token for; None: there is no such text, or it is an error.
    start_ids: what a pretrained model expects before every text; mostly nothing.
    chat_template: how its model spells conversations (see chat.py); None: it was not taught any.
    special_tokens: what such templates call some control tokens: {"eos_token": "<|im_end|>"}.
    """

    vocab_size: int
    separator_id: int | None
    unknown_id: int | None = None
    start_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({})

    @property
    def control_ids(self) -> dict[str, int]:
        """See above."""
        return {}

    @classmethod
    @abc.abstractmethod
    def for_corpus(
        cls, train: Iterable[str], validation: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Self:
        """Returns a tokenizer fitted to a corpus, as far as this kind is fitted at all.

        Raises:
            UserError: this kind cannot have such control tokens.
        """

    @classmethod
    def spec(cls, vocab_size: int, special_tokens: Sequence[str] = ()) -> str:
        """Returns what, besides the corpus, decides the outcome of for_corpus."""
        return cls.__name__

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without separators."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text as an integer array: a corpus is too long for lists."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Returns the text of some ids; the separator and control tokens are spelled out, or skipped."""

    @property
    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray | None:
        """See above."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Returns all there is to save."""

    @classmethod
    @abc.abstractmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Returns the tokenizer that to_json described."""

    @property
    def hash(self) -> str:
        """The sha256 of the canonical JSON: equal hashes give equal ids."""
        return sha256_json(self.to_json())

    def spelled_as(self, spelling: Spelling) -> Self:
        """Returns self, with the chat template and special tokens of the files beside a tokenizer.json."""
        self.chat_template, self.special_tokens = spelling
        return self

    def num_bytes(self, text: str) -> int:
        """Returns the size of a text in UTF-8."""
        return len(text.encode())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer to a JSON file that load and load_tokenizer read; beside tokenizer.json its template."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(), ensure_ascii=False), "utf-8")
        config = as_config(Spelling(self.chat_template, dict(self.special_tokens)))
        if path.name == FILE and config:
            (path.parent / CONFIG).write_text(json.dumps(config, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Returns a saved tokenizer of this kind.

        Raises:
            UserError: no such file, or it holds no such tokenizer.
        """
        return _from_json(cls, _read_json(path), path)


class CharTokenizer(Tokenizer):
    """One id per character: nanoGPT's, ids in the order of code points, no separator."""

    separator_id = None

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        beyond_unicode = 0x110000  # so that every search ends at an entry
        self._code_points = np.array([*map(ord, self.characters), beyond_unicode], np.uint32)

    @classmethod
    def for_corpus(
        cls, train: Iterable[str], validation: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Self:
        """Returns the tokenizer of all characters, those of the validation text too, as nanoGPT does."""
        _refuse_special("char", special_tokens)
        characters: set[str] = set()
        for text in itertools.chain(train, validation):
            characters.update(text)
        return cls(characters)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(character.encode()) for character in self.characters], np.int64)

    def encode(self, text: str) -> list[int]:
        """Returns one id per character.

        Raises:
            UserError: a character that the tokenizer was not made with.
        """
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return "".join(self.characters[index] for index in ids)

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "characters": self.characters}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(value["characters"])

    def _encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = np.searchsorted(self._code_points, code_points)
        known = self._code_points[ids] == code_points
        if not known.all():
            code_point = int(code_points[np.argmin(known)])
            raise UserError(
                f"Character {chr(code_point)!r} (U+{code_point:04X}) is not among the {self.vocab_size} characters "
                f"of this tokenizer; data.tokenizer=byte encodes any text."
            )
        return ids


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 as the separator."""

    vocab_size = 257
    separator_id = 256

    @classmethod
    def for_corpus(
        cls, train: Iterable[str], validation: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Self:
        """Returns the tokenizer, which is the same for every text."""
        _refuse_special("byte", special_tokens)
        return cls()

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int64)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Returns the text; bytes that are not UTF-8, as a model may well produce, become U+FFFD."""
        separator = b"" if skip_special else SEPARATOR.encode()
        data = b"".join(separator if index == self.separator_id else bytes([index]) for index in ids)
        return data.decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"type": "byte"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls()


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding by the Hugging Face `tokenizers` library, or any tokenizer.json it reads.

    Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, over bytes as in GPT-2. "<|endoftext|>" has id 0 when
    fitted here. vocab_size is what to fit; afterwards what was reached, which is less if the text runs out of pairs,
    and the special_tokens, further control tokens such as "<|im_end|>", whose ids follow.
    """

    def __init__(self, vocab_size: int = 50257, special_tokens: Sequence[str] = ()):
        if vocab_size < 257:
            raise UserError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and the separator.")
        if not all(special_tokens) or len(set(special_tokens)) < len(special_tokens):
            raise UserError(f"special_tokens={list(special_tokens)} must be different texts, and none empty.")
        self.vocab_size = vocab_size
        self.separator_id = None
        self.start_ids = ()
        self._extra = [token for token in special_tokens if token != SEPARATOR]  # which there is anyway
        self._backend = None
        self._can_cut = False

    @classmethod
    def for_corpus(
        cls, train: Iterable[str], validation: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Self:
        """Returns a tokenizer fitted to the training text alone: validation text must not shape it."""
        return cls(vocab_size, special_tokens).fit(train)

    @classmethod
    def spec(cls, vocab_size: int, special_tokens: Sequence[str] = ()) -> str:
        return ":".join([cls.__name__, str(vocab_size), *special_tokens])

    def fit(self, corpus: Iterable[str]) -> Self:
        """Returns self, with merges learned from the texts.

        Raises:
            UserError: a special token is a token of text too.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(itertools.chain.from_iterable(map(pieces, corpus)), trainer)
        if backend.get_vocab_size() < self.vocab_size:
            log.warning("The text has pairs for a vocabulary of %d, not %d.", backend.get_vocab_size(), self.vocab_size)
        if taken := backend.get_vocab().keys() & set(self._extra):
            raise UserError(f"special_tokens: {min(taken)!r} is a token of text already; choose another spelling.")
        backend.add_special_tokens(self._extra)
        self._adopt(backend)
        return self

    @property
    def token_bytes(self) -> np.ndarray | None:
        if not isinstance(self._fitted.decoder, decoders.ByteLevel):
            return None
        added = self._fitted.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in self._fitted.get_vocab().items():
            sizes[index] = len(token)  # byte-level tokens are spelled with one character per byte
        for index, token in added.items():
            sizes[index] = 0 if token.special else len(token.content.encode())
        return sizes

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [[] for _ in texts]
        cut = pieces if self._can_cut else lambda text: [text]
        numbered = ((row, piece) for row, text in enumerate(texts) for piece in cut(text))
        for group in batched(numbered, GROUP_BYTES, size=lambda item: len(item[1].encode())):
            encodings = self._fitted.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (row, _), encoding in zip(group, encodings, strict=True):
                parts[row].append(np.array(encoding.ids, np.uint32))
        return [np.concatenate(arrays) for arrays in parts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._fitted.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def tokenizer_json(self) -> str:
        """Returns the tokenizer.json that the `tokenizers` library and transformers read."""
        return self._fitted.to_str()

    def to_json(self) -> dict[str, Any]:
        """Returns the library's JSON; for a separator not in SEPARATORS, {"separator": ..., "tokenizer": that JSON}."""
        value = json.loads(self.tokenizer_json())
        separator = self._fitted.id_to_token(self.separator_id)
        return value if separator in SEPARATORS else {"separator": separator, "tokenizer": value}

    @classmethod
    def from_json(cls, value: dict[str, Any], *, end_id: int | None = None) -> Self:
        """Returns the tokenizer of what to_json or the library wrote.

        Args:
            end_id: the separator, if there is none of SEPARATORS: the id that ends what the model writes.
        """
        separator = value.get("separator")
        backend = tokenizers.Tokenizer.from_str(json.dumps(value["tokenizer"] if separator else value))
        tokenizer = cls()
        tokenizer._adopt(backend, separator or (None if end_id is None else backend.id_to_token(end_id)))
        return tokenizer

    @property
    def control_ids(self) -> dict[str, int]:
        added = self._fitted.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @property
    def _fitted(self) -> tokenizers.Tokenizer:
        if self._backend is None:
            raise UserError("This BPETokenizer has no merges yet; call fit(texts) or BPETokenizer.load(path).")
        return self._backend

    def _adopt(self, backend: tokenizers.Tokenizer, end: str | None = None) -> None:
        vocabulary = backend.get_vocab()
        separator = next((token for token in SEPARATORS if token in vocabulary), end)
        if separator not in vocabulary:
            raise UserError(f"The tokenizer has no token for the end of a document: none of {', '.join(SEPARATORS)}.")
        backend.add_special_tokens([separator])  # some files leave it unmarked, and text could then spell it
        backend.encode_special_tokens = True  # text that spells a control token stays text; not saved by the library
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator_id = vocabulary[separator]
        self.unknown_id = _unknown_id(backend)
        self.start_ids = _start_ids(backend)
        self._backend = backend
        self._can_cut = _is_gpt2(backend)


def load_tokenizer(path: str | os.PathLike, *, end_id: int | None = None) -> Tokenizer:
    """Returns the tokenizer in a file, one of ours or any Hugging Face tokenizer.json, or in a folder that has one.

    Args:
        end_id: the separator, if the tokenizer has none of SEPARATORS.

    Raises:
        UserError: no such file, or it holds no tokenizer.
    """
    path = Path(os.path.expanduser(path))
    path = path / FILE if path.is_dir() else path
    tokenizer = tokenizer_of(_read_json(path), path, end_id=end_id)
    return tokenizer.spelled_as(read_spelling(path.parent)) if path.name == FILE else tokenizer


def tokenizer_of(value: dict[str, Any], where: str | os.PathLike, *, end_id: int | None = None) -> Tokenizer:
    """Returns the tokenizer that a JSON value describes; as load_tokenizer, with `where` for messages."""
    kinds = {"char": CharTokenizer, "byte": ByteTokenizer}
    kind = kinds.get(value.get("type"))
    return _from_json(kind, value, where) if kind else _from_json(BPETokenizer, value, where, end_id=end_id)


def _refuse_special(name: str, special_tokens: Sequence[str]) -> None:
    if special_tokens:
        raise UserError(
            f"data.tokenizer={name} has no control tokens, such as {special_tokens[0]!r}; use data.tokenizer=bpe, or "
            f"that of a pretrained model."
        )


def _start_ids(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the tokenizer's own template puts before a text, such as Llama 3's <|begin_of_text|>."""
    encoding = backend.encode("a")
    is_control = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(index for index, _ in itertools.takewhile(lambda item: item[1], is_control))


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    model = json.loads(backend.to_str())["model"]
    if "unk_id" in model:  # Unigram's
        return model["unk_id"]
    return None if model.get("unk_token") is None else backend.token_to_id(model["unk_token"])


def _is_gpt2(backend: tokenizers.Tokenizer) -> bool:
    """Returns whether text is split into words by GPT-2's pattern and nothing else, as `pieces` assumes.

    SmolLM's splits off single digits before, which is no more than that pattern allows.
    """
    words = backend.pre_tokenizer
    steps = list(words) if isinstance(words, pre_tokenizers.Sequence) else [words]
    if not steps or not all(isinstance(step, pre_tokenizers.Digits) for step in steps[:-1]):
        return False
    words = steps[-1]
    only_special = all(token.special for token in backend.get_added_tokens_decoder().values())
    return isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex and not backend.normalizer and only_special


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yields a text in pieces of about size characters, cut only where GPT-2's pattern always cuts: a word's end.

    No match of that pattern holds white space after something else, so cutting before it changes no token.
    """
    start = 0
    while match := WORD_END.search(text, start + size):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def batched(items: Iterable, limit: int, size=len) -> Iterator[list]:
    """Yields lists of consecutive items; a list ends with the item that brings its total size to the limit."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"The tokenizer {path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"The tokenizer {path} must be a JSON object.")
    return value


def _from_json(kind: type[Tokenizer], value: dict[str, Any], path: str | os.PathLike, **options) -> Tokenizer:
    try:
        return kind.from_json(value, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception for a file it does not understand
        raise UserError(f"{path} holds no {kind.__name__}: {error!r}.") from None


TOKENIZERS = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bpe": BPETokenizer,
}
