"""Low-rank adapters: which linear maps have one, how they are drawn, merged, and handed to the model.

A linear map with an adapter computes x W + scale (x a) b; only a [*in_shape, R] and b [R, *out_shape] are trained. b
begins at zero, so that at first nothing changes. Hu et al. 2021, 2106.09685. Adapters are a tree that is nested as the
parameters are, with leaves at the targets only:

    {"block_0": {"attention": {"query": {"a": [D, R], "b": [R, N, H]}}}, ...}

Of scanned layers they are stacked on a first axis, as the kernels are.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from foundry_jax.errors import UserError
from foundry_jax.model import stacking
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.config import scale_of as scale_of  # for those who handle adapters
from foundry_jax.model.layers import Linear, logical
from foundry_jax.model.stacking import stacking_of
from foundry_jax.model.transformer import Transformer
from foundry_jax.schema import require


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """The shapes of a linear map, and the logical names of in_shape + out_shape."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str, ...]


def linear_maps(model: ModelConfig) -> dict[str, LinearMap]:
    """Returns the linear maps of all blocks by path, "block_0/attention/query"; experts and routers are none."""
    drawn = {"vocab_size": 1, "dropout": 0.0, "dtype": "float32", "scan_layers": True, "remat": "none"}
    return dict(_linear_maps(dataclasses.replace(model, **drawn)))


@functools.lru_cache(maxsize=32)
def _linear_maps(model: ModelConfig) -> dict[str, LinearMap]:
    found: dict[int, dict[str, LinearMap]] = {layer: {} for layer in range(model.num_layers)}

    def note(method, arguments, options, context):
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            layers, rest = _layers_of("/".join(module.path), model)
            for layer in layers:
                found[layer][rest] = LinearMap(module.in_shape, module.out_shape, module.axes)
        return method(*arguments, **options)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda key: Transformer(model).init(key, jnp.zeros((1, 1), jnp.int32)), jax.random.key(0))
    return {f"block_{layer}/{rest}": one for layer, maps in found.items() for rest, one in maps.items()}


def _layers_of(path: str, model: ModelConfig) -> tuple[list[int], str]:
    """Returns (the layers that a module of a scanned model stands for, its path within a block)."""
    block, _, rest = path.partition("/")
    if block != "blocks":
        return [int(block.removeprefix("block_"))], rest
    member, _, rest = rest.partition("/")
    return stacking_of(model).member(int(member.removeprefix("layer_"))), rest


def target_paths(model: ModelConfig, targets: str) -> list[str]:
    """Returns the paths of the linear maps within whose block the regular expression `targets` is found.

    Raises:
        UserError: there are none, or it is no regular expression.
    """
    maps = linear_maps(model)
    try:
        found = [path for path in maps if re.search(targets, within_block(path))]
    except re.error as error:
        raise UserError(f"lora.targets={targets!r} is no regular expression: {error}.") from None
    names = ", ".join(dict.fromkeys(map(within_block, maps)))
    require(bool(found), f"lora.targets={targets!r} is found in none of {names}; '.*' is found in all.")
    return found


def within_block(path: str) -> str:
    """Returns the path of a linear map within its block: "attention/query" of "block_3/attention/query"."""
    return path.partition("/")[2]


def num_params(model: ModelConfig, rank: int, targets: str) -> int:
    """Returns how many numbers the adapters have.

    Raises:
        UserError: as in target_paths.
    """
    maps = [linear_maps(model)[path] for path in target_paths(model, targets)]
    return rank * sum(math.prod(one.in_shape) + math.prod(one.out_shape) for one in maps)


