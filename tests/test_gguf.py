"""GGUF files: read as the Hugging Face checkpoint they were made from, and refused in one line where they cannot be."""

import json
import random
import tracemalloc

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from foundry_jax import zoo
from foundry_jax.data import load_tokenizer
from foundry_jax.errors import UserError
from foundry_jax.model.position import Llama3, scaling_of
from foundry_jax.zoo.export import export
from foundry_jax.zoo.folder import HuggingFaceFolder
from foundry_jax.zoo.gguf import GGUFFile
from foundry_jax.zoo.gguf_header import read_header
from foundry_jax.zoo.gguf_tokenizer import PRE, tokenizer_json
from tests import checkpoints

# Quantised rows come in blocks of 32.
VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, MLP_DIM, LAYERS = 320, 96, 4, 2, 8, 64, 2
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": MLP_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rope_theta": 50000.0,
}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": MLP_DIM,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.value_length": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
}
NAMES = {  # of llama.cpp
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32 = GGMLQuantizationType.F32


def draw(seed=0) -> dict[str, np.ndarray]:
    """Returns the tensors of a Llama as transformers names them."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (DIM,),
            f"{layer}post_attention_layernorm.weight": (DIM,),
            f"{layer}self_attn.q_proj.weight": (HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, DIM),
            f"{layer}self_attn.o_proj.weight": (DIM, HEADS * HEAD_DIM),
            f"{layer}mlp.gate_proj.weight": (MLP_DIM, DIM),
            f"{layer}mlp.up_proj.weight": (MLP_DIM, DIM),
            f"{layer}mlp.down_proj.weight": (DIM, MLP_DIM),
        }
    return {name: rng.normal(len(shape) == 1, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def in_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of heads as llama.cpp has them: dims that turn together side by side."""
    size = len(x) // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return x[order]


def write(path, found=None, kind=F32, *, metadata=None, extra=None):
    """Returns the path of a GGUF file with tensors of transformers' names.

    Args:
        kind: of all matrices.
        metadata: keys to add or, with None, to leave out.
        extra: tensors under their own names.
    """
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for key, value in (METADATA | (metadata or {})).items():
        put(writer, key, value)
    for name, x in (draw() if found is None else found).items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "attn_q." in name or "attn_k." in name:
            x = in_pairs(x, HEADS if "attn_q." in name else KV_HEADS)
        own = kind if x.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(x, own), raw_dtype=own)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf")


# ------------------------------------------------------------------------------------------------ weights


def test_a_file_is_the_checkpoint_it_was_made_from(whole, tmp_path):
    twin = HuggingFaceFolder(checkpoints.write(tmp_path, draw(), tokenizer=False, **CONFIG))
    source = zoo.open_source(whole)
    assert source.model == twin.model
    for path, shape in source.shapes.items():
        found = source.read(path)
        assert found.dtype == np.float32 and found.shape == shape
        np.testing.assert_array_equal(found, twin.read(path))
    tokens = jnp.arange(12).reshape(2, 6)
    logits = [zoo.load_pretrained(each).logits(tokens) for each in (whole, tmp_path)]
    np.testing.assert_array_equal(*logits)


