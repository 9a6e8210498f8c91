"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

Each adapted linear map has two tensors, base_model.model.<module of transformers>.lora_A.weight [r, in] and
.lora_B.weight [out, r]; what it adds to the map's weight [out, in] is scale B A. Ours are a [*in_shape, r] and
b [r, *out_shape], the heads being axes of their own.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks it for
import numpy as np
import safetensors
import safetensors.numpy

from foundry_jax.errors import UserError
from foundry_jax.model import lora
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.stacking import stacking_of
from foundry_jax.schema import require
from foundry_jax.zoo.export import family_for, new_folder, write_json
from foundry_jax.zoo.families import Family
from foundry_jax.zoo.folder import PICKLES
from foundry_jax.zoo.settings import Keys, read_json
from foundry_jax.zoo.source import FLOATS, origins, param_shapes, parts_of, path_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Shape = tuple[int, ...]
# The values that keys of adapter_config.json may have. Some initialisations change the weights of the base as well.
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}
# Keys that are read elsewhere, and those that make no difference to trained adapters. Any other one may mean a variant
# of LoRA (use_dora, rank_pattern, modules_to_save, ...) and must be empty.
KNOWN = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "base_model_name_or_path", "layers_pattern", "task_type", "inference_mode", "fan_in_fan_out", "revision",
    "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of one rank, and what was said of them.

    tree: {"block_0": {"attention": {"query": {"a": [*in_shape, r], "b": [r, *out_shape]}}}} of numpy arrays in
        float32, with layers stacked as the model has them.
    base_name: where the base model was when they were trained: a path, or a name on the hub; may be empty.
    """

    tree: dict
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base_name: str

    @property
    def scale(self) -> float:
        """What multiplies a b before it is added to the weight."""
        return lora.scale_of(self.rank, self.alpha, rslora=self.rslora)


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear map that may have an adapter: its path in the parameters of an unscanned model, and its axes."""

    path: str
    in_shape: Shape
    out_shape: Shape

    def their_shape(self, letter: str, rank: int) -> Shape:
        """Returns the shape of lora_A or lora_B."""
        return (rank, math.prod(self.in_shape)) if letter == "A" else (math.prod(self.out_shape), rank)

    def to_ours(self, letter: str, theirs: np.ndarray) -> np.ndarray:
        """Returns a or b in float32."""
        x = np.ascontiguousarray(theirs.T, np.float32)
        return x.reshape(*self.in_shape, -1) if letter == "A" else x.reshape(-1, *self.out_shape)

    def to_theirs(self, letter: str, ours: np.ndarray) -> np.ndarray:
        """Returns lora_A or lora_B in float32."""
        rank = ours.shape[-1] if letter == "A" else ours.shape[0]
        flat = ours.reshape(-1, rank) if letter == "A" else ours.reshape(rank, -1)
        return np.ascontiguousarray(flat.T, np.float32)


def targets_of(model: ModelConfig) -> tuple[Family, dict[str, Target]]:
    """Returns the family of a model, and its linear maps by the name of their module in transformers.

    Raises:
        UserError: no family has this architecture.
    """
    family, _ = family_for(model)
    shapes, targets = param_shapes(model), {}
    for path, linear in lora.linear_maps(model).items():
        (part,) = parts_of(f"{path}/kernel", shapes[f"{path}/kernel"], family)
        targets[part.name.removesuffix(".weight")] = Target(path, linear.in_shape, linear.out_shape)
    return family, targets


# ------------------------------------------------------------------------------------------------ saving


