"""Writing on: prompts of token ids to the ids that a model continues them with, by way of its key/value cache.

A prompt is read in pieces and every further token alone. Lengths are rounded up to powers of two, so that few programs
are compiled, and a batch to a multiple of the devices that share it.

`generate` and `stream` continue a few prompts together. `continued` continues any number of them, in a fixed number of
rows of a cache, each of which takes the next prompt when it has finished one. A Reader reads texts that begin alike.
"""

import collections
import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from foundry_jax.model import transformer
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import batch_shards, constrain
from foundry_jax.model.mask import EMPTY, Placement
from foundry_jax.model.position import position_of
from foundry_jax.model.transformer import Cache, Transformer
from foundry_jax.schema import require, require_range

log = logging.getLogger(__name__)

SMALLEST_BUCKET = 32
PIECE = 512  # tokens of a prompt read at once: attention holds PIECE x cache length logits a head, not length squared
CHUNK = 64  # tokens of a text that a Reader reads at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: at temperature 0 the likeliest, otherwise among the top_k likeliest, of those the
    fewest that have the probability top_p together. top_k=0 and top_p=1 leave none out.

    top_p: Holtzman et al. 2019, 1904.09751.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        inf = float("inf")
        require_range(self, "", temperature=(0, inf), top_k=(0, inf), top_p=(1e-6, 1), seed=(0, 2**31 - 1))

    @property
    def kind(self) -> str:
        """Which program draws: greedy, plain (no token is left out) or restricted."""
        if self.temperature == 0:
            return "greedy"
        return "plain" if self.top_k == 0 and self.top_p == 1 else "restricted"


class _Draw(NamedTuple):
    """The numbers of one draw, traced, so that changing one does not recompile; or arrays, one number a row."""

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    seed: np.int32
    step: np.int32

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int, step: int) -> "_Draw":
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        return cls(
            np.float32(sampling.temperature), np.int32(top_k), np.float32(sampling.top_p), np.int32(sampling.seed),
            np.int32(step),
        )  # fmt: skip


def generate(
    config: ModelConfig,
    variables: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Returns the new ids of each prompt, without the stop id that ended it.

    Args:
        variables: {"params": ...}, and {"lora": ...} if there are adapters.
        prompts: of any lengths, at least one token each.
        max_tokens: most new tokens of a prompt.

    Raises:
        UserError: a prompt without tokens or with ids that the model does not have, or too few learned positions.
    """
    found: list[list[int]] = [[] for _ in prompts]
    done = np.zeros(len(prompts), bool)
    for tokens_B in stream(config, variables, prompts, max_tokens=max_tokens, sampling=sampling):
        done |= np.isin(tokens_B, list(stop_ids))
        for row in np.flatnonzero(~done):
            found[row].append(int(tokens_B[row]))
        if done.all():
            break
    return found


def stream(
    config: ModelConfig,
    variables: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next id of every prompt, [number of prompts], max_tokens times; arguments as in `generate`."""
    sampling = sampling or Sampling()
    _check(config, prompts)
    require(max_tokens >= 0, f"max_tokens={max_tokens} must be 0 or more.")
    spare = -len(prompts) % batch_shards()
    tokens_BL, positions_BL, ends_B = _left_padded([*prompts, *[prompts[0]] * spare])
    longest = int(ends_B.max())
    length = _cache_length(longest + max_tokens, config)
    cache = _empty_cache(variables, config=config, batch=len(ends_B), length=length)
    advance = functools.partial(_advance, config=config, kind=sampling.kind)
    for step in range(max_tokens):
        draw = _Draw.of(sampling, config.vocab_size, step)
        for i in range(0, tokens_BL.shape[1], PIECE):
            piece = np.s_[:, i : i + PIECE]
            next_B1, cache = advance(variables, tokens_BL[piece], positions_BL[piece], cache, draw)
        yield np.asarray(next_B1)[: len(prompts), 0]
        if step == max(0, config.context_length - longest):
            log.warning("The text is now longer than the model's %d tokens of context.", config.context_length)
        tokens_BL, positions_BL = next_B1, (ends_B + step)[:, None]


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    require(len(prompts) > 0, "There is no prompt to continue.")
    require(all(map(len, prompts)), "A prompt must have at least one token: begin with the tokenizer's separator.")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    wrong = low if low < 0 else high
    require(
        0 <= wrong < config.vocab_size,
        f"Token id {wrong} in a prompt is none of the model's, 0 to {config.vocab_size - 1}: another tokenizer's?",
    )


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens [B, L], positions [B, L], lengths [B]); L is a power of two, and padding on the left."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    L = _bucket(int(lengths_B.max()))
    tokens_BL, positions_BL = np.zeros((len(prompts), L), np.int32), np.full((len(prompts), L), EMPTY, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, L - len(prompt) :] = prompt
        positions_BL[row, L - len(prompt) :] = np.arange(len(prompt))
    return tokens_BL, positions_BL, lengths_B


