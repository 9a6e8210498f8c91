"""The running interpreter's own standard library: 11 MB of real text, no download, the same for every user of it.

A document is one .py file and its id is the path below the library's folder, such as "json/decoder.py". Left out
are tests, installed packages, the files written when this interpreter was built, which differ by machine, and
pydoc_data: one generated file of manual pages there falls to validation and would be 62 % of it.
"""

import os
import sysconfig
from pathlib import Path

from foundry_jax.data.sources.text import TextFiles
from foundry_jax.errors import UserError

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
MACHINE_PREFIXES = ("config-", "_sysconfigdata")  # hold build paths and compiler flags


def find(path: str) -> TextFiles:
    """Returns the sources of the standard library; path must be empty.

    Raises:
        UserError: a path is given, or this interpreter ships without sources.
    """
    if path:
        raise UserError(f"data.path={path!r} has no meaning for data.source=pystdlib; use text, or pystdlib(path='').")
    root = Path(sysconfig.get_path("stdlib"))
    paths = source_files(root)
    if not paths:
        raise UserError(f"No .py files in the standard library at {root}; use data.source=text.")
    return TextFiles("pystdlib", paths, skip_undecodable=True)


def source_files(root: Path) -> dict[str, Path]:
    """Returns {id: file} of the .py files below root that are neither tests nor particular to this machine."""
    paths = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _kept(name)]
        files = [Path(folder, name) for name in names if name.endswith(".py") and _kept(name)]
        paths.update({file.relative_to(root).as_posix(): file for file in files})
    return paths


def _kept(name: str) -> bool:
    return name not in SKIPPED_FOLDERS and not name.startswith(MACHINE_PREFIXES)
