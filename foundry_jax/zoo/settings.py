"""Between config.json and ModelConfig: what each key means, and which values no model of ours can have.

Settings are keys of ModelConfig, those that make a difference: {"num_layers": 30, "rope_theta": 100000.0, ...}.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from foundry_jax.errors import UserError
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.mlp.moe import moe_of
from foundry_jax.model.position import Linear, Llama3, Yarn, scaling_of
from foundry_jax.model.stacking import stacking_of
from foundry_jax.registry import unknown
from foundry_jax.schema import build, require

ACTIVATIONS = {  # their hidden_act of a gated MLP -> our mlp
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "sigmoid": "glu",
}
# Keys that change what is computed, and that we can only read with these values.
FIXED = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "pretraining_tp": (None, 1),  # computes the same, but differently: refused so that parity is never in doubt
}
# What a model has that no checkpoint says: numbers of variants it does not use, and how it is run.
NEUTRAL = {
    "attention": "gqa", "q_lora_rank": 0, "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2,
    "v_head_dim": 1, "bias": "none", "qk_norm": "none", "attention_softcap": 0.0, "pattern": "L", "window": 1,
    "sparse": "strided(stride=16)", "mlp": "swiglu", "moe": "none", "norm": "rmsnorm", "norm_placement": "pre",
    "position": "rope", "rope_theta": 10000.0, "rope_scaling": "none", "embedding": "plain", "dropout": 0.0,
    "dtype": "float32", "scan_layers": False, "remat": "none",
}  # fmt: skip
NOT_ARCHITECTURE = ("dropout", "dtype", "scan_layers", "remat")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of one config.json, read with errors that name the file."""

    values: Mapping[str, Any]
    where: str

    def whole(self, name: str, default: int | None = None) -> int:
        """Returns a whole number; without a default it must be there. null counts as absent."""
        value = self.values.get(name)
        value = default if value is None else value
        require(value is not None, f"{self.where} has no {name}, a whole number; is it the model's own config.json?")
        require(isinstance(value, int) and not isinstance(value, bool), self._wrong(name, "a whole number"))
        return value

    def optional_whole(self, name: str, default: int | None) -> int | None:
        """Returns a whole number or None (null in the file); the default if the key is absent."""
        value = self.values.get(name, default)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(value is None or is_int, self._wrong(name, "a whole number or null"))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a number; null counts as absent."""
        value = self.values.get(name)
        value = default if value is None else value
        require(value is not None, f"{self.where} has no {name}, a number; is it the model's own config.json?")
        require(isinstance(value, (int, float)) and not isinstance(value, bool), self._wrong(name, "a number"))
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns true or false; null counts as absent."""
        value = self.values.get(name)
        value = default if value is None else value
        require(isinstance(value, bool), self._wrong(name, "true or false"))
        return value

    def choice(self, name: str, table: Mapping[str, str], default: str | None = None) -> str:
        """Returns table[value of the key]."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in table:
            raise UserError(f"{self.where}: {unknown(str(value), table, name)}")
        return table[value]

    def section(self, name: str) -> "Keys | None":
        """Returns a nested object as keys of its own, None if it is absent or null."""
        value = self.values.get(name)
        require(value is None or isinstance(value, Mapping), self._wrong(name, "an object"))
        return None if value is None else Keys(value, f"{self.where}, {name}")

    def with_default(self, name: str, value: Any) -> "Keys":
        """Returns the keys with one that is set if it was absent."""
        return Keys({name: value, **self.values}, self.where)

    def _wrong(self, name: str, expected: str) -> str:
        return f"{self.where}: {name}={self.values.get(name)!r} must be {expected}."


def read_decoder(keys: Keys) -> dict[str, Any]:
    """Returns the settings that all families share."""
    for name, allowed in FIXED.items():
        value = keys.values.get(name)
        require(value in allowed, f"{keys.where}: {name}={value!r} is not supported, only {_words(allowed)}.")
    dim, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    require(
        keys.values.get("head_dim") is not None or dim % heads == 0,
        f"{keys.where}: hidden_size={dim} is not a multiple of num_attention_heads={heads}, and there is no head_dim.",
    )
    theta, scaling = _read_rope(keys)
    return {
        "vocab_size": keys.whole("vocab_size"),
        "context_length": keys.whole("max_position_embeddings"),
        "num_layers": keys.whole("num_hidden_layers"),
        "model_dim": dim,
        "num_heads": heads,
        "num_kv_heads": keys.whole("num_key_value_heads", heads),
        "head_dim": keys.whole("head_dim", dim // heads),
        "mlp_dim": keys.whole("intermediate_size"),
        "mlp": keys.choice("hidden_act", ACTIVATIONS, "silu"),
        "norm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
    }


def _read_rope(keys: Keys) -> tuple[float, str]:
    """Returns (rope_theta, rope_scaling): of rope_parameters (transformers 5), or of rope_theta and rope_scaling."""
    rope = keys.section("rope_parameters") or keys.section("rope_scaling") or Keys({}, keys.where)
    nested = [name for name, value in rope.values.items() if isinstance(value, Mapping)]
    require(not nested, f"{rope.where}: rotary embeddings by kind of layer ({', '.join(nested)}) are not supported.")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in _ROPES:
        raise UserError(f"{keys.where}: {unknown(str(kind), _ROPES, 'rope_type')}")
    require(
        rope.values.get("partial_rotary_factor") in (None, 1, 1.0),
        f"{rope.where}: partial_rotary_factor={rope.values.get('partial_rotary_factor')!r} is not supported, only 1.",
    )
    return theta, _ROPES[kind](rope, keys)


def _yarn(rope: Keys, keys: Keys) -> str:
    require(rope.flag("truncate", True), f"{rope.where}: truncate=false is not supported.")
    yarn = Yarn(
        factor=rope.number("factor"),
        original_length=rope.whole("original_max_position_embeddings", keys.whole("max_position_embeddings")),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )
    both = rope.values.get("mscale") and rope.values.get("mscale_all_dim")
    if both:  # transformers ignores one without the other
        yarn = dataclasses.replace(yarn, mscale=rope.number("mscale"), mscale_all_dim=rope.number("mscale_all_dim"))
    found = rope.values.get("attention_factor")
    expected = yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim)
    require(
        found is None or abs(found - expected) < 1e-6,
        f"{rope.where}: attention_factor={found} is not supported, only that of its factor, {expected:.6g}.",
    )
    return as_call("yarn", yarn)


_ROPES = {
    "default": lambda rope, keys: "none",
    "linear": lambda rope, keys: as_call("linear", Linear(rope.number("factor"))),
    "llama3": lambda rope, keys: as_call("llama3", Llama3(
        rope.number("factor"), rope.whole("original_max_position_embeddings"),
        rope.number("low_freq_factor"), rope.number("high_freq_factor"),
    )),
    "yarn": _yarn,
}  # fmt: skip


def as_call(name: str, numbers: Any) -> str:
    """Returns "name(field=value, ...)" of a dataclass, as schema.variant reads it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in dataclasses.asdict(numbers).items())})"


