"""What result.json of a sweep holds: everything that a reader, a lineage or a report needs, from the facts."""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.search import measuring, verdict
from foundry_jax.search.facts import Facts
from foundry_jax.search.request import Request
from foundry_jax.search.space import INCUMBENT
from foundry_jax.search.verdict import Verdict

FORMAT = 1


def result_of(facts: Facts, verdicts: Mapping[str, Verdict], decision: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the result; decision is None before anything was trained."""
    asked, begin, budget = facts.request, facts.ledger.get("begin"), facts.ledger.get("budget")
    metric = measuring.metric_of(asked.metric)
    looks = {int(count): found for count, found in facts.ledger.under("look").items()}
    contestants = {name: _contestant(facts, name, verdicts.get(name)) for name in facts.everybody}
    _add_others(facts, contestants, [name for name in verdicts if not facts.trouble(name)])
    return {
        "format": FORMAT,
        "name": facts.path.name,
        "command": command_of(asked),
        "config": asked.config,
        "overrides": [*asked.overrides],
        "metric": metric.to_json(),
        "alpha": asked.alpha,
        "min_effect": asked.min_effect,
        "match": asked.match,
        "seeds": [asked.first_seed + i for i in range(max(looks, default=0))],
        "max_seeds": asked.max_seeds,
        "budget": budget,
        "incumbent": INCUMBENT,
        "contestants": contestants,
        "decision": decision,
        "rungs": _rungs(facts, verdicts, metric),
        "looks": [{"seeds": count, "verdicts": _words(found)} for count, found in looks.items()],
        "cost": _cost(facts),
        "hashes": {
            "code": begin["code"],
            "validation": facts.probe(INCUMBENT).get("validation_hash"),
            "items": _item_hashes(facts),
            "lineage": begin["lineage"],
            "incumbent": begin["incumbent"],
        },
        "environment": _environment(facts),
        "started": begin["time"],
        "finished": time.time(),
    }


def _words(verdicts: Mapping[str, Any]) -> dict[str, str]:
    return {name: found["verdict"] for name, found in verdicts.items()}


def _cost(facts: Facts) -> dict[str, Any]:
    runs = list(facts.ledger.under("trial").values())
    done = [run for run in runs if run["status"] == "done"]
    return {
        "seconds": time.time() - facts.ledger.get("begin")["time"],
        "runs": len(runs),
        **{
            shown: math.fsum(run[key] for run in done)
            for shown, key in {"run_seconds": "seconds", "compile_seconds": "compile_seconds", "flops": "flops"}.items()
        },
    }


def _item_hashes(facts: Facts) -> dict[str, str]:
    """Returns {task: what names its items and prompts}."""
    folder = next(iter(facts.folders(INCUMBENT).values()), None)
    if folder is None:
        return {}
    tasks = facts.probe(INCUMBENT)["scores"]
    return {task: measuring.measure(folder, measuring.metric_of(task)).hash for task in tasks}


def _environment(facts: Facts) -> dict[str, Any] | None:
    runs = facts.ledger.under("trial").values()
    return next((run["environment"] for run in runs if run["status"] == "done"), None)


def _contestant(facts: Facts, name: str, its: Verdict | None) -> dict[str, Any]:
    """Returns what is said of a contestant."""
    runs, config = facts.runs(name), facts.final_config(name)
    status, reason = _status(facts, name)
    return {
        "argument": facts.everybody[name].argument,
        "status": status,
        "reason": reason,
        "changes": facts.changes(name),
        "forecast": facts.forecast(name),
        "gate": facts.probe(name).get("gate", []),
        "learning_rate": config["optimizer.learning_rate"] if config else None,
        "rates": (facts.ledger.get(f"rate/{name}") or {}).get("rates"),
        "ratios": facts.ratios(name),
        "runs": [{"seed": seed, **run} for seed, run in runs.items()],
        "mean": _means([run["metrics"] for run in runs.values() if run["status"] == "done"]),
        "verdict": its.to_json() if its and status == "trained" else None,
        "others": {},
    }


def _status(facts: Facts, name: str) -> tuple[str, str | None]:
    """Returns the status of a contestant and the reason for it."""
    if name in (refusals := facts.refusals()):
        return "refused", refusals[name]
    if trouble := facts.trouble(name):
        return "failed", trouble
    if name in (pruned := facts.pruned()):
        return "pruned", f"left behind at step {pruned[name]}"
    return ("incumbent" if name == INCUMBENT else "trained"), None


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean over seeds of the metrics that all runs have."""
    shared = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    return {name: math.fsum(run[name] for run in runs) / len(runs) for name in shared}


def _add_others(facts: Facts, contestants: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    """Adds the verdicts on all other metrics that the runs have; they are shown, and decide nothing."""
    if not names:
        return
    known = contestants[INCUMBENT]["mean"]
    own = measuring.full_name(measuring.metric_of(facts.request.metric), known)
    for metric in map(measuring.metric_of, known):
        if metric.name.startswith("ema_") or metric.name == own:
            continue
        able = [name for name in names if _has_comparable(facts, name, metric)]
        for name, its in (judge_once(facts, able, metric, metric.default_min_effect) if able else {}).items():
            contestants[name]["others"][metric.name] = its.to_json()


def _has_comparable(facts: Facts, name: str, metric: measuring.Metric) -> bool:
    """Returns whether a contestant can be compared in a metric: losses of another tokenizer cannot."""
    try:
        measuring.evidence(facts.folders(INCUMBENT), facts.folders(name), metric)
    except UserError:
        return False
    return True


def judge_once(facts: Facts, names: Sequence[str], metric: measuring.Metric, min_effect: float) -> dict[str, Verdict]:
    """Returns verdicts from all seeds as if there had been one look, for what decides nothing."""
    count = max(1, len(facts.folders(INCUMBENT)))
    evidence = {name: measuring.evidence(facts.folders(INCUMBENT), facts.folders(name), metric) for name in names}
    look = verdict.Look(count, count, count)
    return verdict.judge(evidence, alpha=facts.request.alpha, min_effect=min_effect, look=look)


def _rungs(facts: Facts, verdicts: Mapping[str, Verdict], metric: measuring.Metric) -> dict[str, Any] | None:
    """Returns who was left behind where, and how often a look at the end says that this was wrong."""
    rungs = facts.ledger.under("rung")
    if not rungs:
        return None
    best = max((its.effect for its in verdicts.values()), default=-math.inf)
    pruned = facts.pruned()
    sound = [name for name in facts.audited() if facts.folders(name) and not facts.trouble(name)]
    found = judge_once(facts, sound, metric, facts.request.min_effect) if sound else {}
    audited = {
        name: {"pruned_at": pruned[name], "effect": its.effect, "would_have_won": its.effect > best}
        for name, its in found.items()
    }
    return {
        "steps": [rung["steps"] for rung in rungs.values()],
        "pruned": pruned,
        "audited": audited,
        "wrong": sum(row["would_have_won"] for row in audited.values()),
        "checked": len(audited),
    }


def command_of(request: Request) -> str:
    """Returns the command that asks for a sweep."""
    flags = {
        "--eval-task": request.eval_tasks,
        "--metric": request.metric,
        "--seeds": request.seeds,
        "--max-seeds": request.max_seeds,
        "--first-seed": request.first_seed,
        "--alpha": f"{request.alpha:g}",
        "--min-effect": f"{request.min_effect:g}",
        "--match": request.match,
        "--lr-bracket": request.lr_bracket,
        "--rungs": request.rungs,
        "--budget": "" if request.budget is None else f"{request.budget:g}s",
    }
    words = ["python", "-m", "foundry_jax.cli.sweep", *request.words, f"--config={request.config}"]
    words += [f"{flag}={value}" for flag, value in flags.items() if value not in ("", 0)]
    words += ["--stack"] * request.stack
    words += [f"--config.{override}" for override in request.overrides]
    return shlex.join(words)