def _cache_length(needed: int, config: ModelConfig) -> int:
    """Returns a power of two; the number of learned positions where that is less, if they suffice."""
    limit = position_of(config).table_length(config)
    return min(_bucket(needed), max(limit, needed)) if limit else _bucket(needed)


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _empty_cache(variables: dict, *, config: ModelConfig, batch: int, length: int, rolling: bool = True) -> Cache:
    """Returns an empty cache on the devices of the parameters: an array that is on none in particular, as one made of
    nothing is on a mesh of one device, would have what takes it compiled again."""
    return _emptied(jax.tree.leaves(variables)[0], config=config, batch=batch, length=length, rolling=rolling)


@functools.partial(jax.jit, static_argnames=("config", "batch", "length", "rolling"), keep_unused=True)
def _emptied(_: jax.Array, *, config: ModelConfig, batch: int, length: int, rolling: bool) -> Cache:
    return _laid_out(transformer.init_cache(config, batch, length, rolling=rolling))


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames=("cache",))
def _advance(variables, tokens_BL, positions_BL, cache: Cache, draw: _Draw, *, config: ModelConfig, kind: str):
    """Returns (the next id of every row [B, 1], the cache with the tokens in it)."""
    model, placement = Transformer(config), Placement(positions_BL)
    logits_BV, cache = model.apply(variables, tokens_BL, placement, cache, method=_last_logits)
    next_B = _next_ids(logits_BV, draw, kind)
    return constrain(next_B.astype(jnp.int32)[:, None], None, None), _laid_out(cache)  # ids whole on every process


def _last_logits(module: Transformer, tokens_BL, placement, cache):
    """Returns (logits of the last token of every row [B, V], cache); those of a whole prompt would be large."""
    x_BLD, cache = module.hidden(tokens_BL, placement, cache)
    return module.logits(x_BLD[:, -1:])[:, 0], cache


def _laid_out(cache: Cache) -> Cache:
    """Returns the cache with each row, and each head's keys and values, on the devices that work on them: it is never
    whole on one device, and every step gets the same layout, so that one program serves them all."""

    def layer(name, tensors):
        lead = (None,) if name == "blocks" else ()  # scanned layers are stacked

        def tensor(x):
            rest = {2: (None, None), 3: (None, "activation_heads", None)}[x.ndim - len(lead) - 1]  # BSR, or BSKH
            return constrain(x, *lead, "activation_batch", *rest)

        return jax.tree.map(tensor, tensors)

    positions = {letter: constrain(x_BS, "activation_batch", None) for letter, x_BS in cache.positions.items()}
    layers = {name: layer(name, tensors) for name, tensors in cache.layers.items()}
    return cache.replace(positions=positions, layers=layers)


def _next_ids(logits_BV: jax.Array, draw: _Draw, kind: str) -> jax.Array:
    """Returns one id a row [B]; if the numbers of the draw are arrays, a row's id depends on nothing of the others."""
    if kind == "greedy":
        return jnp.argmax(logits_BV, axis=-1)
    draw_of = functools.partial(sample, restricted=kind == "restricted")
    if draw.seed.ndim == 0:
        return draw_of(logits_BV, draw)
    return jax.vmap(lambda logits_V, one: draw_of(logits_V[None], one)[0])(logits_BV, draw)


def sample(logits_BV: jax.Array, draw: _Draw, *, restricted: bool) -> jax.Array:
    """Returns one id a row [B], drawn with the probabilities that a temperature, top_k and top_p leave.

    Tokens are ranked before they are left out, so that of equal ones (bfloat16 has many) no more than top_k stay.
    """
    key = jax.random.fold_in(jax.random.key(draw.seed), draw.step)
    logits_BV = logits_BV / draw.temperature
    if not restricted:
        return jax.random.categorical(key, logits_BV)
    order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    ranked_BV = left_over(jnp.take_along_axis(logits_BV, order_BV, axis=-1), draw.top_k, draw.top_p)
    rank_B1 = jax.random.categorical(key, ranked_BV)[:, None]
    return jnp.take_along_axis(order_BV, rank_B1, axis=-1)[:, 0]


