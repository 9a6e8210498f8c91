"""The report of a finished sweep, written beside it.

SWEEP/report.html       everything, in one file that loads nothing
SWEEP/report.md         an entry for a log, negative results included
SWEEP/report/*.png      the charts
"""

import dataclasses
import os
import pathlib

from foundry_jax.errors import UserError
from foundry_jax.search import charts, page
from foundry_jax.search.reading import Sweep, read


@dataclasses.dataclass(frozen=True)
class Report:
    """The files of a report."""

    sweep: Sweep
    html: pathlib.Path
    markdown: pathlib.Path
    pictures: tuple[pathlib.Path, ...]


def write(folder: str | os.PathLike) -> Report:
    """Writes the report of a sweep's folder, replacing an earlier one, and returns its files.

    Raises:
        UserError: there is no finished sweep, it is damaged, or its folder cannot be written to.
    """
    folder = pathlib.Path(folder)
    sweep = read(folder)
    drawn = charts.draw(sweep)
    pictures = folder / "report"
    try:
        pictures.mkdir(exist_ok=True)
        paths = tuple(_replace(pictures / f"{chart.name}.png", chart.png()) for chart in drawn)
        for old in set(pictures.glob("*.png")) - set(paths):  # of an earlier report, which had more to show
            old.unlink()
        markdown = _replace(folder / "report.md", page.markdown(sweep, drawn).encode())
        html = _replace(folder / "report.html", page.html(sweep, drawn).encode())
    except OSError as error:
        raise UserError(
            f"Cannot write the report into {folder}: {error.strerror}; make the folder writable."
        ) from error
    return Report(sweep, html, markdown, paths)


def _replace(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Replaces a file, so that whoever reads it sees the old one or the new one, whole; returns its path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
