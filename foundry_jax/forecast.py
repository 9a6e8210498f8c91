"""What a config would do on a number of devices, said without training it."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

from foundry_jax import compilation, sharding
from foundry_jax.config import Config
from foundry_jax.model import lora, transformer
from foundry_jax.optimizer import NUM_MOMENTS
from foundry_jax.sharding import Plan
from foundry_jax.train_step import Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class ParamRow:
    """Where one parameter goes."""

    name: str
    shape: tuple[int, ...]
    spec: str
    bytes_per_device: int


def plan_of(config: Config, num_devices: int) -> Plan:
    """Returns the planner's decision for a config whose model.vocab_size is known.

    Raises:
        UserError: a variant or a mesh that does not fit.
    """
    transformer.check(config.model)
    return sharding.plan(transformer.num_params(config.model), num_devices, config.sharding)


def num_trained_params(config: Config) -> int:
    """Returns how many parameters are trained: all of the model's, or those of the adapters.

    Raises:
        UserError: lora.targets names no linear map.
    """
    if not config.lora.rank:
        return transformer.num_params(config.model)
    return lora.num_params(config.model, config.lora.rank, config.lora.targets)


def train_flops_per_token(config: Config) -> float:
    """Returns the FLOPs of a training step for one token: forward, backward, and gradients of what is trained."""
    forward = transformer.flops_per_token(config.model)
    return 2 * forward + 6 * num_trained_params(config) if config.lora.rank else 3 * forward


def param_table(config: Config, plan: Plan) -> list[ParamRow]:
    """Returns one row a parameter, without building any; needs as many (virtual) devices as the plan.

    Adapters come after the parameters that they are added to, as "lora/block_0/attention/query/a".
    """
    inputs = compilation.abstract_inputs(Program.of(config), plan, (1, 1))
    table = inputs.base | {"lora": inputs.state.params} if config.lora.rank else inputs.state.params
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(table):
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        name = "/".join(key.key for key in path)
        rows.append(ParamRow(name, leaf.shape, str(leaf.sharding.spec).removeprefix("PartitionSpec"), local))
    return rows


def memory(config: Config, plan: Plan) -> sharding.MemoryEstimate:
    """Returns the estimated bytes per device of one training step."""
    micro_batch = math.prod(config.batch_shape[:-1]) // config.optimizer.accumulation_steps
    return sharding.estimate_memory(
        config.model,
        num_trained_params(config),
        plan,
        micro_batch,
        optimizer_slots=NUM_MOMENTS[config.optimizer.name],
        num_frozen=transformer.num_params(config.model) if config.lora.rank else 0,
    )


def strategies_that_fit(config: Config, num_devices: int, device_bytes: int) -> dict[str, int]:
    """Returns {strategy: estimated bytes per device} of the strategies that stay within device_bytes."""
    fitting = {}
    for strategy in ("ddp", "fsdp") if num_devices > 1 else ("none",):
        layout = dataclasses.replace(config.sharding, strategy=strategy, data=0, fsdp=0)
        candidate = dataclasses.replace(config, sharding=layout)
        total = memory(candidate, plan_of(candidate, num_devices)).total
        if total <= device_bytes:
            fitting[strategy] = total
    return fitting


def compiled_step(config: Config, plan: Plan) -> dict[str, Any]:
    """Returns the collectives of the compiled training step and the bytes per device that XLA sets aside."""
    with plan.context():
        compiled = compilation.compile_train_step(Program.of(config), plan, config.batch_shape)
    found = re.findall(rf"= \S+ ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    planned = compiled.memory_analysis()
    return {
        "backend": jax.default_backend(),
        "collectives": dict(collections.Counter(found)),
        "argument_bytes": planned.argument_size_in_bytes,
        "temporary_bytes": planned.temp_size_in_bytes,
    }
