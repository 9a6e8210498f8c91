"""FAMILIES: tiny `transformers` models, the fields of our config that mean the same, and where each parameter lies.

A name table is data: our path -> "their_name LAYOUT" or "their_name LAYOUT part". A layout such as NH,D->DNH reads: the
axes of their tensor (letters run together are one axis of theirs), then ours. P is an axis on which they keep several
of our parameters in one tensor (query, key and value; gate and up); `part` says which one is meant.

The names are those of transformers 5 in memory, where experts are fused; the files it saves have others.
pad_token_id must be None: with 0, torch drops the gradient of the embedding's row 0.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import transformers as hf

VOCAB, MODEL_DIM, LAYERS = 97, 64, 2


@dataclasses.dataclass(frozen=True)
class Family:
    """One tiny oracle beside our description of it."""

    make: Callable[[], torch.nn.Module]
    fields: dict  # of our ModelConfig
    whole: dict  # names outside the layers
    layers: tuple[dict, ...]  # names inside each layer, after `block_i/` and `layer_prefix`
    layer_prefix: str = "model.layers.{i}."
    scale_offset: float = 0.0  # Gemma and Nemotron keep norm scales minus one

    def names(self) -> dict[str, tuple[str, str, int | None]]:
        """Returns our path -> (their name, layout, part)."""
        rows = dict(self.whole)
        for i, layer in enumerate(self.layers):
            prefix = self.layer_prefix.format(i=i)
            rows |= {f"block_{i}/{path}": prefix + row for path, row in layer.items()}
        split = {path: row.split() for path, row in rows.items()}
        return {path: (name, layout, int(part[0]) if part else None) for path, (name, layout, *part) in split.items()}


# ------------------------------------------------------------------------------------------------ name tables

TIED = {"embed/embedding": "model.embed_tokens.weight V,D->VD", "final_norm/scale": "model.norm.weight D->D"}
UNTIED = TIED | {"unembed/kernel": "lm_head.weight V,D->DV"}
NORMS = {
    "attention_norm/scale": "input_layernorm.weight D->D",
    "mlp_norm/scale": "post_attention_layernorm.weight D->D",
}
POST_NORMS = {
    "attention_post_norm/scale": "post_attention_layernorm.weight D->D",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight D->D",
}
SANDWICH_NORMS = POST_NORMS | {
    "attention_norm/scale": "input_layernorm.weight D->D",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight D->D",
}
ATTENTION = {
    "attention/query/kernel": "self_attn.q_proj.weight NH,D->DNH",
    "attention/key/kernel": "self_attn.k_proj.weight KH,D->DKH",
    "attention/value/kernel": "self_attn.v_proj.weight KH,D->DKH",
    "attention/out/kernel": "self_attn.o_proj.weight D,NH->NHD",
}
QKV_BIASES = {
    "attention/query/bias": "self_attn.q_proj.bias NH->NH",
    "attention/key/bias": "self_attn.k_proj.bias KH->KH",
    "attention/value/bias": "self_attn.v_proj.bias KH->KH",
}
ATTENTION_BIASES = QKV_BIASES | {"attention/out/bias": "self_attn.o_proj.bias D->D"}
QK_NORM = {
    "attention/query_norm/scale": "self_attn.q_norm.weight H->H",
    "attention/key_norm/scale": "self_attn.k_norm.weight H->H",
}
LATENT = {
    "attention/kv_down/kernel": "self_attn.kv_a_proj_with_mqa.weight C,D->DC",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight R->R",
    "attention/kv_up/kernel": "self_attn.kv_b_proj.weight NH,R->RNH",
    "attention/out/kernel": "self_attn.o_proj.weight D,NH->NHD",
}
FULL_QUERY = {"attention/query/kernel": "self_attn.q_proj.weight NH,D->DNH"}
LOW_RANK_QUERY = {
    "attention/query_down/kernel": "self_attn.q_a_proj.weight R,D->DR",
    "attention/query_norm/scale": "self_attn.q_a_layernorm.weight R->R",
    "attention/query_up/kernel": "self_attn.q_b_proj.weight NH,R->RNH",
}
PLAIN_MLP = {"mlp/up/kernel": "mlp.up_proj.weight F,D->DF", "mlp/down/kernel": "mlp.down_proj.weight D,F->FD"}
GATED_MLP = PLAIN_MLP | {"mlp/gate/kernel": "mlp.gate_proj.weight F,D->DF"}
GATED_MLP_BIASES = {
    "mlp/gate/bias": "mlp.gate_proj.bias F->F",
    "mlp/up/bias": "mlp.up_proj.bias F->F",
    "mlp/down/bias": "mlp.down_proj.bias D->D",
}
EXPERTS = {
    "mlp/router/kernel": "mlp.gate.weight E,D->DE",
    "mlp/experts/gate/kernel": "mlp.experts.gate_up_proj E,PF,D->EDF 0",
    "mlp/experts/up/kernel": "mlp.experts.gate_up_proj E,PF,D->EDF 1",
    "mlp/experts/down/kernel": "mlp.experts.down_proj E,D,F->EFD",
}
SHARED_EXPERTS = {
    "mlp/shared/gate/kernel": "mlp.shared_experts.gate_proj.weight F,D->DF",
    "mlp/shared/up/kernel": "mlp.shared_experts.up_proj.weight F,D->DF",
    "mlp/shared/down/kernel": "mlp.shared_experts.down_proj.weight D,F->FD",
}
BALANCE_BIAS = {"mlp/router/balance_bias": "mlp.gate.e_score_correction_bias E->E"}
LLAMA = NORMS | ATTENTION | GATED_MLP
MIXTURE = NORMS | ATTENTION | EXPERTS

NEMOTRON_WHOLE = UNTIED | {"final_norm/bias": "model.norm.bias D->D"}
NEMOTRON = ATTENTION | PLAIN_MLP | NORMS | {
    "attention_norm/bias": "input_layernorm.bias D->D",
    "mlp_norm/bias": "post_attention_layernorm.bias D->D",
}  # fmt: skip
MPT_WHOLE = {"embed/embedding": "transformer.wte.weight V,D->VD", "final_norm/scale": "transformer.norm_f.weight D->D"}
MPT = {
    "attention_norm/scale": "norm_1.weight D->D",
    "attention/query/kernel": "attn.Wqkv.weight PNH,D->DNH 0",
    "attention/key/kernel": "attn.Wqkv.weight PNH,D->DNH 1",
    "attention/value/kernel": "attn.Wqkv.weight PNH,D->DNH 2",
    "attention/out/kernel": "attn.out_proj.weight D,NH->NHD",
    "mlp_norm/scale": "norm_2.weight D->D",
    "mlp/up/kernel": "ffn.up_proj.weight F,D->DF",
    "mlp/down/kernel": "ffn.down_proj.weight D,F->FD",
}
BLOOM_WHOLE = {
    "embed/embedding": "transformer.word_embeddings.weight V,D->VD",
    "embed_norm/scale": "transformer.word_embeddings_layernorm.weight D->D",
    "embed_norm/bias": "transformer.word_embeddings_layernorm.bias D->D",
    "final_norm/scale": "transformer.ln_f.weight D->D",
    "final_norm/bias": "transformer.ln_f.bias D->D",
}
BLOOM = {
    "attention_norm/scale": "input_layernorm.weight D->D",
    "attention_norm/bias": "input_layernorm.bias D->D",
    "attention/query/kernel": "self_attention.query_key_value.weight NPH,D->DNH 0",
    "attention/key/kernel": "self_attention.query_key_value.weight NPH,D->DNH 1",
    "attention/value/kernel": "self_attention.query_key_value.weight NPH,D->DNH 2",
    "attention/query/bias": "self_attention.query_key_value.bias NPH->NH 0",
    "attention/key/bias": "self_attention.query_key_value.bias NPH->NH 1",
    "attention/value/bias": "self_attention.query_key_value.bias NPH->NH 2",
    "attention/out/kernel": "self_attention.dense.weight D,NH->NHD",
    "attention/out/bias": "self_attention.dense.bias D->D",
    "mlp_norm/scale": "post_attention_layernorm.weight D->D",
    "mlp_norm/bias": "post_attention_layernorm.bias D->D",
    "mlp/up/kernel": "mlp.dense_h_to_4h.weight F,D->DF",
    "mlp/up/bias": "mlp.dense_h_to_4h.bias F->F",
    "mlp/down/kernel": "mlp.dense_4h_to_h.weight D,F->FD",
    "mlp/down/bias": "mlp.dense_4h_to_h.bias D->D",
}
GPT2_WHOLE = {
    "embed/embedding": "transformer.wte.weight V,D->VD",
    "position_embed/embedding": "transformer.wpe.weight L,D->LD",
    "final_norm/scale": "transformer.ln_f.weight D->D",
    "final_norm/bias": "transformer.ln_f.bias D->D",
}
GPT2 = {  # its Conv1D keeps weights [in, out]
    "attention_norm/scale": "ln_1.weight D->D",
    "attention_norm/bias": "ln_1.bias D->D",
    "attention/query/kernel": "attn.c_attn.weight D,PNH->DNH 0",
    "attention/key/kernel": "attn.c_attn.weight D,PNH->DNH 1",
    "attention/value/kernel": "attn.c_attn.weight D,PNH->DNH 2",
    "attention/query/bias": "attn.c_attn.bias PNH->NH 0",
    "attention/key/bias": "attn.c_attn.bias PNH->NH 1",
    "attention/value/bias": "attn.c_attn.bias PNH->NH 2",
    "attention/out/kernel": "attn.c_proj.weight NH,D->NHD",
    "attention/out/bias": "attn.c_proj.bias D->D",
    "mlp_norm/scale": "ln_2.weight D->D",
    "mlp_norm/bias": "ln_2.bias D->D",
    "mlp/up/kernel": "mlp.c_fc.weight D,F->DF",
    "mlp/up/bias": "mlp.c_fc.bias F->F",
    "mlp/down/kernel": "mlp.c_proj.weight F,D->FD",
    "mlp/down/bias": "mlp.c_proj.bias D->D",
}

# ------------------------------------------------------------------------------------------------ families

ROPE = {"rope_type": "default", "rope_theta": 1e4}
NO_SPECIALS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"}
NO_SPECIALS |= {"experts_implementation": "eager"}
SIZES = NO_SPECIALS | {
    "vocab_size": VOCAB,
    "hidden_size": MODEL_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rope_parameters": ROPE,
}
FIELDS = {  # of the same sizes; a family names what differs
    "vocab_size": VOCAB,
    "context_length": 32,
    "num_layers": LAYERS,
    "model_dim": MODEL_DIM,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 96,
    "norm_epsilon": 1e-5,
    "tie_embeddings": False,
    "rope_theta": 1e4,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
}
LATENT_SIZES = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def decoder(name, hf_fields, fields, whole, layers, **options):
    """Returns a Family of the class hf.<name>ForCausalLM; one table of `layers` stands for all."""
    layers = layers if isinstance(layers, tuple) else (layers,) * LAYERS

    def make():
        config = getattr(hf, f"{name}Config")(**hf_fields)
        model = getattr(hf, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
        return reinitialised(model)

    return Family(make, FIELDS | fields, whole, layers, **options)


def llama(hf_fields, fields, layer=LLAMA):
    """Returns a Llama with tied embeddings and 2 key/value heads unless told otherwise."""
    base = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    base |= hf_fields
    whole = TIED if base["tie_word_embeddings"] else UNTIED
    return decoder("Llama", base, {"tie_embeddings": base["tie_word_embeddings"]} | fields, whole, layer)


def gqa(name, hf_fields, fields, layers, whole=UNTIED, **options):
    """Returns a family of Llama's sizes with two key/value heads."""
    base = SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5} | hf_fields
    return decoder(name, base, fields, whole, layers, **options)


