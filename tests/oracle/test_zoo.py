"""Checkpoints that transformers wrote are read at its own numbers, and what we write it reads back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import zoo
from foundry_jax.zoo.export import export

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
hf = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
families = pytest.importorskip("tests.oracle.families")

# Of families.FAMILIES: those that the zoo reads, tied and untied, with and without windows, norms, biases, experts.
NAMES = (
    "llama_mha_untied", "llama_gqa_wide_heads", "llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn",
    "llama_rope_yarn_mscale", "llama_geglu_tanh", "llama_all_biases", "mistral_window", "qwen2_window_in_second_layer",
    "qwen3", "olmo2", "mixtral",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, families.VOCAB, (3, 21))


def opened(folder, dtype):
    """Returns what transformers makes of a folder, every tensor of it used and none made up."""
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """What save_pretrained wrote of a model in bfloat16: many files and an index."""
    folder = tmp_path_factory.mktemp(request.param)
    families.FAMILIES[request.param].make().to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_logits_equal_those_of_transformers(folder):
    ours = zoo.load_pretrained(folder).logits(jnp.asarray(TOKENS))
    np.testing.assert_allclose(ours, logits_of(opened(folder, torch.float32)), atol=5e-5)


def test_an_export_is_the_same_model_to_transformers_bit_for_bit(folder, tmp_path):
    export(zoo.open_source(folder), tmp_path / "out", shard_bytes=60_000)
    ours, theirs = opened(tmp_path / "out", torch.bfloat16), opened(folder, torch.bfloat16)
    assert type(ours) is type(theirs)
    ours_state, their_state = ours.state_dict(), theirs.state_dict()
    assert ours_state.keys() == their_state.keys()
    assert all(torch.equal(ours_state[name], their_state[name]) for name in their_state)
    exported, original = (opened(path, torch.float32) for path in (tmp_path / "out", folder))
    np.testing.assert_array_equal(logits_of(exported), logits_of(original))