def bias_of(keys: Keys) -> str:
    """Returns the setting `bias` of attention_bias (of queries, keys, values and the output) and mlp_bias."""
    attention, mlp = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    require(attention or not mlp, f"{keys.where}: mlp_bias without attention_bias is not supported.")
    return "all" if mlp else "attention" if attention else "none"


def windows_of(keys: Keys) -> dict[str, Any]:
    """Returns the settings `pattern` and `window` of layer_types, or of use_sliding_window and max_window_layers."""
    layers, window = keys.whole("num_hidden_layers"), keys.optional_whole("sliding_window", None)
    kinds = keys.values.get("layer_types")
    if kinds is None:
        first = keys.whole("max_window_layers", 28) if keys.flag("use_sliding_window", False) else layers
        letters = "".join("L" if i < first else "S" for i in range(layers))
    else:
        known = {"full_attention": "L", "sliding_attention": "S"}
        for kind in kinds:
            if kind not in known:
                raise UserError(f"{keys.where}: {unknown(str(kind), known, 'entry of layer_types')}")
        require(
            len(kinds) == layers,
            f"{keys.where}: layer_types has {len(kinds)} entries, but num_hidden_layers={layers}.",
        )
        letters = "".join(known[kind] for kind in kinds)
    if "S" not in letters:
        return {}
    require(window is not None, f"{keys.where}: there are layers of a sliding window, but no sliding_window.")
    return {"pattern": compressed(letters, layers), "window": window}


def compressed(pattern: str, num_layers: int) -> str:
    """Returns the shortest pattern whose repetition gives the same letters to all layers."""
    letters = (pattern * num_layers)[:num_layers]
    return next(letters[:n] for n in range(1, num_layers + 1) if (letters[:n] * num_layers)[:num_layers] == letters)


def describe(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json that all families share."""
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": activations.get(config.mlp, "silu"),  # read back as another one: then no family fits
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": _describe_scaling(config),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _describe_scaling(config: ModelConfig) -> dict[str, Any] | None:
    match scaling_of(config):
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3(factor, original_length, low, high):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original_length,
            }  # fmt: skip
        case Yarn() as yarn:
            both = yarn.mscale_all_dim > 0
            return {
                "rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
                **({"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim} if both else {}),
            }  # fmt: skip
        case _:
            return None


def model_of(settings: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of settings; what they leave out has its neutral value."""
    return build(ModelConfig, NEUTRAL | dict(settings), "model.")


def meaningful(config: ModelConfig) -> dict[str, Any]:
    """Returns what decides what a model computes: variants with their numbers written out, unused numbers left out."""
    values = dataclasses.asdict(config)
    for name in NOT_ARCHITECTURE:
        del values[name]
    letters, moe = stacking_of(config).letters, moe_of(config)
    values["pattern"] = compressed(config.pattern, config.num_layers)
    values["rope_scaling"] = scaling_of(config)
    unused = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    if config.attention == "mla":
        unused = ["num_kv_heads", "head_dim"]
    unused += [] if "S" in letters else ["window"]
    unused += [] if "P" in letters else ["sparse"]
    unused += [] if config.position == "rope" else ["rope_theta", "rope_scaling"]
    if moe:
        resolved = dataclasses.replace(moe, expert_dim=moe.width(config.mlp_dim), balance=0.0, z=0.0)
        values["moe"] = (type(moe).__name__, resolved)
        unused += [] if moe.dense_layers else ["mlp_dim"]
    return {name: value for name, value in values.items() if name not in unused}


def read_json(path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: no such file, or it holds no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    require(isinstance(value, dict), f"{path} must hold a JSON object.")
    return value


def _words(allowed: tuple) -> str:
    return " or ".join("nothing" if value is None else repr(value) for value in allowed)
