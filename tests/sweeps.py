"""A finished sweep as a folder, made up but with all that a real one may hold, for tests of what reads sweeps.

Every kind of contestant is in it: better, worse, equivalent, inconclusive, refused by the gate, impossible to build,
failed and pruned.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foundry_jax.runfolder import write_json_atomic
from foundry_jax.search.verdict import Estimate, Verdict

STEPS, EVERY, TOKENS_PER_STEP = 300, 25, 2048
BITS_PER_NAT = 0.4573  # bits per byte of one nat per token: 3.15 bytes a token
SEEDS = (0, 1, 2)
COMMAND = "python -m foundry_jax.cli.sweep attention=mla,gqa_1kv norm=layernorm qk_norm=rms --promote --jobs 2"


@dataclasses.dataclass(frozen=True)
class Made:
    """A contestant to make up. gain: by how many bits per byte it is better; the factors are to the incumbent's."""

    argument: str
    changes: Mapping[str, Sequence[Any]]
    status: str = "trained"
    verdict: str | None = None
    gain: float = 0.0
    params: float = 1.0
    flops: float = 1.0
    seconds: float = 1.0
    kv: float = 1.0
    reason: str | None = None

    @property
    def is_built(self) -> bool:
        """Whether there is a forecast and a gate: all but what cannot be one model."""
        return self.status == "incumbent" or bool(self.changes)


MADE = {
    "incumbent": Made("", {}, "incumbent"),
    "mla": Made(
        "attention=mla", {"model.attention": ["gqa", "mla"]}, "trained", "better", 0.031, 0.97, 1.08, 1.21, 0.5
    ),
    "layernorm": Made(
        "norm=layernorm", {"model.norm": ["rmsnorm", "layernorm"]}, "trained", "equivalent", 0.0006, 1, 1.01, 1.04
    ),
    "gqa_1kv": Made(
        "attention=gqa_1kv", {"model.num_kv_heads": [2, 1]}, "trained", "worse", -0.019, 0.94, 0.96, 0.95, 0.5
    ),
    "qk_norm": Made("qk_norm=rms", {"model.qk_norm": ["none", "rms"]}, "trained", "inconclusive", 0.008, seconds=1.03),
    "lr=3e-2": Made(
        "lr=3e-2",
        {"optimizer.learning_rate": [0.003, 0.03]},
        "failed",
        reason="no seed finished: 10 steps in a row up to step 84 were not finite (loss nan)",
    ),
    "sparse=topk": Made(
        "sparse=topk", {"model.sparse": ["none", "topk"]}, "refused", flops=0.91, reason="the gate refused: causality"
    ),
    "mla,window": Made(
        "attention=mla,sliding_window", {}, "refused", reason="model.attention=mla cannot have model.pattern=S"
    ),
    "pattern=SSSL": Made(
        "pattern=SSSL", {"model.pattern": ["L", "SSSL"]}, "pruned", None, -0.03, 1, 0.93, 0.97, 0.4,
        reason="left behind at step 100",
    ),
}  # fmt: skip


