"""Run folders as sources: what was trained here, to be exported, evaluated, or started from."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from foundry_jax import checkpoint
from foundry_jax.config import Config
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.tokenize import BPETokenizer, Tokenizer, load_tokenizer
from foundry_jax.model import lora
from foundry_jax.model.config import ModelConfig
from foundry_jax.model.stacking import stacking_of
from foundry_jax.schema import build, require
from foundry_jax.train_step import unbox
from foundry_jax.zoo import graft
from foundry_jax.zoo.adapted import Adapted
from foundry_jax.zoo.layouts import Index
from foundry_jax.zoo.load import abstract_params
from foundry_jax.zoo.settings import meaningful, read_json
from foundry_jax.zoo.source import Source

Step = int | Literal["best", "latest"]


def is_run(path: pathlib.Path) -> bool:
    """Returns whether a folder is that of a run."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


class RunSource(Source):
    """A checkpoint of a run, all of it in memory: Orbax reads whole parameters."""

    def __init__(self, path: pathlib.Path, step: Step = "latest", *, ema: bool = False):
        """Reads a checkpoint's parameters, raw or averaged.

        Raises:
            UserError: no run, no such checkpoint, or one that is damaged.
        """
        self.name, self.path = str(path), path
        self.config = run_config(path)
        restored = checkpoint.load_params(path / "checkpoints", step, ema=ema)
        self.step, self._ema, self.tree = restored.step, ema, restored.state
        self.model = unscanned(self.config.model)

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        return np.asarray(leaf_of(self.tree, path, self.config.model))[index or ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the run's config and which checkpoint this is."""
        flat = read_json(self.path / "config.json")
        return sha256_json({"config": flat, "step": self.step, "ema": self._ema})

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return stop_ids_of(self.tokenizer())

    def tokenizer(self) -> Tokenizer | None:
        path = self.path / "tokenizer.json"
        return load_tokenizer(path) if path.exists() else None

    def texts(self) -> Mapping[str, str]:
        """Returns the tokenizer's files; only those of BPE are such as transformers reads."""
        tokenizer = self.tokenizer()
        if not isinstance(tokenizer, BPETokenizer):
            return {}
        end = tokenizer.decode([tokenizer.separator_id])
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, **tokenizer.special_tokens}
        if tokenizer.chat_template:
            facts["chat_template"] = tokenizer.chat_template
        facts["model_max_length"] = self.model.context_length
        return {
            "tokenizer.json": tokenizer.tokenizer_json(),
            "tokenizer_config.json": json.dumps(facts, indent=2, ensure_ascii=False),
        }


class Grafted(RunSource):
    """What a run began with, where that was another architecture than its source's; the run's in all else."""

    def __init__(self, run: RunSource, base: Source):
        """Reads all parameters of the base.

        Raises:
            UserError: they do not fit the run's model.
        """
        self.name, self.path, self.config, self.model = run.name, run.path, run.config, run.model
        where = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        shardings = jax.tree.map(lambda _: where, unbox(abstract_params(self.config.model)))
        start = self.config.init
        self.tree = graft.start(base, self.config.model, shardings, fresh=start.fresh, seed=self.config.seed)
        self.fingerprint = base.fingerprint


def open_run(
    path: pathlib.Path, open_source: Callable[[str], Source], step: Step = "latest", *, ema: bool = False
) -> Source:
    """Returns a run as a source; one that trained adapters, as its base with the adapters on it.

    Raises:
        UserError: as in RunSource, or the base is not what it was.
    """
    run = RunSource(path, step, ema=ema)
    settings = run.config.lora
    if not settings.rank:
        return run
    require(bool(run.config.init.source), f"{path} trained adapters on random parameters: there is nothing to load.")
    base = open_source(run.config.init.source)
    began_with = read_json(path / "source.json")["fingerprint"]
    require(
        base.fingerprint == began_with,
        f"{path} trained adapters on {run.config.init.source}, whose files have changed since: put the old ones back.",
    )
    if meaningful(base.model) | {"context_length": 0} != meaningful(run.model) | {"context_length": 0}:
        base = Grafted(run, base)
    return Adapted(str(path), base, _adapters(run), settings.scale, words=run if _speaks_otherwise(run, base) else None)


def _speaks_otherwise(run: RunSource, base: Source) -> bool:
    """Returns whether a run learned to converse in another format than its base."""
    own, other = run.tokenizer(), base.tokenizer()
    return own is not None and (other is None or own.chat_template != other.chat_template)


def stop_ids_of(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Returns what ends the text of a model that was trained here: what ended every document, and every turn."""
    if tokenizer is None:
        return ()
    turn = tokenizer.control_ids.get(tokenizer.special_tokens.get("eos_token", ""))
    return tuple(dict.fromkeys(index for index in (tokenizer.separator_id, turn) if index is not None))


def _adapters(run: RunSource) -> dict:
    """Returns the adapters that a run trained, layers not scanned."""
    adapters: dict[str, Any] = {}
    for path in lora.linear_maps(run.model):
        with contextlib.suppress(KeyError):  # not a target
            _put(adapters, path, {name: run.read(f"{path}/{name}") for name in ("a", "b")})
    return adapters


def _put(tree: dict, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def leaf_of(tree: dict, path: str, config: ModelConfig) -> np.ndarray:
    """Returns the parameter with the path of an unscanned model from a tree that `config` may stack.

    Raises:
        KeyError: it has no such parameter.
    """
    block, _, rest = path.partition("/")
    stacking = stacking_of(config)
    if not block.startswith("block_") or int(block.removeprefix("block_")) in stacking.single:
        return _descend(tree, path)
    repeat, member = divmod(int(block.removeprefix("block_")) - stacking.first, stacking.period)
    return _descend(tree, f"blocks/layer_{member}/{rest}")[repeat]


def _descend(tree: dict, path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def run_config(path: pathlib.Path) -> Config:
    """Returns the config that a run was started with.

    Raises:
        UserError: the folder holds no run, or one of another version.
    """
    require(is_run(path), f"{path} is no run folder: it has no config.json and checkpoints.")
    nested: dict[str, Any] = {}
    for key, value in read_json(path / "config.json").items():
        _put(nested, key.replace(".", "/"), value)
    return build(Config, nested)


def unscanned(config: ModelConfig) -> ModelConfig:
    """Returns the architecture alone, as sources have it: layers not scanned, no dropout, float32."""
    return dataclasses.replace(config, scan_layers=False, remat="none", dropout=0.0, dtype="float32")
