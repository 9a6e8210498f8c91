"""GGUF files of the llama architecture, as llama.cpp reads them: one file with settings, tokenizer and weights.

Seen as a LlamaForCausalLM of Hugging Face: its names, its tensors, its order of the rotated dims. Quantised tensors are
dequantised to float32, a few rows at a time.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from foundry_jax.data.template import spelling_of
from foundry_jax.data.tokenize import FILE, Tokenizer, load_tokenizer, tokenizer_of
from foundry_jax.model.position import Llama3
from foundry_jax.schema import require
from foundry_jax.zoo.families import FAMILIES
from foundry_jax.zoo.folder import TEXTS, require_vocabulary
from foundry_jax.zoo.gguf_header import Header, Tensor, read_header
from foundry_jax.zoo.gguf_tokenizer import KIND, control_token, tokenizer_json
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.settings import Keys, model_of
from foundry_jax.zoo.source import NamedSource, TensorInfo

ARCHITECTURE = "llama"
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {  # blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaling divides each frequency by, in place of its numbers
NEEDED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Keys that change what is computed, as some models with a llama architecture have them, and the values that do not.
FIXED = {
    "llama.expert_count": (None, 0),
    "llama.attention.scale": (None, 0.0),
    "llama.embedding_scale": (None, 1.0),
    "llama.residual_scale": (None, 1.0),
    "llama.logit_scale": (None, 1.0),
    "llama.attention.sliding_window": (None, 0),
    "split.count": (None, 0, 1),
}
UNQUANTISED = {
    GGMLQuantizationType.F32: ("F32", np.dtype(np.float32)),
    GGMLQuantizationType.F16: ("F16", np.dtype(np.float16)),
    GGMLQuantizationType.BF16: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names -> GGUF's
# Spellings of tokens that end a turn; files of instruction-tuned models may name another one as their only end.
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>")
_PIECE = 2**20  # numbers dequantised at a time
_SAMPLE, _SAMPLES = 4096, 64  # bytes; how many of them are spread over the weights


class GGUFFile(NamedSource):
    """A GGUF file of the llama architecture, tied if it has no output.weight."""

    def __init__(self, path: pathlib.Path):
        """Reads the header.

        Raises:
            UserError: no whole GGUF file, or a model of another architecture.
        """
        self.path = path
        self.header = read_header(path)
        family = FAMILIES["LlamaForCausalLM"]
        keys = Keys(_settings(self.header), str(path))
        super().__init__(str(path), model_of(family.read(keys)), family, GGUFTensors(self.header, keys))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the header, the size, and samples spread evenly over the weights."""
        data, start = self.header.data, self.header.data_start
        digest = hashlib.sha256(data[:start])
        digest.update(str(len(data)).encode())
        for i in range(_SAMPLES):
            at = start + (len(data) - start) * i // _SAMPLES
            digest.update(data[at : at + _SAMPLE])
        return digest.hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ends that the metadata name, and tokens that are known to end a turn."""
        metadata = self.header.metadata
        named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        spelled = [tokens.index(token) for token in ENDS_OF_TURN if token in tokens]
        return tuple(dict.fromkeys(i for i in [*named, *spelled] if isinstance(i, int)))

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer: of a tokenizer.json beside the file, or rebuilt from the metadata."""
        beside, end_id = self.path.with_name(FILE), self.stop_ids[0] if self.stop_ids else None
        if beside.exists():
            tokenizer = load_tokenizer(beside, end_id=end_id)
        elif KIND in self.header.metadata:
            tokenizer = tokenizer_of(tokenizer_json(self.header.metadata, self.name), self.name, end_id=end_id)
        else:
            return None
        require_vocabulary(tokenizer, self.model.vocab_size, str(beside) if beside.exists() else self.name)
        return tokenizer.spelled_as(spelling_of(self._configs(), self.name))

    def texts(self) -> Mapping[str, str]:
        """Returns what transformers' AutoTokenizer and generate read."""
        beside, texts = self.path.with_name(FILE), self._configs()
        if beside.exists():
            texts[FILE] = beside.read_text("utf-8")
        elif KIND in self.header.metadata:
            texts[FILE] = json.dumps(tokenizer_json(self.header.metadata, self.name), ensure_ascii=False)
        return texts

    def _configs(self) -> dict[str, str]:
        """Returns the same without the tokenizer itself; files beside a tokenizer.json have precedence."""
        texts = {"generation_config.json": json.dumps(self._generation(), indent=2)}
        if KIND in self.header.metadata:
            texts["tokenizer_config.json"] = json.dumps(self._tokenizer_config(), indent=2, ensure_ascii=False)
        if self.path.with_name(FILE).exists():
            found = [self.path.with_name(name) for name in TEXTS if name != FILE]
            texts |= {path.name: path.read_text("utf-8") for path in found if path.exists()}
        return texts

    def _generation(self) -> dict[str, Any]:
        metadata = self.header.metadata
        ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{TOKENS[name]}_token_id") for name in ("bos", "pad")}
        ids["eos_token_id"] = list(self.stop_ids) or None
        return {name: value for name, value in ids.items() if value is not None}

    def _tokenizer_config(self) -> dict[str, Any]:
        metadata = self.header.metadata
        tokens = {f"{name}_token": control_token(metadata, theirs) for name, theirs in TOKENS.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.model.context_length,
            **{name: token for name, token in tokens.items() if token is not None},
            **({"chat_template": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}),
        }


