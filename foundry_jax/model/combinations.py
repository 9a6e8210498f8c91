"""REFUSALS: pairs of variants that cannot be one model, and why."""

import dataclasses

from foundry_jax.model.config import ModelConfig
from foundry_jax.schema import require


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Two settings that exclude each other. "!none" stands for every value but "none"; numbers do not count."""

    first: tuple[str, str]  # (field of ModelConfig, value)
    second: tuple[str, str]
    reason: str
    advice: str

    def applies(self, config: ModelConfig) -> bool:
        """Returns whether the config has both settings."""
        return _has(config, *self.first) and _has(config, *self.second)


REFUSALS = (
    Refusal(
        ("attention", "mla"), ("qk_norm", "!none"),
        "multi-head latent attention norms its latents, and decoding from them never makes the keys to norm",
        "model.qk_norm=none",
    ),
    Refusal(
        ("attention", "mla"), ("bias", "!none"),
        "multi-head latent attention has no biases: decoding absorbs its up-projections, which must be linear",
        "model.bias=none",
    ),
    Refusal(
        ("moe", "!none"), ("bias", "all"),
        "experts have no biases",
        "model.bias=attention",
    ),
    Refusal(
        ("position", "alibi"), ("rope_scaling", "!none"),
        "ALiBi has no rotary frequencies to scale, and reaches longer text as it is",
        "model.rope_scaling=none",
    ),
    Refusal(
        ("position", "learned"), ("rope_scaling", "!none"),
        "learned positions have no rotary frequencies to scale",
        "model.rope_scaling=none",
    ),
    Refusal(
        ("position", "none"), ("rope_scaling", "!none"),
        "without positions there are no rotary frequencies to scale",
        "model.rope_scaling=none",
    ),
)  # fmt: skip


def check(config: ModelConfig) -> None:
    """Raises UserError if the config combines what cannot be one model; names both settings and the reason."""
    for refusal in REFUSALS:
        given = " with ".join(f"model.{name}={getattr(config, name)}" for name, _ in (refusal.first, refusal.second))
        require(not refusal.applies(config), f"{given} is refused: {refusal.reason}; use {refusal.advice}.")


def _has(config: ModelConfig, field: str, value: str) -> bool:
    name = getattr(config, field).partition("(")[0].strip()
    return name != "none" if value == "!none" else name == value
