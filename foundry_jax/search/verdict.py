"""Whether a contestant is better than the incumbent, and how sure that is: paired differences, Holm, alpha spending.

    evidence = {"mla": Evidence({0: 0.031, 1: 0.027, 2: 0.036}, units, "bits per byte", "groups of validation text")}
    judge(evidence, alpha=0.05, min_effect=0.005, look=Look(3, 3, 3))["mla"].verdict      # "better"

A difference has two sources of noise: another seed gives other weights, another text gives other numbers for the same
weights. Each is tested by a paired t test, and both have to agree: the p-value is the larger one, the interval covers
both. So neither three lucky seeds on a text that happens to suit, nor one lucky run measured on a large text, will do.

What is guaranteed, as far as differences are normal: the probability that any contestant of a sweep is called better or
worse without being different is at most alpha, however many there are (Holm 1979) and however often was looked (see
Look); and so is the probability that any is called equivalent whose true effect is min_effect or more. A decision is
made once: of several looks the first one that decides stands (see settle).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special

from foundry_jax.schema import require

VERDICTS = BETTER, WORSE, EQUIVALENT, INCONCLUSIVE = "better", "worse", "equivalent", "inconclusive"

NO_SPREAD = 1e-9  # standard deviation over mean: what is left of equal differences after rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of one contestant against the incumbent, in one metric.

    seeds: the paired difference of each seed, signed so that more is better.
    units: paired differences over parts of the text or over items, [n], averaged over seeds and scaled so that their
        mean is the effect; None where they are not known.
    unit: of the differences, for people: "bits per byte".
    parts: what the units are, for people: "items".
    are_scores: whether units are differences of scores between 0 and 1, such as right or wrong.
    """

    seeds: Mapping[int, float]
    units: np.ndarray | None = None
    unit: str = ""
    parts: str = "parts"
    are_scores: bool = False

    def __post_init__(self):
        finite = np.isfinite(list(self.seeds.values())).all() and (self.units is None or np.isfinite(self.units).all())
        assert finite, "a run that is not finite has failed; it is no evidence"


@dataclasses.dataclass(frozen=True)
class Look:
    """The look at the results after `seeds` seeds, of looks after first, first + 1, ... and at most max_seeds.

    Whoever looks often finds something sooner or later. So alpha is spent by and by, as alpha ln(1 + (e - 1) t) at the
    share t of all seeds (Lan & DeMets 1983, after Pocock), and a look has what was not spent before it. The levels
    add up to at most alpha, which holds whatever the looks have in common. One look at all seeds has all of alpha.

    Raises:
        UserError: the numbers are not 1 <= first <= seeds <= max_seeds.
    """

    seeds: int
    first: int
    max_seeds: int

    def __post_init__(self):
        require(
            1 <= self.first <= self.seeds <= self.max_seeds,
            f"A look after {self.seeds} seeds, the first one after {self.first}, the last one after {self.max_seeds}: "
            f"these must not decrease and be 1 or more; raise --max-seeds.",
        )

    def level(self, alpha: float) -> float:
        """Returns the share of alpha that this look may use."""
        before = self._spent(self.seeds - 1) if self.seeds > self.first else 0.0
        return alpha * (self._spent(self.seeds) - before)

    def _spent(self, seeds: int) -> float:
        return math.log1p((math.e - 1) * seeds / self.max_seeds)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of n paired differences; interval and p_value (of no difference, two-sided) are None for n < 2."""

    effect: float
    interval: tuple[float, float] | None
    p_value: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is said of a contestant.

    verdict: one of VERDICTS.
    effect: by how much it is better, the mean over seeds; negative: worse.
    interval: of the effect, covering both sources; None with fewer than two seeds.
    p_value: of no difference, two-sided, not adjusted: compare it with level.
    p_equivalent: of a difference of min_effect or more, by two one-sided tests; None where min_effect is 0.
    level: alpha, adjusted for the look and the other contestants; the intervals are of confidence 1 - level.
    why: one line for people.
    """

    verdict: str
    effect: float
    interval: tuple[float, float] | None
    p_value: float | None
    p_equivalent: float | None
    over_seeds: Estimate
    over_units: Estimate | None
    level: float
    why: str

    @property
    def is_decided(self) -> bool:
        """Whether more seeds are not needed."""
        return self.verdict != INCONCLUSIVE

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers and lists."""
        values = dataclasses.asdict(self)
        for part in (values, values["over_seeds"], values["over_units"] or {}):
            if part.get("interval") is not None:
                part["interval"] = list(part["interval"])
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Verdict":
        """Returns what to_json was called of."""
        units = values["over_units"]
        parts = {
            "over_seeds": _estimate(values["over_seeds"]),
            "over_units": None if units is None else _estimate(units),
        }
        return cls(**{**values, **parts, "interval": _pair(values["interval"])})


def _estimate(values: Mapping[str, Any]) -> Estimate:
    return Estimate(**{**values, "interval": _pair(values["interval"])})


def _pair(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def judge(
    evidence: Mapping[str, Evidence], *, alpha: float, min_effect: float, look: Look, family: int = 0
) -> dict[str, Verdict]:
    """Returns the verdict on each contestant, by name.

    better: no difference is rejected in the contestant's favour, and the effect is min_effect or more. worse: mirrored.
    equivalent: effects of min_effect or more are rejected on both sides. Otherwise inconclusive.

    Args:
        evidence: of all contestants that have some, those included on which an earlier look decided.
        family: how many contestants there are, if some have no evidence because of how they did: a contestant that was
            pruned for its results makes those that are left look better than they are, so it counts.

    Raises:
        UserError: alpha or min_effect is out of range.
    """
    require(0 < alpha < 1, f"alpha={alpha} must be between 0 and 1, such as 0.05.")
    require(min_effect >= 0, f"min_effect={min_effect} must be 0 or more.")
    family, level = max(family, len(evidence)), look.level(alpha)
    samples = {name: _samples(one) for name, one in evidence.items()}
    p_values = {name: max(map(p_different, found)) for name, found in samples.items()}
    p_equivalent = {name: _p_equivalent(one, min_effect) for name, one in evidence.items()}
    levels, equivalence_levels = holm(p_values, level, family), holm(p_equivalent, level, family)
    return {
        name: _verdict(one, p_values[name], levels[name], p_equivalent[name], equivalence_levels[name], min_effect)
        for name, one in evidence.items()
    }


def settle(earlier: Mapping[str, Verdict], now: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Returns the verdicts after another look: what was decided stays, the level spent on it being gone."""
    return {name: earlier[name] if name in earlier and earlier[name].is_decided else now[name] for name in now}


