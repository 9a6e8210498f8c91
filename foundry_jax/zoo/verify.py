"""Whether two files hold the same model: both read the same few hundred tokens, and their logits are compared."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from foundry_jax.data.tokenize import CharTokenizer, Tokenizer
from foundry_jax.schema import require
from foundry_jax.zoo import open_source
from foundry_jax.zoo.pretrained import pretrained
from foundry_jax.zoo.source import Source

# Prose, code, figures, other scripts, a list, a dialogue: a mistake in one part of a vocabulary should not stay hidden.
PROMPTS = (
    "The lighthouse keeper counted the ships twice before he wrote the number down, because the fog had been rising "
    "since noon and he no longer trusted what he saw. Forty years earlier his father had made the same mistake, and",
    "def moving_average(values: list[float], width: int) -> list[float]:\n"
    '    """Returns the mean of each window of consecutive values."""\n'
    "    if width < 1:\n        raise ValueError(f\"width={width} must be 1 or more\")\n    return [",
    "Quarter 1: 1,204.50; quarter 2: 987.25; quarter 3: 1,311.00. The sum of the three is 3,502.75, so that the mean "
    "is 1,167.58. If the fourth quarter reaches 2 x 10^3, the year as a whole comes to",
    "Les oiseaux migrateurs reviennent au printemps. Die Vögel kehren im Frühling zurück. Птицы возвращаются весной. "
    "渡り鳥は春に戻ってくる。 Los pájaros",
    '{"name": "Ada", "born": 1815, "languages": ["en", "fr"], "notes": [{"page": 12, "text": "Bernoulli numbers"}, '
    '{"page": 13, "text": "',
    "Shopping list:\n- 2 onions\n- 500 g flour\n- olive oil\n\nUser: What can I bake with these?\nAssistant: With "
    "flour and oil you can make a simple flatbread. First",
)  # fmt: skip
IDS, IDS_LENGTH = 4, 64  # rows and tokens for models without a tokenizer


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are apart.

    tokens: positions compared; prompts: "text", or "random ids" for models without a tokenizer.
    max_difference: largest difference of any logit; largest_logit: the size of the largest one of the first model.
    mean_kl: mean over positions of the Kullback-Leibler divergence of the second model's distribution from the first's,
        in nats.
    top1_agreement: share of positions at which both find the same token the likeliest.
    """

    first: str
    second: str
    prompts: str
    tokens: int
    max_difference: float
    largest_logit: float
    mean_kl: float
    top1_agreement: float


def verify(
    one: str | os.PathLike,
    other: str | os.PathLike,
    *,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Returns the comparison of two models, each a name or path of load_pretrained. Only one is in memory at a time.

    Raises:
        UserError: one cannot be loaded, or they have different vocabularies or tokenizers.
    """
    first, second = open_source(one), open_source(other)
    prompts, rows = _prompts(first, second)
    tokens_BL, is_token_BL = _padded(rows)
    logits_NV, other_NV = (_logits(source, tokens_BL, dtype, progress)[is_token_BL] for source in (first, second))
    p_NV, q_NV = _log_softmax(logits_NV), _log_softmax(other_NV)
    return Comparison(
        first=first.name,
        second=second.name,
        prompts=prompts,
        tokens=len(logits_NV),
        max_difference=float(np.max(np.abs(logits_NV - other_NV))),
        largest_logit=float(np.max(np.abs(logits_NV))),
        mean_kl=float(np.mean(np.sum(np.exp(p_NV) * (p_NV - q_NV), axis=-1))),
        top1_agreement=float(np.mean(logits_NV.argmax(axis=-1) == other_NV.argmax(axis=-1))),
    )


def _prompts(first: Source, second: Source) -> tuple[str, list[list[int]]]:
    """Returns (what they are, ids of each), the same for both models."""
    sizes = first.model.vocab_size, second.model.vocab_size
    require(
        sizes[0] == sizes[1],
        f"{first.name} has a vocabulary of {sizes[0]}, {second.name} one of {sizes[1]}: they cannot be compared.",
    )
    length = min(first.model.context_length, second.model.context_length)
    encoded = [rows for source in (first, second) if (rows := _encoded(source.tokenizer(), length))]
    if not encoded:
        rng = np.random.default_rng(0)
        return "random ids", rng.integers(0, sizes[0], (IDS, min(IDS_LENGTH, length))).tolist()
    require(
        encoded[0] == encoded[-1],
        f"The tokenizers of {first.name} and {second.name} give other ids for the same text: they cannot be compared.",
    )
    return "text", encoded[0]


def _encoded(tokenizer: Tokenizer | None, length: int) -> list[list[int]]:
    """Returns the ids of the prompts; none without a tokenizer, or with one of characters, which lacks some."""
    if tokenizer is None or isinstance(tokenizer, CharTokenizer):
        return []
    return [[*tokenizer.start_ids, *ids.tolist()][:length] for ids in tokenizer.encode_batch(PROMPTS)]


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens [B, L], whether each is one [B, L]), padded on the right, where no other token sees it."""
    tokens_BL = np.zeros((len(rows), max(map(len, rows))), np.int32)
    is_token_BL = np.zeros(tokens_BL.shape, bool)
    for row, ids in enumerate(rows):
        tokens_BL[row, : len(ids)], is_token_BL[row, : len(ids)] = ids, True
    return tokens_BL, is_token_BL


def _logits(source: Source, tokens_BL: np.ndarray, dtype: str, progress) -> np.ndarray:
    """Returns the logits of a model [B, L, V], which is forgotten afterwards."""
    return np.asarray(pretrained(source, dtype=dtype, progress=progress).logits(tokens_BL))


def _log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted_NV = logits_NV.astype(np.float64) - np.max(logits_NV, axis=-1, keepdims=True)
    return shifted_NV - np.log(np.sum(np.exp(shifted_NV), axis=-1, keepdims=True))
