"""Mutations of the architecture."""

import math
import re

from foundry_jax.errors import UserError
from foundry_jax.model.config import is_gated
from foundry_jax.registry import lookup, unknown
from foundry_jax.schema import require

ATTENTION_VARIANTS = {
    "mha": "one key/value head per query head; Vaswani et al. 2017, 1706.03762",
    "gqa": "the config's own number of key/value heads; Ainslie et al. 2023, 2305.13245",
    "mqa": "one key/value head for all query heads; Shazeer 2019, 1911.02150",
    "gqa_1kv": "one key/value head",
    "gqa_2kv": "two key/value heads (any count works: gqa_3kv, ...)",
    "mla": "multi-head latent attention; DeepSeek-V2 2024, 2405.04434",
}
BIAS_VARIANTS = {
    "none": "no biases; Touvron et al. 2023, 2302.13971",
    "qkv": "of queries, keys and values; Qwen2 2024, 2407.10671",
    "attention": "of queries, keys, values and attention's output",
    "all": "of attention and the MLP; Radford et al. 2019 (GPT-2)",
}
QK_NORM_VARIANTS = {
    "none": "no norm of queries and keys",
    "head": "over each head; Dehghani et al. 2023, 2302.05442; Qwen3 2025, 2505.09388",
    "whole": "over all heads at once; OLMo 2 2024, 2501.00656",
}
SPARSE_VARIANTS = {
    "strided": "the last stride tokens, and every stride-th one before; Child et al. 2019, 1904.10509",
    "fixed": "the own block of tokens, and the last few of every block before; Child et al. 2019, 1904.10509",
}
MLP_VARIANTS = {
    "swiglu": "gated by SiLU; Shazeer 2020, 2002.05202",
    "geglu": "gated by GELU (erf); Shazeer 2020, 2002.05202",
    "geglu_tanh": "gated by GELU's tanh approximation; Gemma 2024, 2403.08295",
    "glu": "gated by the sigmoid; Dauphin et al. 2016, 1612.08083",
    "gelu": "no gate, GELU (erf); Hendrycks & Gimpel 2016, 1606.08415",
    "gelu_tanh": "no gate, GELU's tanh approximation; Radford et al. 2019 (GPT-2), 1606.08415",
    "relu2": "no gate, squared ReLU; So et al. 2021, 2109.08668",
}
ROUTER_VARIANTS = {
    "softmax": "weights of the chosen experts renormalised; Mixtral 2024, 2401.04088",
    "softmax_unnormalized": "weights as they are; DeepSeek-V2 2024, 2405.04434",
    "sigmoid": "a balancing bias outside the gradient; DeepSeek-V3 2024, 2412.19437",
}
NORM_VARIANTS = {
    "rmsnorm": "root mean square, a scale; Zhang & Sennrich 2019, 1910.07467",
    "layernorm": "mean and variance, a scale and a bias; Ba et al. 2016, 1607.06450",
    "layernorm_nobias": "mean and variance, a scale; Chowdhery et al. 2022, 2204.02311",
}
PLACEMENT_VARIANTS = {
    "pre": "before attention and MLP; Xiong et al. 2020, 2002.04745",
    "post": "after them, before the addition; OLMo 2 2024, 2501.00656",
    "sandwich": "before and after them; Ding et al. 2021, 2105.13290",
}
POSITION_VARIANTS = {
    "rope": "rotary queries and keys; Su et al. 2021, 2104.09864",
    "alibi": "a bias on the logits that falls with distance; Press et al. 2021, 2108.12409",
    "learned": "one learned vector for each position; Radford et al. 2019 (GPT-2)",
    "nope": "none: the causal mask alone tells order; Kazemnejad et al. 2023, 2305.19466",
}
SCALING_VARIANTS = {
    "none": "frequencies as they are",
    "linear": "all frequencies divided by the factor; Chen et al. 2023, 2306.15595",
    "llama3": "slow frequencies divided by the factor; Dubey et al. 2024, 2407.21783",
    "yarn": "a ramp between both, and a temperature; Peng et al. 2023, 2309.00071",
}
EMBEDDING_VARIANTS = {
    "plain": "the embedding as it is",
    "scaled": "times the root of the width; Gemma 2024, 2403.08295",
    "normed": "a norm follows; BLOOM 2022, 2211.05100",
}


def attention(config, variant: str):
    """How queries, keys and values are made: mha, gqa, mqa, gqa_<count>kv or mla."""
    if variant == "mla":
        return {"model.attention": "mla"}
    if match := re.fullmatch(r"gqa_(\d+)kv", variant):
        return {"model.attention": "gqa", "model.num_kv_heads": int(match[1])}
    counts = {"mha": config.model.num_heads, "mqa": 1, "gqa": config.model.num_kv_heads}
    if variant not in counts:
        raise UserError(unknown(variant, ATTENTION_VARIANTS, "attention variant"))
    return {"model.attention": "gqa", "model.num_kv_heads": counts[variant]}


def mla(config, kv_rank: str = "", q_rank: str = ""):
    """Multi-head latent attention: rank of the key/value latent, and of the queries (0: full), by default the config's.

    DeepSeek-V2 2024, 2405.04434.
    """
    ranks = {"model.kv_lora_rank": kv_rank, "model.q_lora_rank": q_rank}
    return {"model.attention": "mla"} | {key: rank for key, rank in ranks.items() if rank}


def bias(config, where: str = "qkv"):
    """Biases of linear maps: none, qkv, attention (and its output) or all (and the MLP)."""
    lookup(BIAS_VARIANTS, where, "place of biases")
    return {"model.bias": where}


