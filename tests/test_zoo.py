"""Hugging Face folders: what they mean, what is refused, where parameters go, and the way back."""

import gc
import json
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from foundry_jax import sharding, zoo
from foundry_jax.config import ShardingConfig
from foundry_jax.errors import UserError
from foundry_jax.model.transformer import num_params
from foundry_jax.zoo import families, load
from foundry_jax.zoo.export import export, family_for
from foundry_jax.zoo.layouts import FROM_HEADS, HEAD_VECTOR, LINEAR, TABLE, TO_HEADS, VECTOR
from foundry_jax.zoo.settings import Keys, meaningful, model_of
from tests import checkpoints
from tests.checkpoints import CONFIG, DIM, HEAD_DIM, HEADS, KV_HEADS, LAYERS, tensors, write
from tests.variants import tiny

AUTO = ShardingConfig(strategy="auto", fsdp_min_params=1e9, data=0, fsdp=0, tensor=0)


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("layout", "shape", "theirs"),
    [
        (VECTOR, (5,), lambda x: x),
        (TABLE, (7, 5), lambda x: x),
        (LINEAR, (5, 7), lambda x: x.T),
        (TO_HEADS, (5, 2, 3), lambda x: np.stack([x[:, n, h] for n in range(2) for h in range(3)])),
        (FROM_HEADS, (2, 3, 5), lambda x: np.stack([x[n, h] for n in range(2) for h in range(3)], axis=1)),
        (HEAD_VECTOR, (2, 3), lambda x: np.concatenate([x[0], x[1]])),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_layout_and_its_inverse_are_what_a_loop_says(layout, shape, theirs):
    ours = np.arange(np.prod(shape)).reshape(shape)
    expected = theirs(ours)
    assert layout.their_shape(shape) == expected.shape
    np.testing.assert_array_equal(layout.to_theirs(ours), expected)
    whole = (slice(None),) * len(shape)
    np.testing.assert_array_equal(layout.to_ours(lambda i: expected[i], shape, whole), ours)
    for axis, size in enumerate(shape):
        part = tuple(slice(1, size - 0) if i == axis else slice(None) for i in range(len(shape)))
        np.testing.assert_array_equal(layout.to_ours(lambda i: expected[i], shape, part), ours[part])


def test_a_part_of_a_parameter_reads_no_more_rows_and_columns_than_hold_it():
    asked = []
    stored = np.zeros((HEADS * HEAD_DIM, DIM))
    index = (slice(0, 5), slice(2, 4), slice(None))
    TO_HEADS.to_ours(lambda i: asked.append(i) or stored[i], (DIM, HEADS, HEAD_DIM), index)
    assert asked == [(slice(2 * HEAD_DIM, 4 * HEAD_DIM), slice(0, 5))]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(300, 520), (300, 4, 130), (4, 130, 300)])
def test_large_transposed_views_are_copied_right(shape, dtype):
    rng = np.random.default_rng(0)
    flat = (shape[0], -1) if shape == (300, 4, 130) else (-1, shape[-1])
    stored = np.ascontiguousarray(rng.normal(size=shape).astype(ml_dtypes.bfloat16).reshape(flat).T)
    view = stored.T.reshape(shape)
    assert load._as_transposed(view) is not None
    out = np.empty(shape, dtype)
    load._copy(view, out)
    np.testing.assert_array_equal(out, view.astype(dtype))


# ------------------------------------------------------------------------------------------------ config.json


def keys_of(**changes):
    return Keys(CONFIG | changes, "config.json")