def deepseek(version, hf_fields, moe, *, q_lora_rank=None, dense_layers=1, **fields):
    """Returns a DeepSeek-V2 or V3 whose first layers are dense."""
    base = SIZES | DEEPSEEK | LATENT_SIZES | {"q_lora_rank": q_lora_rank, "first_k_dense_replace": dense_layers}
    attention = NORMS | LATENT | (LOW_RANK_QUERY if q_lora_rank else FULL_QUERY)
    experts = attention | EXPERTS | SHARED_EXPERTS | (BALANCE_BIAS if version == "V3" else {})
    layers = tuple(attention | GATED_MLP if i < dense_layers else experts for i in range(LAYERS))
    ours = LATENT_SIZES | {"attention": "mla", "num_kv_heads": 4, "q_lora_rank": q_lora_rank or 0, "moe": moe}
    return decoder(f"Deepseek{version}", base | hf_fields, ours | fields, UNTIED, layers)


def deepseek_v3(**options):
    """Returns a DeepSeek-V3 with 4 groups of 2 experts, of which 2 groups are searched."""
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}
    moe = "sigmoid(experts=8, top_k=3, groups=4, top_groups=2, scale=2.5, shared=2, dense_layers=1, expert_dim=48)"
    moe = "none" if options.get("dense_layers") == LAYERS else moe
    return deepseek("V3", groups | options.pop("hf_fields", {}), moe, **options)


