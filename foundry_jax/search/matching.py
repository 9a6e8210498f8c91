"""What makes a comparison fair: the contestant's run is brought to as much of one thing as the incumbent's has.

Steps, tokens, FLOPs and seconds are matched by the number of steps, parameters by the width of the MLP. What was not
matched differs, and is reported as a ratio. Imports no JAX: the number of parameters comes from a function handed in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from foundry_jax.config import Config
from foundry_jax.registry import lookup
from foundry_jax.schema import require

MATCHES = {
    "steps": "as many optimizer steps",
    "tokens": "as many training tokens",
    "flops": "as many training FLOPs",
    "params": "as many parameters, by way of model.mlp_dim, and as many steps",
    "seconds": "as long on this machine, validation aside",
}
WIDE = 64  # from this width on, MLPs keep to multiples of 8, at which matrix products of accelerators are fast
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run costs. seconds_per_step is None where no step was timed."""

    params: int
    steps: int
    tokens_per_step: int
    flops_per_token: float  # of training
    seconds_per_step: float | None

    @classmethod
    def of(cls, forecast: Mapping[str, Any]) -> "Cost":
        """Returns the cost that a forecast of a contestant (search/looking.py) speaks of."""
        return cls(
            params=forecast["params"],
            steps=forecast["steps"],
            tokens_per_step=forecast["tokens_per_step"],
            flops_per_token=forecast["flops_per_token"],
            seconds_per_step=forecast["step_seconds"],
        )

    @property
    def of_a_step(self) -> dict[str, float | None]:
        """How much of each thing that steps add up takes one of them."""
        flops = self.tokens_per_step * self.flops_per_token
        return {"steps": 1, "tokens": self.tokens_per_step, "flops": flops, "seconds": self.seconds_per_step}


def match(
    incumbent: Cost,
    contestant: Cost,
    config: Config,
    by: str,
    *,
    num_params: Callable[[Config], int] | None = None,
) -> Config:
    """Returns the contestant's config with as much as the incumbent has, up to half a step or one width.

    Args:
        contestant: the cost of config as it is.
        by: one of MATCHES.
        num_params: for "params": config -> its number of parameters.

    Raises:
        UserError: an unknown `by`; the contestant was made to differ in what would be matched; seconds were not
            measured; or no width of the MLP has as many parameters.
    """
    lookup(MATCHES, by, "--match")
    require(
        config.num_steps == incumbent.steps,
        f"num_steps={config.num_steps}, while the incumbent has {incumbent.steps}: matching would undo what this "
        f"contestant changes; leave the steps alone, or compare finished runs with cli.compare.",
    )
    if by == "params":
        assert num_params is not None, "matching by params needs to know how many a config has"
        return with_params(config, incumbent.params, num_params)
    have, want = contestant.of_a_step[by], incumbent.of_a_step[by]
    require(bool(have and want), f"--match={by} needs the {by} of both, and they were not measured; use --match=flops.")
    return stretched(config, max(1, round(incumbent.steps * want / have)))


def stretched(config: Config, steps: int) -> Config:
    """Returns the config with this many steps; what is counted in steps keeps its share of them.

    That is the warm-up, and how often the run is evaluated and saved; not how often it is logged.
    """

    def part(count: int) -> int:
        return max(1, round(count * steps / config.num_steps)) if count else 0

    return dataclasses.replace(
        config,
        num_steps=steps,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=part(config.optimizer.warmup_steps)),
        eval=dataclasses.replace(config.eval, every=part(config.eval.every)),
        checkpoint=dataclasses.replace(config.checkpoint, every=part(config.checkpoint.every)),
    )


def with_params(config: Config, params: int, num_params: Callable[[Config], int]) -> Config:
    """Returns the config with the model.mlp_dim that brings its parameters, of the whole model, nearest to `params`.

    Raises:
        UserError: even the narrowest MLP has too many, or the width does not matter; or the run starts from a model
            whose widths are given.
    """
    require(
        not config.init.source,
        f"--match=params changes model.mlp_dim, but init.source={config.init.source!r} has the width that it has; "
        f"use --match=flops.",
    )
    multiple = MULTIPLE if config.model.mlp_dim >= WIDE else 1
    count = lambda unit: num_params(_with_width(config, unit * multiple))  # noqa: E731
    require(
        count(1) < count(1024),
        f"--match=params changes model.mlp_dim, but with model.moe={config.model.moe} the parameters do not depend on "
        f"it; leave out expert_dim, or use --match=flops.",
    )
    require(
        count(1) <= params,
        f"--match=params: with model.mlp_dim={multiple} there still are {count(1):,} parameters, the incumbent has "
        f"{params:,}; make this contestant smaller, or use --match=flops.",
    )
    low, high = 1, 2
    while count(high) <= params:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= params else (low, middle)
    nearest = min((low, high), key=lambda unit: abs(count(unit) - params))
    kept = abs(num_params(config) - params) <= abs(count(nearest) - params)
    return config if kept else _with_width(config, nearest * multiple)


def report(incumbent: Cost, contestant: Cost) -> dict[str, float | None]:
    """Returns the contestant's share of the incumbent's steps, tokens, FLOPs, parameters and seconds, of whole runs.

    None where there are no seconds.
    """
    ratios: dict[str, float | None] = {"params": contestant.params / incumbent.params}
    for name, want in incumbent.of_a_step.items():
        have = contestant.of_a_step[name]
        ratios[name] = contestant.steps * have / (incumbent.steps * want) if have and want else None
    return {name: ratios[name] for name in ("steps", "tokens", "flops", "params", "seconds")}


def _with_width(config: Config, width: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=width))
