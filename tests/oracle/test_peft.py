"""Adapters against PEFT on a tiny Llama: it loads ours, we load its, and all four models say the same."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from foundry_jax.model import lora
from foundry_jax.model.transformer import Transformer
from foundry_jax.train_step import unbox
from foundry_jax.zoo import peft
from foundry_jax.zoo.adapted import Adapted
from foundry_jax.zoo.folder import HuggingFaceFolder
from foundry_jax.zoo.load import abstract_params, load

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
hf = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
theirs = pytest.importorskip("peft", reason="needs the oracle extra: make oracle")

ATOL = 1e-5  # at logits of 3, which adapters change by 0.5 to 3; measured: at most 4e-6 off
RANK, ALPHA = 4, 6.0
TARGETS = {".*": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
           "attention/(query|value)": ["q_proj", "v_proj"], "down|out": r".*\.(o_proj|down_proj)"}  # fmt: skip


SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "Llama": {"head_dim": 24, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def write_base(folder, family):
    """Writes a tiny random model, its numbers well away from those of an untrained one."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(hf, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn_like(x) * 0.1) if x.ndim > 1 else x.add_(torch.randn_like(x) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny random Llama."""
    return write_base(tmp_path_factory.mktemp("base"), "Llama")


def tokens():
    return np.random.default_rng(0).integers(0, 97, (3, 21))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens())).logits.numpy()


def their_base(base):
    return hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def our_base(base, scan_layers=False):
    """Returns (config, parameters)."""
    source = HuggingFaceFolder(base)
    model = dataclasses.replace(source.model, scan_layers=scan_layers)
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), unbox(abstract_params(model)))
    return model, load(source.read, model, where)


def our_logits(model, **variables):
    return apply(model, variables)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables):
    return Transformer(model).apply(variables, tokens())[0]


def random_adapters(model, targets):
    rng = np.random.default_rng(1)
    shapes = unbox(jax.eval_shape(lambda: lora.init(model, RANK, targets, jax.random.key(0))))
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def assert_both_equal(model, params, tree, scale, expected):
    """Adapters beside the parameters and merged into them."""
    beside = our_logits(model, params=params, lora=lora.scaled(tree, scale))
    merged = our_logits(model, params=lora.merge(params, tree, scale))
    np.testing.assert_allclose(beside, expected, atol=ATOL)
    np.testing.assert_allclose(merged, expected, atol=ATOL)
    np.testing.assert_allclose(merged, beside, atol=ATOL)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_peft_loads_ours(base, tmp_path, targets, rslora, scan_layers):
    model, params = our_base(base, scan_layers)
    tree = random_adapters(model, targets)
    peft.save(tmp_path / "ours", tree, model=model, alpha=ALPHA, rslora=rslora, dropout=0.1, base_name=str(base))
    loaded = theirs.PeftModel.from_pretrained(their_base(base), tmp_path / "ours")
    sizes = [x.numel() for name, x in loaded.named_parameters() if "lora_" in name]
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(tree))
    expected = their_logits(loaded)
    assert np.abs(expected - their_logits(their_base(base))).max() > 0.1
    assert_both_equal(model, params, tree, lora.scale_of(RANK, ALPHA, rslora=rslora), expected)
    np.testing.assert_allclose(their_logits(loaded.merge_and_unload()), expected, atol=ATOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours_of_every_family(tmp_path, family):
    base = write_base(tmp_path / "base", family)
    model, params = our_base(base)
    tree = random_adapters(model, ".*")
    peft.save(tmp_path / "ours", tree, model=model, alpha=RANK, rslora=False, dropout=0.0, base_name=str(base))
    expected = their_logits(theirs.PeftModel.from_pretrained(their_base(base), tmp_path / "ours"))
    assert np.abs(expected - their_logits(their_base(base))).max() > 0.5
    assert_both_equal(model, params, tree, 1.0, expected)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_we_load_pefts(base, tmp_path, targets, rslora):
    config = theirs.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, use_rslora=rslora, target_modules=TARGETS[targets],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = theirs.get_peft_model(their_base(base), config)
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if "lora_" in name:
                x.copy_(torch.randn_like(x) * 0.1)
    expected = their_logits(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    for scan_layers in (False, True):
        model, params = our_base(base, scan_layers)
        found = peft.load(tmp_path / "theirs", model)
        assert (found.rank, found.alpha, found.rslora, found.dropout) == (RANK, ALPHA, rslora, 0.1)
        assert found.base_name == str(base) == peft.base_of(tmp_path / "theirs")
        assert_both_equal(model, params, found.tree, found.scale, expected)


def test_a_source_with_adapters_reads_as_the_merged_model(base, tmp_path):
    model, params = our_base(base)
    config = theirs.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = theirs.get_peft_model(their_base(base), config)
    adapted.save_pretrained(tmp_path / "theirs")
    found = peft.load(tmp_path / "theirs", model)
    source = Adapted("adapted", HuggingFaceFolder(base), found.tree, found.scale)
    where = jax.tree.map(lambda x: x.sharding, params)
    merged = load(source.read, model, where)
    np.testing.assert_allclose(our_logits(model, params=merged), their_logits(adapted), atol=ATOL)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_pefts_other_adapters_are_refused(base, tmp_path, changes):
    model = HuggingFaceFolder(base).model
    config = theirs.LoraConfig(**{"r": RANK, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes)
    theirs.get_peft_model(their_base(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="is not supported|belongs to no linear map"):
        peft.load(tmp_path / "theirs", model)