def read(architecture="LlamaForCausalLM", **changes):
    return families.FAMILIES[architecture].read(keys_of(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": None, "hidden_size": 30}, {"head_dim": 5, "model_dim": 30}),
        ({"rope_scaling": None}, {"rope_scaling": "none"}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": "linear(factor=2.0)"}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
            {"rope_theta": 5e5, "rope_scaling": "llama3(factor=32.0, original_length=8192, low=1.0, high=4.0)"},
        ),
        ({"attention_bias": True}, {"bias": "attention"}),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
        ({"num_key_value_heads": None}, {"num_kv_heads": HEADS}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"mlp": "geglu_tanh"}),
        ({"max_position_embeddings": 131072}, {"context_length": 131072}),
    ],
)  # fmt: skip
def test_keys_of_config_json_are_read(changes, expected):
    found = read(**changes)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("MistralForCausalLM", {"sliding_window": None}, {}),
        ("MistralForCausalLM", {"sliding_window": 16}, {"pattern": "S", "window": 16}),
        ("MistralForCausalLM", {}, {"pattern": "S", "window": 4096}),  # the default of transformers' MistralConfig
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 131072}, {}),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            {"pattern": "LSS", "window": 8},
        ),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8},
            {"pattern": "SL", "window": 8},
        ),
    ],
)
def test_sliding_windows_are_read(architecture, changes, expected):
    found = read(architecture, **changes)
    assert {name: found[name] for name in ("pattern", "window") if name in found} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}}, "config.json: Unknown rope_type 'longrope'.*llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "Unknown rope_type 'dynamic'"),
        ({"rope_scaling": [2]}, r"rope_scaling=\[2\] must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer .full_attention."),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json, rope_scaling has no factor"),
        ({"hidden_act": "relu6"}, "config.json: Unknown hidden_act 'relu6'"),
        ({"hidden_size": None}, "config.json has no hidden_size, a whole number"),
        ({"hidden_size": "wide"}, "hidden_size='wide' must be a whole number"),
        ({"hidden_size": 21, "head_dim": None}, "hidden_size=21 is not a multiple of num_attention_heads=6"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported, only nothing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias is not supported"),
    ],
)
def test_what_no_model_of_ours_can_have_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, "layers of a sliding window, but no sliding_window"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries, but num_hidden_layers=3"),
        ({"layer_types": ["linear_attention"] * 3}, "Unknown entry of layer_types 'linear_attention'"),
    ],
)
def test_layers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read("Qwen2ForCausalLM", **changes)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"mlp": "geglu_tanh", "bias": "all", "tie_embeddings": False}),
        ("LlamaForCausalLM", {"rope_scaling": "llama3(factor=8, original_length=32)"}),
        ("LlamaForCausalLM", {"rope_scaling": "yarn(factor=4, original_length=64, mscale=1, mscale_all_dim=0.8)"}),
        ("LlamaForCausalLM", {"rope_scaling": "linear(2)", "num_kv_heads": 6}),
        ("MistralForCausalLM", {"pattern": "S", "window": 5}),
        ("Qwen2ForCausalLM", {"bias": "qkv"}),
        ("Qwen2ForCausalLM", {"bias": "qkv", "pattern": "LS", "window": 5}),
        ("Qwen3ForCausalLM", {"qk_norm": "head"}),
        ("Olmo2ForCausalLM", {"qk_norm": "whole", "norm_placement": "post"}),
        ("MixtralForCausalLM", {"moe": "softmax(experts=4, top_k=2, expert_dim=12)"}),
    ],
)
def test_an_architecture_finds_its_family_and_comes_back_from_config_json(architecture, changes):
    config = tiny(**changes)
    family, described = family_for(config)
    assert family.architecture == architecture
    found = model_of(family.read(Keys(json.loads(json.dumps(described)), "config.json")))
    assert meaningful(found) == meaningful(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "nearest, LlamaForCausalLM, cannot have .*model.position=alibi"),
        ({"attention": "mla"}, "model.attention=mla"),
        ({"mlp": "relu2"}, "model.mlp=relu2"),
        ({"norm_placement": "sandwich"}, "model.norm_placement=sandwich"),
        ({"pattern": "SL", "window": 5}, "cannot have model.bias=none|model.pattern=SL"),
    ],
)
def test_an_architecture_that_transformers_does_not_have_is_refused_by_what_it_lacks(changes, message):
    with pytest.raises(UserError, match=message):
        family_for(tiny(**changes))  # no traceback of what a family cannot spell


# ------------------------------------------------------------------------------------------------ reading


@pytest.fixture(scope="module")
def stored():
    return tensors()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stored):
    return write(tmp_path_factory.mktemp("model"), stored, files=3)


