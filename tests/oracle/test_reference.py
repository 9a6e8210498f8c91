"""The reference of the contract suite against `transformers`: it must be right before it may judge."""

import types

import numpy as np
import pytest

from tests import reference

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
families = pytest.importorskip("tests.oracle.families")

NO_CHOICES = {  # so that this needs nothing of the model that the reference judges
    "attention": "gqa",
    "bias": "none",
    "qk_norm": "none",
    "attention_softcap": 0.0,
    "pattern": "L",
    "sparse": "strided",
    "mlp": "swiglu",
    "moe": "none",
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "position": "rope",
    "rope_scaling": "none",
    "embedding": "plain",
    "q_lora_rank": 0,
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_reference_has_the_oracles_logits(name):
    family = families.FAMILIES[name]
    model = family.make().double()
    tokens = np.random.default_rng(0).integers(0, families.VOCAB, (2, 13))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    config = types.SimpleNamespace(**NO_CHOICES | family.fields)
    params = {"params": families.converted(family, families.tensors(model))}
    ours = reference.logits(config, params, tokens)
    # transformers keeps norms, router and softmax in float32 even in a float64 model
    np.testing.assert_allclose(ours, expected, atol=5e-5)
