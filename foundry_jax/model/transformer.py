"""The decoder-only transformer, and what can be said of it without building it."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from foundry_jax.model import combinations
from foundry_jax.model.attention import ATTENTIONS
from foundry_jax.model.attention.cache import Slots, full_slots, rolling_slots
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.layers import Dropout, Embed, Linear, constrain
from foundry_jax.model.mask import EMPTY, SPARSE, Causal, Mask, MaskSpec, Placement, Window, whole_sequence
from foundry_jax.model.mlp import MLPS
from foundry_jax.model.mlp.dense import MLP
from foundry_jax.model.mlp.moe import MixtureOfExperts, RouterStats, balance_bias_update, moe_of
from foundry_jax.model.norm import NORMS
from foundry_jax.model.position import position_of, scaling_of
from foundry_jax.model.stacking import restack, stacking_of
from foundry_jax.registry import lookup
from foundry_jax.schema import require, variant

# What a letter of config.pattern lets a layer see.
LAYER_MASKS = {
    "L": lambda config: Causal(),
    "S": lambda config: Window(config.window),
    "P": lambda config: variant(config.sparse, SPARSE, "model.sparse"),
}


@flax.struct.dataclass
class Cache:
    """What decoding keeps: by letter of the pattern the position that each slot holds (EMPTY: none), and per-layer
    tensors, under the names of the parameters of their layers. See init_cache for `rolling`."""

    positions: dict[str, jax.Array]
    layers: dict[str, dict]
    rolling: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class View:
    """What all layers of one letter share: their mask, and the slots of the cache for the new tokens."""

    mask: Mask
    slots: Slots | None


class Block(nn.Module):
    """One layer: attention, then an MLP or experts, each added to the residual stream.

    The norm comes before the sub-layer (Xiong et al. 2020, 2002.04745), after it but before the addition (OLMo 2,
    2501.00656), or both (sandwich; Ding et al. 2021, 2105.13290).
    """

    config: ModelConfig
    letter: str
    dense: bool

    @nn.compact
    def __call__(self, x_BLD, cache, views: dict[str, View], dropout_rate):
        """Returns (x_BLD, cache)."""
        c, view = self.config, views[self.letter]
        attention = lookup(ATTENTIONS, c.attention, "attention")(c, name="attention")
        y_BLD, cache = attention(self._norm("attention_norm", x_BLD), view.mask, cache, view.slots)
        x_BLD = x_BLD + Dropout()(self._norm("attention_post_norm", y_BLD), dropout_rate)
        mlp = (MLP if self.dense else MixtureOfExperts)(c, name="mlp")
        y_BLD = mlp(self._norm("mlp_norm", x_BLD), view.mask.queries.positions_BL != EMPTY)
        x_BLD = x_BLD + Dropout()(self._norm("mlp_post_norm", y_BLD), dropout_rate)
        return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed"), cache

    def _norm(self, name: str, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        absent = "pre" if name.endswith("post_norm") else "post"
        if c.norm_placement == absent:
            return x_BLD
        return lookup(NORMS, c.norm, "norm")(c.model_dim, c.norm_epsilon, c.dtype, name=name)(x_BLD)


class Group(nn.Module):
    """Consecutive layers, one for each letter: what is repeated when layers are scanned."""

    config: ModelConfig
    letters: str

    @nn.compact
    def __call__(self, x_BLD, caches: dict | None, views: dict[str, View], dropout_rate):
        """Returns (x_BLD, caches)."""
        new_caches = {}
        for j, letter in enumerate(self.letters):
            block = _remat(Block, self.config)(self.config, letter, dense=not moe_of(self.config), name=f"layer_{j}")
            cache = None if caches is None else caches[f"layer_{j}"]
            x_BLD, new_caches[f"layer_{j}"] = block(x_BLD, cache, views, dropout_rate)
        return x_BLD, None if caches is None else new_caches


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _remat(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    if config.remat == "none":
        return module
    return nn.remat(module, policy=REMAT[config.remat], prevent_cse=not config.scan_layers)


class Transformer(nn.Module):
    """A decoder-only transformer: embedding, num_layers blocks, a final norm and the output map."""

    config: ModelConfig

    def setup(self):
        c, stacking = self.config, stacking_of(self.config)
        norm = functools.partial(lookup(NORMS, c.norm, "norm"), c.model_dim, c.norm_epsilon, c.dtype)
        self.embed = Embed(c.vocab_size, c.model_dim, c.dtype)
        if length := position_of(c).table_length(c):
            self.position_embed = Embed(length, c.model_dim, c.dtype, axis="position")
        if c.embedding == "normed":
            self.embed_norm = norm()
        self.embed_dropout = Dropout()
        is_moe = moe_of(c) is not None
        for i in stacking.single:
            block = _remat(Block, c)(c, stacking.letters[i], dense=not is_moe or i < stacking.first)
            setattr(self, f"block_{i}", block)
        if stacking.repeats:
            self.blocks = nn.scan(
                Group,
                variable_axes={"params": 0, "lora": 0, "router": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=stacking.repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, stacking.letters[stacking.first : stacking.first + stacking.period])
        self.final_norm = norm()
        if not c.tie_embeddings:
            self.unembed = Linear((c.model_dim,), (c.vocab_size,), ("embed", "vocab"), c.dtype)

    def __call__(self, tokens_BL, placement=None, cache=None, dropout_rate=None):
        """Returns (logits_BLV in float32, cache).

        Args:
            placement: positions and documents of the tokens, EMPTY for padding; None: one document at 0..L-1.
            cache: from init_cache; the tokens go to the slots of their positions, and all are read.
            dropout_rate: None switches dropout off; a number needs a "dropout" rng.
        """
        x_BLD, cache = self.hidden(tokens_BL, placement, cache, dropout_rate)
        return self.logits(x_BLD), cache

    def hidden(self, tokens_BL, placement=None, cache=None, dropout_rate=None):
        """Returns (x_BLD after the final norm, cache); arguments as in __call__."""
        queries = placement or whole_sequence(tokens_BL.shape[1])
        x_BLD = self.embed_dropout(self._embedded(tokens_BL, queries.positions_BL), dropout_rate)
        x_BLD = constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")
        if cache is None:
            views = {letter: self._view(letter, queries, contiguous=placement is None) for letter in self.letters}
            x_BLD, _ = self._run_blocks(x_BLD, None, views, dropout_rate)
            return self.final_norm(x_BLD), None
        queries = queries.replace(positions_BL=jnp.broadcast_to(queries.positions_BL, tokens_BL.shape))
        positions, views = {}, {}
        for letter in self.letters:
            positions[letter], views[letter] = self._cached_view(letter, queries, cache)
        x_BLD, layers = self._run_blocks(x_BLD, cache.layers, views, dropout_rate)
        return self.final_norm(x_BLD), cache.replace(positions=positions, layers=layers)

    def hidden_and_kernel(self, tokens_BL, placement=None, dropout_rate=None):
        """Returns (x_BLD after the final norm, kernel_DV of the output map): logits are their product."""
        x_BLD, _ = self.hidden(tokens_BL, placement, None, dropout_rate)
        return x_BLD, self.output_kernel()

    @property
    def letters(self) -> list[str]:
        """The letters of the pattern, each once."""
        return letters_of(self.config)

    def _embedded(self, tokens_BL, positions_BL):
        c = self.config
        x_BLD = self.embed(tokens_BL)
        if c.embedding == "scaled":  # Gemma, 2403.08295: tied embeddings are small for a residual stream
            x_BLD = x_BLD * jnp.asarray(c.model_dim**0.5, x_BLD.dtype)
        if position_of(c).table_length(c):
            x_BLD = x_BLD + self.position_embed(jnp.maximum(positions_BL, 0))
        return self.embed_norm(x_BLD) if c.embedding == "normed" else x_BLD

    def _view(self, letter, queries, *, contiguous) -> View:
        self._require_positions(queries.positions_BL.shape[1])
        return View(Mask(queries, queries, layer_mask(self.config, letter), contiguous, aligned=True), None)

    def _cached_view(self, letter, queries, cache: Cache) -> tuple[jax.Array, View]:
        """Returns (the position that each slot holds afterwards, the view)."""
        slots_of = rolling_slots if cache.rolling and _is_rolling(self.config, letter) else full_slots
        cached_BS = cache.positions[letter]
        slots = slots_of(cached_BS, queries.positions_BL)
        written_BS, read_BS = slots.update_positions(cached_BS, queries.positions_BL)
        spec = layer_mask(self.config, letter)
        return written_BS, View(Mask(queries, Placement(read_BS), spec, contiguous=False, aligned=False), slots)

    def _require_positions(self, length: int) -> None:
        limit = position_of(self.config).table_length(self.config)
        require(
            not limit or length <= limit,
            f"{length} tokens are more than the model.context_length={limit} positions that were learned; "
            f"use a longer context_length, or model.position=rope or alibi.",
        )

    def _run_blocks(self, x_BLD, caches, views, dropout_rate):
        """Returns (x_BLD, caches), both by way of all layers in order."""
        new_caches = {}
        for name in stacking_of(self.config).names:
            cache = None if caches is None else caches[name]
            x_BLD, new_caches[name] = getattr(self, name)(x_BLD, cache, views, dropout_rate)
        return x_BLD, new_caches

    def output_kernel(self):
        """Returns the output map kernel_DV in the compute dtype."""
        return self.embed.output_kernel() if self.config.tie_embeddings else self.unembed.kernel()

    def logits(self, x_BLD):
        """Returns logits_BLV in float32."""
        B, L, D = x_BLD.shape
        logits = (x_BLD.reshape(B * L, D) @ self.output_kernel()).astype(jnp.float32).reshape(B, L, -1)
        return constrain(logits, "activation_batch", "activation_length", "activation_vocab")


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Returns new parameters, boxed with their logical axis names; the same whether layers are scanned or not.

    They are always drawn by a scanned model: drawing one layer in a loop compiles in about two thirds of the time of
    drawing each (2.4 s against 3.6 s for configs/tiny.py, 3.0 s against 5.1 s for the baseline; 2 busy cores).
    """
    drawn = dataclasses.replace(config, scan_layers=True, remat="none", pattern="L")
    params = Transformer(drawn).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return restack(params, drawn, config)


