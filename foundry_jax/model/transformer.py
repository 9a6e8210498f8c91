"""The decoder-only transformer, and what can be said of it without building it."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from foundry_jax.model.attention import ATTENTIONS
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Dropout, Embed, Linear, constrain
from foundry_jax.model.mask import EMPTY, Mask, MaskSpec, Placement, whole_sequence
from foundry_jax.model.mlp import MLPS
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import POSITIONS
from foundry_jax.registry import lookup


@flax.struct.dataclass
class Cache:
    """What decoding keeps: per-layer tensors, and which position each of the S slots holds (EMPTY: none)."""

    positions_BS: jax.Array
    layers: tuple | dict  # one dict a layer; one dict of stacked arrays when the layers are scanned


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD, cache, mask: Mask, slots_BL, dropout_rate):
        """Returns (x_BLD, cache)."""
        c = self.config
        norm = functools.partial(lookup(NORMS, c.norm, "norm"), c.model_dim, c.norm_epsilon, c.dtype)
        attention = lookup(ATTENTIONS, c.attention, "attention")(c, name="attention")
        y_BLD, cache = attention(norm(name="attention_norm")(x_BLD), mask, cache, slots_BL)
        x_BLD = x_BLD + Dropout()(y_BLD, dropout_rate)
        y_BLD = lookup(MLPS, c.mlp, "mlp")(c, name="mlp")(norm(name="mlp_norm")(x_BLD))
        x_BLD = x_BLD + Dropout()(y_BLD, dropout_rate)
        return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed"), cache


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """A decoder-only transformer: embedding, num_layers blocks, a final norm and the output map."""

    config: ModelConfig

    def setup(self):
        c = self.config
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=not c.scan_layers)
        if c.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        else:
            self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.embed = Embed(c.vocab_size, c.model_dim, c.dtype)
        self.embed_dropout = Dropout()
        self.final_norm = lookup(NORMS, c.norm, "norm")(c.model_dim, c.norm_epsilon, c.dtype)
        if not c.tie_embeddings:
            self.unembed = Linear((c.model_dim,), (c.vocab_size,), ("embed", "vocab"), c.dtype)

    def __call__(self, tokens_BL, placement=None, cache=None, dropout_rate=None):
        """Returns (logits_BLV in float32, cache).

        Args:
            placement: positions and documents of the tokens; None: one document at positions 0..L-1.
            cache: from init_cache; its slots at the tokens' positions are written, all are read.
            dropout_rate: None switches dropout off; a number needs a "dropout" rng.
        """
        x_BLD, cache = self.hidden(tokens_BL, placement, cache, dropout_rate)
        return self.logits(x_BLD), cache

    def hidden(self, tokens_BL, placement=None, cache=None, dropout_rate=None):
        """Returns (x_BLD after the final norm, cache); arguments as in __call__."""
        contiguous = placement is None and cache is None
        queries = placement or whole_sequence(tokens_BL.shape[1])
        slots_BL = keys = None
        if cache is not None:
            slots_BL = jnp.broadcast_to(queries.positions_BL, tokens_BL.shape)
            keys = Placement(write_positions(cache.positions_BS, slots_BL))
        mask = Mask(queries, keys or queries, MaskSpec(), contiguous)
        x_BLD = self.embed_dropout(self.embed(tokens_BL), dropout_rate)
        x_BLD = constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")
        layers = cache.layers if cache is not None else None
        x_BLD, layers = self._run_blocks(x_BLD, layers, mask, slots_BL, dropout_rate)
        cache = None if cache is None else Cache(keys.positions_BL, layers)
        return self.final_norm(x_BLD), cache

    def _run_blocks(self, x_BLD, layers, mask, slots_BL, dropout_rate):
        if self.config.scan_layers:
            return self.blocks(x_BLD, layers, mask, slots_BL, dropout_rate)
        new_layers = []
        for i, block in enumerate(self.blocks):
            x_BLD, layer = block(x_BLD, None if layers is None else layers[i], mask, slots_BL, dropout_rate)
            new_layers.append(layer)
        return x_BLD, tuple(new_layers)

    def logits(self, x_BLD):
        """Returns logits_BLV in float32."""
        B, L, D = x_BLD.shape
        kernel_DV = self.embed.output_kernel() if self.config.tie_embeddings else self.unembed.kernel()
        logits = (x_BLD.reshape(B * L, D) @ kernel_DV).astype(jnp.float32).reshape(B, L, -1)
        return constrain(logits, "activation_batch", "activation_length", "activation_vocab")


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Returns new parameters, boxed with their logical axis names; the same whether layers are scanned or not.

    They are always drawn by the scanned model: drawing one layer in a loop compiles in about two thirds of the time of
    drawing each (2.4 s against 3.6 s for configs/tiny.py, 3.0 s against 5.1 s for the baseline; 2 busy cores).
    """
    scanned = Transformer(dataclasses.replace(config, scan_layers=True, remat="none"))
    params = scanned.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return params if config.scan_layers else unstack_layers(params, config.num_layers)


