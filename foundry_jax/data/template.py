"""What lies beside a tokenizer.json: a chat template, and what templates call the model's special tokens.

Hugging Face's files, all of them optional:

    tokenizer_config.json    {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{% for ...", ...}
    chat_template.jinja      the template, if it is not in there
    special_tokens_map.json  older files: the special tokens
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from foundry_jax.errors import UserError

TEMPLATE, CONFIG, TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
FILES = (TEMPLATE, CONFIG, TOKENS)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Spelling(NamedTuple):
    """How a model wants to be talked to: Jinja, or None, and {"eos_token": "<|im_end|>", ...}."""

    template: str | None
    special_tokens: dict[str, str]


def read_spelling(folder: Path) -> Spelling:
    """Returns what the files in a folder say; all of them may be absent.

    Raises:
        UserError: a file cannot be read or is not what it should be.
    """
    texts = {}
    for name in FILES:
        try:
            texts[name] = (folder / name).read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {folder / name}: {getattr(error, 'strerror', None) or error}.") from None
    return spelling_of(texts, str(folder))


def spelling_of(texts: Mapping[str, str], where: str) -> Spelling:
    """Returns the same of {file name: content}; `where` names them in errors."""
    tokens: dict[str, str] = {}
    config: dict[str, Any] = {}
    for name in (TOKENS, CONFIG):  # the newer one has the last word
        if name in texts:
            config = _parse(texts[name], f"{where}/{name}")
            tokens |= {key: text for key in NAMES if (text := _token(config.get(key))) is not None}
    template = texts.get(TEMPLATE)
    if template is None and CONFIG in texts:
        template = _template(config.get("chat_template"), f"{where}/{CONFIG}")
    return Spelling(template, tokens)


def as_config(spelling: Spelling) -> dict[str, Any]:
    """Returns the keys of tokenizer_config.json that say it."""
    return spelling.special_tokens | ({} if spelling.template is None else {"chat_template": spelling.template})


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold a JSON object.")
    return value


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _template(value: Any, where: str) -> str | None:
    """Returns a template, or of a list of named ones the one for ordinary use."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        if not isinstance(named.get("default"), str):
            raise UserError(f'{where}: chat_template must be text, or a list with one named "default".')
        return named["default"]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: chat_template must be text.")
    return value