def router_stats(sown: dict | None) -> RouterStats | None:
    """Returns what the routers of all layers have sown (the collection "router"), stacked; None: no experts."""
    found = jax.tree.leaves(sown or {}, is_leaf=lambda x: isinstance(x, RouterStats))
    if not found:
        return None
    rows = [jax.tree.map(lambda x, n=one.load.ndim: x if n == 2 else x[None], one) for one in found]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def rebalance(params: dict, sown: dict, rate: jax.Array) -> dict:
    """Returns the parameters with the balancing bias of every router that has one moved against its load."""
    if isinstance(sown.get("stats"), RouterStats):
        router = params["router"]
        if "balance_bias" not in router:
            return params
        bias = router["balance_bias"] + balance_bias_update(sown["stats"].load, rate)
        return params | {"router": router | {"balance_bias": bias}}
    return params | {name: rebalance(params[name], part, rate) for name, part in sown.items()}


def layer_mask(config: ModelConfig, letter: str) -> MaskSpec:
    """Returns what layers of one letter of the pattern may see."""
    return lookup(LAYER_MASKS, letter, "letter of model.pattern")(config)


def letters_of(config: ModelConfig) -> list[str]:
    """Returns the letters of the layers, each once."""
    return sorted(set(stacking_of(config).letters))