KINDS = [getattr(GGMLQuantizationType, name) for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_tensors_are_what_the_package_dequantises(kind, tmp_path):
    source = GGUFFile(write(tmp_path / "model.gguf", kind=kind))
    for name, path, heads in (
        ("model.layers.1.self_attn.q_proj.weight", "block_1/attention/query/kernel", HEADS),
        ("model.layers.1.self_attn.k_proj.weight", "block_1/attention/key/kernel", KV_HEADS),
        ("model.layers.0.mlp.down_proj.weight", "block_0/mlp/down/kernel", None),
        ("model.embed_tokens.weight", "embed/embedding", None),
    ):
        x = draw()[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(in_pairs(x, heads) if heads else x, kind), kind)
        if heads:  # a pair of dims (2i, 2i + 1) of a head are its dims i and i + d/2
            expected = expected.reshape(heads, HEAD_DIM, -1)
            expected = np.concatenate([expected[:, 0::2], expected[:, 1::2]], axis=1).reshape(x.shape)
        ours = expected if "embed" in path else expected.T.reshape(source.shapes[path])
        np.testing.assert_array_equal(source.read(path).astype(np.float32), ours)


@pytest.mark.parametrize("kind", [F32, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_a_part_of_a_parameter_is_that_part_of_the_whole(kind, tmp_path):
    source = GGUFFile(write(tmp_path / "model.gguf", kind=kind))
    rng = random.Random(0)
    for path, shape in source.shapes.items():
        whole = source.read(path)
        for _ in range(4):
            starts = [rng.randrange(size) for size in shape]
            index = tuple(slice(start, rng.randint(start + 1, size)) for start, size in zip(starts, shape, strict=True))
            np.testing.assert_array_equal(source.read(path, index), whole[index], err_msg=f"{path} {index}")


def test_rows_that_cut_through_a_head_are_put_in_order_too(whole):
    tensors, name = GGUFFile(whole)._tensors, "model.layers.0.self_attn.k_proj.weight"
    everything = tensors.read(name, (slice(None), slice(None)))
    for rows in (slice(3, 11), slice(0, 1), slice(15, 16), slice(5, 5)):
        np.testing.assert_array_equal(tensors.read(name, (rows, slice(2, 5))), everything[rows, 2:5])


def test_dequantising_takes_little_more_memory_than_the_result(tmp_path):
    found = draw() | {"model.embed_tokens.weight": np.zeros((100_000, DIM), np.float32)}
    source = GGUFFile(
        write(tmp_path / "model.gguf", found, GGMLQuantizationType.Q4_1, metadata={"llama.vocab_size": 100_000})
    )
    tracemalloc.start()
    size = source.read("embed/embedding").nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 100_000 * DIM * 4 and peak < size + 32 * 2**20


def test_tied_and_biased_models_are_told_by_their_tensors(tmp_path):
    found = draw() | {"lm_head.weight": np.ones((VOCAB, DIM), np.float32)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}.self_attn."
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": DIM}
        found |= {f"{layer}{x}_proj.bias": np.arange(n, dtype=np.float32) for x, n in sizes.items()}
    source = GGUFFile(write(tmp_path / "model.gguf", found))
    assert not source.model.tie_embeddings and source.model.bias == "attention"
    for name, heads in (("query", HEADS), ("key", KV_HEADS)):
        bias = source.read(f"block_0/attention/{name}/bias")
        np.testing.assert_array_equal(bias, np.arange(heads * HEAD_DIM).reshape(heads, HEAD_DIM))


def test_an_exported_file_is_a_checkpoint_with_the_same_numbers(tmp_path):
    source = GGUFFile(write(tmp_path / "model.gguf", kind=GGMLQuantizationType.Q4_1))
    export(source, tmp_path / "out", dtype="float32")
    twin = HuggingFaceFolder(tmp_path / "out")
    assert twin.model == source.model
    for path in source.shapes:
        np.testing.assert_array_equal(twin.read(path), source.read(path))


def test_the_fingerprint_changes_with_the_weights_and_with_nothing_else(whole, tmp_path):
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(whole.read_bytes())
    assert GGUFFile(copy).fingerprint == GGUFFile(whole).fingerprint
    assert GGUFFile(write(tmp_path / "b.gguf", draw(seed=1))).fingerprint != GGUFFile(whole).fingerprint


# ------------------------------------------------------------------------------------------------ settings


def rope_factors(factor, original_length=8192):
    """Returns what llama.cpp's converter writes for Llama 3's scaling, in its words."""
    factors = []
    for freq in 1.0 / 50000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelen = 2 * np.pi / freq
        if wavelen < original_length / 4:
            factors.append(1)
        elif wavelen > original_length:
            factors.append(factor)
        else:
            smooth = (original_length / wavelen - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def test_llama3_scaling_is_told_by_its_factors(tmp_path):
    for factor in (8.0, 32.0):
        source = GGUFFile(write(tmp_path / f"{factor}.gguf", extra=rope_factors(factor)))
        assert scaling_of(source.model) == Llama3(factor, 8192, 1.0, 4.0)
    assert GGUFFile(write(tmp_path / "1.gguf", extra=rope_factors(1.0))).model.rope_scaling == "none"
    with pytest.raises(UserError, match=r"rope_freqs.weight is not supported: only the factors of Llama 3's scaling"):
        GGUFFile(write(tmp_path / "x.gguf", extra=rope_factors(8.0, original_length=4096)))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, "none"),
        ({"type": "linear", "factor": 4.0}, "linear(factor=4.0)"),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 16},
            "yarn(factor=8.0, original_length=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)",
        ),
    ],
)
def test_rope_scaling_keys(metadata, expected, tmp_path):
    keys = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    assert GGUFFile(write(tmp_path / "model.gguf", metadata=keys)).model.rope_scaling == expected


