"""The verdict: its statistics against scipy's, its wrong decisions counted, and what it says."""

import json

import numpy as np
import pytest
from scipy import stats

from foundry_jax.errors import UserError
from foundry_jax.search.verdict import (
    Evidence,
    Look,
    Verdict,
    holm,
    interval_of,
    judge,
    p_different,
    p_within,
    settle,
)

ONCE = Look(3, 3, 3)


def judged(seeds, units=None, *, alpha=0.05, min_effect=0.005, look=ONCE, **options) -> Verdict:
    """Returns the verdict on one contestant."""
    evidence = Evidence(dict(enumerate(seeds)), None if units is None else np.array(units), "bits per byte", "items")
    return judge({"x": evidence}, alpha=alpha, min_effect=min_effect, look=look, **options)["x"]


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n", [2, 3, 30])
def test_statistics_are_those_of_scipy_stats(n):
    x = np.random.default_rng(n).normal(0.3, 1, n)
    found = stats.ttest_1samp(x, 0)
    assert p_different(x) == pytest.approx(found.pvalue, rel=1e-12)
    assert interval_of(x, 0.03) == pytest.approx(tuple(found.confidence_interval(0.97)), rel=1e-12)
    above = stats.ttest_1samp(x, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(x, 0.5, alternative="less").pvalue
    assert p_within(x, 0.5) == pytest.approx(max(above, below), rel=1e-12)


def test_holm_tests_the_smallest_p_value_at_the_strictest_level_and_stops_at_the_first_that_is_kept():
    p_values = {"a": 0.03, "b": 0.012, "c": 0.04, "d": 0.001}
    assert holm(p_values, 0.05, 4) == pytest.approx({"d": 0.05 / 4, "b": 0.05 / 3, "a": 0.05 / 2, "c": 0.05 / 2})
    assert holm(dict.fromkeys("abc", 0.001), 0.06, 3) == pytest.approx({"a": 0.02, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.001}, 0.05, 5) == {"a": 0.01}  # four others were pruned


def test_looks_spend_all_of_alpha_and_no_more():
    levels = [Look(n, 3, 8).level(0.05) for n in range(3, 9)]
    assert sum(levels) == pytest.approx(0.05)
    assert levels[0] == pytest.approx(0.05 * np.log(1 + (np.e - 1) * 3 / 8))
    assert ONCE.level(0.05) == pytest.approx(0.05)


@pytest.mark.parametrize("numbers", [(2, 3, 8), (9, 3, 8), (0, 0, 3)])
def test_looks_out_of_order_are_refused(numbers):
    with pytest.raises(UserError, match="must not decrease and be 1 or more"):
        Look(*numbers)


# ------------------------------------------------------------------------------------------------ decisions

CLEAR, NARROW = [0.030, 0.031, 0.029], [0.0301, 0.0299] * 10


def test_better_and_worse_are_mirror_images():
    better, worse = judged(CLEAR, NARROW), judged([-x for x in CLEAR], [-x for x in NARROW])
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert better.interval == pytest.approx((-worse.interval[1], -worse.interval[0]))
    assert better.p_value == worse.p_value
    assert "0.03 bits per byte better; 95 % interval +0.02752 to +0.03248 over 3 seeds and 20 items" in better.why


def test_a_difference_needs_both_seeds_and_units():
    wide = [0.5, -0.44] * 10
    told = judged(CLEAR, wide)
    assert told.verdict == "inconclusive"
    assert "noise between items:" in told.why
    assert told.interval == told.over_units.interval
    told = judged([0.09, -0.03, 0.03], NARROW)
    assert told.verdict == "inconclusive"
    assert "noise between seeds:" in told.why
    assert told.interval == told.over_seeds.interval


def test_a_real_difference_below_the_smallest_effect_is_not_better():
    told = judged(CLEAR, NARROW, min_effect=0.0302)
    assert told.verdict == "inconclusive"
    assert "less than 0.0302 bits per byte, but more cannot be ruled out" in told.why


def test_equivalence_is_shown_by_two_one_sided_tests_over_both_sources():
    told = judged([0.001, -0.001, 0.0005], [0.001, -0.001] * 10)
    assert told.verdict == "equivalent"
    assert "differences of 0.005 bits per byte or more are ruled out" in told.why
    assert judged([0.001, -0.001, 0.0005], [0.05, -0.05] * 10).verdict == "inconclusive"
    assert judged([0.001, -0.001, 0.0005], [0.001, -0.001] * 10, min_effect=0).verdict == "inconclusive"


def test_one_seed_proves_nothing():
    told = judged([0.03], NARROW)
    assert (told.verdict, told.interval, told.p_value) == ("inconclusive", None, None)
    assert told.over_units.interval[0] > 0
    assert "one seed proves nothing" in told.why


def test_differences_without_any_spread():
    same = judged([0.0] * 3, [0.0] * 20)
    assert (same.verdict, same.effect, same.interval) == ("equivalent", 0.0, (0.0, 0.0))
    assert judged([0.0] * 3, [0.0] * 20, min_effect=0).verdict == "inconclusive"
    shifted = judged([2.1 - 2.0, 2.2 - 2.1, 2.3 - 2.2], [0.1] * 20)  # equal up to rounding
    assert (shifted.verdict, shifted.p_value) == ("better", 0.0)
    told = judged([0.1] * 3)  # all seeds win the same number of items, by chance
    assert told.verdict == "inconclusive"
    assert "without any spread there is nothing to judge by" in told.why


def test_the_number_of_contestants_widens_the_intervals_also_when_some_were_pruned():
    alone, among = judged(CLEAR, NARROW), judged(CLEAR, NARROW, family=200)
    assert among.level == pytest.approx(alone.level / 200)
    assert among.interval[0] < alone.interval[0]
    assert among.verdict == "inconclusive"


def test_what_was_decided_stays_decided():
    first, second = judged(CLEAR, NARROW), judged([0.03, -0.03, 0.01])
    assert settle({"x": first}, {"x": second}) == {"x": first}
    assert settle({"x": second}, {"x": first, "y": second}) == {"x": first, "y": second}


@pytest.mark.parametrize("told", [judged(CLEAR, NARROW), judged(CLEAR), judged([0.03], NARROW), judged([0.0] * 3)])
def test_verdicts_survive_json(told):
    assert Verdict.from_json(json.loads(json.dumps(told.to_json(), allow_nan=False))) == told


@pytest.mark.parametrize(
    "numbers, message",
    [({"alpha": 0}, "alpha=0 must be between 0 and 1"), ({"min_effect": -1}, "min_effect=-1 must be 0 or more")],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(UserError, match=message):
        judged(CLEAR, **numbers)


# ------------------------------------------------------------------------------------------------ error rates

UNITS = 30


def simulated(rng, effects, seeds) -> dict[str, np.ndarray]:
    """Returns the paired differences [seeds, units] of each contestant: all have the incumbent's noise in common."""
    noise = lambda: rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, (seeds, UNITS))  # noqa: E731
    incumbent, text = noise(), rng.normal(0, 1, (len(effects), 1, UNITS))
    return {f"c{i}": effect + noise() + text[i] - incumbent for i, effect in enumerate(effects)}


def verdicts_of_sweep(rng, effects, *, most=3, alpha=0.05, min_effect=0.0, with_units=False) -> list[str]:
    """Returns the verdicts of a sweep that looks after 3 seeds, and after one more while any is undecided."""
    drawn, verdicts = simulated(rng, effects, most), {}
    for n in range(3, most + 1):
        units = {name: x[:n].mean(0) if with_units else None for name, x in drawn.items()}
        evidence = {name: Evidence(dict(enumerate(x[:n].mean(1))), units[name]) for name, x in drawn.items()}
        verdicts = settle(verdicts, judge(evidence, alpha=alpha, min_effect=min_effect, look=Look(n, 3, most)))
        if all(one.is_decided for one in verdicts.values()):
            break
    return [one.verdict for one in verdicts.values()]


def is_at_most(count, n, probability) -> bool:
    return stats.binomtest(count, n, probability, alternative="greater").pvalue > 0.01


def test_one_contestant_is_wrongly_decided_as_often_as_alpha_says():
    rng = np.random.default_rng(0)
    wrong = sum(verdicts_of_sweep(rng, [0.0], alpha=0.1) != ["inconclusive"] for _ in range(2000))
    assert stats.binomtest(wrong, 2000, 0.1).pvalue > 0.01


@pytest.mark.parametrize("contestants", [1, 3, 10])
@pytest.mark.parametrize("most", [3, 8])
@pytest.mark.parametrize("with_units", [False, True])
def test_any_of_the_contestants_is_wrongly_decided_less_often_than_alpha(contestants, most, with_units):
    rng = np.random.default_rng(contestants + most)
    sweeps = [
        verdicts_of_sweep(rng, [0.0] * contestants, most=most, with_units=with_units)
        for _ in range({1: 1000, 3: 500, 10: 200}[contestants])
    ]
    wrong = sum("better" in verdicts or "worse" in verdicts for verdicts in sweeps)
    assert is_at_most(wrong, len(sweeps), 0.05)


def test_contestants_that_are_rightly_found_better_do_not_make_the_others_wrong_more_often():
    rng = np.random.default_rng(0)
    sweeps = [verdicts_of_sweep(rng, [100.0, 100.0, 0.0, 0.0]) for _ in range(1000)]
    assert np.mean([verdicts[0] == "better" for verdicts in sweeps]) > 0.9
    assert is_at_most(sum(verdicts[2:] != ["inconclusive"] * 2 for verdicts in sweeps), len(sweeps), 0.05)


@pytest.mark.parametrize("most", [3, 8])
def test_equivalence_is_rarely_claimed_of_the_smallest_effect_worth_having(most):
    rng = np.random.default_rng(most)
    sweeps = [verdicts_of_sweep(rng, [20.0, -20.0], most=most, min_effect=20.0) for _ in range(1000)]
    assert is_at_most(sum("equivalent" in verdicts for verdicts in sweeps), len(sweeps), 0.05)


def test_a_large_effect_is_found_and_so_is_equivalence():
    rng = np.random.default_rng(0)
    found = [verdicts_of_sweep(rng, [15.0], min_effect=1.0, with_units=True)[0] for _ in range(200)]
    assert found.count("better") > 180
    found = [verdicts_of_sweep(rng, [0.0], min_effect=15.0, with_units=True)[0] for _ in range(200)]
    assert found.count("equivalent") > 180


@pytest.mark.parametrize(("items", "expected"), [(4, "inconclusive"), (290, "inconclusive"), (310, "equivalent")])
def test_items_that_nobody_answers_differently_prove_equivalence_only_if_there_are_enough(items, expected):
    """0.99 ** 299 is 0.05."""
    same = Evidence({0: 0.0, 1: 0.0, 2: 0.0}, np.zeros(items), "score", "items", are_scores=True)
    found = judge({"a": same}, alpha=0.05, min_effect=0.01, look=Look(3, 3, 3))["a"]
    assert found.verdict == expected and found.p_equivalent == pytest.approx(0.99**items)
    assert found.verdict == "equivalent" or f"answered differently, but {items} are too few" in found.why
