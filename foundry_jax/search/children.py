"""Child configs: a small file that is a parent with mutations on top, and says where it comes from.

    configs/children/tiny_attention_mla.py    what `python -m foundry_jax.mutate attention mla` leaves

A child follows its parent: promotions and edits of the parent reach it. Imports no JAX.
"""

import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax import mutate
from foundry_jax.data.hashing import sha256_file
from foundry_jax.errors import UserError
from foundry_jax.runfolder import fsync
from foundry_jax.search import lineage

FOLDER = "children"
MAX_LINE_LENGTH = 120  # of the style of configs/
MAX_NAME_LENGTH = 80  # without the digest that makes a longer name unlike others

TEMPLATE = '''\
"""{parent} with {argument}.

    python -m foundry_jax.main --config={path}

Changes:
{changes}

Parent: sha256 {sha256}, newest promotion: {promotion}.
{made}{time} by:
    {command}
"""

import pathlib

from ml_collections import ConfigDict

from foundry_jax import mutate
from foundry_jax.config import load_dict

PARENT = {spec}  # its file, as seen from here, and the mutations


def get_config(arg: str = "") -> ConfigDict:
    """Returns PARENT with what was promoted for this config, and the mutations named in `arg`, applied."""
    c = load_dict(f"{{pathlib.Path(__file__).parent}}/{{PARENT}}")
    c.name = {name}
    return mutate.apply(c, arg, lineage=__file__)
'''
MADE = "Made "  # begins the line with the time, which is no difference between two files


def default_path(parent: str, items: Sequence[str]) -> pathlib.Path:
    """Returns where a child of the config "configs/tiny.py[:argument]" goes: configs/children/tiny_attention_mla.py."""
    path, _, argument = parent.partition(":")
    name = re.sub(r"\W+", "_", "_".join([pathlib.Path(path).stem, *mutate.items(argument), *items])).strip("_")
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[:MAX_NAME_LENGTH]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    folder = pathlib.Path(path).parent
    return (folder if folder.name == FOLDER else folder / FOLDER) / f"{name}.py"


def render(
    parent: str, items: Sequence[str], path: pathlib.Path, changes: Mapping[str, Sequence[Any]], command: str
) -> str:
    """Returns the text of a child config.

    Args:
        parent: "configs/tiny.py[:argument]".
        items: the mutations on top of it.
        path: where the text will be.
        changes: {dotted key: (the parent's value, the child's)}.
        command: what made it.
    """
    file, _, argument = parent.partition(":")
    promotions = lineage.promotions(parent)
    relative = os.path.relpath(file, path.parent)
    text = TEMPLATE.format(
        parent=_text(parent),
        argument=_text(", ".join(items)),
        path=_text(str(path)),
        changes="\n".join(_text(f"    {key}: {old!r} -> {new!r}") for key, (old, new) in changes.items()),
        sha256=sha256_file(file),
        promotion=f"{promotions[-1].id}, {_text(promotions[-1].name)}" if promotions else "none",
        made=MADE,
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=_text(command),
        spec=json.dumps(f"{pathlib.PurePath(relative).as_posix()}:{','.join([*mutate.items(argument), *items])}"),
        name=json.dumps(path.stem),
    )
    return f"# ruff: noqa: E501\n{text}" if max(map(len, text.splitlines())) > MAX_LINE_LENGTH else text


def save(path: pathlib.Path, text: str) -> bool:
    """Returns whether the file was written; False if it was there already, with the same content but for the time.

    Raises:
        UserError: another file is there, or it cannot be written.
    """
    if path.exists():
        if _timeless(path.read_text(encoding="utf-8")) != _timeless(text):
            raise UserError(f"{path} is there already, and is another config: delete it, or choose another --save.")
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
        fsync(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; choose another --save.") from error
    return True


def _timeless(text: str) -> str:
    return re.sub(rf"^{MADE}.*$", "", text, flags=re.MULTILINE)


def _text(text: str) -> str:
    """Returns text as it can stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', r"\"\"\"")