def test_epsilon_is_the_number_that_was_rounded_to_float32(whole):
    assert GGUFFile(whole).model.norm_epsilon == 1e-5


WRONG = {
    r"has the architecture 'gpt2'; of GGUF files only 'llama' is read": {"general.architecture": "gpt2"},
    r"has the architecture None": {"general.architecture": None},
    r"has no llama.block_count: it holds no whole llama model": {"llama.block_count": None},
    r"llama.expert_count=8 is not supported, only 0": {"llama.expert_count": 8},
    r"llama.attention.scale=0.5 is not supported": {"llama.attention.scale": 0.5},
    r"split.count=3 is not supported": {"split.count": 3},
    r"llama.rope.dimension_count=4 is not supported, only 8": {"llama.rope.dimension_count": 4},
    r"llama.rope.scaling.type='longrope' is not supported, only 'linear' and 'yarn'": {
        "llama.rope.scaling.type": "longrope"
    },
    r"llama.block_count='two' must be a whole number": {"llama.block_count": "two"},
    r"has tensors of 2 layers, but llama.block_count=1": {"llama.block_count": 1},
    r"has tensors of 2 layers, but llama.block_count=4000000000": {"llama.block_count": 4_000_000_000},
    r"mlp.down_proj.weight has the shape \[96, 64\]": {"llama.feed_forward_length": 65},
}


@pytest.mark.parametrize("message", WRONG)
def test_other_models_are_refused_by_name(message, tmp_path):
    path = write(tmp_path / "model.gguf", metadata=WRONG[message])
    with pytest.raises(UserError, match=message) as error:
        GGUFFile(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_tensors_of_other_types_and_names_are_refused(tmp_path):
    extra = {"blk.0.attn_q.weight.more": np.zeros((2, 32), np.float32)}
    with pytest.raises(UserError, match=r"blk.0.attn_q.weight.more\[2, 32\] is no part"):
        GGUFFile(write(tmp_path / "a.gguf", extra=extra))
    found = draw()
    del found["model.norm.weight"]
    with pytest.raises(
        UserError, match=r"model.norm.weight has the type I32, which the gguf package cannot dequantise"
    ):
        GGUFFile(write(tmp_path / "b.gguf", found, extra={"output_norm.weight": np.zeros(DIM, np.int32)}))


# ------------------------------------------------------------------------------------------------ the header


def test_the_header_says_what_the_gguf_package_reads(tmp_path):
    keys = {
        "a.flag": True, "a.float": 0.1, "a.text": "ü\n", "a.numbers": [1, 2, 3], "a.texts": ["x", "", "é"],
        "a.floats": [0.5, 1.5],
    }  # fmt: skip
    path = write(tmp_path / "model.gguf", kind=GGMLQuantizationType.Q4_1, metadata=keys)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        assert ours.metadata[key] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, found.start, found.num_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert found.shape == tuple(tensor.shape.tolist()[::-1])


def test_a_file_cut_off_anywhere_says_so(whole, tmp_path):
    data, path = whole.read_bytes(), tmp_path / "cut.gguf"
    start = read_header(whole).data_start
    for size in [*range(0, start, 7), start, start + 100, len(data) - 40]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut off|no GGUF file") as error:
            GGUFFile(path)
        assert "\n" not in str(error.value)


def test_a_damaged_header_never_hangs_and_never_crashes(whole, tmp_path):
    data, path, rng = whole.read_bytes(), tmp_path / "damaged.gguf", random.Random(0)
    start = read_header(whole).data_start
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(start)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_files_that_are_something_else_are_refused(whole, tmp_path):
    data, path = whole.read_bytes(), tmp_path / "model.gguf"
    for content, message in (
        (b"", "it is empty"),
        (b"PK\x03\x04" + data, "does not begin with GGUF"),
        (data[:4] + b"\x01\x00\x00\x00" + data[8:], "of version 1"),
        (data[:4] + b"\x00\x00\x00\x03" + data[8:], "big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            GGUFFile(path)
    with pytest.raises(UserError, match=r"Cannot read .*nowhere.gguf: No such file"):
        GGUFFile(tmp_path / "nowhere.gguf")


def test_overlapping_and_doubled_tensors_are_refused(tmp_path):
    path = write(tmp_path / "model.gguf", extra={"zz": np.zeros(32, np.float32)})
    data, at = path.read_bytes(), path.read_bytes().index(b"zz") + 2 + 4 + 8 + 4
    path.write_bytes(data[:at] + (64).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(UserError, match=r"the tensors .* and .* overlap"):
        GGUFFile(path)
    path.write_bytes(data.replace(b"blk.1.ffn_norm.weight", b"blk.0.ffn_norm.weight"))
    with pytest.raises(UserError, match=r"the tensor 'blk.0.ffn_norm.weight' twice"):
        GGUFFile(path)


# ------------------------------------------------------------------------------------------------ tokenizers

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLITS = {  # what the original tokenizer.json of a model has
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ]),
}  # fmt: skip
TEXT = "The year 2024, and 31415 more: don't café   spaces\n\n\ttabs A1b22 ½ 數字 ١٢٣ 🙂 <|im_end|> x=<|im_start|>y"


def original(split="smollm") -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer whose first tokens are control tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = SPLITS[split], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT * 5, "the theme of the 31 31 22 22 22"], trainer)
    return backend


