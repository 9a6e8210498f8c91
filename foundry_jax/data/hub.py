"""Data sets of the Hugging Face hub. Without a network its libraries ask again and again, for minutes; not here."""

import contextlib
import importlib
import importlib.util
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import huggingface_hub
import huggingface_hub.constants

from foundry_jax.errors import UserError, first_line
from foundry_jax.schema import require

log = logging.getLogger(__name__)

HUB_SECONDS = 2.0  # to hear from the hub at all: without a network the user shall know within 5 s


def load_dataset(path: str, *, subject: str, instead: str, **options: str | None) -> Any:
    """Returns a data set of a folder or of the hub, or of the cache of `datasets` if the hub does not answer.

    Args:
        path: the folder, or the name on the hub.
        subject: what messages begin with; instead: what they end with.
        options: those of datasets.load_dataset, which returns a Dataset if a split is among them.

    Raises:
        UserError: no such data set, no package to get it with, or no network.
    """
    require(
        importlib.util.find_spec("datasets") is not None,
        f"{subject} needs the package datasets: pip install 'foundry-jax[data]'. {instead}",
    )
    local = pathlib.Path(path).expanduser().is_dir()
    answers = local or hub_answers(path)()
    require(
        answers or may_be_cached(path),
        f"{subject} cannot be loaded: the hub does not answer, nor is it in the cache of datasets. {instead}",
    )
    datasets = importlib.import_module("datasets")  # takes seconds
    with offline(datasets, active=not answers):
        try:
            return datasets.load_dataset(os.path.expanduser(path) if local else path, **options)
        except Exception as error:  # of whichever of its many libraries; passed on in one line
            raise UserError(f"{subject} cannot be loaded: {first_line(error)}. {instead}") from None


def hub_answers(repository: str) -> Callable[[], bool]:
    """Returns what waits until HUB_SECONDS from now, and returns whether the hub answers.

    It is asked in a thread, as looking up its address may take long to fail.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            huggingface_hub.dataset_info(repository, timeout=HUB_SECONDS)
        except Exception as error:  # an answer of any kind is one: load_dataset will say more
            if getattr(error, "response", None) is None:
                log.debug("No answer about %s: %s", repository, error)
                return
        answered.set()

    def wait() -> bool:
        thread.join(max(0.0, deadline - time.monotonic()))
        return answered.is_set()

    thread, deadline = threading.Thread(target=ask, daemon=True), time.monotonic() + HUB_SECONDS
    thread.start()
    return wait


def may_be_cached(repository: str) -> bool:
    """Returns whether the cache of `datasets`, which takes seconds to import, has a folder of that name."""
    home = os.environ.get("HF_DATASETS_CACHE") or pathlib.Path(huggingface_hub.constants.HF_HOME) / "datasets"
    folder = pathlib.Path(home).expanduser()
    name = _letters(repository.rpartition("/")[2])
    return folder.is_dir() and any(name in _letters(path.name) for path in folder.iterdir())


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


@contextlib.contextmanager
def offline(datasets: ModuleType, *, active: bool) -> Iterator[None]:
    """Lets `datasets` look at nothing but its cache, where active."""
    modules = [datasets.config, huggingface_hub.constants] if active else []
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
