"""Curricula: the definition computed the slow way; as many tokens as without; no difference once they are over."""

import math
from collections import Counter

import numpy as np
import pytest

from foundry_jax.data.batches import Portion, train_batches
from foundry_jax.data.curriculum import CURRICULA, compression_ratio, curriculum, parse, row_difficulty
from foundry_jax.data.pack import plan
from foundry_jax.data.stream import Stream
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError

L, B, STEPS = 5, 4, 40
STARTS = np.concatenate([[0], np.cumsum(np.random.default_rng(1).geometric(0.15, 60))])
TOKENS = np.arange(1000, 1000 + STARTS[-1], dtype=np.uint16)
DIFFICULTY = np.round(np.random.default_rng(2).random(60), 1)  # there are ties
PACKINGS = ["stream", "split", "pad", "first_fit(bins=4)"]


def ordered(text="length", packing="pad", difficulty=DIFFICULTY, num_steps=STEPS):
    return curriculum(parse(text), num_steps, difficulty, STARTS, plan(STARTS, packing, L), L)


def batches_of(text: str | None, packing: str):
    portion = Portion(Stream(TOKENS, STARTS), packed=plan(STARTS, packing, L))
    if text:
        portion = portion._replace(curriculum=ordered(text, packing))
    return train_batches([portion], batch_size=B, context_length=L, seed=3)


class Scorer:
    fingerprint = "model-7"

    def __call__(self, texts):
        return [len(text) / 7 for text in texts]