def in_metadata(backend: tokenizers.Tokenizer, pre: str, **changes) -> dict:
    """Returns the metadata that llama.cpp's converter makes of a tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in CONTROLS else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()} | {
        "tokenizer.chat_template": checkpoints.CHATML
    }


@pytest.mark.parametrize("pre", SPLITS)
def test_a_rebuilt_tokenizer_gives_the_original_ids(pre, tmp_path):
    backend = original(pre)
    tokenizer = GGUFFile(write(tmp_path / "model.gguf", metadata=in_metadata(backend, pre))).tokenizer()
    backend.encode_special_tokens = True
    for text in (TEXT, *TEXT.split(), "", " ", "\n", "1234567890", "<|im_end|>"):
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(CONTROLS) & {backend.id_to_token(i) for i in tokenizer.encode(TEXT)}
    assert tokenizer.control_ids == {token: i for i, token in enumerate(CONTROLS)}
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2], skip_special=True) == "hi"
    assert (tokenizer.separator_id, tokenizer.start_ids, tokenizer.chat_template) == (0, (), checkpoints.CHATML)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


WORDS = {
    "gpt-2": ["The", " year", " 2024", ",", " don", "'t", " CAN", "'", "T", "  ", " x", "\n", "\n", "+=", "12345",
              "\n"],
    "smollm": ["The", " year", " ", "2", "0", "2", "4", ",", " don", "'t", " CAN", "'", "T", "  ", " x", "\n", "\n",
               "+=", "1", "2", "3", "4", "5", "\n"],
    "llama-bpe": ["The", " year", " ", "202", "4", ",", " don", "'t", " CAN", "'T", "  ", " x", "\n\n", "+=",
                  "123", "45", "\n"],
    "qwen2": ["The", " year", " ", "2", "0", "2", "4", ",", " don", "'t", " CAN", "'T", "  ", " x", "\n\n", "+=",
              "1", "2", "3", "4", "5", "\n"],
}  # fmt: skip


@pytest.mark.parametrize("pre", WORDS)
def test_text_is_split_into_the_words_of_each_kind(pre):
    value = tokenizer_json(in_metadata(original(), pre), "x")
    backend = tokenizers.Tokenizer.from_str(json.dumps(value))
    words = backend.pre_tokenizer.pre_tokenize_str("The year 2024, don't CAN'T   x\n\n+=12345\n")
    assert [decoders.ByteLevel().decode([word]) for word, _ in words] == WORDS[pre]
    assert isinstance(backend.normalizer, normalizers.NFC if pre == "qwen2" else type(None))
    assert value["model"]["ignore_merges"] == (pre == "llama-bpe")


def test_texts_begin_as_the_file_says(tmp_path):
    for pre, given, expected in (("llama-bpe", None, (1,)), ("llama-bpe", False, ()), ("gpt-2", True, (1,))):
        metadata = in_metadata(original(), pre, add_bos_token=given)
        tokenizer = GGUFFile(write(tmp_path / "model.gguf", metadata=metadata)).tokenizer()
        assert tokenizer.start_ids == expected
        assert 1 not in tokenizer.encode(TEXT)


def test_unused_tokens_are_left_out_and_user_defined_ones_found_in_text(tmp_path):
    metadata = in_metadata(original(), "smollm")
    tokens, kinds = (list(metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))
    tokens[-2:], kinds[-2:] = ["<tool_call>", "[PAD319]"], [4, 5]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [pair for pair in metadata["tokenizer.ggml.merges"] if pair.replace(" ", "") in tokens]
    metadata["tokenizer.ggml.merges"] = merges
    tokenizer = GGUFFile(write(tmp_path / "model.gguf", metadata=metadata)).tokenizer()
    assert tokenizer.vocab_size == VOCAB - 1
    assert VOCAB - 2 in tokenizer.encode("a<tool_call>b") and "<tool_call>" not in tokenizer.control_ids


def test_ends_are_those_named_and_those_that_end_a_turn(tmp_path):
    metadata = in_metadata(original(), "smollm", eos_token_id=0, eot_token_id=1)
    source = GGUFFile(write(tmp_path / "model.gguf", metadata=metadata))
    assert source.stop_ids == (0, 1, 2)
    assert json.loads(source.texts()["generation_config.json"])["eos_token_id"] == [0, 1, 2]


def test_an_export_carries_the_tokenizer(tmp_path):
    source = GGUFFile(write(tmp_path / "model.gguf", metadata=in_metadata(original(), "smollm")))
    export(source, tmp_path / "out")
    exported = HuggingFaceFolder(tmp_path / "out")
    assert exported.stop_ids == source.stop_ids == (2,)
    tokenizer = exported.tokenizer()
    assert tokenizer.encode(TEXT) == source.tokenizer().encode(TEXT)
    assert tokenizer.chat_template == checkpoints.CHATML
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert config["bos_token"] == "<|im_start|>" and config["model_max_length"] == 64


def test_a_tokenizer_without_any_known_separator_takes_the_end_of_the_model(tmp_path):
    metadata = in_metadata(original(), "smollm")
    tokens = ["<|nothing|>", *metadata["tokenizer.ggml.tokens"][1:]]
    source = GGUFFile(write(tmp_path / "model.gguf", metadata=metadata | {"tokenizer.ggml.tokens": tokens}))
    tokenizer = source.tokenizer()
    assert tokenizer.separator_id == 2
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert (again.separator_id, again.hash) == (2, tokenizer.hash)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert tokenizers.Tokenizer.from_str(again.tokenizer_json()).token_to_id("<|im_end|>") == 2


def test_other_tokenizers_are_refused_unless_a_file_lies_beside(tmp_path):
    path = write(tmp_path / "model.gguf", metadata={"tokenizer.ggml.model": "llama"})
    source = GGUFFile(path)
    with pytest.raises(UserError, match=r"has the tokenizer 'llama'; only 'gpt2'.*A tokenizer.json beside the file"):
        source.tokenizer()
    metadata = in_metadata(original(), "chatglm-bpe")
    with pytest.raises(
        UserError, match=r"Unknown tokenizer.ggml.pre 'chatglm-bpe'.*Choose from: gpt-2.*beside the file"
    ):
        GGUFFile(write(tmp_path / "other.gguf", metadata=metadata)).tokenizer()
    checkpoints.write_tokenizer(tmp_path)
    assert source.tokenizer().vocab_size == checkpoints.VOCAB
    assert source.tokenizer().chat_template == checkpoints.CHATML
    assert json.loads(source.texts()["tokenizer.json"]) == json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    checkpoints.write_tokenizer(tmp_path, vocab_size=VOCAB + 10)
    with pytest.raises(UserError, match=rf"has {VOCAB + 10} tokens, but the model only vocab_size={VOCAB}"):
        source.tokenizer()


def test_a_file_without_a_tokenizer_has_none(whole):
    assert GGUFFile(whole).tokenizer() is None
    assert GGUFFile(whole).texts().keys() == {"generation_config.json"}


DAMAGED = {
    "tokens is no list of texts": {"tokens": [1, 2]},
    "token_type does not have one entry": {"token_type": [1]},
    "the merge 'a b c' does not join": {"merges": ["a b c"]},
    "holds no BPETokenizer": {"merges": ["a nothing"]},
    "has no such token": {"bos_token_id": 99_999, "add_bos_token": True},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_tokenizers_are_refused(message, tmp_path):
    metadata = in_metadata(original(), "smollm", **DAMAGED[message])
    with pytest.raises(UserError, match=message) as error:
        GGUFFile(write(tmp_path / "model.gguf", metadata=metadata)).tokenizer()
    assert "\n" not in str(error.value)


def test_every_kind_of_split_is_tested():
    assert {id(PRE[name]) for name in WORDS} == {id(value) for value in PRE.values()}