def deepseek_v2(hf_fields, moe, **options):
    """Returns a DeepSeek-V2: softmax scores, not renormalised."""
    moe = f"softmax_unnormalized(experts=8, top_k=3, scale=1.5, shared=2, dense_layers=1, expert_dim=48{moe})"
    return deepseek("V2", {"routed_scaling_factor": 1.5} | hf_fields, moe, **options)


def plain(name, hf_fields, heads, dim, fields, whole, layer, *, layer_prefix):
    """Returns a family of GPT-2's kind: a key/value head for every head, an MLP four times as wide, tied embeddings."""
    sizes = {
        "model_dim": dim,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": dim // heads,
        "mlp_dim": 4 * dim,
        "tie_embeddings": True,
    }
    return decoder(name, hf_fields, sizes | fields, whole, layer, layer_prefix=layer_prefix)


def mpt(heads, dim):
    """Returns an MPT: ALiBi, LayerNorm without bias, plain GELU."""
    sizes = {"d_model": dim, "n_heads": heads, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": VOCAB}
    ours = {"position": "alibi", "norm": "layernorm_nobias", "mlp": "gelu"}
    return plain("Mpt", NO_SPECIALS | sizes, heads, dim, ours, MPT_WHOLE, MPT, layer_prefix="transformer.blocks.{i}.")


def bloom(heads, dim):
    """Returns a Bloom: ALiBi, a norm after the embedding, biases everywhere, GELU by tanh."""
    sizes = {"hidden_size": dim, "n_head": heads, "n_layer": LAYERS, "vocab_size": VOCAB}
    ours = {"position": "alibi", "norm": "layernorm", "mlp": "gelu_tanh", "bias": "all", "embedding": "normed"}
    return plain("Bloom", NO_SPECIALS | sizes, heads, dim, ours, BLOOM_WHOLE, BLOOM, layer_prefix="transformer.h.{i}.")


def gpt2():
    """Returns a GPT-2: learned positions, LayerNorm, biases everywhere, GELU by tanh."""
    sizes = {"n_embd": MODEL_DIM, "n_head": 4, "n_layer": LAYERS, "n_positions": 32, "vocab_size": VOCAB}
    ours = {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": "all"}
    return plain("GPT2", NO_SPECIALS | sizes, 4, MODEL_DIM, ours, GPT2_WHOLE, GPT2, layer_prefix="transformer.h.{i}.")


FAMILIES = {
    "llama_mha_untied": llama(
        {"num_key_value_heads": 4, "tie_word_embeddings": False}, {"num_kv_heads": 4, "tie_embeddings": False}
    ),
    "llama_gqa_wide_heads": llama({"head_dim": 24}, {"head_dim": 24}),
    "llama_mqa": llama({"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "llama_rope_linear": llama(
        {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": "linear(factor=4)"}
    ),
    "llama_rope_llama3": llama(
        {"rope_parameters": LLAMA3}, {"rope_scaling": "llama3(factor=8, original_length=32, low=1, high=4)"}
    ),
    "llama_rope_yarn": llama({"rope_parameters": YARN}, {"rope_scaling": "yarn(factor=4, original_length=512)"}),
    "llama_rope_yarn_mscale": llama(
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}},
        {"rope_scaling": "yarn(factor=4, original_length=512, mscale=1, mscale_all_dim=0.8)"},
    ),
    "llama_geglu": llama({"hidden_act": "gelu"}, {"mlp": "geglu"}),
    "llama_geglu_tanh": llama({"hidden_act": "gelu_pytorch_tanh"}, {"mlp": "geglu_tanh"}),
    "llama_glu": llama({"hidden_act": "sigmoid"}, {"mlp": "glu"}),
    "llama_attention_biases": llama({"attention_bias": True}, {"bias": "attention"}, LLAMA | ATTENTION_BIASES),
    "llama_all_biases": llama(
        {"attention_bias": True, "mlp_bias": True}, {"bias": "all"}, LLAMA | ATTENTION_BIASES | GATED_MLP_BIASES
    ),
    "mistral_window": gqa("Mistral", {"sliding_window": 5}, {"pattern": "S", "window": 5}, LLAMA),
    "qwen2_window_in_second_layer": gqa(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"bias": "qkv", "pattern": "LS", "window": 4},
        LLAMA | QKV_BIASES,
    ),
    "qwen3": gqa("Qwen3", {"head_dim": 16}, {"qk_norm": "head"}, LLAMA | QK_NORM),
    "olmo2": gqa(
        "Olmo2", {}, {"qk_norm": "whole", "norm_placement": "post"}, POST_NORMS | ATTENTION | QK_NORM | GATED_MLP
    ),
    "gemma": gqa(
        "Gemma",
        {"num_key_value_heads": 1, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
        {"num_kv_heads": 1, "mlp": "geglu_tanh", "embedding": "scaled", "tie_embeddings": True},
        LLAMA,
        TIED,
        scale_offset=1.0,
    ),
    "gemma2_softcap_sandwich": gqa(
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": None,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "mlp": "geglu_tanh",
            "embedding": "scaled",
            "tie_embeddings": True,
            "attention_softcap": 2.0,
            "norm_placement": "sandwich",
            "pattern": "SL",
            "window": 5,
        },
        SANDWICH_NORMS | ATTENTION | GATED_MLP,
        TIED,
        scale_offset=1.0,
    ),
    "smollm3_no_position": gqa(
        "SmolLM3", {"no_rope_layers": [0, 0], "tie_word_embeddings": False}, {"position": "none"}, LLAMA
    ),
    "nemotron_relu2": gqa(
        "Nemotron",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}, "head_dim": 16, "norm_eps": 1e-5},
        {"mlp": "relu2", "norm": "layernorm"},
        NEMOTRON,
        NEMOTRON_WHOLE,
        scale_offset=1.0,
    ),
    "mixtral": gqa(
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"moe": "softmax(experts=4, top_k=2, expert_dim=96)"},
        MIXTURE,
    ),
    "qwen3_moe": gqa(
        "Qwen3Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {"qk_norm": "head", "moe": "softmax(experts=4, top_k=2, expert_dim=48)"},
        MIXTURE | QK_NORM,
    ),
    "deepseek_v2": deepseek_v2({"topk_method": "greedy"}, ""),
    "deepseek_v2_groups": deepseek_v2(
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, ", groups=4, top_groups=2"
    ),
    "deepseek_v3": deepseek_v3(),
    "deepseek_v3_q_lora": deepseek_v3(q_lora_rank=24),
    "deepseek_v3_dense": deepseek_v3(dense_layers=LAYERS),
    "deepseek_v3_yarn": deepseek_v3(
        hf_fields={"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}},
        rope_scaling="yarn(factor=4, original_length=512, mscale=1, mscale_all_dim=0.8)",
    ),
    "mpt_4_heads": mpt(4, 64),
    "mpt_6_heads": mpt(6, 96),
    "bloom_4_heads": bloom(4, 64),
    "bloom_6_heads": bloom(6, 96),
    "gpt2": gpt2(),
}