@pytest.mark.parametrize("packing", PACKINGS)
def test_difficulty_of_a_row_is_the_mean_of_its_tokens(packing):
    of_token = np.repeat(DIFFICULTY, np.diff(STARTS))
    rows = plan(STARTS, packing, L)
    if rows is None:
        expected = [of_token[start : start + L].mean() for start in range(0, (len(TOKENS) // L - 1) * L, L)]
    else:
        inputs = [np.concatenate([np.arange(s, s + n) for s, n in part]) for part in
                  np.split(rows.pieces, rows.offsets[1:-1])]  # fmt: skip
        expected = [of_token[row].mean() for row in inputs]
    np.testing.assert_allclose(row_difficulty(DIFFICULTY, STARTS, rows, L), expected, rtol=1e-12)


@pytest.mark.parametrize("packing", PACKINGS)
def test_ties_are_broken_by_the_number_of_the_row(packing):
    found = row_difficulty(DIFFICULTY, STARTS, plan(STARTS, packing, L), L)
    order = ordered(packing=packing)
    assert order.row_of_rank.tolist() == sorted(range(len(found)), key=lambda row: (found[row], row))
    assert order.rank_of_row[order.row_of_rank].tolist() == list(range(len(found)))


@pytest.mark.parametrize("text", ["length", "compression(pacing='root', start=0.05)", "length(pacing='step')"])
def test_rows_are_those_of_the_definition(text):
    order = ordered(text)
    total = len(order)
    for step in [*range(22), 39, 10**6]:
        pool = max(1, math.ceil(round(order.kind.share(step, STEPS) * total, 6)))
        expected = []
        for row in range(total):
            rank = order.rank_of_row[row]
            expected.append(row if rank < pool else order.row_of_rank[(rank - pool) * pool // (total - pool)])
        found = order.rows_at(step, np.arange(total))
        assert found.tolist() == expected
        assert set(order.rank_of_row[found]) == set(range(pool)), "all of the pool and nothing else"
        counts = Counter(found.tolist()).values()
        assert max(counts) - min(counts) <= 1, "each equally often"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("length(pacing='linear', start=0.2, steps=0.5)", [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]),
        ("length(pacing='step', start=0.3, steps=0.25)", [0.3, 0.3, 1, 1, 1, 1, 1, 1]),
        # Platanios et al. 2019, equation 7: sqrt(t (1 - c0^2) / T + c0^2).
        ("length(pacing='root', start=0.1, steps=0.5)", [0.1, 0.50744, 0.71063, 0.86747, 1, 1, 1, 1]),
        ("length(start=1)", [1] * 8),
        ("length(steps=0)", [1] * 8),
    ],
)
def test_pacing(text, expected):
    assert [round(parse(text).share(step, 8), 5) for step in range(8)] == expected


def test_a_pool_is_never_empty_and_rounds_up():
    assert ordered("length(start=0)").pool_size(0) == 1
    order = ordered("length(start=0.1, pacing='step')")
    assert order.pool_size(0) == math.ceil(len(order) / 10)
    rows = plan(np.arange(0, 151, 5), "pad", L)
    thirty = curriculum(parse("length(start=0.1)"), 10, np.zeros(30), np.arange(0, 151, 5), rows, L)
    assert thirty.pool_size(0) == 3, "0.1 * 30 is more than 3 in floating point"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("pacing", ["linear", "root", "step"])
def test_batches_are_easy_at_first_and_those_without_a_curriculum_once_it_is_over(packing, pacing):
    plain, eased = batches_of(None, packing), batches_of(f"length(pacing='{pacing}', steps=0.5)", packing)
    assert any((plain.batch(step)["inputs"] != eased.batch(step)["inputs"]).any() for step in range(20))
    for step in range(20, 60):
        for name, x in plain.batch(step).items():
            np.testing.assert_array_equal(x, eased.batch(step)[name])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_row_of_the_pool_stays_where_it_was(packing):
    plain, eased = batches_of(None, packing), batches_of("length(start=0.4, pacing='step')", packing)
    same = [(plain.batch(step)["inputs"] == eased.batch(step)["inputs"]).all(axis=1) for step in range(20)]
    assert 0.25 < np.mean(same) < 0.6
    assert {x.shape for x in eased.batch(0).values()} == {(B, L)}, "as many tokens as without"


def test_documents_become_harder_step_by_step():
    batches = batches_of("length(start=0.1)", "pad")
    of_token = dict(zip(TOKENS.tolist(), np.repeat(DIFFICULTY, np.diff(STARTS)).tolist(), strict=True))
    hardest = [max(of_token[token] for token in batches.batch(step)["inputs"][:, 0].tolist()) for step in range(20)]
    assert hardest[0] <= 0.2 < 0.5 < max(hardest[15:])
    limits = np.quantile(row_difficulty(DIFFICULTY, STARTS, plan(STARTS, "pad", L), L), np.linspace(0.1, 1, 21)[:20])
    assert all(found <= limit + 0.1 for found, limit in zip(hardest, limits, strict=True))


def test_each_part_of_a_mixture_keeps_its_share():
    difficulty = [DIFFICULTY, DIFFICULTY + 10]
    portions = [
        Portion(Stream(TOKENS + 5000 * i, STARTS), 1 + i, plan(STARTS, "pad", L), ordered(difficulty=difficulty[i]))
        for i in range(2)
    ]
    batches = train_batches(portions, batch_size=B, context_length=L, seed=3)
    second = sum((batches.batch(step)["inputs"][:, 0] >= 5000).sum() for step in range(60))
    assert abs(second / (60 * B) - 2 / 3) < 0.01


def test_a_difficulty_of_texts():
    texts, sizes = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "the quick brown fox", ""], [3, 7, 1]
    tools = Tools(scorer={"m": Scorer()}.__getitem__)
    assert parse("length").measure(tools)(texts, sizes) == [3, 7, 1]
    assert parse("perplexity(model='m')").measure(tools)(texts, sizes) == [30 / 7, 19 / 7, 0]
    easy, hard, empty = parse("compression").measure(tools)(texts, sizes)
    assert 0 == empty < easy < 0.2 < 0.8 < hard < 1.2


def test_short_texts_are_not_hard_because_of_the_header_of_zlib():
    assert compression_ratio("a") <= 3
    assert abs(compression_ratio("é" * 50) - compression_ratio("é" * 60)) < 0.02


def test_fingerprints_tell_difficulties_apart_and_not_pacings():
    tools = Tools(scorer=lambda model: Scorer())
    texts = ["length", "compression", "perplexity(model='m')"]
    assert len({parse(text).fingerprint(tools) for text in texts}) == len(CURRICULA) - 1
    assert parse("length(start=0.5)").fingerprint(tools) == parse("length(pacing='root')").fingerprint(tools)
    assert "model-7" in parse("perplexity").fingerprint(tools)


def test_none_is_no_curriculum():
    assert parse("none") is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("lenght", "Unknown data.curriculum 'lenght'. Did you mean 'length'?"),
        ("length(pacing='rot')", "Unknown data.curriculum: pacing 'rot'. Did you mean 'root'?"),
        ("length(start=-0.1)", "data.curriculum: start=-0.1 must be a finite number between 0 and 1"),
        ("length(start=1.5)", "start=1.5 must be"),
        ("length(steps=2)", "data.curriculum: steps=2.0 must be a finite number between 0 and 1"),
        ("length(steps='nan')", "steps=nan must be a finite number"),
        ("length(start='easy')", "start='easy' must be a number, not text"),
        ("length(model='m')", "Unknown number of data.curriculum=length 'model'"),
        ("perplexity(modl='m')", "Did you mean 'model'?"),
        ("none(start=1)", "Unknown number of data.curriculum=none 'start'"),
        ("length(", "must be a name, or a name with numbers"),
    ],
)
def test_a_bad_curriculum_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_perplexity_needs_somebody_who_knows_models():
    with pytest.raises(UserError, match="Nothing here can score texts with model='smollm2-135m'"):
        parse("perplexity").measure(Tools())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_difficulty_that_is_no_number_is_named(bad):
    difficulty = DIFFICULTY.copy()
    difficulty[6] = bad
    with pytest.raises(UserError, match="the difficulty of training document 7 is not a finite number"):
        ordered(difficulty=difficulty)
