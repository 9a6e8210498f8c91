"""Pretrained models: names and files to working models, and back to files that other tools load.

    model = load_pretrained("llama3-1b")              # or a Hugging Face folder, a GGUF file, a run folder
    print(model.generate("Once upon a time,"))

ZOO (catalog.py) has the names, FAMILIES (families.py) the architectures. Nothing here imports torch or unpickles.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundry_jax.zoo.catalog import ZOO
    from foundry_jax.zoo.open import load_pretrained, open_source, settings_of
    from foundry_jax.zoo.pretrained import Pretrained
    from foundry_jax.zoo.source import Source

__all__ = ["ZOO", "Pretrained", "Source", "load_pretrained", "open_source", "settings_of"]

# Where each name is. Imported when it is asked for: `python -m foundry_jax.zoo --help` must not wait for JAX.
HOMES = {
    "ZOO": "catalog",
    "Pretrained": "pretrained",
    "Source": "source",
    "load_pretrained": "open",
    "open_source": "open",
    "settings_of": "open",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
