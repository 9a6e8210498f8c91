"""The scorer: one model, asked how likely texts are and what it writes after them, with lm-eval's meaning of each.

An answer depends, bit by bit, on its request alone: not on what else is asked, nor in which order, nor on the batch
size. For that a row of a program must not see how many others there are, nor how long they are; generate.Reader and
attention over a cache (model/attention/core.py) are made so, and tests hold it.
"""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax import generate
from foundry_jax.data.chat import TextStream
from foundry_jax.generate import CHUNK, Prompt, Reader, common_length, num_chunks
from foundry_jax.model import transformer
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import batch_shards, constrain
from foundry_jax.model.position import position_of
from foundry_jax.model.transformer import Transformer
from foundry_jax.schema import require
from foundry_jax.tasks.encoding import Encoder
from foundry_jax.tasks.requests import Continuation, Generation, Score
from foundry_jax.zoo.pretrained import Pretrained

log = logging.getLogger(__name__)

SHORTEST_CACHE = 512  # tokens; longer ones are powers of two, so that few programs are compiled
ROWS_AT_ONCE = 8  # a batch is rounded up to a multiple: programs of fewer rows would round in other places
LOOKUPS = 32  # tokens whose logits exist at once: [LOOKUPS, V] numbers in float32
MOST_ROWS = {"cpu": 8}  # of a batch that is chosen automatically; on a CPU 32 rows write 1.4 times as fast
MOST_ROWS_ELSEWHERE = 64
CACHE_SHARE = 0.5  # of the free memory of a device that an automatic batch's cache may take

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """A text to read, and what to look up in it: how likely each of `targets` is after the token at its position.

    positions: ascending; places: where each answer belongs among all answers; owners: the requests that need them.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    places: np.ndarray
    owners: list[int]

    @property
    def first(self) -> int:
        """The number of the first chunk that something is looked up in."""
        return int(self.positions[0]) // CHUNK

    def wanted(self, number: int) -> slice:
        """Returns what is looked up in a chunk."""
        return slice(*np.searchsorted(self.positions, [number * CHUNK, (number + 1) * CHUNK]))


class Scorer:
    """Answers requests about text. Answers come in the order of the requests.

    `progress`, wherever it is taken, is called with the number of requests answered since it was called last.

    truncated: how many requests were longer than the context and lost their beginning so far.
    """

    def __init__(self, model: Pretrained, *, batch_size: int | None = None, max_length: int | None = None):
        """Loads nothing.

        Args:
            batch_size: how many texts are continued at once, rounded up to ROWS_AT_ONCE; None: up to MOST_ROWS, as
                many as have a cache in CACHE_SHARE of the free memory. Texts to score need no batch.
            max_length: tokens of context and answer together; None: all of the model's context.

        Raises:
            UserError: no tokenizer, or a number that is out of range.
        """
        limit = model.config.context_length
        require(batch_size is None or batch_size >= 1, f"batch_size={batch_size} must be 1 or more.")
        require(
            max_length is None or 1 <= max_length <= limit,
            f"max_length={max_length} must be between 1 and the {limit} tokens of the model's context.",
        )
        self.max_length, self.truncated = max_length or limit, 0
        self._model, self._batch_size = model, batch_size
        self._encoder = Encoder(model.tokenizer, model.stop_ids, model.name)
        self._length = 0  # of caches
        self._reader: Reader | None = None

    def reserve(self, requests: Sequence[Continuation | Generation]) -> None:
        """Makes room for the longest of some requests: for those that come in several calls, which would else compile
        their programs again whenever a longer one comes."""
        texts = dict.fromkeys(_text_of(request) for request in requests)
        lengths = dict(zip(texts, map(len, self._encoder.encode(list(texts))), strict=True))
        most = max((lengths[_text_of(request)] + getattr(request, "max_tokens", 0) for request in requests), default=0)
        self._make_room(min(most, self.max_length))

    def check(self, requests: Sequence[Continuation | Generation]) -> None:
        """Refuses requests as answering them would, and counts those that are cut, without the model's parameters.

        Raises:
            UserError: as in the methods that answer.
        """
        self._pairs([request for request in requests if isinstance(request, Continuation)])
        self._prompts([request for request in requests if isinstance(request, Generation)])

    def is_cut(self, request: Continuation | Generation) -> bool:
        """Returns whether a request is longer than the context and loses its beginning: one that `truncated` counts."""
        if isinstance(request, Generation):
            [ids] = self._encoder.encode([request.context])
            return len(ids) > self.max_length - request.max_tokens
        [pair] = self._encoder.pairs([request])
        return sum(map(len, pair)) > self.max_length + 1

    def loglikelihood(self, requests: Sequence[Continuation], progress: Progress = lambda _: None) -> list[Score]:
        """Returns how likely each continuation is after its context.

        Raises:
            UserError: a continuation without tokens, or longer than the context by itself.
        """
        return self._scores(self._pairs(requests), range(len(requests)), progress)

    def loglikelihood_rolling(self, texts: Sequence[str], progress: Progress = lambda _: None) -> list[float]:
        """Returns how likely each text is as a whole, in nats: a long one in windows, each token scored once."""
        windows = [self._encoder.windows(text, self.max_length) for text in texts]
        owners = [i for i, group in enumerate(windows) for _ in group]
        progress(sum(not group for group in windows))
        scores = self._scores([pair for group in windows for pair in group], owners, progress)
        totals = [0.0] * len(texts)
        for i, score in zip(owners, scores, strict=True):
            totals[i] += score.log_prob
        return totals

    def generate_until(self, requests: Sequence[Generation], progress: Progress = lambda _: None) -> list[str]:
        """Returns what the model writes after each context, up to the first of the texts that end it.

        Raises:
            UserError: no room for max_tokens in the context.
        """
        prompts = self._prompts(requests)
        ends = [_End(self._encoder, self._model, request.until) for request in requests]
        found = [""] * len(requests)
        self._make_room(max((len(prompt.ids) + prompt.max_tokens for prompt in prompts), default=0))
        with self._model._context():
            new = generate.continued(
                prompts, self._ready_reader(), rows=self._rows(), is_end=lambda i, index: ends[i].add(index)
            )
            for i, ids in new:
                found[i] = ends[i].cut(self._model.tokenizer.decode(ids, skip_special=True))
                progress(1)
        return found

    def _pairs(self, requests: Sequence[Continuation]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids of the context, ids of the continuation) of each request."""
        pairs = self._encoder.pairs(requests)
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        require(
            longest <= self.max_length,
            f"A continuation of {longest} tokens is longer than the {self.max_length} tokens of the context.",
        )
        self._count_truncated(sum(len(a) + len(b) > self.max_length + 1 for a, b in pairs))
        return pairs

    def _prompts(self, requests: Sequence[Generation]) -> list[Prompt]:
        """Returns the requests as prompts, of which those that are too long have lost their beginning."""
        contexts = self._encoder.encode([request.context for request in requests])
        rooms = [self.max_length - request.max_tokens for request in requests]
        for request, room in zip(requests, rooms, strict=True):
            require(
                room > 0,
                f"max_tokens={request.max_tokens} leaves no room for a context in the {self.max_length} tokens of the "
                f"model; ask for fewer.",
            )
        self._count_truncated(sum(len(ids) > room for ids, room in zip(contexts, rooms, strict=True)))
        return [
            Prompt(self._encoder.prompt(ids)[-room:], request.max_tokens, request.sampling)
            for ids, room, request in zip(contexts, rooms, requests, strict=True)
        ]

    def _count_truncated(self, count: int) -> None:
        self.truncated += count
        if count:
            log.warning("%d requests are longer than %d tokens and lose their beginning.", count, self.max_length)

    def _scores(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], owners: Sequence[int], progress: Progress
    ) -> list[Score]:
        """Returns the score of each (context, continuation); owners: the request that each belongs to."""
        sizes = [len(continuation) for _, continuation in pairs]
        texts, left = _texts(pairs, owners, self.max_length), collections.Counter(owners)
        log_probs, is_likeliest = np.zeros(sum(sizes)), np.zeros(sum(sizes), bool)
        self._make_room(max((len(text.ids) for text in texts), default=0))
        with self._model._context():
            for places, found, best, done in self._looked_up(texts):
                log_probs[places], is_likeliest[places] = found, best
                left.subtract(done)
                progress(sum(left[owner] == 0 for owner in set(done)))
        spans = [slice(stop - size, stop) for stop, size in zip(np.cumsum(sizes), sizes, strict=True)]
        return [Score(math.fsum(log_probs[i]), bool(is_likeliest[i].all()), len(log_probs[i])) for i in spans]

    def _looked_up(self, texts: Sequence[_Text]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]]:
        """Yields (places, log-probabilities, whether each is the likeliest token, owners of the texts now read)."""
        reader = self._ready_reader()
        walks = [_walk(reader, row, part) for row, part in enumerate(_dealt(texts, reader.rows))]
        started: collections.deque = collections.deque()  # the device works on the next step while one is looked at
        while any(work := [next(walk, None) for walk in walks]):
            x_TCD = reader.read([item and (item[0].ids, item[1]) for item in work])
            started.append(self._start_lookups(x_TCD, work))
            if len(started) > 1:
                yield _finished(*started.popleft())
        for item in started:
            yield _finished(*item)

    def _start_lookups(
        self, x_TCD: jax.Array, work: Sequence[tuple[_Text, int] | None]
    ) -> tuple[list, np.ndarray, list[int]]:
        """Returns (what the device is looking up, LOOKUPS at a time; places of the answers; owners of texts now read).

        Args:
            work: the text of each row and the number of its chunk that was read.
        """
        found = [(row, *item, item[0].wanted(item[1])) for row, item in enumerate(work) if item]
        at = np.concatenate([text.positions[i] % CHUNK + row * CHUNK for row, text, _, i in found])
        targets = np.concatenate([text.targets[i] for _, text, _, i in found])
        places = np.concatenate([text.places[i] for _, text, _, i in found])
        done = [owner for _, text, n, _ in found if n == num_chunks(len(text.ids)) - 1 for owner in text.owners]
        at, targets = (np.pad(x, (0, -len(x) % LOOKUPS)).reshape(-1, LOOKUPS) for x in (at, targets))
        model = self._model
        lookups = [
            _look_up(model.variables, x_TCD, *piece, config=model.config) for piece in zip(at, targets, strict=True)
        ]
        return lookups, places, done

    def _make_room(self, length: int) -> None:
        """Makes caches longer, if they are shorter than that; the old ones are forgotten."""
        length = _cache_length(length, self.max_length, self._model.config)
        if length > self._length:
            self._length, self._reader = length, None

    def _ready_reader(self) -> Reader:
        """Returns the reader of texts to score and of prompts. Its rows do not depend on the batch size: on a CPU one
        for each device keeps it busy, and more would have less in common with what was read before."""
        if self._reader is None:
            rows = batch_shards() if jax.default_backend() == "cpu" else _rounded(1)
            self._reader = Reader(self._model.config, self._model.variables, rows, self._length)
        return self._reader

    def _rows(self) -> int:
        """Returns how many texts are continued at once."""
        fitting = functools.partial(fitting_rows, self._model.config, self._length)
        return _rounded(self._batch_size or fitting(free_bytes() * CACHE_SHARE))