class GGUFTensors:
    """The tensors of a GGUF file under the names and in the order of Hugging Face."""

    def __init__(self, header: Header, keys: Keys):
        """Reads no tensors.

        Args:
            keys: of the model's config.json.

        Raises:
            UserError: a tensor of a type that cannot be dequantised.
        """
        self._data, self._file, self._keys = header.data, header.name, keys
        self._tensors = {_renamed(name): tensor for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
        for name, tensor in self._tensors.items():
            require(
                _is_readable(tensor.kind),
                f"{header.name}: {name} has the type {tensor.kind.name}, which the gguf package cannot dequantise; "
                f"quantise the model to another one, such as Q8_0.",
            )
        self.infos = {
            name: TensorInfo(header.name, UNQUANTISED.get(tensor.kind, ("F32", None))[0], tensor.shape)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a tensor, or the part of it that one slice for each axis names; float32 if it was quantised."""
        tensor = self._tensors[name]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None:
            return _read(self._data, tensor, index)
        head_dim = tensor.shape[0] // self._keys.whole(heads)
        start, stop, _ = index[0].indices(tensor.shape[0])
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        x = _read(self._data, tensor, (slice(first, last), *index[1:]))
        return halves_from_pairs(x, head_dim)[start - first : stop - first]


def halves_from_pairs(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns rows of heads with dims (i, i + d/2) turning together, where the file has (2i, 2i + 1)."""
    return x.reshape(-1, head_dim // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _read(data: Any, tensor: Tensor, index: Index) -> np.ndarray:
    """Returns tensor[index]: whole blocks of the quantisation are read, and what was not asked for is cut off."""
    block, size = GGML_QUANT_SIZES[tensor.kind]
    start, stop, _ = index[-1].indices(tensor.shape[-1])
    first, last = start // block, -(-stop // block)
    rows = np.frombuffer(data, np.uint8, tensor.num_bytes, tensor.start).reshape(*tensor.shape[:-1], tensor.row_bytes)
    rows = rows[(*index[:-1], slice(first * size, last * size))]
    if tensor.kind in UNQUANTISED:
        return rows.view(UNQUANTISED[tensor.kind][1])
    return _dequantised(rows, tensor.kind)[..., start - first * block : stop - first * block]


def _dequantised(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Returns rows of blocks as float32; done at once, the gguf package holds all numbers twice."""
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((*rows.shape[:-1], rows.shape[-1] // size * block), np.float32)
    if rows.ndim == 1:
        out[...] = dequantize(rows, kind)
        return out
    step = max(16, _PIECE // max(1, out.shape[-1]))
    for i in range(0, len(out), step):
        out[i : i + step] = dequantize(rows[i : i + step], kind)
    return out


@functools.cache
def _is_readable(kind: GGMLQuantizationType) -> bool:
    """Returns whether tensors of a type are floats that the gguf package can dequantise."""
    if kind in UNQUANTISED:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _renamed(name: str) -> str:
    """Returns Hugging Face's name of a tensor; one that a llama model does not have keeps its own, and is refused."""
    match = IN_LAYER.fullmatch(name)
    if match and match[2] in LAYER:
        return f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"
    return WHOLE.get(name, name)


def _settings(header: Header) -> dict[str, Any]:
    """Returns the keys that config.json would have.

    Raises:
        UserError: another architecture, keys that are missing, or a model that LlamaForCausalLM is not.
    """
    metadata, where, tensors = header.metadata, header.name, header.tensors
    found = metadata.get("general.architecture")
    require(
        found == ARCHITECTURE, f"{where} has the architecture {found!r}; of GGUF files only {ARCHITECTURE!r} is read."
    )
    for key, allowed in FIXED.items():
        value = metadata.get(key)
        require(value in allowed, f"{where}: {key}={value!r} is not supported, only {allowed[-1]!r} or nothing.")
    for name in NEEDED:
        require(f"llama.{name}" in metadata, f"{where} has no llama.{name}: it holds no whole llama model.")
    keys = Keys(metadata, where)
    dim, heads = keys.whole("llama.embedding_length"), keys.whole("llama.attention.head_count")
    layers, found = keys.whole("llama.block_count"), {match[1] for match in map(IN_LAYER.fullmatch, tensors) if match}
    require(len(found) == layers, f"{where} has tensors of {len(found)} layers, but llama.block_count={layers}.")
    require("token_embd.weight" in tensors, f"{where} has no tensor token_embd.weight: it holds no whole llama model.")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.whole("llama.context_length"),
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("llama.attention.head_count_kv", heads),
        "head_dim": _head_dim(keys, dim, heads),
        "intermediate_size": keys.whole("llama.feed_forward_length"),
        "rms_norm_eps": keys.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, keys),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _head_dim(keys: Keys, dim: int, heads: int) -> int:
    """Returns the dims of a head, which must be the same for keys and values, and all turn."""
    head_dim = keys.whole("llama.attention.key_length", dim // max(1, heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        other = keys.whole(f"llama.{name}", head_dim)
        require(
            other == head_dim, f"{keys.where}: llama.{name}={other} is not supported, only {head_dim}, a head's dims."
        )
    return head_dim


def _rope_scaling(header: Header, keys: Keys) -> dict[str, Any] | None:
    """Returns rope_scaling of config.json."""
    kind = keys.values.get("llama.rope.scaling.type", "none")
    if ROPE_FACTORS in header.tensors:
        require(kind == "none", f"{keys.where} has both {ROPE_FACTORS} and llama.rope.scaling.type={kind!r}.")
        return _llama3_scaling(header, keys)
    if kind == "none":
        return None
    factor = keys.number("llama.rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    require(
        kind == "yarn", f"{keys.where}: llama.rope.scaling.type={kind!r} is not supported, only 'linear' and 'yarn'."
    )
    length = keys.whole("llama.rope.scaling.original_context_length", keys.whole("llama.context_length"))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}


def _llama3_scaling(header: Header, keys: Keys) -> dict[str, Any] | None:
    """Returns the numbers of Llama 3's scaling that divides the frequencies as the file's tensor says."""
    tensor = header.tensors[ROPE_FACTORS]
    require(
        tensor.kind in UNQUANTISED and len(tensor.shape) == 1, f"{keys.where}: {ROPE_FACTORS} is no vector of floats."
    )
    found = np.asarray(_read(header.data, tensor, (slice(None),)), np.float32)
    theta = keys.number("llama.rope.freq_base", 10000.0)
    scaling = dataclasses.replace(Llama3(), factor=max(1.0, float(found.max())))
    frequencies = theta ** -(np.arange(len(found)) / len(found))
    expected = frequencies / np.asarray(scaling.scale(frequencies, theta)[0])
    if np.allclose(found, 1):
        return None
    require(
        np.allclose(found, expected, rtol=1e-3),
        f"{keys.where}: {ROPE_FACTORS} is not supported: only the factors of Llama 3's scaling for "
        f"{scaling.original_length} tokens with turns from {scaling.low:g} to {scaling.high:g} are.",
    )
    return {
        "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_length,
    }  # fmt: skip
