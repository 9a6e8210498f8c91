"""Adapters in PEFT's format: what the files hold, what is read from others' files, and what is refused."""

import dataclasses
import json
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from foundry_jax.errors import UserError
from foundry_jax.model import lora
from foundry_jax.train_step import unbox
from foundry_jax.zoo import peft
from foundry_jax.zoo.source import path_of
from tests.variants import tiny

RANK, ALPHA = 3, 7.5
MODEL = tiny()
LAYER = "base_model.model.model.layers.1."
SIZES = {  # of tiny(): [in, out]
    "self_attn.q_proj": (20, 24), "self_attn.k_proj": (20, 8), "self_attn.v_proj": (20, 8),
    "self_attn.o_proj": (24, 20),
    "mlp.gate_proj": (20, 28), "mlp.up_proj": (20, 28), "mlp.down_proj": (28, 20),
}  # fmt: skip


def adapters_of(model=MODEL, targets=".*", seed=0):
    """Returns adapters with numbers in b too."""
    rng = np.random.default_rng(seed)
    shapes = unbox(jax.eval_shape(lambda: lora.init(model, RANK, targets, jax.random.key(0))))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def save(folder, adapters, model=MODEL, **changes):
    options = {"alpha": ALPHA, "rslora": False, "dropout": 0.1, "base_name": "some/base"} | changes
    peft.save(folder, adapters, model=model, **options)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Adapters of all linear maps."""
    return save(tmp_path / "adapters", adapters_of())


def edit(folder, changes=None, **keys):
    """Changes tensors (None takes one away) and keys of the config."""
    tensors = load_file(folder / "adapter_model.safetensors") | (changes or {})
    save_file({k: x for k, x in tensors.items() if x is not None}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ------------------------------------------------------------------------------------------------ saving


def test_the_files_are_those_of_peft(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 3,
        "lora_alpha": 7.5,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(SIZES) * MODEL.num_layers
    for module, (into, out) in SIZES.items():
        a, b = (tensors[f"{LAYER}{module}.lora_{letter}.weight"] for letter in "AB")
        assert (a.shape, b.shape, a.dtype, b.dtype) == ((RANK, into), (out, RANK), np.float32, np.float32)


def test_the_product_is_ours_with_heads_run_together(folder):
    tensors, adapters = load_file(folder / "adapter_model.safetensors"), adapters_of()["block_1"]

    def theirs(module):
        return tensors[f"{LAYER}{module}.lora_B.weight"] @ tensors[f"{LAYER}{module}.lora_A.weight"]

    query, out = adapters["attention"]["query"], adapters["attention"]["out"]
    query_DNH, out_NHD = (np.tensordot(x["a"], x["b"], axes=1) for x in (query, out))
    for n in range(MODEL.num_heads):
        for h in range(MODEL.head_dim):
            row = n * MODEL.head_dim + h
            np.testing.assert_allclose(theirs("self_attn.q_proj")[row], query_DNH[:, n, h], atol=1e-5)
            np.testing.assert_allclose(theirs("self_attn.o_proj")[:, row], out_NHD[n, h], atol=1e-5)
    down = adapters["mlp"]["down"]
    np.testing.assert_allclose(theirs("mlp.down_proj"), (down["a"] @ down["b"]).T, atol=1e-5)


def test_a_whole_alpha_is_written_as_one(tmp_path):
    save(tmp_path / "adapters", adapters_of(), alpha=16.0)
    assert '"lora_alpha": 16,' in (tmp_path / "adapters" / "adapter_config.json").read_text()


def test_stacked_layers_are_saved_as_layers(tmp_path, folder):
    scanned = dataclasses.replace(MODEL, scan_layers=True)
    stacked = lora.restack(adapters_of(), MODEL, scanned)
    save(tmp_path / "stacked", stacked, scanned)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "stacked" / name).read_bytes() == (folder / name).read_bytes()


def test_modules_that_not_all_layers_have_are_named_in_full(tmp_path):
    adapters = adapters_of(targets="attention/(query|value)")
    del adapters["block_1"]["attention"]["value"]
    save(tmp_path / "adapters", adapters)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert_equal(peft.load(tmp_path / "adapters", MODEL).tree, adapters)


def test_nothing_is_left_where_saving_fails(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match="adapters exists already; delete it, or name another folder"):
        save(folder, adapters_of())
    with pytest.raises(UserError, match="No architecture of transformers is like this model: .*model.position=alibi"):
        save(tmp_path / "new", adapters_of(tiny("alibi")), tiny("alibi"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="Cannot write .*new: No space left on device"):
        save(tmp_path / "new", adapters_of())
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("variant", ["gqa", "mha+bias_all", "qk_norm_whole+post_norm", "window_and_full+bias_qkv"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_was_saved_is_loaded(tmp_path, variant, scan_layers):
    if variant == "window_and_full+bias_qkv":  # layers of two kinds: of Qwen2; the rest of 5 layers stands alone
        model = tiny(variant, num_layers=5, scan_layers=scan_layers)
    else:
        model = tiny(variant, scan_layers=scan_layers)
    adapters = adapters_of(model)
    found = peft.load(save(tmp_path / "adapters", adapters, model, rslora=True), model)
    assert_equal(found.tree, adapters)
    assert (found.rank, found.alpha, found.rslora, found.dropout, found.base_name) == (3, 7.5, True, 0.1, "some/base")
    assert found.scale == 7.5 / 3**0.5
    assert peft.base_of(tmp_path / "adapters") == "some/base"


def test_the_scale_is_alpha_by_rank(folder):
    assert peft.load(folder, MODEL).scale == 2.5


def test_stacked_layers_without_adapters_get_zeros(tmp_path):
    adapters = adapters_of(targets="mlp/up")
    del adapters["block_1"]
    found = peft.load(save(tmp_path / "adapters", adapters), dataclasses.replace(MODEL, scan_layers=True)).tree
    up = found["blocks"]["layer_0"]["mlp"]["up"]
    for letter in "ab":
        for layer in (0, 2):
            np.testing.assert_array_equal(up[letter][layer], adapters[f"block_{layer}"]["mlp"]["up"][letter])
        assert not up[letter][1].any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_dtypes_become_float32(folder, dtype):
    edit(folder, {k: x.astype(dtype) for k, x in load_file(folder / "adapter_model.safetensors").items()})
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), adapters_of())
    assert_equal(peft.load(folder, MODEL).tree, expected)


def paths(adapters):
    return {path_of(keys)[:-2] for keys, _ in jax.tree_util.tree_leaves_with_path(adapters)}


@pytest.mark.parametrize(
    ("keys", "targets"),
    [
        ({"target_modules": r".*\.mlp\.(up|down)_proj"}, "mlp/(up|down)"),
        ({"target_modules": r"model\.layers\.\d+\.self_attn\.q_proj", "exclude_modules": ".*k_proj"}, "query"),
        ({"target_modules": "all-linear"}, ".*"),
        ({"target_modules": ["q_proj", "k_proj", "up_proj"], "exclude_modules": ["mlp.up_proj"]}, "query|key"),
        ({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}, "query|up"),
        ({"target_modules": None}, "gate"),
    ],
)
def test_targets_are_found_as_peft_finds_them(tmp_path, keys, targets):
    adapters = adapters_of(targets=targets)
    edit(save(tmp_path / "adapters", adapters), **keys)
    assert paths(peft.load(tmp_path / "adapters", MODEL).tree) == set(lora.target_paths(MODEL, targets))


@pytest.mark.parametrize("layers", [[0, 2], 1])
def test_layers_to_transform_are_those_that_have_adapters(tmp_path, layers):
    adapters = adapters_of(targets="query")
    for layer in range(3):
        if layer not in (layers if isinstance(layers, list) else [layers]):
            del adapters[f"block_{layer}"]
    edit(save(tmp_path / "adapters", adapters), target_modules=["q_proj"], layers_to_transform=layers)
    assert_equal(peft.load(tmp_path / "adapters", MODEL).tree, adapters)
    edit(tmp_path / "adapters", layers_to_transform=None)
    with pytest.raises(UserError, match="has no .*q_proj.lora_A.weight.* asks for"):
        peft.load(tmp_path / "adapters", MODEL)


def test_what_peft_itself_writes_besides_is_no_matter(folder):
    """adapter_config.json of PEFT 0.21, its keys that we do not write."""
    edit(
        folder, alora_invocation_tokens=None, alpha_pattern={}, arrow_config=None, auto_mapping=None, corda_config=None,
        ensure_weight_tying=False, eva_config=None, exclude_modules=None, init_lora_weights=True, kasa_config=None,
        layer_replication=None, layers_pattern=None, layers_to_transform=None, loftq_config={}, lora_bias=False,
        lora_ga_config=None, megatron_config=None, megatron_core="megatron.core", modules_to_save=None,
        monteclora_config=None, peft_version="0.21.2", qalora_group_size=16, rank_pattern={}, revision=None,
        target_parameters=None, trainable_token_indices=None, use_bdlora=None, use_dora=False, use_qalora=False,
        velora_config=None,
    )  # fmt: skip
    assert_equal(peft.load(folder, MODEL).tree, adapters_of())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type="LOHA" is not supported; adapters must be plain LoRA'),
        ({"bias": "lora_only"}, 'bias="lora_only" is not supported'),
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"lora_bias": True}, "lora_bias=true is not supported"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] is not supported'),
        ({"rank_pattern": {"q_proj": 4}}, r'rank_pattern=\{"q_proj": 4\} is not supported; .*of one rank and alpha'),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern=.* is not supported"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\] is not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.* is not supported"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters=.* is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights="pissa_niter_4" is not supported; .*own weights'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights="olora" is not supported'),
        ({"use_lora_of_next_year": {"x": "y" * 99}}, r"use_lora_of_next_year=\{.*\.\.\. is not supported"),
        ({"r": 0}, "r=0 must be at least 1"),
        ({"r": "3"}, "r='3' must be a whole number"),
        ({"r": 4}, r"lora_A.weight has the shape \[3, .*\], but r and the base, .*, ask for \[4, .*\]"),
        ({"lora_alpha": None}, "adapter_config.json has no lora_alpha, a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_dropout": 1}, "lora_dropout=1 must be at least 0 and less than 1"),
        ({"target_modules": [1]}, r"target_modules=\[1\] must be a pattern or a list of names"),
        ({"target_modules": "(q_proj"}, r"target_modules='\(q_proj' is no regular expression"),
        ({"target_modules": ["q_proj"]}, "has .*lora_A.weight, but .*adapter_config.json does not target model"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all' must be whole numbers"),
    ],
)  # fmt: skip
def test_a_config_that_means_more_is_refused(folder, keys, message):
    with pytest.raises(UserError, match=message) as error:
        peft.load(edit(folder, **keys), MODEL)
    assert "\n" not in str(error.value)


Q = f"{LAYER}self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}B.weight": None}, f"has {Q}A.weight, but not {Q}B.weight"),
        ({f"{Q}A.weight": None}, f"has no {Q}A.weight\\[3, 20\\], which target_modules .* asks for|not {Q}A.weight"),
        ({f"{Q}A.weight": None, f"{Q}B.weight": None}, r"has no .*q_proj.lora_A.weight\[3, 20\], which target_modules"),
        ({f"{Q}A.weight": np.zeros((3, 21), np.float32)}, r"q_proj.lora_A.weight has the shape \[3, 21\], .*\[3, 20\]"),
        ({f"{Q}B.weight": np.zeros((24, 4), np.float32)}, r"lora_B.weight has the shape \[24, 4\], .* for \[24, 3\]"),
        ({f"{Q}B.weight": np.zeros((24, 3), np.int8)}, "q_proj.lora_B.weight is I8, but must be F32, F16, BF16"),
        ({f"{LAYER}self_attn.q_proj.lora_magnitude_vector": np.zeros(24)}, "lora_magnitude_vector.* no linear map"),
        ({f"{LAYER}self_attn.q_proj.lora_B.bias": np.zeros(24)}, r"lora_B.bias\[24\] belongs to no linear map"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 20))}, "lm_head.lora_A.weight.* no linear map"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 37))}, "embed_tokens.* no linear map"),
        ({"model.layers.1.self_attn.q_proj.lora_A.weight": np.zeros((3, 20))}, "no linear map .* such as base_model."),
        ({f"{LAYER}mlp.router.lora_A.weight": np.zeros((3, 20))}, "a LlamaForCausalLM of 3 layers, such as"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message) as error:
        peft.load(edit(folder, changes), MODEL)
    assert "\n" not in str(error.value)
    assert str(folder / "adapter_model.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"layers.2.* belongs to no linear map in the layers of the base, a LlamaForCausalLM of 2"),
        (
            {"num_layers": 4},
            r"has no .*layers.3.*lora_A.weight\[3, 20\], which target_modules in .*: these are adapters of",
        ),
        (
            {"model_dim": 24},
            r"has the shape \[.*20.*\], but r and the base, a LlamaForCausalLM of 3 layers, ask for \[.*24",
        ),
        (
            {"num_kv_heads": 3},
            r"k_proj.lora_B.weight has the shape \[8, 3\], .* ask for \[12, 3\]: it is of another base",
        ),
    ],
)
def test_adapters_of_another_base_are_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        peft.load(folder, tiny(**changes))


def test_damaged_files_are_refused(folder):
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-8], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="adapter_model.safetensors is no whole safetensors file"):
            peft.load(folder, MODEL)
    save_file({}, weights)
    with pytest.raises(UserError, match="adapter_model.safetensors has no tensors"):
        peft.load(folder, MODEL)
    weights.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        peft.load(folder, MODEL)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is not JSON"):
        peft.load(folder, MODEL)


def test_pickles_are_refused_unread(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        UserError, match="adapter_model.bin is a pickle, which can run any code when read and is refused"
    ):
        peft.load(folder, MODEL)
    assert not (tmp_path / "sprung").exists()


def test_a_base_that_is_not_named_is_asked_for(folder):
    with pytest.raises(UserError, match="names no base_model_name_or_path; load the base model, with adapter='"):
        peft.base_of(edit(folder, base_model_name_or_path=None))
