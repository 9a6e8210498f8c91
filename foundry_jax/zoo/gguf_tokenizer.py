"""From the metadata of a GGUF file to the tokenizer.json that its model was trained with.

GGUF keeps the vocabulary and the merges of byte-level BPE, and names the way text is split into words (`pre`), which
llama.cpp knows by heart: src/llama-vocab.cpp. Here are those ways as the original files of the models spell them.
"""

from collections.abc import Mapping
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.registry import unknown
from foundry_jax.schema import require

KIND = "tokenizer.ggml.model"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

_WORDS = (  # Llama 3 and Qwen: contractions, words, digits, marks, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(*, use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _steps(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = {"pre_tokenizer": _bytes(use_regex=True)}
_SMOLLM = {"pre_tokenizer": _steps({"type": "Digits", "individual_digits": True}, _bytes(use_regex=True))}
_LLAMA3 = {
    "pre_tokenizer": _steps(_split(_WORDS % "{1,3}"), _bytes(use_regex=False)),
    "ignore_merges": True,
    "begins": True,
}
_QWEN2 = {
    "pre_tokenizer": _steps(_split(_WORDS % ""), _bytes(use_regex=False)),
    "normalizer": {"type": "NFC"},
}
# tokenizer.ggml.pre -> how text is split; ignore_merges: a word that is a token is that token; begins: texts begin
# with a control token unless the file says otherwise.
PRE = {"gpt-2": _GPT2, "smollm": _SMOLLM, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2}


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a tokenizer.json as the `tokenizers` library reads it.

    Raises:
        UserError: a tokenizer of another kind, or lists that are missing or do not fit together.
    """
    pre = _pre(metadata, where)
    tokens = _list(metadata, "tokens", where)
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    require(
        isinstance(kinds, list) and len(kinds) == len(tokens),
        f"{where} is damaged: tokenizer.ggml.token_type does not have one entry for each of its {len(tokens)} tokens.",
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i], kind) for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)],
        "normalizer": pre.get("normalizer"),
        "pre_tokenizer": pre["pre_tokenizer"],
        "post_processor": _template(metadata, tokens, pre, where),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.get("ignore_merges", False),
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED},
            "merges": [_merge(text, where) for text in _list(metadata, "merges", where)],
        },
    }


def control_token(metadata: Mapping[str, Any], name: str) -> str | None:
    """Returns the spelling of a control token: name is bos, eos, unknown or padding; None if the file has none."""
    index, tokens = metadata.get(f"tokenizer.ggml.{name}_token_id"), metadata.get("tokenizer.ggml.tokens")
    known = isinstance(index, int) and isinstance(tokens, list) and 0 <= index < len(tokens)
    return tokens[index] if known else None


def _pre(metadata: Mapping[str, Any], where: str) -> dict:
    """Returns the entry of PRE."""
    kind, pre = str(metadata[KIND]), str(metadata.get("tokenizer.ggml.pre", "default"))
    beside = "A tokenizer.json beside the file is used instead, if there is one."
    require(kind == "gpt2", f"{where} has the tokenizer {kind!r}; only 'gpt2', byte-level BPE, is read. {beside}")
    if pre not in PRE:
        raise UserError(f"{where}: {unknown(pre, PRE, 'tokenizer.ggml.pre')} {beside}")
    return PRE[pre]


def _list(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    valid = isinstance(value, list) and all(isinstance(each, str) for each in value)
    require(valid, f"{where} is damaged: tokenizer.ggml.{name} is no list of texts.")
    return value


def _added(index: int, token: str, kind: int) -> dict:
    return {
        "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": kind == CONTROL,
    }  # fmt: skip


def _merge(text: str, where: str) -> list[str]:
    pair = text.split(" ")
    require(len(pair) == 2, f"{where} is damaged: the merge {text!r} does not join two tokens.")
    return pair


def _template(metadata: Mapping[str, Any], tokens: list[str], pre: dict, where: str) -> dict | None:
    """Returns what puts a control token before every text; None if the model has no such habit."""
    if not metadata.get("tokenizer.ggml.add_bos_token", pre.get("begins", False)):
        return None
    token = control_token(metadata, "bos")
    require(token is not None, f"{where} begins every text with tokenizer.ggml.bos_token_id, but has no such token.")
    ids = [metadata["tokenizer.ggml.bos_token_id"]]
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": ids, "tokens": [token]}},
    }
