"""From verdicts to a decision: who is promoted, and why or why not."""

import dataclasses
from collections.abc import Mapping

from foundry_jax.search.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Decision:
    """best: the contestant to promote, or None; why: one line."""

    best: str | None
    why: str


def choose(verdicts: Mapping[str, Verdict], troubles: Mapping[str, str], unit: str) -> Decision:
    """Returns the contestant with the largest effect of those that are better than the incumbent.

    Args:
        verdicts: of the contestants that were trained.
        troubles: {contestant: why it was not}.
        unit: of the effects.
    """
    better = {name: verdict for name, verdict in verdicts.items() if verdict.verdict == "better"}
    if not better:
        return Decision(None, _why_nobody(verdicts, troubles))
    best = max(better, key=lambda name: better[name].effect)
    others = len(better) - 1
    more = f"; {others} more {'is' if others == 1 else 'are'} better than the incumbent" if others else ""
    return Decision(best, f"{best} is better by {_interval(better[best])} {unit}{more}.")


def _why_nobody(verdicts: Mapping[str, Verdict], troubles: Mapping[str, str]) -> str:
    found = [f"{name} is {verdict.verdict}" for name, verdict in verdicts.items()]
    found += [f"{name} {trouble}" for name, trouble in troubles.items()]
    return f"Nobody is better than the incumbent: {', '.join(found)}."


def _interval(verdict: Verdict) -> str:
    low, high = verdict.interval
    return f"{verdict.effect:.4f} [{low:.4f}, {high:.4f}]"