def check(config: ModelConfig) -> None:
    """Raises UserError if a variant is unknown, or its dimensions or two variants do not fit together."""
    for letter in config.pattern or " ":
        layer_mask(config, letter)
    lookup(MLPS, config.mlp, "mlp")
    lookup(NORMS, config.norm, "norm")
    scaling_of(config)
    position_of(config).check(config)
    lookup(ATTENTIONS, config.attention, "attention").check(config)
    combinations.check(config)
    if moe_of(config):
        MixtureOfExperts.check(config)


def _is_rolling(config: ModelConfig, letter: str) -> bool:
    return isinstance(layer_mask(config, letter), Window)


def init_cache(
    config: ModelConfig, batch_size: int, length: int, dtype: str | None = None, *, rolling: bool = True
) -> Cache:
    """Returns an empty cache for positions 0..length-1, in the compute dtype unless told otherwise.

    A layer with a sliding window has one slot for each token of the window, any other one for each position. Without
    `rolling` all have one for each position: then what was read last can be replaced from any token on.

    Raises:
        UserError: positions are learned, and not that many.
    """
    limit = position_of(config).table_length(config)
    require(
        not limit or length <= limit, f"A cache of {length} tokens needs model.context_length={length}, not {limit}."
    )
    make = functools.partial(ATTENTIONS[config.attention].init_cache, config, batch_size)
    sizes = {
        x: min(config.window, length) if rolling and _is_rolling(config, x) else length for x in letters_of(config)
    }
    stacking = stacking_of(config)
    layers = {f"block_{i}": make(sizes[stacking.letters[i]], dtype or config.dtype) for i in stacking.single}
    if stacking.repeats:
        group = {}
        for j in range(stacking.period):
            one = make(sizes[stacking.letters[stacking.first + j]], dtype or config.dtype)
            group[f"layer_{j}"] = jax.tree.map(lambda x: jnp.stack([x] * stacking.repeats), one)
        layers["blocks"] = group
    positions = {letter: jnp.full((batch_size, size), EMPTY, jnp.int32) for letter, size in sizes.items()}
    return Cache(positions, layers, rolling)