class _End:
    """Whether what the model writes after one context has come to an end, token by token."""

    def __init__(self, encoder: Encoder, model: Pretrained, until: Sequence[str]):
        self._stops = [text for text in dict.fromkeys((*until, encoder.end_text)) if text]
        control = {encoder.control_ids[text] for text in self._stops if text in encoder.control_ids}
        self._ids = control | set(model.stop_ids) | ({encoder.end_id} - {None})
        self._stream = TextStream(model.tokenizer.decode)  # with control tokens spelled out
        self._kept = max(map(len, self._stops), default=1) - 1  # characters of the text so far that a stop may begin in
        self._text = ""

    def add(self, index: int) -> bool:
        """Returns whether one more token ends the text."""
        if index in self._ids:
            return True
        self._text += self._stream.add(index)
        if any(stop in self._text for stop in self._stops):
            return True
        self._text = self._text[-self._kept :] if self._kept else ""
        return False

    def cut(self, text: str) -> str:
        """Returns a text without what ends it: cut at one stop after the other."""
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text


def _text_of(request: Continuation | Generation) -> str:
    return request.context + getattr(request, "continuation", "")


def _rounded(rows: int) -> int:
    """Returns a number of rows that the devices share evenly."""
    unit = math.lcm(ROWS_AT_ONCE, batch_shards())
    return -(-rows // unit) * unit


def _texts(pairs: Sequence[tuple[np.ndarray, np.ndarray]], owners: Sequence[int], max_length: int) -> list[_Text]:
    """Returns the texts to read, each once: the choices of a question that differ in the last token are one.

    The last token of a continuation is not read, and of a text that is too long the first ones are not.
    """
    found: dict[bytes, tuple[np.ndarray, list, list[int]]] = {}
    place = 0
    for (context, continuation), owner in zip(pairs, owners, strict=True):
        size = len(continuation)
        ids = np.concatenate([context, continuation])[-(max_length + 1) : -1]
        _, wanted, owned = found.setdefault(ids.tobytes(), (ids, [], []))
        wanted.append((len(ids) - size + np.arange(size), continuation, place + np.arange(size)))
        owned.append(owner)
        place += size
    return [_text(*item) for item in found.values()]


def _text(ids: np.ndarray, wanted: Sequence[tuple[np.ndarray, ...]], owners: list[int]) -> _Text:
    positions, targets, places = map(np.concatenate, zip(*wanted, strict=True))
    order = np.argsort(positions, kind="stable")
    return _Text(ids, positions[order], targets[order], places[order], owners)


def _dealt(texts: Sequence[_Text], rows: int) -> list[list[_Text]]:
    """Returns the texts for each row, alike ones one after another, so that no row has more chunks to read than needed.

    Where a row's texts begin, all of the first one is read.
    """
    if not texts:
        return []
    texts = sorted(texts, key=lambda text: text.ids.astype(">i4").tobytes())
    alone = [num_chunks(len(text.ids)) for text in texts]
    after = [
        alone[i] - (min(common_length(texts[i - 1].ids, text.ids) // CHUNK, text.first) if i else 0)
        for i, text in enumerate(texts)
    ]
    low, high = max(alone), sum(alone)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_starts(alone, after, middle)) <= rows else (middle + 1, high)
    starts = _starts(alone, after, high)
    return [texts[i:j] for i, j in zip(starts, [*starts[1:], len(texts)], strict=True)]


def _starts(alone: Sequence[int], after: Sequence[int], limit: int) -> list[int]:
    """Returns where each row's texts begin, if none may have more than `limit` chunks to read."""
    starts, used = [], limit
    for i, (whole, rest) in enumerate(zip(alone, after, strict=True)):
        used += rest
        if used > limit:
            starts.append(i)
            used = whole
    return starts


def _walk(reader: Reader, row: int, texts: Sequence[_Text]) -> Iterator[tuple[_Text, int]]:
    """Yields (text, number of the chunk to read next) of one row."""
    for text in texts:
        for number in range(min(reader.common(row, text.ids), text.first), num_chunks(len(text.ids))):
            yield text, number


@functools.partial(jax.jit, static_argnames=("config",))
def _look_up(variables, x_TCD, at_M, targets_M, *, config: ModelConfig):
    """Returns (log-probability of each target after the token that lies at `at` in the chunks, whether it is the
    likeliest one): only those tokens go through the output map."""
    x_MD = x_TCD.reshape(-1, x_TCD.shape[-1])[at_M]
    logits_MV = Transformer(config).apply(variables, x_MD[:, None], method=Transformer.logits)[:, 0]
    target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    log_prob_M, is_best_M = target_M - jax.nn.logsumexp(logits_MV, axis=-1), jnp.argmax(logits_MV, axis=-1) == targets_M
    return constrain(log_prob_M, None), constrain(is_best_M, None)  # whole on every process


def _finished(
    lookups: list, places: np.ndarray, done: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Returns what _looked_up yields; waits for the device."""
    if not lookups:
        return places, np.zeros(0), np.zeros(0, bool), done
    log_probs, best = (np.concatenate([np.asarray(x) for x in column]) for column in zip(*lookups, strict=True))
    return places, log_probs[: len(places)], best[: len(places)], done


def _cache_length(length: int, max_length: int, config: ModelConfig) -> int:
    """Returns a power of two, or less if max_length, or the number of positions that are learned, is less."""
    block = -(-max_length // SHORTEST_CACHE) * SHORTEST_CACHE
    size = min(max(SHORTEST_CACHE, 1 << (length - 1).bit_length()), block)
    return min(size, position_of(config).table_length(config) or size)


def fitting_rows(config: ModelConfig, length: int, budget: float) -> int:
    """Returns how many rows of a cache for `length` tokens each fit in some bytes of every device, up to MOST_ROWS."""
    abstract = jax.eval_shape(lambda: transformer.init_cache(config, 1, length))
    one = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    most = MOST_ROWS.get(jax.default_backend(), MOST_ROWS_ELSEWHERE)
    return max(1, min(most, int(budget // one) * batch_shards()))


def free_bytes() -> int:
    """Returns the bytes of memory that are free on each device; virtual devices of a CPU share the computer's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        free = 1024 * int(values["MemAvailable"].split()[0])
    except (OSError, KeyError):
        free = 2**32  # not Linux
    return free // jax.local_device_count()
