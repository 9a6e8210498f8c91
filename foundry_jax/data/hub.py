"""Whether the Hugging Face hub answers: without a network, its libraries ask again and again, for minutes."""

import contextlib
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import huggingface_hub
import huggingface_hub.constants

log = logging.getLogger(__name__)

HUB_SECONDS = 2.0  # to hear from the hub at all: without a network the user shall know within 5 s


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