def save(
    destination: str | os.PathLike,
    adapters: dict,
    *,
    model: ModelConfig,
    alpha: float,
    rslora: bool,
    dropout: float,
    base_name: str,
) -> None:
    """Writes a folder that peft.PeftModel.from_pretrained loads onto the base model.

    Args:
        adapters: a tree as of Adapters, stacked as the model stacks its layers.
        model: the architecture that they belong to.

    Raises:
        UserError: no family has this architecture, the destination exists or cannot be written; nothing is left there.
    """
    _, targets = targets_of(model)
    pairs = _pairs(adapters, model)
    tensors = {
        _tensor_name(module, letter): target.to_theirs(letter, pairs[target.path][letter.lower()])
        for module, target in targets.items()
        for letter in "AB"
        if target.path in pairs
    }
    (rank,) = {pair["a"].shape[-1] for pair in pairs.values()}
    assert len(tensors) == 2 * len(pairs), "an adapter on what is no linear map of the model"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": float(dropout),
        "use_rslora": rslora,
        "target_modules": _target_modules({_module_of(name) for name in tensors}, model.num_layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(destination) as folder:
        write_json(folder / CONFIG, config)
        (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


def _pairs(adapters: dict, model: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Returns {path of a linear map of the unscanned model: {"a": ..., "b": ...}}."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        names = origins(path_of(keys), model)
        rows = {names: np.asarray(leaf)} if isinstance(names, str) else dict(zip(names, np.asarray(leaf), strict=True))
        for name, x in rows.items():
            path, _, letter = name.rpartition("/")
            pairs.setdefault(path, {})[letter] = x
    return pairs


def _target_modules(modules: set[str], num_layers: int) -> list[str]:
    """Returns target_modules: "q_proj" where all layers have it, or else whole names."""
    parts = [module.split(".") for module in modules]
    layers = {part[2] for part in parts}
    short = {part[-1] for part in parts}
    everywhere = len(layers) == num_layers and len(modules) == num_layers * len(short)
    return sorted(short if everywhere else modules)


def _tensor_name(module: str, letter: str) -> str:
    return f"{PREFIX}{module}.lora_{letter}.weight"


def _module_of(tensor: str) -> str:
    return tensor.removeprefix(PREFIX).rpartition(".lora_")[0]


# ------------------------------------------------------------------------------------------------ loading


def base_of(folder: str | os.PathLike) -> str:
    """Returns the name or path of the base model that adapters were trained on.

    Raises:
        UserError: the folder does not say.
    """
    keys = _keys(pathlib.Path(folder))
    name = keys.values.get("base_model_name_or_path")
    require(
        isinstance(name, str) and bool(name),
        f"{keys.where} names no base_model_name_or_path; load the base model, with adapter={str(folder)!r}.",
    )
    return name


def load(folder: str | os.PathLike, model: ModelConfig) -> Adapters:
    """Returns the adapters in a folder, for a base model of this architecture.

    Layers that are stacked and have no adapters, while others have, get zeros: nothing is added, and nothing learned.

    Raises:
        UserError: files that are damaged, adapters of another base model, or more than plain LoRA on linear maps.
    """
    folder = pathlib.Path(folder).expanduser()
    keys = _keys(folder)
    _require_plain(keys)
    rank, alpha, dropout = keys.whole("r"), keys.number("lora_alpha"), keys.number("lora_dropout", 0.0)
    require(rank > 0, f"{keys.where}: r={rank} must be at least 1.")
    require(math.isfinite(alpha), f"{keys.where}: lora_alpha={alpha} must be a finite number.")
    require(0 <= dropout < 1, f"{keys.where}: lora_dropout={dropout:g} must be at least 0 and less than 1.")
    rslora = keys.flag("use_rslora", False)
    family, targets = targets_of(model)
    expected = {
        _tensor_name(module, letter): target.their_shape(letter, rank)
        for module, target in targets.items()
        for letter in "AB"
    }
    tensors = _read(folder, expected, f"{family.architecture} of {model.num_layers} layers")
    _require_all(folder / WEIGHTS, tensors, expected, keys)
    pairs = {
        target.path: {letter.lower(): target.to_ours(letter, tensors[_tensor_name(module, letter)]) for letter in "AB"}
        for module, target in targets.items()
        if _tensor_name(module, "A") in tensors
    }
    base_name = keys.values.get("base_model_name_or_path") or ""
    return Adapters(_stacked(pairs, model), rank, alpha, rslora, dropout, str(base_name))


def _keys(folder: pathlib.Path) -> Keys:
    path = pathlib.Path(folder).expanduser() / CONFIG
    return Keys(read_json(path), str(path))


def _require_plain(keys: Keys) -> None:
    for name, value in keys.values.items():
        fine = value in ALLOWED[name] if name in ALLOWED else name in KNOWN or value in (None, False, "", [], {})
        if not fine:
            raise UserError(
                f"{keys.where}: {name}={_brief(value)} is not supported; adapters must be plain LoRA: of linear maps "
                f"alone, of one rank and alpha, on a base whose own weights are as they were."
            )
    require("peft_type" in keys.values, f"{keys.where} has no peft_type; is it PEFT's?")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _read(folder: pathlib.Path, expected: Mapping[str, Shape], base: str) -> dict[str, np.ndarray]:
    """Returns the tensors by name; none is read before all are known to have a place in the base."""
    path = folder / WEIGHTS
    if not path.exists():
        _refuse(folder)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():
                info = file.get_slice(name)
                _require_place(path, name, tuple(info.get_shape()), expected, base)
                dtype = str(info.get_dtype())
                require(dtype in FLOATS, f"{path}: {name} is {dtype}, but must be {', '.join(FLOATS)}.")
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}.") from None


def _refuse(folder: pathlib.Path) -> None:
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which can run any code when read and is refused; get the adapters' safetensors."
        )
    raise UserError(f"{folder / WEIGHTS} is missing: copy or download the whole folder again.")


def _require_place(path: pathlib.Path, name: str, shape: Shape, expected: Mapping[str, Shape], base: str) -> None:
    """Raises UserError unless a tensor is one of an adapter of the base's linear maps."""
    if name not in expected:
        raise UserError(
            f"{path}: {name}{list(shape)} belongs to no linear map in the layers of the base, a {base}, such as "
            f"{next(iter(expected))}: it is of another base, or more than LoRA on those."
        )
    require(
        shape == expected[name],
        f"{path}: {name} has the shape {list(shape)}, but r and the base, a {base}, ask for {list(expected[name])}: it "
        f"is of another base.",
    )


def _require_all(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], keys: Keys
) -> None:
    """Raises UserError unless the tensors are those of the modules that the config targets."""
    require(bool(tensors), f"{path} has no tensors.")
    is_target = _matcher(keys)
    for name, shape in expected.items():
        module, found = _module_of(name), name in tensors
        partner = _tensor_name(module, "B" if name == _tensor_name(module, "A") else "A")
        if found:
            require(partner in tensors, f"{path} has {name}, but not {partner}.")
        if is_target and is_target(module) and not found:
            raise UserError(
                f"{path} has no {name}{list(shape)}, which target_modules in {keys.where} asks for: these are adapters "
                f"of another base, or some are lost."
            )
        if is_target and found and not is_target(module):
            raise UserError(f"{path} has {name}, but {keys.where} does not target {module}.")


