"""Writing on: prompts of token ids to the ids that a model continues them with, by way of its key/value cache.

A prompt is read in pieces and every further token alone. Lengths are rounded up to powers of two, so that few programs
are compiled, and a batch to a multiple of the devices that share it.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator, Sequence
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
    """The numbers of one draw, traced, so that changing one does not recompile."""

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
    cache = _empty_cache(config=config, batch=len(ends_B), length=_cache_length(longest + max_tokens, config))
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


@functools.partial(jax.jit, static_argnames=("config", "batch", "length"))
def _empty_cache(*, config: ModelConfig, batch: int, length: int) -> Cache:
    return _laid_out(transformer.init_cache(config, batch, length))


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames=("cache",))
def _advance(variables, tokens_BL, positions_BL, cache: Cache, draw: _Draw, *, config: ModelConfig, kind: str):
    """Returns (the next id of every row [B, 1], the cache with the tokens in it)."""
    model, placement = Transformer(config), Placement(positions_BL)
    logits_BV, cache = model.apply(variables, tokens_BL, placement, cache, method=_last_logits)
    next_B = jnp.argmax(logits_BV, axis=-1) if kind == "greedy" else sample(logits_BV, draw, restricted=kind != "plain")
    return constrain(next_B.astype(jnp.int32)[:, None], "activation_batch", None), _laid_out(cache)


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
    return Cache(positions, {name: layer(name, tensors) for name, tensors in cache.layers.items()})


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