def num_params(config: ModelConfig) -> int:
    """Returns the number of parameters, from the config alone."""
    return _count_params(config, active=False)


def num_active_params(config: ModelConfig) -> int:
    """Returns how many parameters one token uses: of the experts only those it is sent to."""
    return _count_params(config, active=True)


def _count_params(config: ModelConfig, *, active: bool) -> int:
    norm = NORMS[config.norm].num_params(config.model_dim)
    num_dense, num_moe = _num_mlps(config)
    total = config.num_layers * (ATTENTIONS[config.attention].num_params(config) + _norms_per_layer(config) * norm)
    total += num_dense * MLP.num_params(config)
    if num_moe:
        count = MixtureOfExperts.num_active_params if active else MixtureOfExperts.num_params
        total += num_moe * count(config)
    embeddings = config.vocab_size * config.model_dim * (1 if config.tie_embeddings else 2)
    positions = position_of(config).table_length(config) * config.model_dim
    return total + embeddings + positions + norm * (2 if config.embedding == "normed" else 1)


def _norms_per_layer(config: ModelConfig) -> int:
    return 4 if config.norm_placement == "sandwich" else 2


def _num_mlps(config: ModelConfig) -> tuple[int, int]:
    """Returns how many layers have (a dense MLP, experts)."""
    num_dense = stacking_of(config).first if moe_of(config) else config.num_layers
    return num_dense, config.num_layers - num_dense


def flops_per_token(config: ModelConfig, num_keys: float | None = None, *, computed: bool = False) -> float:
    """Returns the forward FLOPs of one token, averaged over a sequence of context_length tokens.

    Counts matrix products only, and of attention only the query-key pairs the masks allow (a causal token sees
    half the context on average); `computed` counts the pairs that are really computed, num_keys overrides the number.
    A training step costs three times as much.
    """
    total = 2 * config.model_dim * config.vocab_size
    for letter in stacking_of(config).letters:
        spec = layer_mask(config, letter)
        count = spec.computed_keys if computed else spec.mean_visible_keys
        keys = count(config.context_length) if num_keys is None else num_keys
        total += ATTENTIONS[config.attention].flops_per_token(config, keys)
    num_dense, num_moe = _num_mlps(config)
    total += num_dense * MLP.flops_per_token(config)
    return total + (num_moe * MixtureOfExperts.flops_per_token(config) if num_moe else 0)


def mean_computed_keys(config: ModelConfig) -> float:
    """Returns against how many keys a token is computed, averaged over context_length tokens and all layers."""
    letters = stacking_of(config).letters
    return sum(layer_mask(config, x).computed_keys(config.context_length) for x in letters) / len(letters)


def kv_bytes_per_token(config: ModelConfig) -> float:
    """Returns how many bytes one token takes in the key/value cache of all layers, at context_length tokens.

    A layer with a sliding window keeps no more than its window: its cost per token falls as the text grows.
    """
    size = ATTENTIONS[config.attention].cache_size_per_token(config) * jnp.dtype(config.dtype).itemsize
    length = config.context_length
    kept = sum(
        min(config.window, length) if _is_rolling(config, letter) else length for letter in stacking_of(config).letters
    )
    return size * kept / length
