"""The one place that knows meshes: which strategy, why, and where every parameter goes.

`plan` is a pure function of numbers. The model names logical axes; RULES below maps them to the mesh axes
data (batches), fsdp (batches and parameters) and tensor (heads, mlp, vocabulary).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from foundry_jax.config import ShardingConfig
from foundry_jax.errors import UserError
from foundry_jax.losses import num_chunks
from foundry_jax.model import transformer
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.registry import unknown
from foundry_jax.schema import require

MESH_AXES = ("data", "fsdp", "tensor")

PARAM_RULES = {
    "vocab": "tensor",
    "position": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "qk_norm": None,
    "experts": None,
    "mlp": "tensor",
    "q_lora": "fsdp",
    "kv_lora": "fsdp",
    "lora": None,
    "layers": None,
}
ACTIVATION_RULES = {
    "activation_batch": ("data", "fsdp"),
    "activation_length": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A decision: the strategy, the size of each mesh axis, and the reason in words."""

    strategy: str  # none, ddp or fsdp
    data: int
    fsdp: int
    tensor: int
    reason: str

    @property
    def num_devices(self) -> int:
        """How many devices the mesh covers."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is cut."""
        return self.data * self.fsdp

    def axis_sizes(self) -> dict[str, int]:
        """Returns {mesh axis: size}."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def mesh(self) -> Mesh:
        """Returns the mesh over the first num_devices devices, neighbours on the tensor axis."""
        devices = np.asarray(jax.devices()[: self.num_devices]).reshape(self.data, self.fsdp, self.tensor)
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Makes the model's logical axis names mean this plan's mesh; on one device they mean nothing.

        jax.set_mesh, not `with mesh:`: under the latter Linen's logical constraints are silent no-ops.
        """
        if self.num_devices == 1:
            yield
            return
        rules = tuple((PARAM_RULES | ACTIVATION_RULES).items())
        with jax.set_mesh(self.mesh()), nn.logical_axis_rules(rules):
            yield

    def batch_sharding(self) -> NamedSharding:
        """Returns the sharding of a batch array [B, ...]."""
        return NamedSharding(self.mesh(), PartitionSpec(("data", "fsdp")))

    def param_spec(self, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
        """Returns where a parameter of this shape and these logical axes goes.

        An axis that a mesh axis does not divide is not cut. If that leaves a parameter whole on the fsdp axis, its
        largest other divisible axis is cut instead, so that every device really holds 1/fsdp of it.

        Raises:
            UserError: a logical name without a rule.
        """
        sizes = self.axis_sizes()
        spec: list[str | None] = [None] * len(shape)
        for i, name in enumerate(names):
            if name is not None and name not in PARAM_RULES:
                raise UserError(unknown(name, PARAM_RULES, "logical axis"))
            axis = PARAM_RULES[name] if name else None
            if axis and axis not in spec and sizes[axis] > 1 and shape[i] % sizes[axis] == 0:
                spec[i] = axis
        if self.fsdp > 1 and "fsdp" not in spec:
            free = [i for i in range(len(shape)) if spec[i] is None and shape[i] % self.fsdp == 0]
            if free:
                spec[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*spec)

    def specs(self, abstract_boxed: Any) -> Any:
        """Returns a tree of PartitionSpecs for an abstract tree whose parameters carry logical names."""

        def spec(leaf):
            if isinstance(leaf, nn.LogicallyPartitioned):
                return self.param_spec(leaf.value.shape, leaf.names)
            return PartitionSpec()

        return jax.tree.map(spec, abstract_boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))

    def shardings(self, abstract_boxed: Any) -> Any:
        """Returns a tree of NamedShardings for an abstract tree whose parameters carry logical names."""
        mesh = self.mesh()
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(abstract_boxed))


