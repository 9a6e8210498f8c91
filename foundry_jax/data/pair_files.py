"""Preference pairs from files: two completions of one prompt, of which the first was preferred. One a line of JSONL:

    {"prompt": "Human: How are you?\\n\\nAssistant:", "chosen": " Fine, thanks.", "rejected": " Go away."}
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}], ...}
    {"principle": "Be kind.", "prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "Go away."}

Texts alone are taken as they are: a sequence is the prompt's tokens, then the completion's, then the tokenizer's
separator if it has one. Messages, and whatever comes with a principle, are conversations, which data.format spells: a
principle is what the system says, and the completion is the last turn with its end. Ends are predicted too, so that
they are learned.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foundry_jax.data.conversation import ChatCodec, codec_of, last_turn
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.preferences import Pairs, Preferences
from foundry_jax.data.sources import chat, constitution, jsonl
from foundry_jax.data.sources.rows import Row
from foundry_jax.data.split import in_validation, place_of
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.registry import lookup
from foundry_jax.schema import build, calls, require

log = logging.getLogger(__name__)

SHAPE = '{"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages, and maybe a "principle"'
NAMES = ("prompt", "chosen", "rejected")
GROUP = 1000  # pairs that are encoded at a time


@dataclasses.dataclass(frozen=True)
class PairFile:
    """A file: its share of the pairs of a batch, and whether part of it is held out."""

    path: str = ""
    weight: float = 1.0
    held_out: bool = True

    def __post_init__(self):
        require(bool(self.path), "A file of data.preferences needs its path: pairs(path='pairs.jsonl').")
        require(
            math.isfinite(self.weight) and self.weight > 0,
            f"data.preferences: weight={self.weight:g} of {self.path} must be a finite number above 0; leave the file "
            f"out if it is not wanted.",
        )


@dataclasses.dataclass(frozen=True)
class ConstitutionFile(PairFile):
    """The same; its texts are conversations, with or without a principle."""


FILES = {"pairs": PairFile, "constitution": ConstitutionFile}


def parse(preferences: str) -> list[PairFile]:
    """Returns the files of "pairs.jsonl", or of "pairs(path='a.jsonl', weight=2), constitution(path='b.jsonl')".

    Raises:
        UserError: an unknown name or option, or a value that cannot be.
    """
    what = "data.preferences"
    if not re.match(r"\s*\w+\((\w+=|\))", preferences):
        return [PairFile(preferences)]
    files = []
    for name, options in calls(preferences, what):
        kind = lookup(FILES, name, f"kind of {what}")
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        files.append(build(kind, defaults | options, f"{what}={name}: "))
    require(
        any(file.held_out for file in files),
        f"{what}={preferences!r} holds nothing out, but what is learned is measured on pairs that are not trained on: "
        f"set held_out=True for one file.",
    )
    return files


def read(
    preferences: str, tokenizer: Tokenizer | None, *, format: str, fraction: float, context_length: int
) -> Preferences:
    """Returns the pairs of some files as tokens.

    Where a pair is too long, the prompt of both loses its beginning; a completion loses its end only if it is too long
    for the context by itself.

    Args:
        fraction: of the prompts, chosen by a hash of what they say, that is held out with all their pairs.

    Raises:
        UserError: no such file, no pair in it, a line that is none or that cannot be encoded; nothing is held out, or
            nothing is left to train on.
    """
    require(tokenizer is not None, "data.preferences needs a tokenizer, but data.source has none; set data.tokenizer.")
    files, encoder = parse(preferences), _Encoder(tokenizer, format, context_length)
    sides = [_divided(file, encoder, fraction) for file in files]
    held_out = [pair for _, held in sides for pair in held]
    prompts = {pair.prompt for pair in held_out}  # a file that holds nothing out may have one of them too
    train = [[pair for pair in pairs if pair.prompt not in prompts] for pairs, _ in sides]
    for file, pairs in zip(files, train, strict=True):
        require(bool(pairs), f"{file.path} has no pair left to train on: all prompts are held out; give more pairs.")
    found = [_pairs(some, context_length) for some in (*train, held_out)]
    log.info("%s pairs of completions to train on, %s held out.", f"{sum(map(len, train)):,}", f"{len(held_out):,}")
    return Preferences(tuple(found[:-1]), tuple(file.weight for file in files), found[-1])


class _Encoded(NamedTuple):
    """A pair as ids: what its prompt says, [chosen, rejected] sequences, and how many of their ids are the prompt's."""

    prompt: str
    sequences: list[np.ndarray]
    prompt_lengths: list[int]


def _pairs(encoded: Sequence[_Encoded], context_length: int) -> Pairs:
    sequences = [ids for pair in encoded for ids in pair.sequences]
    return Pairs.of(sequences, [length for pair in encoded for length in pair.prompt_lengths], context_length)


def _divided(file: PairFile, encoder: "_Encoder", fraction: float) -> tuple[list[_Encoded], list[_Encoded]]:
    """Returns the pairs of a file that are (trained on, held out); at least one prompt is held out."""
    pairs = list(encoder.encode(file))
    require(bool(pairs), f"{file.path} has no pairs; a line is one: {SHAPE}.")
    if not file.held_out:
        return pairs, []
    first = min(place_of(pair.prompt) for pair in pairs)
    train, held_out = [], []
    for pair in pairs:
        is_held = in_validation(pair.prompt, fraction) or place_of(pair.prompt) == first
        (held_out if is_held else train).append(pair)
    return train, held_out