def init(model: ModelConfig, rank: int, targets: str, key: jax.Array) -> dict:
    """Returns new adapters in float32, boxed with their logical axis names; the same whether layers are scanned or not.

    a is uniform in +-1/sqrt(in), as PEFT draws it. An adapter's draw does not depend on which others there are.

    Raises:
        UserError: as in target_paths.
    """
    maps = linear_maps(model)
    order = sorted(set(map(within_block, maps)))
    layers = collections.defaultdict(list)
    for path in target_paths(model, targets):
        layers[within_block(path)].append(path)
    drawn = {}
    for rest, paths in layers.items():
        # All layers at once: one program for each kind of map, not for each map.
        numbers = jnp.array([int(path.partition("/")[0].removeprefix("block_")) for path in paths])
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, order.index(rest))))(numbers)
        stacked = jax.vmap(functools.partial(_draw, maps[paths[0]], rank))(keys)
        for i, path in enumerate(paths):
            drawn[path] = _boxed(maps[path], rank, stacked[i])
    tree = unflatten_dict({tuple(path.split("/")): adapter for path, adapter in drawn.items()})
    return restack(tree, dataclasses.replace(model, scan_layers=False), model)


def _draw(one: LinearMap, rank: int, key: jax.Array) -> jax.Array:
    bound = 1 / math.sqrt(math.prod(one.in_shape))
    return jax.random.uniform(key, (*one.in_shape, rank), jnp.float32, -bound, bound)


def _boxed(one: LinearMap, rank: int, a: jax.Array) -> dict:
    """Returns an adapter that adds nothing yet."""
    into, out = one.axes[: len(one.in_shape)], one.axes[len(one.in_shape) :]
    b = jnp.zeros((rank, *one.out_shape), jnp.float32)
    return {"a": logical(lambda: a, *into, "lora")(), "b": logical(lambda: b, "lora", *out)()}


def restack(adapters: dict, source: ModelConfig, target: ModelConfig) -> dict:
    """Returns adapters of one stacking of layers in another: both configs differ in nothing else."""
    have = stacking_of(source)
    layers: dict[str, Any] = {name: adapters.get(name, {}) for name in have.names}
    if have.repeats:
        layers["blocks"] = {f"layer_{j}": layers["blocks"].get(f"layer_{j}", {}) for j in range(have.period)}
    return _pruned(stacking.restack(layers, source, target))


def _pruned(tree: Any) -> Any:
    """Returns the tree without the nodes that hold no leaf."""
    if not isinstance(tree, Mapping):
        return tree
    parts = {name: _pruned(part) for name, part in tree.items()}
    return {name: part for name, part in parts.items() if not (isinstance(part, Mapping) and not part)}


def scaled(adapters: dict, scale: jax.Array | float, rate: jax.Array | None = None) -> dict:
    """Returns what the model takes as its collection "lora"; in training with a dropout rate beside each adapter."""
    return {name: _scaled(block, scale, rate, is_stacked=name == "blocks") for name, block in adapters.items()}


def _scaled(tree: dict, scale, rate, *, is_stacked: bool) -> dict:
    if not is_adapter(tree):
        return {name: _scaled(part, scale, rate, is_stacked=is_stacked) for name, part in tree.items()}
    collection = {"a": tree["a"], "b": scale * tree["b"]}
    if rate is None:
        return collection
    return collection | {"rate": jnp.broadcast_to(rate, tree["a"].shape[:1] if is_stacked else ())}


def merge(params: dict, adapters: dict, scale: jax.Array | float) -> dict:
    """Returns the parameters with scale a b added to the kernels that have an adapter, in the kernels' dtype."""
    if not is_adapter(adapters):
        return params | {name: merge(params[name], part, scale) for name, part in adapters.items()}
    kernel, a, b = params["kernel"], adapters["a"], adapters["b"]
    is_stacked = a.ndim + b.ndim - 2 > kernel.ndim
    added = (jax.vmap(product) if is_stacked else product)(a, b)
    return params | {"kernel": (kernel + scale * added).astype(kernel.dtype)}


def unmerge(params: dict, adapters: dict, scale: jax.Array | float) -> dict:
    """Returns the parameters as they were before `merge`, up to rounding."""
    return merge(params, adapters, -scale)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a b [*in_shape, *out_shape]."""
    return jnp.tensordot(a, b, axes=1, precision="highest")


def is_adapter(tree: Any) -> bool:
    """Returns whether a node of the tree is one adapter."""
    return "a" in tree and "b" in tree