def unstack_layers(params: dict, num_layers: int) -> dict:
    """Returns the parameters of a scanned model as the unrolled model holds them: block_0, block_1, ..."""

    def layer(leaf, i):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return leaf.replace(value=leaf.value[i], names=leaf.names[1:])
        return leaf[i]

    boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    blocks = {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: layer(leaf, i), params["blocks"], is_leaf=boxed)
        for i in range(num_layers)
    }
    return {name: part for name, part in params.items() if name != "blocks"} | blocks


def write_positions(positions_BS, slots_BL):
    """Returns positions_BS with each token's position stored in its slot."""
    rows = jnp.arange(positions_BS.shape[0])[:, None]
    return positions_BS.at[rows, slots_BL].set(slots_BL)


def check(config: ModelConfig) -> None:
    """Raises UserError if a variant is unknown or its dimensions do not fit together."""
    lookup(ATTENTIONS, config.attention, "attention").check(config)
    lookup(MLPS, config.mlp, "mlp")
    lookup(NORMS, config.norm, "norm")
    lookup(POSITIONS, config.position, "position")


def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: str | None = None) -> Cache:
    """Returns an empty cache with `length` slots a row, in the compute dtype unless told otherwise."""
    make = functools.partial(ATTENTIONS[config.attention].init_cache, config, batch_size, length, dtype or config.dtype)
    if config.scan_layers:
        layers = jax.tree.map(lambda *xs: jnp.stack(xs), *[make() for _ in range(config.num_layers)])
    else:
        layers = tuple(make() for _ in range(config.num_layers))
    return Cache(jnp.full((batch_size, length), EMPTY, jnp.int32), layers)


def num_params(config: ModelConfig) -> int:
    """Returns the number of parameters, from the config alone."""
    norm = NORMS[config.norm].num_params(config.model_dim)
    block = ATTENTIONS[config.attention].num_params(config) + MLPS[config.mlp].num_params(config) + 2 * norm
    embeddings = config.vocab_size * config.model_dim * (1 if config.tie_embeddings else 2)
    return config.num_layers * block + embeddings + norm


def flops_per_token(config: ModelConfig, num_keys: float | None = None) -> float:
    """Returns the forward FLOPs of one token, averaged over a sequence of context_length tokens.

    Counts matrix products only, and of attention only the query-key pairs the mask allows (a causal token sees
    half the context on average); num_keys overrides that number. A training step costs three times as much.
    """
    if num_keys is None:
        num_keys = MaskSpec().mean_visible_keys(config.context_length)
    attention = ATTENTIONS[config.attention].flops_per_token(config, num_keys)
    block = attention + MLPS[config.mlp].flops_per_token(config)
    return config.num_layers * block + 2 * config.model_dim * config.vocab_size


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Returns how many bytes one token takes in the key/value cache of all layers."""
    size = ATTENTIONS[config.attention].cache_size_per_token(config)
    return config.num_layers * size * jnp.dtype(config.dtype).itemsize
