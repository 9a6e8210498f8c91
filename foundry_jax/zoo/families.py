"""FAMILIES: architectures of Hugging Face checkpoints: what config.json means, and where each of our parameters lies.

A row of WEIGHTS is our path -> (their name, layout). {i} is the layer; {e} the expert: we hold those of a layer in one
array, they in a tensor each. A row counts for the models that have its parameter: a tied model has no unembed/kernel.
"""

import dataclasses
from collections.abc import Callable, Mapping

from foundry_jax.model.config import ModelConfig
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.zoo.layouts import FROM_HEADS, HEAD_VECTOR, LINEAR, TABLE, TO_HEADS, VECTOR, Layout
from foundry_jax.zoo.settings import Keys, bias_of, compressed, describe, read_decoder, windows_of

Weights = Mapping[str, tuple[str, Layout]]

_BLOCK, _LAYER = "block_{i}/", "model.layers.{i}."


def _rows(rows: Mapping[str, tuple[str, Layout]]) -> dict[str, tuple[str, Layout]]:
    return {_BLOCK + path: (_LAYER + name, layout) for path, (name, layout) in rows.items()}


_WHOLE = {
    "embed/embedding": ("model.embed_tokens.weight", TABLE),
    "final_norm/scale": ("model.norm.weight", VECTOR),
    "unembed/kernel": ("lm_head.weight", LINEAR),
}
_ATTENTION = _rows({
    "attention/query/kernel": ("self_attn.q_proj.weight", TO_HEADS),
    "attention/key/kernel": ("self_attn.k_proj.weight", TO_HEADS),
    "attention/value/kernel": ("self_attn.v_proj.weight", TO_HEADS),
    "attention/out/kernel": ("self_attn.o_proj.weight", FROM_HEADS),
    "attention/query/bias": ("self_attn.q_proj.bias", HEAD_VECTOR),
    "attention/key/bias": ("self_attn.k_proj.bias", HEAD_VECTOR),
    "attention/value/bias": ("self_attn.v_proj.bias", HEAD_VECTOR),
    "attention/out/bias": ("self_attn.o_proj.bias", VECTOR),
})  # fmt: skip
_QK_NORM = _rows({
    "attention/query_norm/scale": ("self_attn.q_norm.weight", VECTOR),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", VECTOR),
})  # fmt: skip
_PRE_NORM = _rows({
    "attention_norm/scale": ("input_layernorm.weight", VECTOR),
    "mlp_norm/scale": ("post_attention_layernorm.weight", VECTOR),
})  # fmt: skip
_POST_NORM = _rows({
    "attention_post_norm/scale": ("post_attention_layernorm.weight", VECTOR),
    "mlp_post_norm/scale": ("post_feedforward_layernorm.weight", VECTOR),
})  # fmt: skip
_MLP = _rows({
    "mlp/gate/kernel": ("mlp.gate_proj.weight", LINEAR),
    "mlp/up/kernel": ("mlp.up_proj.weight", LINEAR),
    "mlp/down/kernel": ("mlp.down_proj.weight", LINEAR),
    "mlp/gate/bias": ("mlp.gate_proj.bias", VECTOR),
    "mlp/up/bias": ("mlp.up_proj.bias", VECTOR),
    "mlp/down/bias": ("mlp.down_proj.bias", VECTOR),
})  # fmt: skip
_EXPERTS = _rows({
    "mlp/router/kernel": ("block_sparse_moe.gate.weight", LINEAR),
    "mlp/experts/gate/kernel": ("block_sparse_moe.experts.{e}.w1.weight", LINEAR),
    "mlp/experts/up/kernel": ("block_sparse_moe.experts.{e}.w3.weight", LINEAR),
    "mlp/experts/down/kernel": ("block_sparse_moe.experts.{e}.w2.weight", LINEAR),
})  # fmt: skip

