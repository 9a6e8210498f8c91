"""From a config file, its argument and overrides to one frozen, validated Config.

A config file defines get_config(arg) -> ml_collections.ConfigDict with every key of the dataclasses below.
The ConfigDict is what users, mutations and overrides edit; the library reads only the dataclasses.
"""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from foundry_jax.errors import UserError
from foundry_jax.model.config import ModelConfig, scale_of
from foundry_jax.registry import lookup, unknown
from foundry_jax.schema import build, calls, coerce, require, require_range, variant

SCHEDULES = {
    "cosine": "half a cosine from the peak to the minimum",
    "linear": "a straight line from the peak to the minimum",
    "wsd": "warm-up, stable, linear decay over the last decay_fraction of the steps",
    "constant": "the peak rate after warm-up",
}
OPTIMIZERS = {
    "adamw": "Adam with decoupled weight decay",
    "lion": "the sign of an interpolated momentum; wants a smaller rate",
}
TOKEN_LOSSES = {
    "cross_entropy": "-log p of each token, with label smoothing and z-loss if asked for",
    "focal": "cross-entropy that weighs a token the less the better it is predicted; Lin et al. 2017, 1708.02002",
}
PAIR_LOSSES = {
    "dpo": "direct preference optimization on pairs of completions; Rafailov et al. 2023, 2305.18290",
    "ipo": "preference optimization towards a fixed margin per token; Azar et al. 2023, 2310.12036",
}
LOSSES = TOKEN_LOSSES | PAIR_LOSSES
# Which losses have which numbers; each is 0 for the others.
LOSS_NUMBERS = {"label_smoothing": ("cross_entropy", "dpo"), "z_loss": ("cross_entropy", "focal")}
STRATEGIES = ("auto", "none", "ddp", "fsdp")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What the parameters are at step 0: a source's (zoo.open_source), or random, by the seed, if there is none."""

    source: str
    fresh: bool

    def __post_init__(self):
        require(bool(self.source) or not self.fresh, "init.fresh=true has no meaning without an init.source.")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters, trained instead of the parameters if rank > 0. All but rank and targets is traced."""

    rank: int
    alpha: float
    dropout: float
    targets: str
    rslora: bool

    def __post_init__(self):
        require_range(self, "lora.", rank=(0, math.inf), alpha=(0, math.inf), dropout=(0, 0.999))
        require(self.rank > 0 or self.dropout == 0, f"lora.dropout={self.dropout:g} has no meaning with lora.rank=0.")

    @property
    def scale(self) -> float:
        """The weight of the adapters; 0 if there are none."""
        return scale_of(self.rank, self.alpha, rslora=self.rslora) if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are batched."""

    source: str
    path: str
    tokenizer: str
    vocab_size: int
    validation: str
    filters: str
    format: str
    packing: str
    curriculum: str
    batch_size: int
    preferences: str
    cache_dir: str

    def __post_init__(self):
        require_range(self, "data.", vocab_size=(257, 2**31 - 1), batch_size=(1, math.inf))
        from foundry_jax.data import settings  # imports numpy and tokenizers, which --help does without

        settings.check(self)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """The numbers of the schedule wsd: the share of the steps spent decaying."""

    decay_fraction: float = 0.2

    def __post_init__(self):
        require_range(self, "optimizer.schedule=wsd: ", decay_fraction=(0, 1))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule. Every number but accumulation_steps is a traced input of the compiled step."""

    name: str
    learning_rate: float
    min_learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    decay_embeddings: bool
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    ema_decay: float
    accumulation_steps: int

    def __post_init__(self):
        inf = math.inf
        require_range(
            self, "optimizer.", learning_rate=(0, 1e3), min_learning_rate=(0, 1e3), warmup_steps=(0, inf),
            weight_decay=(0, inf), beta1=(0, 0.99999999), beta2=(0, 0.99999999), epsilon=(0, 1), clip_norm=(0, inf),
            ema_decay=(0, 0.99999999), accumulation_steps=(1, inf))  # fmt: skip
        lookup(SCHEDULES, self.schedule_name, "optimizer.schedule")
        lookup(OPTIMIZERS, self.name, "optimizer.name")
        self.schedule_numbers()

    @property
    def schedule_name(self) -> str:
        """The schedule without its numbers."""
        return self.schedule.partition("(")[0].strip()

    def schedule_numbers(self) -> WarmupStableDecay | None:
        """Returns the numbers of the schedule, None if it has none.

        Raises:
            UserError: a number that it does not have, or one out of range.
        """
        table = dict.fromkeys(SCHEDULES) | {"wsd": WarmupStableDecay}
        return variant(self.schedule, table, "optimizer.schedule")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training loss, its numbers traced. Validation is always plain cross-entropy."""

    name: str
    label_smoothing: float
    z_loss: float
    focal_gamma: float
    dpo_beta: float

    def __post_init__(self):
        inf = math.inf
        require_range(
            self, "loss.", label_smoothing=(0, 0.999), z_loss=(0, inf), focal_gamma=(0, inf), dpo_beta=(1e-6, inf)
        )
        lookup(LOSSES, self.name, "loss.name")
        for number, names in LOSS_NUMBERS.items():
            value = getattr(self, number)
            require(
                self.name in names or value == 0,
                f"{self.name} has no {number.replace('_', ' ')}: set loss.{number} to 0, not {value:g}, or loss.name "
                f"to {' or '.join(names)}.",
            )
        require(
            self.name != "dpo" or self.label_smoothing < 0.5,
            f"loss.label_smoothing={self.label_smoothing:g} must be less than 0.5 with loss.name=dpo: it is the share "
            f"of pairs that are taken to be the wrong way round.",
        )


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How parameters and batches are laid out over devices; a zero axis size is chosen by the planner."""

    strategy: str
    fsdp_min_params: float
    data: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        require(
            self.strategy in STRATEGIES,
            f"sharding.strategy={self.strategy!r} must be one of {', '.join(STRATEGIES)}.",
        )
        require_range(
            self,
            "sharding.",
            fsdp_min_params=(0, math.inf),
            data=(0, math.inf),
            fsdp=(0, math.inf),
            tensor=(0, math.inf),
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how many to keep; every counts steps."""

    every: int
    keep_latest: int
    keep_best: int

    def __post_init__(self):
        require_range(self, "checkpoint.", every=(1, math.inf), keep_latest=(1, math.inf), keep_best=(0, math.inf))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate on the whole validation set; every counts steps, batch_size sequences.

    tasks: evaluation tasks for the parameters that are being trained; see tasks/in_loop.py.
    """

    every: int
    batch_size: int
    tasks: str

    def __post_init__(self):
        require_range(self, "eval.", every=(1, math.inf), batch_size=(1, math.inf))
        calls(self.tasks, "eval.tasks")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often metrics are written, in steps, and to which trackers besides metrics.jsonl (comma separated)."""

    every: int
    trackers: str

    def __post_init__(self):
        require_range(self, "log.", every=(1, math.inf))


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What to do about non-finite steps: skip each, roll back after max_skips in a row, give up after max_rollbacks."""

    max_skips: int
    max_rollbacks: int

    def __post_init__(self):
        require_range(self, "guard.", max_skips=(1, math.inf), max_rollbacks=(0, math.inf))


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    name: str
    seed: int
    num_steps: int
    model: ModelConfig
    init: InitConfig
    lora: LoRAConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    sharding: ShardingConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    log: LogConfig
    guard: GuardConfig

    def __post_init__(self):
        require_range(self, "", seed=(0, 2**31 - 1), num_steps=(1, 2**31 - 1))
        require(
            self.data.batch_size % self.optimizer.accumulation_steps == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of "
            f"optimizer.accumulation_steps={self.optimizer.accumulation_steps}.",
        )
        pairs, path = self.loss.name in PAIR_LOSSES, self.data.preferences
        require(
            bool(path) or not pairs,
            f"loss.name={self.loss.name} learns from pairs of completions: set data.preferences to a JSONL file with "
            f"the fields prompt, chosen and rejected, or loss.name to {' or '.join(TOKEN_LOSSES)}.",
        )
        require(
            pairs or not path,
            f"data.preferences={path!r} is not used by loss.name={self.loss.name}: set loss.name to "
            f"{' or '.join(PAIR_LOSSES)}, or data.preferences to nothing.",
        )
        for key, plain in {"packing": "stream", "curriculum": "none", "filters": ""}.items() if pairs else ():
            value = getattr(self.data, key)
            require(
                value == plain,
                f"data.{key}={value!r} has no meaning with loss.name={self.loss.name}, which reads pairs as they are: "
                f"set it to {plain!r}.",
            )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of a training batch: (sequences, tokens), or (pairs, 2, tokens): chosen and rejected."""
        rows = (self.data.batch_size, 2) if self.loss.name in PAIR_LOSSES else (self.data.batch_size,)
        return (*rows, self.model.context_length)


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the Config of "path/to/file.py[:argument]" with "dotted.key=value" overrides applied.

    Raises:
        UserError: no such file, unknown key or variant, wrong type, or a value out of range.
    """
    return build(Config, load_dict(spec, overrides))


def load_dict(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the ConfigDict of "path/to/file.py[:argument]" with overrides applied, not yet validated."""
    path, _, argument = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"No config file {path!r}; try --config=configs/tiny.py or configs/baseline.py:mla.")
    module_spec = importlib.util.spec_from_file_location(f"_config_{pathlib.Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} must define get_config(arg: str = ''); see configs/forkme.py.")
    config = module.get_config(argument)
    return set_values(config, dict(_split_override(text) for text in overrides))