def _matcher(keys: Keys) -> Callable[[str], bool] | None:
    """Returns which modules a config targets, by PEFT's rules; None if it leaves that to PEFT."""
    wanted, excluded = (keys.values.get(name) for name in ("target_modules", "exclude_modules"))
    layers = keys.values.get("layers_to_transform")
    layers = None if layers is None or layers == [] else [layers] if isinstance(layers, int) else layers
    for name, value in (("target_modules", wanted), ("exclude_modules", excluded)):
        _require_pattern(keys, name, value)
    valid = layers is None or (isinstance(layers, list) and all(isinstance(i, int) for i in layers))
    require(valid, f"{keys.where}: layers_to_transform={layers!r} must be whole numbers.")
    if not wanted:
        return None

    def is_target(module: str) -> bool:
        if excluded and _matches(excluded, module):
            return False
        if isinstance(wanted, str) or module in wanted:
            return _matches(wanted, module)
        return _matches(wanted, module) and (layers is None or int(module.split(".")[2]) in layers)

    return is_target


def _require_pattern(keys: Keys, name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    valid = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    require(valid, f"{keys.where}: {name}={_brief(value)} must be a pattern or a list of names.")
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        raise UserError(f"{keys.where}: {name}={value!r} is no regular expression: {error}.") from None


def _matches(targets: str | list[str], module: str) -> bool:
    """A text is a pattern for whole names; names in a list are whole or are the last parts."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _stacked(pairs: Mapping[str, Mapping[str, np.ndarray]], model: ModelConfig) -> dict:
    """Returns the tree of adapters, with the layers stacked that the model stacks."""
    stacking, tree = stacking_of(model), {}
    for path, pair in pairs.items():
        block, _, rest = path.partition("/")
        layer = int(block.removeprefix("block_"))
        if layer in stacking.single:
            _node(tree, path).update(pair)
            continue
        repeat, member = divmod(layer - stacking.first, stacking.period)
        node = _node(tree, f"blocks/layer_{member}/{rest}")
        for name, x in pair.items():
            node.setdefault(name, np.zeros((stacking.repeats, *x.shape), x.dtype))[repeat] = x
    return tree


def _node(tree: dict, path: str) -> dict:
    for name in path.split("/"):
        tree = tree.setdefault(name, {})
    return tree