def plan(num_params: int, num_devices: int, config: ShardingConfig) -> Plan:
    """Returns the layout: one device: none; several and fewer than fsdp_min_params parameters: ddp; else fsdp.

    A strategy or axis sizes in the config override that.

    Raises:
        UserError: the axis sizes named do not multiply to the number of devices.
    """
    wanted = {axis: getattr(config, axis) for axis in MESH_AXES}
    strategy, reason = _choose(num_params, num_devices, config)
    if strategy == "none":
        require(
            math.prod(max(size, 1) for size in wanted.values()) == 1,
            f"sharding.strategy=none uses one device, but a mesh of {_format(wanted)} is asked for; use ddp or fsdp.",
        )
        return Plan("none", 1, 1, 1, reason)
    free_axis = "data" if strategy == "ddp" else "fsdp"
    if strategy == "ddp":
        require(wanted["fsdp"] <= 1, f"sharding.strategy=ddp has no fsdp axis, but fsdp={wanted['fsdp']}; use fsdp.")
    sizes = {axis: max(size, 1) for axis, size in wanted.items()}
    if wanted[free_axis] == 0:
        rest = math.prod(size for axis, size in sizes.items() if axis != free_axis)
        sizes[free_axis] = max(num_devices // rest, 1)
    require(
        math.prod(sizes.values()) == num_devices,
        f"The mesh {_format(sizes)} needs {math.prod(sizes.values())} devices, but {num_devices} are present; "
        f"make the product {num_devices}, or leave an axis at 0 for the planner.",
    )
    return Plan(strategy, **sizes, reason=reason)


def _choose(num_params: int, num_devices: int, config: ShardingConfig) -> tuple[str, str]:
    if config.strategy != "auto":
        return config.strategy, f"sharding.strategy={config.strategy} was asked for"
    if any(getattr(config, axis) > 1 for axis in MESH_AXES):
        strategy = "fsdp" if config.fsdp > 1 else "ddp"
        return strategy, "the mesh was given by the config"
    if num_devices == 1:
        return "none", "there is one device"
    size = f"{num_params:,} parameters are"
    if num_params < config.fsdp_min_params:
        return "ddp", f"{size} fewer than {config.fsdp_min_params:g}: each of {num_devices} devices holds a copy"
    return "fsdp", f"{size} not fewer than {config.fsdp_min_params:g}: each of {num_devices} devices holds a part"


def _format(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device of one training step."""

    params: int
    optimizer: int
    ema: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def estimate_memory(
    model: ModelConfig, num_trained: int, plan: Plan, batch_size: int, *, optimizer_slots: int, num_frozen: int = 0
) -> MemoryEstimate:
    """Returns an estimate of bytes per device; accumulation is not counted, batch_size is one micro-batch.

    Parameters are float32, and so are the moments, average and gradients of those that are trained. Activations are
    what the backward pass keeps of every layer under the remat policy, all of the one layer that it is working on, and
    the logits twice (values and gradients), or a piece of them.
    """
    trained, frozen = (4 * number // (plan.fsdp * plan.tensor) for number in (num_trained, num_frozen))
    tokens = math.ceil(batch_size / plan.batch_shards) * model.context_length
    return MemoryEstimate(
        params=trained + frozen,
        optimizer=optimizer_slots * trained,
        ema=trained,
        gradients=trained,
        activations=_activation_bytes(model, tokens, plan.tensor),
    )


def _activation_bytes(m: ModelConfig, tokens: int, tensor: int) -> int:
    width = 2 if m.dtype == "bfloat16" else 4
    qkv = m.head_dim * (m.num_heads + 2 * m.num_kv_heads)
    moe = moe_of(m)
    mlp_dim = moe.width(m.mlp_dim) * (moe.top_k + moe.shared) if moe else m.mlp_dim
    inner = (qkv + 2 * mlp_dim) // tensor
    # float32, and not kept by a fused GPU kernel
    probabilities = int(m.num_heads * transformer.mean_computed_keys(m) * 4 // tensor)
    everything = width * (6 * m.model_dim + 2 * inner) + probabilities
    kept = {"none": everything, "dots": width * (3 * m.model_dim + inner), "full": width * m.model_dim}[m.remat]
    working = 0 if m.remat == "none" else everything
    chunks = num_chunks(tokens, m.context_length, m.vocab_size)
    logits = 2 * 4 * tokens * m.vocab_size // chunks // tensor
    if chunks > 1:  # the gradient of the output map is summed beside them
        logits += 4 * m.model_dim * m.vocab_size // tensor
    return tokens * (m.num_layers * kept + working) + logits