def write(folder: pathlib.Path, names: Sequence[str] = tuple(MADE), seeds: Sequence[int] = SEEDS) -> pathlib.Path:
    """Writes a sweep of some contestants, the incumbent first, and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = result(names, seeds)
    for name, contestant in found["contestants"].items():
        for run in contestant["runs"]:
            _write_run(folder / run["folder"], name, run)
    write_json_atomic(folder / "result.json", found, durable=False)
    return folder


def result(names: Sequence[str] = tuple(MADE), seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Returns what result.json holds."""
    contestants = {name: _contestant(name, seeds) for name in names}
    best = "mla" if "mla" in names and len(seeds) > 1 else None
    verdicts = {name: one["verdict"]["verdict"] for name, one in contestants.items() if one["verdict"]}
    return {
        "format": 1,
        "name": "attention-norm-lr",
        "command": COMMAND,
        "config": "configs/tiny.py",
        "overrides": ["num_steps=300"],
        "metric": {"name": "bits_per_byte", "unit": "bits per byte", "higher_is_better": False},
        "alpha": 0.05,
        "min_effect": 0.005,
        "match": "steps",
        "seeds": list(seeds),
        "max_seeds": max(8, len(seeds)),
        "incumbent": "incumbent",
        "contestants": contestants,
        "decision": {
            "promoted": best,
            "best": best,
            "why": "mla is better by 0.0318 [0.0228, 0.0408] bits per byte." if best else "Nobody is better.",
        },
        "rungs": _rungs() if "pattern=SSSL" in names else None,
        "looks": [{"seeds": len(seeds), "verdicts": verdicts}],
        "cost": {
            "seconds": 1412.0,
            "run_seconds": 1290.2,
            "runs": sum(len(one["runs"]) for one in contestants.values()),
            "flops": 1.31e14,
            "compile_seconds": 41.3,
        },
        "hashes": {"code": "4f2a" * 16, "validation": "9be1" * 16, "items": {"mmlu": "77c0" * 16}, "lineage": ""},
        "environment": {
            "versions": {"python": "3.11.9", "foundry-jax": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6"},
            "git_commit": "fff39ae0c2f2d2a1b0e9c8d7f6a5b4c3d2e1f001",
            "device": "cpu",
            "num_devices": 1,
            "num_processes": 1,
            "sharding": "none",
        },
        "started": 1764460000.0,
        "finished": 1764461412.0,
    }


def _rungs() -> dict[str, Any]:
    audited = {"pattern=SSSL": {"pruned_at": 100, "effect": -0.03, "would_have_won": False}}
    return {"steps": [100, 200], "pruned": {"pattern=SSSL": 100}, "audited": audited, "wrong": 0, "checked": 1}


def _contestant(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    made = MADE[name]
    effect = float(np.mean([_curve("incumbent", seed)[-1] - _curve(name, seed)[-1] for seed in seeds]))
    runs = [] if made.status == "refused" else [_run(name, seed) for seed in seeds]
    done = [run["metrics"] for run in runs if run["status"] == "done"]
    ratios = {"steps": 1.0, "tokens": 1.0, "flops": made.flops, "params": made.params, "seconds": made.seconds}
    rates = {"0.0015": 4.74, "0.003": 4.63, "0.006": 4.66}
    return {
        "argument": made.argument,
        "status": made.status,
        "reason": made.reason,
        "changes": dict(made.changes),
        "forecast": _forecast(made) if made.is_built else None,
        "gate": _gate(name) if made.is_built else [],
        "learning_rate": 0.03 if name == "lr=3e-2" else 0.003,
        "rates": {rate: loss - 2 * effect for rate, loss in rates.items()} if name in ("incumbent", "mla") else None,
        "ratios": ratios if made.is_built else None,
        "runs": runs,
        "mean": {metric: float(np.mean([one[metric] for one in done])) for metric in done[0]} if done else {},
        "verdict": _verdict(made.verdict, effect, len(seeds)) if made.verdict else None,
        "others": {"mmlu/accuracy": _verdict("inconclusive", effect / 10, len(seeds))} if made.verdict else {},
    }


def _forecast(made: Made) -> dict[str, float]:
    params, per_token = int(1_049_728 * made.params), 5.1e6 * made.flops
    return {
        "params": params,
        "active_params": params,
        "trained_params": params,
        "flops_per_token": per_token,
        "kv_bytes_per_token": 1024 * made.kv,
        "memory_bytes": int(1.9e8 * made.params),
        "step_seconds": 0.21 * made.seconds,
        "compile_seconds": 6.6,
        "run_seconds": 71 * made.seconds,
        "tokens": STEPS * TOKENS_PER_STEP,
        "flops": per_token * STEPS * TOKENS_PER_STEP,
        "steps": STEPS,
    }


def _gate(name: str) -> list[dict[str, Any]]:
    evidence = {
        "causality": "changing tokens from 40 on changed no earlier logit",
        "decode": "largest difference 2.1e-06",
        "packing": "no logit changed with the other document",
        "gradients": "all 38 finite, norm 2.41",
    }
    checks = [{"name": one, "passed": True, "evidence": text, "seconds": 0.4} for one, text in evidence.items()]
    if name == "sparse=topk":
        checks[0] |= {
            "passed": False,
            "evidence": "changing token 41 changed the logits of tokens 3, 7, 12 by up to 0.83",
        }
    return checks


def _run(name: str, seed: int) -> dict[str, Any]:
    made = MADE[name]
    status = {"failed": "failed", "pruned": "pruned"}.get(made.status, "done")
    step = {"failed": 75, "pruned": 100}.get(status, STEPS)
    bits = float(_curve(name, seed)[step // EVERY - 1])
    accuracy = 0.25 + made.gain / 10 + 0.002 * seed
    return {
        "seed": seed,
        "folder": f"runs/{name.replace('=', '-').replace(',', '-')}/seed-{seed}",
        "status": status,
        "reason": {"failed": "10 steps in a row were not finite", "pruned": "pruned at step 100"}.get(status),
        "metrics": {"bits_per_byte": bits, "loss": bits / BITS_PER_NAT, "mmlu/accuracy": accuracy}
        if status == "done"
        else {},
        "seconds": 70.1 * made.seconds * step / STEPS + seed,
        "tokens": step * TOKENS_PER_STEP,
        "step": step,
    }


def _curve(name: str, seed: int) -> np.ndarray:
    """Returns bits per byte at every evaluation. Seeds move all contestants alike, and each a little by itself."""
    steps = np.arange(EVERY, STEPS + 1, EVERY)
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, *name.encode()])
    base = 2.02 + 2.4 * np.exp(-steps / 60) + 0.5 * np.exp(-steps / 180)
    noise = 0.012 * shared.standard_normal() + 0.003 * own.standard_normal(len(steps))
    return base + noise - MADE[name].gain * (1 - np.exp(-steps / 80))


def _verdict(verdict: str, effect: float, num_seeds: int) -> dict[str, Any]:
    """Returns a verdict as a sweep writes it; one seed has no interval and decides nothing."""
    half = {"better": 0.009, "worse": 0.008, "equivalent": 0.003, "inconclusive": 0.012}[verdict]
    p = {"better": 0.0021, "worse": 0.0062, "equivalent": 0.61, "inconclusive": 0.14}[verdict]
    units = Estimate(effect, (effect - 0.4 * half, effect + 0.4 * half), p / 10, 212)
    if num_seeds < 2:
        seeds, why = Estimate(effect, None, None, num_seeds), "one seed proves nothing"
        return Verdict("inconclusive", effect, None, None, None, seeds, units, 0.0125, why).to_json()
    interval = (effect - half, effect + half)
    seeds, why = Estimate(effect, interval, p, num_seeds), f"{effect:+.4f} bits per byte, at least 0.005 needed"
    return Verdict(verdict, effect, interval, p, 0.2, seeds, units, 0.0125, why).to_json()


def _write_run(folder: pathlib.Path, name: str, run: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": 1, "kind": "train", "loss": 7.6}]
    for index, bits in enumerate(_curve(name, run["seed"])[: run["step"] // EVERY]):
        losses = {"bits_per_byte": bits, "loss": bits / BITS_PER_NAT, "ema_loss": bits / BITS_PER_NAT + 0.01}
        rows.append({"step": (index + 1) * EVERY, "kind": "eval", **losses})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {key: new for key, (_, new) in MADE[name].changes.items()}
    (folder / "config.json").write_text(json.dumps({"seed": run["seed"], "num_steps": STEPS} | changed))
