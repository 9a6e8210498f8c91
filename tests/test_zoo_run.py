"""What was trained here, as a source: read, exported, adapters and all."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from foundry_jax import train, zoo
from foundry_jax.checkpoint import load_params
from foundry_jax.config import load
from foundry_jax.errors import UserError
from foundry_jax.model import lora
from foundry_jax.model.transformer import Transformer
from foundry_jax.zoo.__main__ import parse_arguments
from foundry_jax.zoo.adapted import Adapted
from foundry_jax.zoo.export import export
from foundry_jax.zoo.pretrained import pretrained
from foundry_jax.zoo.run import open_run
from tests import checkpoints
from tests.processes import SMALL_TEXT

STEPS = ["num_steps=4", "checkpoint.every=2", "eval.every=2", "checkpoint.keep_latest=2", *SMALL_TEXT]
TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on bytes, its layers scanned."""
    folder = tmp_path_factory.mktemp("run")
    train.run(load("configs/smoke.py", [*STEPS, "model.scan_layers=true"]), folder, quiet=True)
    return folder


def logits_of(config, params):
    return Transformer(config).apply({"params": params}, TOKENS)[0]


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_is_a_model_raw_or_averaged(run, ema):
    source = open_run(run, zoo.open_source, 2, ema=ema)
    config = load("configs/smoke.py").model
    params = load_params(run / "checkpoints", 2, ema=ema).state
    expected = logits_of(dataclasses.replace(config, vocab_size=257, scan_layers=True), params)
    model = pretrained(source)
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-5)
    assert model.stop_ids == (256,) and isinstance(model.generate("def ", max_tokens=4), str)


def test_an_exported_run_is_the_same_model(run, tmp_path):
    export(zoo.open_source(run), tmp_path / "out", dtype="float32")
    again, before = zoo.load_pretrained(tmp_path / "out"), zoo.load_pretrained(run)
    jax.tree.map(np.testing.assert_array_equal, again.params, before.params)
    assert again.tokenizer is None  # bytes are no tokenizer that others could read
    assert again.stop_ids == (256,)


def finetune(folder, base, *overrides):
    """Returns the folder of a run of adapters on a checkpoint."""
    settings = [*STEPS, f"init.source={base}", "lora.rank=3", "lora.alpha=6", "optimizer.learning_rate=0.1", *overrides]
    config = load("configs/smoke.py", settings)
    settings = {name: value for name, value in zoo.settings_of(base).items() if name != "context_length"}
    model = dataclasses.replace(config.model, **(settings | dict(model_changes(overrides))))
    train.run(dataclasses.replace(config, model=model), folder, quiet=True)
    return folder


def model_changes(overrides):
    for text in overrides:
        name, _, value = text.partition("=")
        if name.startswith("model."):
            yield name.removeprefix("model."), int(value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("base"))


def test_a_run_of_adapters_is_its_base_with_them_merged(base, tmp_path):
    run = finetune(tmp_path / "run", base)
    model, before = zoo.load_pretrained(run), zoo.load_pretrained(base)
    adapters = load_params(run / "checkpoints").state
    merged = lora.merge(before.params, adapters, 6 / 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), model.params, merged)
    assert np.abs(model.logits(TOKENS) - before.logits(TOKENS)).max() > 0.1
    export(zoo.open_source(run), tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(zoo.load_pretrained(tmp_path / "out").logits(TOKENS), model.logits(TOKENS), atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.exhaustive
def test_adapters_on_a_mutated_base_find_it_again(base, tmp_path):
    run = finetune(tmp_path / "run", base, "model.num_kv_heads=1", "model.num_layers=4")
    model = zoo.load_pretrained(run)
    assert model.config.num_kv_heads == 1 and model.config.num_layers == 4
    stored = np.asarray(checkpoints.tensors()["model.layers.0.self_attn.v_proj.weight"], np.float32)
    heads = stored.T.reshape(checkpoints.DIM, checkpoints.KV_HEADS, checkpoints.HEAD_DIM)
    adapter = load_params(run / "checkpoints").state["block_0"]["attention"]["value"]
    expected = heads.mean(axis=1, keepdims=True) + 2 * np.tensordot(adapter["a"], adapter["b"], axes=1)
    np.testing.assert_allclose(model.params["block_0"]["attention"]["value"]["kernel"], expected, atol=1e-5)
    with pytest.raises(UserError, match="on a changed architecture, and PEFT would put them on .* as it is"):
        command(["export", str(run), str(tmp_path / "adapters"), "--adapter"])


def command(arguments):
    flags = parse_arguments(arguments)
    flags.run(flags)


def test_adapters_alone_are_read_on_their_base(base, tmp_path):
    run = finetune(tmp_path / "run", base)
    command(["export", str(run), str(tmp_path / "adapters"), "--adapter"])
    expected = zoo.load_pretrained(run).logits(TOKENS)
    for model in (zoo.load_pretrained(tmp_path / "adapters"), zoo.load_pretrained(base, adapter=tmp_path / "adapters")):
        np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-5)


@pytest.mark.exhaustive
def test_adapters_whose_base_has_changed_are_refused(tmp_path):
    base = checkpoints.write(tmp_path / "base")
    run = finetune(tmp_path / "run", base)
    checkpoints.write(base, checkpoints.tensors(seed=1))
    with pytest.raises(UserError, match="whose files have changed since: put the old ones back"):
        zoo.open_source(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder: it has no config.json and checkpoints"):
        open_run(tmp_path, zoo.open_source)


def test_a_run_of_another_version_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    flat = json.loads((run / "config.json").read_text())
    flat["model.flux"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(flat))
    with pytest.raises(UserError, match="model.flux"):
        zoo.open_source(tmp_path / "run")


def test_a_source_with_other_adapters_has_another_fingerprint(base):
    source = zoo.open_source(base)

    def adapted(value):
        a, b = np.full((checkpoints.DIM, 2), value), np.ones((2, checkpoints.MLP_DIM))
        return Adapted("adapted", source, {"block_0": {"mlp": {"up": {"a": a, "b": b}}}}, 0.5)

    assert adapted(1.0).fingerprint == adapted(1.0).fingerprint
    assert len({source.fingerprint, adapted(1.0).fingerprint, adapted(2.0).fingerprint}) == 3
    part = (slice(3, 5), slice(0, 7))
    expected = source.read("block_0/mlp/up/kernel")[part].astype(np.float32) + 0.5 * 2 * 2
    np.testing.assert_allclose(adapted(2.0).read("block_0/mlp/up/kernel", part), expected)
    np.testing.assert_array_equal(adapted(2.0).read("final_norm/scale"), source.read("final_norm/scale"))