def set_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of config with dotted keys set, each coerced to the type of the value it replaces.

    Raises:
        UserError: an unknown key (with the nearest one) or a wrong type.
    """
    config = config.copy_and_resolve_references()
    for dotted, value in values.items():
        *sections, name = dotted.split(".")
        node, prefix = config, ""
        for section in sections:
            _require_key(node, section, prefix)
            node, prefix = node[section], f"{prefix}{section}."
            require(isinstance(node, ConfigDict), f"{prefix[:-1]} is a value, not a section: {dotted!r} names no key.")
        _require_key(node, name, prefix)
        require(not isinstance(node[name], ConfigDict), f"{dotted} is a section; set one of its keys.")
        node[name] = coerce(value, type(node[name]), dotted)
    return config


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Returns {dotted key: value} of a Config, in order."""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def from_flat_dict(flat: Mapping[str, Any]) -> Config:
    """Returns the Config of {dotted key: value}.

    Raises:
        UserError: as in load.
    """
    values: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        if section:
            values.setdefault(section, {})[key] = value
        else:
            values[key] = value
    return build(Config, values)


def _require_key(node: ConfigDict, name: str, prefix: str) -> None:
    if name not in node:
        raise UserError(unknown(f"{prefix}{name}", [f"{prefix}{key}" for key in node.keys()], "config key"))


def _split_override(text: str) -> tuple[str, str]:
    dotted, equals, value = text.partition("=")
    require(bool(equals), f"Override {text!r} must look like optimizer.learning_rate=3e-4.")
    return dotted, value
