"""Names and paths to models."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from foundry_jax import sharding
from foundry_jax.errors import UserError
from foundry_jax.registry import unknown
from foundry_jax.schema import require
from foundry_jax.zoo import hub, peft
from foundry_jax.zoo.adapted import Adapted
from foundry_jax.zoo.catalog import ZOO
from foundry_jax.zoo.folder import PICKLES, HuggingFaceFolder
from foundry_jax.zoo.gguf import GGUFFile
from foundry_jax.zoo.pretrained import Pretrained, pretrained
from foundry_jax.zoo.run import is_run, open_run
from foundry_jax.zoo.settings import meaningful
from foundry_jax.zoo.source import Source


def load_pretrained(
    name_or_path: str | os.PathLike,
    *,
    dtype: str = "float32",
    plan: sharding.Plan | None = None,
    device: jax.Device | None = None,
    adapter: str | os.PathLike | None = None,
    revision: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Pretrained:
    """Returns a model ready to use, its parameters read straight onto the devices.

    Args:
        name_or_path: a name of ZOO, "owner/name" on the hub, a Hugging Face folder, a GGUF file, a run folder, or a
            folder with adapters in PEFT's format.
        dtype: of parameters and products: float32 or bfloat16.
        plan: how parameters lie on the devices; None: the planner's choice for all of them.
        device: one device for everything, instead of a plan.
        adapter: a folder with adapters, merged into the weights.
        revision: a commit, branch or tag on the hub instead of the pinned one.
        progress: called with the bytes of each part that was read.

    Raises:
        UserError: no such model, no way to get it, or files that are damaged or do not fit together.
    """
    source = open_source(name_or_path, revision=revision)
    if adapter is not None:
        source = _with_adapters(pathlib.Path(adapter).expanduser(), source)
    return pretrained(source, dtype=dtype, plan=plan, device=device, progress=progress)


def open_source(name_or_path: str | os.PathLike, *, revision: str | None = None) -> Source:
    """Returns a model on disk without reading its weights; what is only on the hub is downloaded.

    Raises:
        UserError: as in load_pretrained.
    """
    name = os.fspath(name_or_path)
    if name in ZOO:
        return _open_path(hub.resolve(ZOO[name], revision))
    path = pathlib.Path(name).expanduser()
    if path.exists():
        return _open_path(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_path(hub.snapshot(name, revision or "main"))
    raise UserError(f"{unknown(name, ZOO, 'model')} Or give a folder's or GGUF file's path, or owner/name on the hub.")


def settings_of(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """Returns the keys of a config's section `model` that make a model; for a name of ZOO no file is needed."""
    if os.fspath(name_or_path) in ZOO:
        return dict(ZOO[os.fspath(name_or_path)].settings)
    config = open_source(name_or_path).model
    return {name: getattr(config, name) for name in meaningful(config)}


def _open_path(path: pathlib.Path) -> Source:
    if path.is_dir():
        if (path / peft.CONFIG).exists():
            return _with_adapters(path, None)
        return open_run(path, open_source) if is_run(path) else HuggingFaceFolder(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    require(
        path.suffix not in PICKLES,
        f"{path} is a pickle, which can run any code when read and is refused; get the model's safetensors.",
    )
    raise UserError(f"{path} is no GGUF file; name the folder that holds config.json and the weights.")


def _with_adapters(path: pathlib.Path, base: Source | None) -> Source:
    """Returns a base, by default the one that the adapters name, with the adapters of a folder on it."""
    base = base or open_source(peft.base_of(path))
    adapters = peft.load(path, base.model)
    return Adapted(str(path), base, adapters.tree, adapters.scale)
