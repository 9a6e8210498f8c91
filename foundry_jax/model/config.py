"""The frozen, validated description of one architecture."""

import dataclasses
import math

from foundry_jax.schema import require, require_range

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "full")
BIASES = ("none", "qkv", "attention", "all")
QK_NORMS = ("none", "head", "whole")
PLACEMENTS = ("pre", "post", "sandwich")
EMBEDDINGS = ("plain", "scaled", "normed")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One architecture. Names of variants are checked where they are looked up, numbers here.

    Zero means "derive it" for vocab_size (from the tokenizer), num_kv_heads (one per query head), head_dim
    (model_dim / num_heads), mlp_dim (see default_mlp_dim) and q_lora_rank (a full-rank query). Texts such as
    "yarn(factor=4)" are a variant with its own numbers (schema.variant).
    """

    vocab_size: int
    context_length: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    attention: str
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: str
    qk_norm: str
    attention_softcap: float
    pattern: str
    window: int
    sparse: str
    mlp: str
    moe: str
    norm: str
    norm_epsilon: float
    norm_placement: str
    position: str
    rope_theta: float
    rope_scaling: str
    embedding: str
    tie_embeddings: bool
    dropout: float
    dtype: str
    scan_layers: bool
    remat: str

    def __post_init__(self):
        inf = math.inf
        require_range(
            self, "model.", vocab_size=(0, inf), context_length=(1, inf), num_layers=(1, inf), model_dim=(1, inf),
            num_heads=(1, inf), num_kv_heads=(0, inf), head_dim=(0, inf), mlp_dim=(0, inf), q_lora_rank=(0, inf),
            kv_lora_rank=(1, inf), qk_nope_head_dim=(1, inf), qk_rope_head_dim=(1, inf), v_head_dim=(1, inf),
            attention_softcap=(0, inf), window=(1, inf), norm_epsilon=(0, 1), rope_theta=(1, inf),
            dropout=(0, 0.999))  # fmt: skip
        choices = {"dtype": DTYPES, "remat": REMAT_POLICIES, "bias": BIASES, "qk_norm": QK_NORMS,
                   "norm_placement": PLACEMENTS, "embedding": EMBEDDINGS}  # fmt: skip
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"model.{name}={value!r} must be one of {', '.join(allowed)}.")
        if self.head_dim == 0:
            require(
                self.model_dim % self.num_heads == 0,
                f"model.num_heads={self.num_heads} must divide model.model_dim={self.model_dim} when head_dim is 0; "
                f"try num_heads in {divisors(self.model_dim)}, or set head_dim.",
            )
            object.__setattr__(self, "head_dim", self.model_dim // self.num_heads)
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", default_mlp_dim(self.model_dim, self.mlp))


def is_gated(mlp: str) -> bool:
    """Returns whether an MLP has three matrices, as those named after the gated linear unit do, or two."""
    return "glu" in mlp


def default_mlp_dim(model_dim: int, mlp: str) -> int:
    """Returns the width that gives every MLP the same number of parameters.

    Gated: 8/3 model_dim, rounded up to a multiple of 64 (Shazeer 2020, 2002.05202); plain: 3/2 of that, 4 model_dim.
    """
    gated_dim = -(-8 * model_dim // (3 * 64)) * 64
    return gated_dim if is_gated(mlp) else gated_dim * 3 // 2


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def scale_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """Returns the weight of a low-rank adapter: alpha / rank, or alpha / sqrt(rank) (rsLoRA; 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