def holm(p_values: Mapping[str, float], alpha: float, family: int) -> dict[str, float]:
    """Returns the level at which each hypothesis is tested; those with p <= level are rejected.

    Holm 1979: the smallest p-value against alpha / family, the next one against alpha / (family - 1), until one is not
    rejected; the others are tested at its level. The probability of any wrong rejection is at most alpha.
    """
    order = sorted(p_values, key=p_values.__getitem__)
    levels = {name: alpha / (family - i) for i, name in enumerate(order)}
    last = next((levels[name] for name in order if p_values[name] > levels[name]), alpha)
    return {name: min(level, last) for name, level in levels.items()}


def _samples(evidence: Evidence) -> list[np.ndarray]:
    """Returns the differences by seed and, if they are known, by unit."""
    seeds = np.array(list(evidence.seeds.values()), float)
    return [seeds] if evidence.units is None else [seeds, np.asarray(evidence.units, float)]


def _mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Returns the mean of [n] numbers and its standard error: exactly 0 if they are equal up to rounding."""
    mean, spread = float(x.mean()), float(x.std(ddof=1))
    return mean, 0.0 if spread <= NO_SPREAD * abs(mean) else spread / math.sqrt(len(x))


def p_different(x: np.ndarray) -> float:
    """Returns the two-sided p-value of a mean of 0: Student's t test of [n] differences; 1 for n < 2."""
    if len(x) < 2:
        return 1.0
    mean, error = _mean_and_error(x)
    if error == 0:
        return float(mean == 0)
    return 2 * float(special.stdtr(len(x) - 1, -abs(mean) / error))


def p_within(x: np.ndarray, bound: float) -> float:
    """Returns the p-value of a mean outside of +-bound: two one-sided t tests (Schuirmann 1987), the larger p.

    It is 1 for a bound of 0, which no mean lies within, and for n < 2.
    """
    if len(x) < 2 or bound == 0:
        return 1.0
    mean, error = _mean_and_error(x)
    room = bound - abs(mean)
    if error == 0:
        return float(room <= 0)
    return float(special.stdtr(len(x) - 1, -room / error))


def _p_equivalent(evidence: Evidence, bound: float) -> float:
    """Returns the p-value of a difference of `bound` or more; 1 for a bound of 0.

    If no item was answered differently there is no spread to judge by. Then it is the probability of that if as many
    items as the bound says are answered differently: four items that both get wrong prove nothing.
    """
    found = [p_within(x, bound) for x in _samples(evidence)]
    if _are_all_alike(evidence):
        found.append(max(0.0, 1 - bound) ** len(evidence.units))
    return max(found)


def _are_all_alike(evidence: Evidence) -> bool:
    """Returns whether no item was answered differently."""
    return evidence.are_scores and evidence.units is not None and not np.any(evidence.units)


