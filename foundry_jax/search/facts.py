"""What the ledger of a sweep says, put as questions: who can be trained, with what config, what became of it."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from foundry_jax.config import Config, from_flat_dict, to_flat_dict
from foundry_jax.search import matching, space
from foundry_jax.search.ledger import Ledger
from foundry_jax.search.request import Request
from foundry_jax.search.space import INCUMBENT, Contestant
from foundry_jax.search.trials import Trial

AUDITED = 10  # one pruned contestant in so many is trained to the end, and at least one


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of one sweep so far; path is its folder, everybody who takes part by name."""

    request: Request
    path: pathlib.Path
    ledger: Ledger
    everybody: Mapping[str, Contestant]

    def probe(self, name: str) -> dict[str, Any]:
        """Returns what was found out about a contestant before training; {} if nothing was."""
        return self.ledger.get(f"probe/{name}") or {}

    def able(self) -> list[str]:
        """Returns who can be trained."""
        return [name for name in self.everybody if self.probe(name).get("status") == "ok"]

    def refusals(self) -> dict[str, str]:
        """Returns {contestant: why it cannot be trained}."""
        found = {name: one.refusal for name, one in self.everybody.items() if one.refusal}
        reasons = {name: self.probe(name).get("reason") for name in self.everybody}
        return found | {name: reason for name, reason in reasons.items() if reason}

    def config_of(self, name: str) -> Config:
        """Returns the config of a contestant before rates, matching and budget."""
        return from_flat_dict(self.probe(name)["config"])

    def planned(self, *, whole: bool = False) -> dict[str, Config]:
        """Returns the configs of those that are trained; with whole=True before the budget takes its share."""
        found = {name: self.ledger.get(f"plan/{name}") for name in self.able()}
        configs = {name: from_flat_dict(flat) for name, flat in found.items() if flat}
        share = 1.0 if whole else self.ledger.get("budget")["share"]
        if share == 1.0:
            return configs
        steps = {name: max(1, round(share * config.num_steps)) for name, config in configs.items()}
        return {name: matching.stretched(config, steps[name]) for name, config in configs.items()}

    def seeds(self) -> list[int]:
        """Returns the seeds of the first look."""
        return [self.request.first_seed + i for i in range(self.ledger.get("budget")["seeds"])]

    def trial(self, name: str, seed: int) -> Trial:
        """Returns the run of a contestant with a seed."""
        key = f"runs/{space.slug(name)}/seed-{seed}"
        config = dataclasses.replace(self.planned()[name], seed=seed, name=name)
        return Trial(key, self.path / key, config, self.probe(name)["program"])

    def runs(self, name: str) -> dict[int, dict[str, Any]]:
        """Returns {seed: what the run came to} of a contestant, by seed."""
        found = self.ledger.under(f"trial/runs/{space.slug(name)}")
        return dict(sorted((int(key.removeprefix("seed-")), fact) for key, fact in found.items()))

    def folders(self, name: str) -> dict[int, pathlib.Path]:
        """Returns {seed: run folder} of a contestant's finished runs."""
        done = {seed: fact for seed, fact in self.runs(name).items() if fact["status"] == "done"}
        return {seed: self.path / fact["folder"] for seed, fact in done.items()}

    def trouble(self, name: str) -> str | None:
        """Returns why not every run of a contestant ended well: its other seeds then prove nothing in its favour."""
        if name in self.able() and f"plan/{name}" in self.ledger and self.ledger.get(f"plan/{name}") is None:
            return "no learning rate of the bracket works for it"
        runs = self.runs(name).items()
        return "; ".join(f"seed {seed}: {fact['reason']}" for seed, fact in runs if fact["status"] != "done") or None

    def pruned(self) -> dict[str, int]:
        """Returns {contestant: the step at which it was left behind}."""
        return {name: rung["steps"] for rung in self.ledger.under("rung").values() for name in rung["pruned"]}

    def audited(self) -> list[str]:
        """Returns the pruned contestants that are trained to the end all the same, chosen by a hash of their names."""
        order = sorted(self.pruned(), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        return order[: math.ceil(len(order) / AUDITED)]

    def final_config(self, name: str) -> dict[str, Any] | None:
        """Returns the flat config that a contestant is trained with, as far as that is settled; None if refused."""
        if "budget" in self.ledger and name in (planned := self.planned()):
            return to_flat_dict(planned[name])
        return self.probe(name).get("config")

    def changes(self, name: str) -> dict[str, list[Any]]:
        """Returns {key: [the incumbent's value, the contestant's]}."""
        old, new = self.final_config(INCUMBENT), self.final_config(name)
        if not old or not new:
            return {}
        return {key: [old[key], new[key]] for key in old if old[key] != new[key] and key != "name"}

    def forecast(self, name: str) -> dict[str, Any] | None:
        """Returns what a run costs with the steps that the contestant is trained for; None if that is not known."""
        found, config = self.probe(name).get("forecast"), self.final_config(name)
        if not found or not config:
            return None
        factor = config["num_steps"] / found["steps"]
        scaled = {key: found[key] * factor for key in ("run_seconds", "tokens", "flops")}
        return found | scaled | {"steps": config["num_steps"]}

    def ratios(self, name: str) -> dict[str, float | None] | None:
        """Returns how many times the incumbent's steps, tokens, FLOPs, parameters and seconds a contestant has."""
        forecasts = self.forecast(INCUMBENT), self.forecast(name)
        return matching.report(*map(matching.Cost.of, forecasts)) if all(forecasts) else None