# ------------------------------------------------------------------------------------------------ tensors


def reinitialised(model):
    """Returns a torch model whose every weight matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.parameters(), *balance_biases(model).values()]:
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model.eval()


def balance_biases(model) -> dict[str, torch.Tensor]:
    """Returns the buffers that are ours to set: those that steer routers."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def tensors(model) -> dict[str, np.ndarray]:
    """Returns every parameter and router bias by its name."""
    both = dict(model.named_parameters()) | balance_biases(model)
    return {name: tensor.detach().numpy() for name, tensor in both.items()}


def gradients(model) -> dict[str, np.ndarray]:
    """Returns the gradient of every parameter by its name, zero where it has none; router biases never have one."""
    both = dict(model.named_parameters()) | balance_biases(model)
    return {name: (torch.zeros_like(x) if x.grad is None else x.grad).detach().numpy() for name, x in both.items()}


def converted(family: Family, arrays: dict[str, np.ndarray], *, offset: bool = True) -> dict:
    """Returns our nested parameters of their arrays; offset=False for gradients.

    Raises AssertionError unless each of their arrays is used exactly once, every part of it.
    """
    tree, taken = {}, set()
    for path, (name, layout, part) in family.names().items():
        assert (name, part) not in taken, f"{name} is used twice"
        taken.add((name, part))
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        shift = family.scale_offset if offset and leaf == "scale" else 0.0
        node[leaf] = rearranged(arrays[name], layout, part, family.fields) + np.float32(shift)
    assert {name for name, _ in taken} == set(arrays)
    assert sum(leaf.size for leaf in leaves(tree)) == sum(array.size for array in arrays.values())
    return tree


def leaves(tree) -> list[np.ndarray]:
    """Returns the arrays of a nested dict."""
    return [x for part in tree.values() for x in (leaves(part) if isinstance(part, dict) else [part])]


def rearranged(array: np.ndarray, layout: str, part: int | None, fields: dict) -> np.ndarray:
    """Returns their array with our axes; see the module's docstring for the layouts."""
    theirs, ours = layout.split("->")
    known = {"N": fields["num_heads"], "K": fields["num_kv_heads"]}
    shape = []
    for letters, size in zip(theirs.split(","), array.shape, strict=True):
        if "P" in letters:
            known["P"] = 2 if letters == "PF" else 3
        free = [letter for letter in letters if letter not in known]
        assert len(free) <= 1
        rest = size // int(np.prod([known[letter] for letter in letters if letter in known]))
        shape += [known.get(letter, rest) for letter in letters]
    array = array.reshape(shape)
    axes = theirs.replace(",", "")
    if part is not None:
        array = np.take(array, part, axis=axes.index("P"))
        axes = axes.replace("P", "")
    return array.transpose([axes.index(letter) for letter in ours])