def interval_of(x: np.ndarray, level: float) -> tuple[float, float]:
    """Returns the t interval of confidence 1 - level of the mean of [n] numbers, n >= 2."""
    mean, error = _mean_and_error(x)
    half = float(special.stdtrit(len(x) - 1, 1 - level / 2)) * error
    return mean - half, mean + half


def estimate(x: np.ndarray, level: float) -> Estimate:
    """Returns what [n] differences say of their mean."""
    if len(x) < 2:
        return Estimate(float(x.mean()), None, None, len(x))
    return Estimate(float(x.mean()), interval_of(x, level), p_different(x), len(x))


def _verdict(
    evidence: Evidence, p: float, level: float, p_equivalent: float, equivalence_level: float, min_effect: float
) -> Verdict:
    seeds, *units = (estimate(x, level) for x in _samples(evidence))
    enough = seeds.n > 1
    told = Verdict(
        verdict=INCONCLUSIVE,
        effect=seeds.effect,
        interval=_covering(seeds, *units) if enough else None,
        p_value=p if enough else None,
        p_equivalent=p_equivalent if enough and min_effect > 0 else None,
        over_seeds=seeds,
        over_units=units[0] if units else None,
        level=level,
        why="",
    )
    verdict = _decide(told, p_equivalent <= equivalence_level, min_effect)
    return dataclasses.replace(told, verdict=verdict, why=_why(verdict, told, evidence, equivalence_level, min_effect))


def _covering(*estimates: Estimate) -> tuple[float, float]:
    """Returns the interval that covers those of all estimates that have one: the wider one, if their means agree."""
    lows, highs = zip(*(one.interval for one in estimates if one.interval is not None), strict=True)
    return min(lows), max(highs)


def _decide(told: Verdict, is_within: bool, min_effect: float) -> str:
    if told.over_seeds.n < 2 or _is_unfounded(told):
        return INCONCLUSIVE
    if is_within:
        return EQUIVALENT
    if _is_different(told) and abs(told.effect) >= min_effect:
        return BETTER if told.effect > 0 else WORSE
    return INCONCLUSIVE


def _is_different(told: Verdict) -> bool:
    """Returns whether the interval is on one side of 0; with a level of its own for each source both must be."""
    low, high = told.interval
    return told.p_value <= told.level and low * high > 0


def _is_unfounded(told: Verdict) -> bool:
    """Returns whether all seeds differ by the same amount and nothing else is known.

    Shares of right answers do that by chance, when all seeds win the same number of items.
    """
    return told.over_units is None and told.effect != 0 and told.over_seeds.p_value == 0.0


def _why(verdict: str, told: Verdict, evidence: Evidence, equivalence_level: float, min_effect: float) -> str:
    """Returns the reason in one line."""
    unit = f" {evidence.unit}" if evidence.unit else ""
    size = (
        f"{abs(told.effect):.4g}{unit} {'better' if told.effect > 0 else 'worse'}" if told.effect else "no difference"
    )
    if told.over_seeds.n < 2:
        return f"{size}, but one seed proves nothing: train 2 or more, 3 are usual."
    if _is_unfounded(told):
        return f"{size} with each seed: without any spread there is nothing to judge by; take more items."
    low, high = told.interval
    seen = f"{100 * (1 - told.level):.4g} % interval {low:+.4g} to {high:+.4g} over {_counted(told, evidence)}"
    if verdict in (BETTER, WORSE):
        return f"{size}; {seen}, p = {told.p_value:.2g}."
    if verdict == EQUIVALENT:
        return (
            f"{size}: differences of {min_effect:g}{unit} or more are ruled out on both sides over "
            f"{_counted(told, evidence)}, p = {told.p_equivalent:.2g} at level {equivalence_level:.2g}."
        )
    if _are_all_alike(evidence):
        return (
            f"no item was answered differently, but {told.over_units.n} are too few to rule out differences of "
            f"{min_effect:g}{unit}: take more items."
        )
    if _is_different(told):
        return f"{size}, which is less than {min_effect:g}{unit}, but more cannot be ruled out: {seen}."
    return f"{size}, which may be noise between {_noise(told, evidence)}: {seen}, p = {told.p_value:.2g}."


def _counted(told: Verdict, evidence: Evidence) -> str:
    units = f" and {told.over_units.n} {evidence.parts}" if told.over_units else ""
    return f"{told.over_seeds.n} seeds{units}"


def _noise(told: Verdict, evidence: Evidence) -> str:
    """Returns the source, or both, that does not exclude 0."""
    sources = {"seeds": told.over_seeds, evidence.parts: told.over_units}
    unsure = [name for name, one in sources.items() if one and (one.p_value is None or one.p_value > told.level)]
    return " and between ".join(unsure) or "seeds"