LLAMA_WEIGHTS: Weights = _WHOLE | _PRE_NORM | _ATTENTION | _MLP
QWEN3_WEIGHTS: Weights = LLAMA_WEIGHTS | _QK_NORM
OLMO2_WEIGHTS: Weights = _WHOLE | _POST_NORM | _ATTENTION | _QK_NORM | _MLP
MIXTRAL_WEIGHTS: Weights = _WHOLE | _PRE_NORM | _ATTENTION | _EXPERTS


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    read(keys of config.json) -> settings, which are keys of ModelConfig; write(config) -> keys of config.json. A config
    is of this family if what write gives is read as the same config.
    """

    architecture: str
    model_type: str
    weights: Weights
    read: Callable[[Keys], dict]
    write: Callable[[ModelConfig], dict]


def _read_llama(keys: Keys) -> dict:
    return read_decoder(keys) | {"bias": bias_of(keys)}


def _write_llama(config: ModelConfig) -> dict:
    return describe(config) | {"attention_bias": config.bias in ("attention", "all"), "mlp_bias": config.bias == "all"}


def _read_mistral(keys: Keys) -> dict:
    window = keys.optional_whole("sliding_window", 4096)
    return read_decoder(keys) | ({"pattern": "S", "window": window} if window else {})


def _write_mistral(config: ModelConfig) -> dict:
    return describe(config) | {"sliding_window": config.window if "S" in config.pattern else None}


def _read_qwen2(keys: Keys) -> dict:
    return read_decoder(keys) | windows_of(keys) | {"bias": "qkv"}


def _write_qwen2(config: ModelConfig) -> dict:
    return describe(config) | _layer_types(config)


def _read_qwen3(keys: Keys) -> dict:
    return read_decoder(keys) | windows_of(keys) | {"bias": bias_of(keys), "qk_norm": "head"}


def _write_qwen3(config: ModelConfig) -> dict:
    return describe(config) | _layer_types(config) | {"attention_bias": config.bias == "attention"}


def _layer_types(config: ModelConfig) -> dict:
    letters = compressed(config.pattern, config.num_layers) * config.num_layers
    kinds = {"S": "sliding_attention", "L": "full_attention"}
    windowed = "S" in config.pattern
    return {
        "use_sliding_window": windowed,
        "sliding_window": config.window if windowed else None,
        "layer_types": [kinds.get(letter, letter) for letter in letters[: config.num_layers]],
    }


def _read_olmo2(keys: Keys) -> dict:
    return read_decoder(keys) | {"bias": bias_of(keys), "qk_norm": "whole", "norm_placement": "post"}


def _write_olmo2(config: ModelConfig) -> dict:
    return describe(config) | {"attention_bias": config.bias == "attention"}


def _read_mixtral(keys: Keys) -> dict:
    experts, top_k = keys.whole("num_local_experts"), keys.whole("num_experts_per_tok")
    width = keys.whole("intermediate_size")
    return _read_mistral(keys.with_default("sliding_window", None)) | {
        "moe": f"softmax(experts={experts}, top_k={top_k}, expert_dim={width})"
    }


def _write_mixtral(config: ModelConfig) -> dict:
    moe = moe_of(config)
    if moe is None:
        return {}
    return _write_mistral(config) | {
        "intermediate_size": moe.width(config.mlp_dim),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance,
    }


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", LLAMA_WEIGHTS, _read_llama, _write_llama),
        Family("MistralForCausalLM", "mistral", LLAMA_WEIGHTS, _read_mistral, _write_mistral),
        Family("Qwen2ForCausalLM", "qwen2", LLAMA_WEIGHTS, _read_qwen2, _write_qwen2),
        Family("Qwen3ForCausalLM", "qwen3", QWEN3_WEIGHTS, _read_qwen3, _write_qwen3),
        Family("Olmo2ForCausalLM", "olmo2", OLMO2_WEIGHTS, _read_olmo2, _write_olmo2),
        Family("MixtralForCausalLM", "mixtral", MIXTRAL_WEIGHTS, _read_mixtral, _write_mixtral),
    )
}
