"""Documents to token ids: by what means, and in several processes where that pays."""

import collections
import concurrent.futures
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from foundry_jax.data.conversation import Encoded, codec_of
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.template import Spelling
from foundry_jax.data.tokenize import Tokenizer, batched, tokenizer_of
from foundry_jax.errors import MachineError, UserError

BATCH_CHARACTERS = 1 << 20  # encoded at a time: the library's encodings take a hundred bytes a token
INLINE_BATCHES = 8  # with fewer than these, processes take longer to start than they save


class Codec(Protocol):
    """Turns documents into ids."""

    separator_id: int | None
    fingerprint: str  # of all that decides the ids

    def encode(self, documents: Sequence[Document]) -> list[Encoded]: ...


class TextCodec:
    """The texts of documents, as a tokenizer encodes them; all of it is trained on."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.separator_id = tokenizer.separator_id
        self.fingerprint = tokenizer.hash

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Returns the ids of each."""
        texts = [document.text for document in documents]
        found = zip(texts, self.tokenizer.encode_batch(texts), strict=True)
        return [Encoded(ids, None, self.tokenizer.num_bytes(text)) for text, ids in found]


def text_or_chat(tokenizer: Tokenizer, format: str | None) -> Codec:
    """Returns the codec of texts, or with a data.format that of conversations.

    Raises:
        UserError: the tokenizer cannot spell the format.
    """
    return TextCodec(tokenizer) if format is None else codec_of(format, tokenizer)


def encode_all(
    documents: Iterable[Document], tokenizer: Tokenizer, format: str | None
) -> Iterator[tuple[Document, Encoded]]:
    """Yields each document with its ids, in order; with as many processes as cores if there is much to do.

    Raises:
        UserError: a document cannot be encoded.
        MachineError: a process was killed.
    """
    codec = text_or_chat(tokenizer, format)
    batches = batched(documents, BATCH_CHARACTERS, size=lambda document: len(document.text))
    first = list(itertools.islice(batches, INLINE_BATCHES))
    cores = len(os.sched_getaffinity(0))
    if len(first) < INLINE_BATCHES or cores == 1:
        for batch in itertools.chain(first, batches):
            yield from zip(batch, codec.encode(batch), strict=True)
        return
    with _Workers(recipe_of(tokenizer, format), cores) as workers:
        yield from workers.encode(itertools.chain(first, batches))


def recipe_of(tokenizer: Tokenizer, format: str | None) -> dict[str, Any]:
    """Returns JSON that codec_from makes the codec of."""
    spelling = [tokenizer.chat_template, dict(tokenizer.special_tokens)]
    return {"tokenizer": tokenizer.to_json(), "spelling": spelling, "format": format}


def codec_from(recipe: dict[str, Any]) -> Codec:
    """Returns the codec of a recipe."""
    tokenizer = tokenizer_of(recipe["tokenizer"], "the tokenizer")
    return text_or_chat(tokenizer.spelled_as(Spelling(*recipe["spelling"])), recipe["format"])


def answer(codec: Codec, request: list[list[Any]]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns what a process says about [[id, text, conversation], ...]: a header, and the arrays that follow it.

    {"sizes": [ids of each document], "bytes": [...], "masked": false} or {"error": "..."}
    """
    documents = [Document(name, text, said and Conversation(*said)) for name, text, said in request]
    try:
        found = codec.encode(documents)
    except UserError as error:
        return {"error": str(error)}, []
    masked = found[0].trained is not None
    header = {"sizes": [len(one.ids) for one in found], "bytes": [one.num_bytes for one in found], "masked": masked}
    arrays = [np.concatenate([one.ids for one in found]).astype(np.uint32)]
    return header, arrays + ([np.concatenate([one.trained for one in found]).astype(np.uint8)] if masked else [])


def read_frame(stream) -> Any:
    """Returns the JSON of the next frame of a pipe; None at its end."""
    head = stream.read(8)
    return json.loads(read_exactly(stream, int.from_bytes(head, "little"))) if head else None


def read_exactly(stream, size: int) -> bytes:
    """Returns so many bytes.

    Raises:
        EOFError: there are fewer, because the writer was killed.
    """
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def write_frame(stream, value: Any, arrays: Sequence[np.ndarray] = ()) -> None:
    """Writes JSON and, after it, arrays as bare bytes."""
    text = json.dumps(value).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        stream.write(array.tobytes())
    stream.flush()


class _Workers:
    """Processes that encode; not multiprocessing's, which run the user's script once more in each."""

    def __init__(self, recipe: dict[str, Any], number: int):
        self.recipe, self.number = recipe, number
        self.processes: list[subprocess.Popen] = []
        self.idle: queue.Queue[subprocess.Popen] = queue.Queue()

    def __enter__(self) -> "_Workers":
        command = [sys.executable, "-c", "from foundry_jax.data.worker import main; main()"]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        for _ in range(self.number):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self.processes.append(process)
            write_frame(process.stdin, self.recipe)
            self.idle.put(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # it holds nothing that would be lost
            process.communicate()

    def encode(self, batches: Iterable[list[Document]]) -> Iterator[tuple[Document, Encoded]]:
        """Yields the documents of all batches with their ids, in order; few batches are in memory at once."""
        pending: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(self.number) as threads:
            for batch in batches:
                pending.append((batch, threads.submit(self._ask, batch)))
                if len(pending) > 2 * self.number:
                    yield from _paired(*pending.popleft())
            while pending:
                yield from _paired(*pending.popleft())

    def _ask(self, batch: list[Document]) -> list[Encoded]:
        process = self.idle.get()
        try:
            write_frame(process.stdin, batch)
            return _read_encoded(process.stdout)
        except (BrokenPipeError, EOFError):
            raise MachineError(
                f"A process that encodes text ended with code {process.wait()}; is there too little memory?"
            ) from None
        finally:
            self.idle.put(process)


def _read_encoded(stream) -> list[Encoded]:
    """Returns what a process answered."""
    header = read_frame(stream)
    if header is None:
        raise EOFError
    if "error" in header:
        raise UserError(header["error"])
    ends = np.cumsum(header["sizes"])
    ids = np.split(np.frombuffer(read_exactly(stream, 4 * int(ends[-1])), np.uint32), ends[:-1])
    trained = [None] * len(ids)
    if header["masked"]:
        trained = np.split(np.frombuffer(read_exactly(stream, int(ends[-1])), np.uint8).astype(bool), ends[:-1])
    return [Encoded(*one) for one in zip(ids, trained, header["bytes"], strict=True)]


def _paired(batch: list[Document], found: concurrent.futures.Future) -> Iterator[tuple[Document, Encoded]]:
    return zip(batch, found.result(), strict=True)