def left_over(ranked_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns logits in descending order with -inf where top_k or top_p leave a token out; the first always stays."""
    ranked_BV = jnp.where(jnp.arange(ranked_BV.shape[-1])[None, :] < top_k, ranked_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(ranked_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    return jnp.where((before_BV < top_p) | (top_p >= 1), ranked_BV, -jnp.inf)


class Reader:
    """A few rows of a cache, each of which holds a text; of the next one only what differs is read.

    Texts are read in chunks of CHUNK tokens that begin at multiples of CHUNK, all rows at once. So what a row holds of
    a text is computed by the same program from the same tokens, bit by bit, whether it was read with this text or with
    another one that begins alike, and whatever the other rows hold.
    """

    def __init__(self, config: ModelConfig, variables: dict, rows: int, length: int):
        """Makes the cache.

        Args:
            variables: as in `generate`.
            rows: a multiple of the devices that share a batch.
            length: most tokens of a text.
        """
        self.config, self.variables, self.rows, self.length = config, variables, rows, length
        self.cache = _empty_cache(variables, config=config, batch=rows, length=length, rolling=False)
        self._held = [np.zeros(0, np.int32)] * rows

    def common(self, row: int, ids: np.ndarray) -> int:
        """Returns how many whole chunks a row holds of a text."""
        return common_length(self._held[row], ids) // CHUNK

    def read(self, work: Sequence[tuple[np.ndarray, int] | None]) -> jax.Array:
        """Returns x [rows, CHUNK, D] of a chunk of each row's text, after the final norm.

        Args:
            work: for each row (ids of a text, number of the chunk), of which the chunks before have been read; or None.
        """
        tokens_TC = np.zeros((self.rows, CHUNK), np.int32)
        positions_TC = np.full((self.rows, CHUNK), EMPTY, np.int32)
        for row, (ids, number) in ((row, item) for row, item in enumerate(work) if item):
            start = number * CHUNK
            part = ids[start : start + CHUNK]
            tokens_TC[row, : len(part)], positions_TC[row, : len(part)] = part, np.arange(start, start + len(part))
            self._held[row] = ids[: start + len(part)]
        x_TCD, self.cache = _read(self.variables, tokens_TC, positions_TC, self.cache, config=self.config)
        return x_TCD

    def read_all(self, texts: Sequence[np.ndarray]) -> None:
        """Reads one text a row, from the first row on."""
        todo = [iter(range(self.common(row, ids), num_chunks(len(ids)))) for row, ids in enumerate(texts)]
        while any(work := [_paired(ids, next(numbers, None)) for ids, numbers in zip(texts, todo, strict=True)]):
            self.read([*work, *[None] * (self.rows - len(work))])


def _paired(ids: np.ndarray, number: int | None) -> tuple[np.ndarray, int] | None:
    return None if number is None else (ids, number)


def num_chunks(length: int) -> int:
    """Returns in how many chunks a text of so many tokens is read."""
    return -(-length // CHUNK)


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many elements two arrays have in common from their beginning."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(variables, tokens_TC, positions_TC, cache: Cache, *, config: ModelConfig):
    """Returns (x_TCD after the final norm, the cache with the tokens in it)."""
    model, placement = Transformer(config), Placement(positions_TC)
    x_TCD, cache = model.apply(variables, tokens_TC, placement, cache, method=Transformer.hidden)
    return constrain(x_TCD, "activation_batch", None, None), _laid_out(cache)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A text to continue: its token ids, at least one, and how many more there may be."""

    ids: np.ndarray
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    @property
    def draw_seed(self) -> int:
        """The seed of its draws: other prompts draw other numbers, and it draws the same ones in any company."""
        return zlib.crc32(self.ids.astype(np.int32).tobytes(), self.sampling.seed) >> 1


def continued(
    prompts: Sequence[Prompt],
    reader: Reader,
    *,
    rows: int,
    is_end: Callable[[int, int], bool],
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a prompt, its new ids) as each is finished: with the id that ended it, or max_tokens of them.

    What is written after a prompt does not depend on the others, nor on their order.

    Args:
        reader: of the model, for texts of at least as many tokens as any prompt and what is written after it.
        rows: how many are continued at once, a multiple of the devices that share a batch.
        is_end: (index, new id) -> whether it ends what is written; asked once about each new id, in order.

    Raises:
        UserError: as in `generate`.
    """
    if prompts:
        _check(reader.config, [prompt.ids.tolist() for prompt in prompts])
    kinds = sorted({prompt.sampling.kind for prompt in prompts})
    for kind in kinds:
        writer = _Writer(reader, rows, kind)
        waiting = [index for index, prompt in enumerate(prompts) if prompt.sampling.kind == kind]
        for index in waiting:
            if prompts[index].max_tokens == 0:
                yield index, []
        waiting = [index for index in waiting if prompts[index].max_tokens > 0]
        waiting.sort(key=lambda index: (prompts[index].ids.astype(">i4").tobytes(), index))  # alike ones in turn
        yield from writer.run(prompts, collections.deque(waiting), is_end)


class _Writer:
    """Rows of a cache in each of which a prompt is continued by one token a step.

    The last token of a prompt is not read with the rest of it: the step that reads it draws the first new one.
    """

    def __init__(self, reader: Reader, rows: int, kind: str):
        self._reader, self._kind = reader, kind
        self._cache = _empty_cache(
            reader.variables, config=reader.config, batch=rows, length=reader.length, rolling=False
        )
        self._tokens_R1 = np.zeros((rows, 1), np.int32)
        self._positions_R1 = np.full((rows, 1), EMPTY, np.int32)
        self._draws_R = _Draw(*(np.ones(rows, number.dtype) for number in _Draw.of(Sampling(), 1, 0)))
        self._index_R: list[int | None] = [None] * rows  # the prompt in each row

    def run(
        self, prompts: Sequence[Prompt], waiting: collections.deque[int], is_end: Callable[[int, int], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields as `continued` does."""
        new: dict[int, list[int]] = {}
        while waiting or new:
            while waiting and None in self._index_R:
                for index in self._admit(prompts, waiting):
                    new[index] = []
            next_R = self._step()
            for row, index in enumerate(self._index_R):
                if index is None:
                    continue
                new[index].append(int(next_R[row]))
                if is_end(index, new[index][-1]) or len(new[index]) == prompts[index].max_tokens:
                    self._index_R[row], self._positions_R1[row] = None, EMPTY
                    yield index, new.pop(index)

    def _admit(self, prompts: Sequence[Prompt], waiting: collections.deque[int]) -> list[int]:
        """Returns the prompts that are read and put into free rows."""
        free = [row for row, index in enumerate(self._index_R) if index is None]
        taken = [waiting.popleft() for _ in range(min(len(free), len(waiting), self._reader.rows))]
        self._reader.read_all([prompts[index].ids[:-1] for index in taken])
        for there, (row, index) in enumerate(zip(free, taken, strict=False)):
            self._cache = _placed(self._cache, self._reader.cache, row, there)
            prompt = prompts[index]
            self._tokens_R1[row], self._positions_R1[row] = prompt.ids[-1], len(prompt.ids) - 1
            draw = _Draw.of(prompt.sampling, self._reader.config.vocab_size, 0)._replace(seed=prompt.draw_seed)
            for numbers_R, number in zip(self._draws_R, draw, strict=True):
                numbers_R[row] = number
            self._index_R[row] = index
        return taken

    def _step(self) -> np.ndarray:
        """Returns the next id of each row [rows]; one of a free row means nothing."""
        model = {"config": self._reader.config, "kind": self._kind}
        next_R1, self._cache = _advance(
            self._reader.variables, self._tokens_R1, self._positions_R1, self._cache, self._draws_R, **model
        )
        self._tokens_R1 = np.array(next_R1)  # waits, so that what the program has read may now change
        self._positions_R1 += self._positions_R1 != EMPTY
        self._draws_R.step[:] += 1
        return self._tokens_R1[:, 0]


@functools.partial(jax.jit, donate_argnames=("cache",))
def _placed(cache: Cache, source: Cache, row, there) -> Cache:
    """Returns the cache with its row replaced by row `there` of another one of the same length."""

    def replaced(axis: int):
        def leaf(x, y):
            part = jax.lax.dynamic_slice_in_dim(y, there, 1, axis)
            return jax.lax.dynamic_update_slice_in_dim(x, part, row, axis)

        return leaf

    layers = {
        name: jax.tree.map(replaced(int(name == "blocks")), tensors, source.layers[name])  # scanned layers are stacked
        for name, tensors in cache.layers.items()
    }
    positions = jax.tree.map(replaced(0), cache.positions, source.positions)
    return _laid_out(cache.replace(positions=positions, layers=layers))
