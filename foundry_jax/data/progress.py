"""How far a long pass over documents is: a line on a terminal, a log line now and then elsewhere."""

import logging
import time
from collections.abc import Iterable, Iterator

import rich.console
import rich.progress

from foundry_jax.data.document import Document

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds before anything is shown
LOG_SECONDS = 30.0


def counted(documents: Iterable[Document], name: str) -> Iterator[Document]:
    """Yields the documents, and shows how many there were; nothing if it is done soon."""
    console = rich.console.Console(stderr=True)
    columns = (rich.progress.SpinnerColumn(), "{task.description}", rich.progress.TimeElapsedColumn())
    start = shown = time.monotonic()
    number = characters = 0
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Tokenizing {name}", total=None, visible=False)
        for document in documents:
            number, characters = number + 1, characters + len(document.text)
            yield document
            now = time.monotonic()
            if now - start < PATIENCE or now - shown < (0.2 if console.is_terminal else LOG_SECONDS):
                continue
            shown, speed = now, characters / (now - start) / 1e6
            text = f"{name}: {number:,} documents, {characters / 1e6:,.1f} M characters, {speed:.1f} M a second"
            if console.is_terminal:
                bar.update(task, description=text, visible=True)
            else:
                log.info("%s.", text)