class _Encoder:
    """Reads files, and turns their pairs into ids that fit the context."""

    def __init__(self, tokenizer: Tokenizer, format: str, context_length: int):
        self.tokenizer, self.format, self.context_length = tokenizer, format, context_length
        self.end = np.array([] if tokenizer.separator_id is None else [tokenizer.separator_id], np.uint32)

    @functools.cached_property
    def codec(self) -> ChatCodec:
        """What spells conversations. Whatever else data.format trains on: what is compared is the last answer."""
        codec = codec_of(self.format, self.tokenizer)
        return dataclasses.replace(codec, format=dataclasses.replace(codec.format, train="assistant"))

    def encode(self, file: PairFile) -> Iterator[_Encoded]:
        """Yields the pairs of a file, cut to the context."""
        rows, cuts = jsonl.rows(Path(file.path).expanduser(), SHAPE), collections.Counter()
        while group := list(itertools.islice(rows, GROUP)):
            for pair in self._whole(file, group):
                yield self._fitted(pair, cuts)
        if cuts["prompts"]:
            text = "%s: %s pairs are longer than model.context_length=%d: their prompts lose the beginning."
            log.info(text, file.path, f"{cuts['prompts']:,}", self.context_length)
        if cuts["completions"]:
            text = "%s: %s completions are longer than that by themselves and lose the end."
            log.warning(text, file.path, f"{cuts['completions']:,}")

    def _whole(self, file: PairFile, rows: Sequence[Row]) -> list[_Encoded]:
        """Returns the pairs of some rows."""
        spelled = [isinstance(file, ConstitutionFile) or _is_conversation(row) for row in rows]
        texts = iter(self._texts([row for row, is_spelled in zip(rows, spelled, strict=True) if not is_spelled]))
        chats = iter(self._chats([row for row, is_spelled in zip(rows, spelled, strict=True) if is_spelled]))
        pairs = [next(chats if is_spelled else texts) for is_spelled in spelled]
        for row, pair in zip(rows, pairs, strict=True):
            require(
                not np.array_equal(*pair.sequences),
                f"{row.where}: chosen and rejected are the same, so nothing is preferred; remove the line.",
            )
        return pairs

    def _texts(self, rows: Sequence[Row]) -> list[_Encoded]:
        texts, pairs = [_texts(row) for row in rows], []
        encoded = _located(lambda some: _in(3, self.tokenizer.encode_batch, some), texts, rows)
        for row, (said, *_), (prompt, *completions) in zip(rows, texts, encoded, strict=True):
            prompt = prompt if len(prompt) else self.end
            require(len(prompt) > 0, f"{row.where} has no prompt, and the tokenizer no separator to stand in for one.")
            sequences = [np.concatenate([prompt, completion, self.end]) for completion in completions]
            pairs.append(_Encoded(constitution.prompt_key(said), sequences, 2 * [len(prompt)]))
        return pairs

    def _chats(self, rows: Sequence[Row]) -> list[_Encoded]:
        found, pairs = [_conversations(row) for row in rows], []
        documents = [[_spoken(pair.prompt + side) for side in (pair.chosen, pair.rejected)] for pair in found]
        encode = self.codec.encode if rows else list
        encoded = _located(lambda some: _in(2, encode, some), documents, rows)
        for pair, sides in zip(found, encoded, strict=True):
            turns = [last_turn(side) for side in sides]
            sequences = [side.ids[: turn.stop] for side, turn in zip(sides, turns, strict=True)]
            pairs.append(_Encoded(constitution.prompt_key(pair.said), sequences, [turn.start for turn in turns]))
        return pairs

    def _fitted(self, pair: _Encoded, cuts: collections.Counter) -> _Encoded:
        """Returns the pair, cut to the context: both prompts lose as much of the beginning."""
        longest = self.context_length + 1
        sizes = [len(ids) for ids in pair.sequences]
        lost = max(min(max(sizes) - longest, min(pair.prompt_lengths) - 1), 0)
        cuts["prompts"] += lost > 0
        cuts["completions"] += sum(size - lost > longest for size in sizes)
        sequences = [ids[lost : lost + longest] for ids in pair.sequences]
        return pair._replace(sequences=sequences, prompt_lengths=[length - lost for length in pair.prompt_lengths])


def _is_conversation(row: Row) -> bool:
    return bool(row.fields.get("principle")) or isinstance(row.fields.get("prompt"), list)


def _texts(row: Row) -> list[str]:
    for name in NAMES:
        require(isinstance(row.fields.get(name), str), f"{row.where} has no text {name!r}; a line is {SHAPE}.")
    return [row.fields[name] for name in NAMES]


def _conversations(row: Row) -> constitution.Pair:
    pair = constitution.pair(row)
    for name, messages in zip(NAMES[1:], (pair.chosen, pair.rejected), strict=True):
        require(
            len(messages) == 1,
            f"{row.where}: {name} must be one message, the assistant's; what was said before belongs to the prompt.",
        )
    return pair


def _spoken(messages: list[dict[str, Any]]) -> Document:
    return chat.document(Conversation(messages))


def _in(size: int, encode: Callable[[list], list], groups: Sequence[Sequence]) -> list[list]:
    """Returns what becomes of the members of groups of one size, which are encoded all at once."""
    encoded = encode(list(itertools.chain.from_iterable(groups)))
    return [encoded[i : i + size] for i in range(0, len(encoded), size)]


def _located(encode: Callable[[Sequence], list], items: Sequence, rows: Sequence[Row]) -> list:
    """Returns encode(items); if one of them is refused, the error names its row.

    Raises:
        UserError: one is.
    """
    try:
        return encode(items)
    except UserError:
        for item, row in zip(items, rows, strict=True):
            try:
                encode([item])
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from None
        raise