def qk_norm(config, over: str = "head"):
    """A norm of queries and keys: over each head, over all heads at once (whole), or none."""
    lookup(QK_NORM_VARIANTS, over, "extent of the QK-norm")
    return {"model.qk_norm": over}


def softcap(config, cap: str = "50"):
    """Attention logits become cap * tanh(logits / cap); 0 switches it off. Gemma 2 2024, 2408.00118."""
    return {"model.attention_softcap": cap}


def pattern(config, letters: str):
    """One letter a layer, repeated over the depth: L full, S sliding window, P sparse. Gemma 2 2024, 2408.00118."""
    return {"model.pattern": letters}


def sliding_window(config, window: str = ""):
    """Every layer sees the last `window` tokens, by default the config's own number. Mistral 2023, 2310.06825."""
    return {"model.pattern": "S", "model.window": window or config.model.window}


def sparse(config, kind: str, stride: str = "", summary: str = ""):
    """Every layer sees a sparse pattern: strided[:stride] or fixed[:stride:summary]."""
    lookup(SPARSE_VARIANTS, kind, "sparse pattern")
    return {"model.pattern": "P", "model.sparse": _call(kind, stride, summary)}


def activation(config, name: str):
    """The MLP's activation; a width that is given explicitly changes so that the parameters stay the same."""
    lookup(MLP_VARIANTS, name, "activation")
    m = config.model
    matrices = {True: 3, False: 2}
    width = m.mlp_dim * matrices[is_gated(m.mlp)] / matrices[is_gated(name)]
    return {"model.mlp": name, "model.mlp_dim": round(width)}


def mlp_dim(config, width: str):
    """Width of the MLP, whatever its parameters; 0 derives the width that all activations are compared at.

    Shazeer 2020, 2002.05202.
    """
    return {"model.mlp_dim": width}


def moe(config, router: str = "softmax", experts: str = "8", top_k: str = "2"):
    """Experts instead of MLPs, of equal active size: softmax, softmax_unnormalized or sigmoid[:experts:top_k]."""
    lookup(ROUTER_VARIANTS, router, "router")
    return {"model.moe": f"{router}(experts={experts}, top_k={top_k})"}


def norm(config, name: str):
    """How activations are rescaled: rmsnorm, layernorm or layernorm_nobias."""
    lookup(NORM_VARIANTS, name, "norm")
    return {"model.norm": name}


def norm_placement(config, where: str):
    """Where the norms of a layer stand: pre, post or sandwich."""
    lookup(PLACEMENT_VARIANTS, where, "placement of norms")
    return {"model.norm_placement": where}


def position(config, name: str):
    """How order reaches attention: rope, alibi, learned or nope (no position)."""
    lookup(POSITION_VARIANTS, name, "position")
    return {"model.position": "none" if name == "nope" else name}


def rope_theta(config, base: str):
    """Longest wavelength of the rotary embedding / 2 pi. Xiong et al. 2023, 2309.16039."""
    return {"model.rope_theta": base}


def rope_scaling(config, kind: str, factor: str = "", original_length: str = ""):
    """How rotary frequencies stretch: none, linear:factor, llama3:factor:original_length, yarn:factor:original_length.

    Any number of a scaling can be named too: rope_scaling=yarn(factor=4, beta_fast=16).
    """
    name = kind.partition("(")[0]
    lookup(SCALING_VARIANTS, name, "scaling of rotary frequencies")
    return {"model.rope_scaling": _call(kind, factor, original_length)}


def embedding(config, transform: str):
    """What follows the token embedding: plain, scaled (by the root of the width) or normed."""
    lookup(EMBEDDING_VARIANTS, transform, "embedding")
    return {"model.embedding": transform}


def tie_embeddings(config, tied: str):
    """Whether the output matrix is the embedding. Press & Wolf 2016, 1608.05859."""
    return {"model.tie_embeddings": tied}


def depth(config, layers: str):
    """Number of layers; a multiple of the pattern's length, so that the mix of layers stays.

    Kaplan et al. 2020, 2001.08361.
    """
    count, period = _whole("depth", layers), len(config.model.pattern)
    below = max(count // period, 1) * period
    choices = sorted({below, below + period})
    require(
        count % period == 0 and count > 0,
        f"depth={count} must be a positive multiple of the {period} letters of model.pattern={config.model.pattern!r}; "
        f"try {' or '.join(map(str, choices))}.",
    )
    return {"model.num_layers": count}


def width(config, dim: str):
    """Width of the residual stream; the head dim and the number of key/value heads stay, so the heads change.

    Kaplan et al. 2020, 2001.08361.
    """
    m, new = config.model, _whole("width", dim)
    head_dim = m.head_dim or m.model_dim // m.num_heads
    # One key/value head per query head stays so; any other number stays and must divide the heads.
    step = head_dim if m.num_kv_heads in (0, m.num_heads) else math.lcm(head_dim, head_dim * m.num_kv_heads)
    below = max(new // step, 1) * step
    require(
        new % step == 0 and new > 0,
        f"width={new} must be a positive multiple of {step}, the head dim {head_dim} times the key/value heads it is "
        f"shared by; try {' or '.join(map(str, sorted({below, below + step})))}.",
    )
    heads = new // head_dim
    changes = {"model.model_dim": new, "model.num_heads": heads, "model.mlp_dim": round(m.mlp_dim * new / m.model_dim)}
    return changes | ({"model.num_kv_heads": heads} if m.num_kv_heads == m.num_heads else {})


def dropout(config, rate: str):
    """Dropout rate after the embedding, the attention and the MLP. Hinton et al. 2012, 1207.0580."""
    return {"model.dropout": rate}


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} must be a whole number.") from None


def _call(name: str, *numbers: str) -> str:
    given = [number for number in numbers if number]
    return f"{name}({', '.join(given)})" if given else name