def expected_params(stored) -> dict:
    """Returns the parameters of a checkpoint, transposed by hand."""

    def full(name):
        return np.asarray(stored[name], np.float32)

    params = {
        "embed": {"embedding": full("model.embed_tokens.weight")},
        "final_norm": {"scale": full("model.norm.weight")},
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        projections = {"query": ("q_proj", HEADS), "key": ("k_proj", KV_HEADS), "value": ("v_proj", KV_HEADS)}
        attention = {
            ours: {"kernel": full(f"{layer}self_attn.{theirs}.weight").T.reshape(DIM, heads, HEAD_DIM)}
            for ours, (theirs, heads) in projections.items()
        }
        attention["out"] = {"kernel": full(f"{layer}self_attn.o_proj.weight").T.reshape(HEADS, HEAD_DIM, DIM)}
        params[f"block_{i}"] = {
            "attention": attention,
            "attention_norm": {"scale": full(f"{layer}input_layernorm.weight")},
            "mlp": {x: {"kernel": full(f"{layer}mlp.{x}_proj.weight").T} for x in ("gate", "up", "down")},
            "mlp_norm": {"scale": full(f"{layer}post_attention_layernorm.weight")},
        }
    return params


def equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_a_folder_gives_a_model_its_tokenizer_and_text(folder, stored):
    model = zoo.load_pretrained(folder)
    equal(model.params, expected_params(stored))
    assert model.config.dtype == "float32" and model.stop_ids == (0,)
    assert model.tokenizer.decode(model.tokenizer.encode("the mother")) == "the mother"
    text = model.generate("the other", max_tokens=5)
    assert model.generate(["the other", "then"], max_tokens=5)[0] == text
    assert isinstance(text, str)
    assert model.logits([[1, 2, 3]]).shape == (1, 3, checkpoints.VOCAB)


def test_parameters_and_products_have_the_dtype_that_is_asked_for(folder):
    model = zoo.load_pretrained(folder, dtype="bfloat16", device=jax.devices()[3])
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert {x.device for x in jax.tree.leaves(model.params)} == {jax.devices()[3]}
    assert model.config.dtype == "bfloat16"


def test_scanned_layers_are_stacked(folder, stored):
    import dataclasses

    source = zoo.open_source(folder)
    config = dataclasses.replace(source.model, scan_layers=True)
    plan = sharding.plan(1, 1, AUTO)
    params = load.load(source.read, config, plan.shardings(load.abstract_params(config)))
    expected = expected_params(stored)
    blocks = [expected.pop(f"block_{i}") for i in range(LAYERS)]
    equal(params.pop("blocks"), {"layer_0": jax.tree.map(lambda *x: np.stack(x), *blocks)})
    equal(params, expected)


def test_eight_devices_hold_their_eighths_and_no_read_gives_more_than_one_of_them(folder, stored):
    source = zoo.open_source(folder)
    plan = sharding.plan(1, 8, ShardingConfig("fsdp", 1e9, 0, 0, 0))
    boxed = load.abstract_params(source.model)
    read = {}

    def recording(path, index):
        x = source.read(path, index)
        read.setdefault(path, []).append(x.size)
        return x

    with plan.context():
        params = load.load(recording, source.model, plan.shardings(boxed))
    equal(params, expected_params(stored))
    for path, sizes in read.items():
        shape = source.shapes[path]
        if any(size % 8 == 0 for size in shape):
            assert sizes == [np.prod(shape) // 8] * 8, path
        else:
            assert sizes == [np.prod(shape)], path  # a copy for everyone is read once


def test_a_load_onto_eight_devices_never_has_a_whole_parameter_in_numpy(tmp_path):
    """XLA's own buffers are the devices; what numpy holds besides is what is on its way to one of them."""
    vocab_size = 2**16
    embedding = np.zeros((vocab_size, DIM), np.float32)
    found = {name: x.astype(np.float32) for name, x in tensors().items()} | {"model.embed_tokens.weight": embedding}
    source = zoo.open_source(write(tmp_path, found, vocab_size=vocab_size, tokenizer=False))
    plan = sharding.plan(1, 8, ShardingConfig("fsdp", 1e9, 0, 0, 0))
    shardings = plan.shardings(load.abstract_params(source.model))
    del found
    for _ in range(2):  # the first time Python and JAX fill their caches
        tracemalloc.start()
        with plan.context():
            params = load.load(source.read, source.model, shardings)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()  # on CPU a device's buffer may be the array that numpy filled
        tracemalloc.stop()
    assert params["embed"]["embedding"].addressable_shards[0].data.nbytes == embedding.nbytes / 8
    assert peak - held < 0.45 * embedding.nbytes  # an eighth, and as much twice while safetensors reads it


def test_a_tied_model_may_repeat_its_embedding_as_output_map(tmp_path, stored):
    same = stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}
    zoo.open_source(write(tmp_path / "same", same))
    other = stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        zoo.open_source(write(tmp_path / "other", other))


# ------------------------------------------------------------------------------------------------ bad input


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        zoo.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def rewrite_header(path: pathlib.Path, change) -> None:
    """Changes the JSON head of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "model.safetensors is no whole safetensors file"),
        (lambda path: path.write_bytes(b""), "model.safetensors is no whole safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "no whole safetensors file"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}) * 20), "no whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:8] + b"!" + path.read_bytes()[9:]), "no whole safetensors"),
        (lambda path: rewrite_header(path, overlap), "no whole safetensors file"),
    ],
    ids=["truncated", "empty", "header bomb", "pickle", "no json", "overlap"],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path / "model.safetensors")
    refused(tmp_path, message)


Q_PROJ, BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"has no tensor {Q_PROJ}\[24, 20\], which LlamaForCausalLM needs"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].T.copy()}), rf"{Q_PROJ} has the shape \[20, 24\], but .* \[24, 20\]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int8)}), rf"{Q_PROJ} is I8, but must be F32, F16, BF16"),
        (lambda t: t.update({"model.extra": t[Q_PROJ]}), r"model.extra\[24, 20\] is no part of a LlamaForCausalLM"),
        (lambda t: t.update({BIAS: np.zeros(24, np.float32)}), "q_proj.bias.* is no part"),
    ],
    ids=["missing", "shape", "dtype", "extra", "bias"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, stored, change, message):
    changed = dict(stored)
    change(changed)
    refused(write(tmp_path, changed), message)


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({Q_PROJ: "model-9.safetensors"}), "model-9.safetensors is missing"),
        (lambda m: m.update({Q_PROJ: "../model-1.safetensors"}), "is not the name of a file beside it"),
        (lambda m: m.update({Q_PROJ: "pytorch_model.bin"}), "must be a safetensors file; nothing is unpickled"),
        (lambda m: m.update({"model.lost": m[Q_PROJ]}), "says that model.lost is in .*, but it is not there"),
        (lambda m: m.pop(Q_PROJ), f"does not list {Q_PROJ}"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
    ids=["absent file", "path", "pickle", "absent tensor", "unlisted", "empty"],
)
def test_an_index_that_lies_is_named(tmp_path, stored, change, message):
    write(tmp_path, stored, files=3)
    edit_index(tmp_path, change)
    refused(tmp_path, message)


def test_a_missing_shard_is_named(tmp_path, stored):
    write(tmp_path, stored, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors is missing: copy or download the whole folder again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pkl", "model.pt"])
def test_nothing_is_ever_unpickled(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "exploded",)

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, f"{name}, a pickle, which can run any code when read and is refused; get the model's safetensors")
    with pytest.raises(UserError, match="is a pickle"):
        zoo.load_pretrained(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_files_and_folders_that_hold_no_model_are_refused(tmp_path):
    refused(tmp_path, "Cannot read .*config.json: No such file or directory")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["FalconForCausalLM"]}))
    refused(tmp_path, "Unknown architecture in .*config.json: 'FalconForCausalLM'.*LlamaForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    refused(tmp_path, "Unknown model_type in .*config.json: 'gpt_neox'.*llama")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")


def test_more_layers_than_tensors_are_refused_at_once(tmp_path):
    write(tmp_path, num_hidden_layers=10**9)
    refused(tmp_path, "has 29 tensors, too few for num_hidden_layers=1000000000")


def test_an_unknown_name_is_answered_with_the_names_there_are():
    with pytest.raises(UserError, match=r"Unknown model 'llama3-8'. Did you mean 'llama3-8b'.*Or give a folder's"):
        zoo.load_pretrained("llama3-8")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, stored):
    write(tmp_path, stored, tokenizer=False)
    checkpoints.write_tokenizer(tmp_path, checkpoints.VOCAB + 1)
    refused(tmp_path, "tokenizer.json has 301 tokens, but the model only vocab_size=300: they do not belong together")


# ------------------------------------------------------------------------------------------------ writing


def test_an_export_is_read_back_bit_for_bit(tmp_path, folder, stored):
    family = export(zoo.open_source(folder), tmp_path / "out", shard_bytes=9000)
    assert family.architecture == "LlamaForCausalLM"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    found = {}
    for name in files:
        found |= load_file(tmp_path / "out" / name)
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[name].view(np.uint16), stored[name].view(np.uint16)) for name in stored)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    equal(zoo.load_pretrained(tmp_path / "out").params, expected_params(stored))


def test_one_small_file_needs_no_index_and_float32_is_exact(tmp_path, folder, stored):
    export(zoo.open_source(folder), tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(found[name], np.asarray(stored[name], np.float32)) for name in stored)


def test_experts_lie_in_a_tensor_each(tmp_path):
    from tests.test_graft import InMemory

    config = tiny(moe="softmax(experts=4, top_k=2, expert_dim=12)")
    source = InMemory(config)
    assert export(source, tmp_path / "out", dtype="float32").architecture == "MixtralForCausalLM"
    found = load_file(tmp_path / "out" / "model.safetensors")
    gate = source.read("block_1/mlp/experts/gate/kernel")
    np.testing.assert_array_equal(found["model.layers.1.block_sparse_moe.experts.2.w1.weight"], gate[2].T)
    again = zoo.open_source(tmp_path / "out")
    assert meaningful(again.model) == meaningful(config)
    np.testing.assert_array_equal(again.read("block_1/mlp/experts/gate/kernel"), gate)
    part = (slice(1, 3), slice(0, 5), slice(None))
    np.testing.assert_array_equal(again.read("block_1/mlp/experts/gate/kernel", part), gate[part])


def test_nothing_is_left_where_an_export_failed(tmp_path, folder, monkeypatch):
    source = zoo.open_source(folder)
    monkeypatch.setattr(source, "texts", lambda: {"no/such/folder.json": ""})
    with pytest.raises(UserError, match="Cannot write .*: No such file or directory"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_taken_is_left_alone(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; delete it, or name another folder"):
        export(zoo.open_source(folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write .*: Not a directory|exists already"):
        export(zoo.open_source(folder), tmp_path / "file" / "out")


def test_neither_torch_nor_transformers_is_imported(tmp_path, folder):
    script = (
        "import sys; from foundry_jax import zoo; from foundry_jax.zoo.export import export; "
        "model = zoo.load_pretrained(sys.argv[1]); model.generate('the', max_tokens=3); "
        "export(zoo.open_source(sys.argv[1]), sys.argv[2]); "
        "print(sorted({'torch', 'transformers', 'peft', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_size_of_a_model_follows_from_its_settings(folder):
    model = zoo.load_pretrained(folder)
    assert num_params(model.config) == sum(x.size for x in jax.tree.leaves(model.params))


def test_a_copy_has_the_same_fingerprint_and_other_weights_have_another(tmp_path, folder):
    source = zoo.open_source(folder)
    copied = zoo.open_source(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    assert copied.fingerprint == source.fingerprint
    assert zoo.open_source(write(tmp_path / "other", tensors(seed=1), files=3)).fingerprint != source.fingerprint
    renamed = zoo.open_source(write(tmp_path / "theta", tensors(), files=3, rope_theta=5e5))
    assert renamed.fingerprint != source.fingerprint
