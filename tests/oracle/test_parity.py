"""The model against `transformers`: same weights, same logits, same gradients.

Oracles are re-initialised away from their defaults (weights N(0, .15), 1-D tensors += N(0, .2)): with the defaults a
wrong rotary pairing moves the logits by only 9e-3, so a sloppy model would pass. Measured floors between two correct
implementations at these sizes are 7e-6 on logits and 2e-6 relative on gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.config import load
from foundry_jax.losses import token_statistics
from foundry_jax.model import transformer
from foundry_jax.model.mask import Placement
from foundry_jax.model.transformer import Transformer

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
transformers = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")

ROPE = {"rope_type": "default", "rope_theta": 1e4}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rope_parameters": ROPE,
    "attn_implementation": "eager",
    "pad_token_id": None,
}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
LOGITS_ATOL, GRADIENT_RTOL = 5e-5, 1e-4


def config_of(hf, **changes):
    """Returns our model config with a Hugging Face config's sizes."""
    return dataclasses.replace(
        load("configs/baseline.py").model,
        vocab_size=hf.vocab_size,
        context_length=32,
        num_layers=hf.num_hidden_layers,
        model_dim=hf.hidden_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        mlp_dim=hf.intermediate_size,
        norm_epsilon=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        **changes,
    )


def reinitialised(model):
    """Returns a torch model whose every weight matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model.eval()


def llama(kv_heads, *, head_dim, tied):
    """Returns (torch model, our config, our parameter path -> (their name, our shape))."""
    hf = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, rms_norm_eps=1e-5
    )
    config = config_of(hf, head_dim=head_dim)
    names = common_names(config)
    for i in range(config.num_layers):
        ours, theirs = f"block_{i}/attention", f"model.layers.{i}.self_attn"
        heads, kv = (config.num_heads, head_dim), (kv_heads, head_dim)
        names[f"{ours}/query/kernel"] = (f"{theirs}.q_proj.weight", (64, *heads))
        names[f"{ours}/key/kernel"] = (f"{theirs}.k_proj.weight", (64, *kv))
        names[f"{ours}/value/kernel"] = (f"{theirs}.v_proj.weight", (64, *kv))
        names[f"{ours}/out/kernel"] = (f"{theirs}.o_proj.weight", (*heads, 64))
    return reinitialised(transformers.LlamaForCausalLM(hf)), config, names


def deepseek_v3(q_lora_rank):
    """Returns the same for DeepSeek-V3's latent attention in a dense model."""
    hf = transformers.DeepseekV3Config(
        **SIZES, **LATENT, q_lora_rank=q_lora_rank, num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=8,
        n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2, moe_intermediate_size=48, num_mtp_layers=0,
        rms_norm_eps=1e-5)  # fmt: skip
    config = config_of(hf, attention="mla", q_lora_rank=q_lora_rank or 0, **LATENT)
    names = common_names(config)
    qk = LATENT["qk_nope_head_dim"] + LATENT["qk_rope_head_dim"]
    for i in range(config.num_layers):
        ours, theirs = f"block_{i}/attention", f"model.layers.{i}.self_attn"
        if q_lora_rank:
            names[f"{ours}/query_down/kernel"] = (f"{theirs}.q_a_proj.weight", (64, q_lora_rank))
            names[f"{ours}/query_norm/scale"] = (f"{theirs}.q_a_layernorm.weight", (q_lora_rank,))
            names[f"{ours}/query_up/kernel"] = (f"{theirs}.q_b_proj.weight", (q_lora_rank, 4, qk))
        else:
            names[f"{ours}/query/kernel"] = (f"{theirs}.q_proj.weight", (64, 4, qk))
        names[f"{ours}/kv_down/kernel"] = (f"{theirs}.kv_a_proj_with_mqa.weight", (64, 20 + 8))
        names[f"{ours}/kv_norm/scale"] = (f"{theirs}.kv_a_layernorm.weight", (20,))
        names[f"{ours}/kv_up/kernel"] = (f"{theirs}.kv_b_proj.weight", (20, 4, 12 + 10))
        names[f"{ours}/out/kernel"] = (f"{theirs}.o_proj.weight", (4, 10, 64))
    return reinitialised(transformers.DeepseekV3ForCausalLM(hf)), config, names


def common_names(config):
    """Returns the names that all of them share."""
    names = {
        "embed/embedding": ("model.embed_tokens.weight", None),
        "final_norm/scale": ("model.norm.weight", (64,)),
    }
    if not config.tie_embeddings:
        names["unembed/kernel"] = ("lm_head.weight", (64, 97))
    for i in range(config.num_layers):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        names[f"{ours}/attention_norm/scale"] = (f"{theirs}.input_layernorm.weight", (64,))
        names[f"{ours}/mlp_norm/scale"] = (f"{theirs}.post_attention_layernorm.weight", (64,))
        for part in ("gate", "up"):
            names[f"{ours}/mlp/{part}/kernel"] = (f"{theirs}.mlp.{part}_proj.weight", (64, config.mlp_dim))
        names[f"{ours}/mlp/down/kernel"] = (f"{theirs}.mlp.down_proj.weight", (config.mlp_dim, 64))
    return names


def converted(tensors, names):
    """Returns our tree of {their name: [out, in] array}; a None shape keeps the layout."""
    tree = {}
    for path, (name, shape) in names.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        array = tensors[name].detach().numpy()
        node[leaf] = jnp.asarray(array if shape is None else array.T.reshape(shape))
    return {"params": tree}


CASES = {
    "llama_mha_untied": lambda: llama(4, head_dim=16, tied=False),
    "llama_gqa_tied_wide_heads": lambda: llama(2, head_dim=24, tied=True),
    "llama_mqa": lambda: llama(1, head_dim=24, tied=True),
    "deepseek_v3": lambda: deepseek_v3(None),
    "deepseek_v3_q_lora": lambda: deepseek_v3(24),
}


@pytest.fixture(params=CASES)
def oracle(request):
    """(torch model, our config, our parameters, name table, tokens [3, 21])."""
    model, config, names = CASES[request.param]()
    params = converted(dict(model.named_parameters()), names)
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in jax.tree.leaves(params))
    return model, config, params, names, np.random.default_rng(0).integers(1, 97, (3, 21))


def test_logits_and_gradients_equal_the_oracles(oracle):
    model, config, params, names, tokens = oracle
    theirs = model(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens))
    theirs.loss.backward()

    def loss(params):
        logits, _ = Transformer(config).apply(params, tokens)
        return jnp.mean(token_statistics(logits[:, :-1], jnp.asarray(tokens[:, 1:])).nll), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, theirs.logits.detach().numpy(), atol=LOGITS_ATOL)
    assert float(value) == pytest.approx(theirs.loss.item(), rel=1e-5)
    expected = converted({name: p.grad for name, p in model.named_parameters()}, names)

    def close(path, ours, oracles):
        limit = GRADIENT_RTOL * float(jnp.abs(oracles).max())
        np.testing.assert_allclose(ours, oracles, atol=limit, err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, grads, expected)


def test_cached_decoding_equals_the_oracles_forward_pass(oracle):
    model, config, params, _, tokens = oracle
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    decode = jax.jit(lambda tokens, placement, cache: Transformer(config).apply(params, tokens, placement, cache))
    cache = transformer.init_cache(config, 3, 32)
    parts, start = [], 0
    for length in [9] + [1] * 12:
        positions = jnp.broadcast_to(jnp.arange(start, start + length), (3, length))
        logits, cache = decode(tokens[:, start : start + length], Placement(positions), cache)
        parts.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=LOGITS_ATOL)
