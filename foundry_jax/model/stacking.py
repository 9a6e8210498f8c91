"""How layers are held: each as a module of its own, or repeats of one group stacked and scanned."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.mlp.moe import moe_of


@dataclasses.dataclass(frozen=True)
class Stacking:
    """Which layers are modules of their own (block_i), and which are repeats of one group that is scanned."""

    letters: str  # of all layers
    first: int  # first layer with experts, 0 if there are none; none before it is scanned
    period: int  # layers of one group
    repeats: int  # groups

    @property
    def single(self) -> list[int]:
        """Layers that are not scanned."""
        stop = self.first + self.period * self.repeats
        return [i for i in range(len(self.letters)) if not self.first <= i < stop]

    @property
    def names(self) -> list[str]:
        """Names of the modules, in the order in which they run: block_0, ..., blocks, ..., block_9."""
        before = [f"block_{i}" for i in self.single if i < self.first]
        after = [f"block_{i}" for i in self.single if i >= self.first]
        return [*before, *(["blocks"] if self.repeats else []), *after]

    def member(self, j: int) -> list[int]:
        """Layers that layer_j of the group stands for."""
        return [self.first + self.period * repeat + j for repeat in range(self.repeats)]


def stacking_of(config: ModelConfig) -> Stacking:
    """Returns the stacking; config.scan_layers scans all layers but leading dense ones and a rest."""
    n = config.num_layers
    letters = (config.pattern * n)[:n]
    moe = moe_of(config)
    first = moe.dense_layers if moe else 0
    period = min(len(config.pattern), max(n - first, 1))
    return Stacking(letters, first, period, (n - first) // period if config.scan_layers else 0)


def restack(params: dict, source: ModelConfig, target: ModelConfig) -> dict:
    """Returns the parameters of one stacking of layers in another: both configs differ in nothing else."""
    layers = _layers(params, stacking_of(source))
    rest = {name: part for name, part in params.items() if not name.startswith("block")}
    stacking = stacking_of(target)
    singles = {f"block_{i}": layers[i] for i in stacking.single}
    if not stacking.repeats:
        return rest | singles
    group = {f"layer_{j}": _stack([layers[i] for i in stacking.member(j)]) for j in range(stacking.period)}
    return rest | singles | {"blocks": group}


def _layers(params: dict, stacking: Stacking) -> dict[int, dict]:
    """Returns {layer: its parameters}."""
    layers = {i: params[f"block_{i}"] for i in stacking.single}
    for j in range(stacking.period if stacking.repeats else 0):
        for repeat, i in enumerate(stacking.member(j)):
            take = functools.partial(_take, repeat)
            layers[i] = jax.tree.map(take, params["blocks"][f"layer_{j}"], is_leaf=is_boxed)
    return layers


def is_boxed(x) -> bool:
    """Returns whether x is a parameter with its logical axis names."""
    return isinstance(x, nn.LogicallyPartitioned)


def _take(index: int, leaf):
    return leaf.replace(value=leaf.value[index], names=leaf.names[1:]) if is_boxed(leaf) else leaf[index]


def _stack(layers: list[dict]) -> dict:
    def stack(*leaves):
        if not is_boxed(leaves[0]):
            return jnp.stack(leaves)
        return leaves[0].replace(value=jnp.stack([x.value for x in leaves]), names=("layers", *leaves[0].names))

    return jax.tree.map(stack, *layers, is_leaf=is_boxed)
