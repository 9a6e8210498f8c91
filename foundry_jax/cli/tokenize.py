"""Tokenizers on the command line: python -m foundry_jax.cli.tokenize fit | encode | stats"""

import argparse
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from foundry_jax import command
from foundry_jax.errors import MachineError, UserError

if TYPE_CHECKING:  # --help must not wait for numpy
    from foundry_jax.data.document import Source
    from foundry_jax.data.tokenize import Tokenizer

log = logging.getLogger("foundry_jax.cli.tokenize")  # __name__ is "__main__" here

PROGRAM = "python -m foundry_jax.cli.tokenize"
NO_VALIDATION = "none"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line; flags.run is the command to run with them."""
    parser = command.Parser(prog=PROGRAM, description="Tokenizers: fit one to text, use one, measure one.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], None], name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--source", default="pystdlib", help="as data.source has it (default: pystdlib)")
        sub.add_argument("--path", default="", help="of the source: a file, a folder or a glob")
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = add(fit, "fit", "Fits a BPE tokenizer to the training documents of a source.")
    sub.add_argument("--vocab-size", type=int, default=8192, help="tokens, without special ones (default: 8192)")
    sub.add_argument(
        "--special-token", action="append", default=[], metavar="TOKEN", help="a further control token; may be repeated"
    )
    _add_validation(sub, f"; {NO_VALIDATION}: fit to all of it")
    _add_out(sub, "a folder for tokenizer.json, or a .json file, that does not exist yet")

    sub = add(encode, "encode", "Writes the tokens of a source as a folder for data.source=bin, in nanoGPT's layout.")
    _add_tokenizer(sub)
    _add_validation(sub, ", in val.bin")
    _add_out(sub, "a folder that does not exist yet")

    _add_tokenizer(add(stats, "stats", "Says what a tokenizer makes of the text of a source, and how fast."))
    return parser.parse_args(argv)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="byte, or a tokenizer.json or a folder with one")


def _add_validation(parser: argparse.ArgumentParser, more: str) -> None:
    default = "document(fraction=0.05)"
    parser.add_argument("--validation", default=default, help=f"text not for training{more} (default: {default})")


def _add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=pathlib.Path, required=True, help=text)


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    flags.run(flags)


def fit(flags: argparse.Namespace) -> None:
    """Fits a tokenizer and writes it."""
    from foundry_jax.data.split import require_both, split
    from foundry_jax.data.tokenize import FILE, BPETokenizer

    path = flags.out if flags.out.suffix == ".json" else flags.out / FILE
    if path.exists():
        raise UserError(f"{path} exists; name another --out.")
    documents, held_out, start = _source(flags), (), time.monotonic()
    if flags.validation != NO_VALIDATION:
        documents, held_out = split(documents, flags.validation)
    is_text = any(document.text for document in documents)
    require_both((is_text, is_text or bool(held_out)), flags.validation)
    tokenizer = BPETokenizer(flags.vocab_size, flags.special_token)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.fit(_announced(documents, flags.source)).save(path)
    except OSError as error:
        raise MachineError(
            f"Cannot write {path}: {error.strerror}; free some space, or choose another --out."
        ) from None
    facts = {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "seconds": time.monotonic() - start}
    _print(flags, {"tokenizer": str(path), **facts})


def encode(flags: argparse.Namespace) -> None:
    """Writes a folder of tokens."""
    from foundry_jax.data import token_folder

    facts = token_folder.write(flags.out, _source(flags), _tokenizer(flags), flags.validation)
    _print(flags, {"folder": str(flags.out), **facts})


def stats(flags: argparse.Namespace) -> None:
    """Prints the figures of a tokenizer."""
    import dataclasses

    from foundry_jax.data.progress import counted
    from foundry_jax.data.tokenizer_stats import measure

    tokenizer = _tokenizer(flags)
    found = measure(tokenizer, (document.text for document in counted(_source(flags), flags.source)))
    _print(flags, {"hash": tokenizer.hash, **dataclasses.asdict(found), **found.ratios})


def _source(flags: argparse.Namespace) -> "Source":
    """Returns the source of the flags.

    Raises:
        UserError: there is none, or several, or it holds tokens.
    """
    from foundry_jax.data.mixture import opened
    from foundry_jax.data.sources.bin import TokenFiles

    parts = opened(flags.source, flags.path)
    if len(parts) > 1:
        raise UserError(f"--source={flags.source!r} names {len(parts)} sources, but the command takes one.")
    if isinstance(parts[0].source, TokenFiles):
        raise UserError("--source=bin holds tokens already; give a source of text.")
    source = parts[0].source
    if skipped := source.undecodable():
        log.warning("%d documents are not UTF-8 and left out: %s.", len(skipped), skipped[:5])
    return source


def _tokenizer(flags: argparse.Namespace) -> "Tokenizer":
    from foundry_jax.data.tokenize import ByteTokenizer, load_tokenizer

    return ByteTokenizer() if flags.tokenizer == "byte" else load_tokenizer(flags.tokenizer)


def _announced(documents, name: str) -> Iterator[str]:
    """Yields the texts, and says when what is left is work without a measure."""
    from foundry_jax.data.progress import counted

    for document in counted(documents, name):
        yield document.text
    log.info("All text is read; learning merges.")


def _print(flags: argparse.Namespace, report: dict[str, Any]) -> None:
    """Prints a report: JSON, or a line for each figure."""
    if flags.json:
        print(json.dumps(report))
        return
    parts = {name: value for name, value in report.items() if not isinstance(value, dict)}
    for name, inner in report.items():
        if isinstance(inner, dict):
            parts |= {f"{name} {key}": value for key, value in inner.items()}
    width = max(map(len, parts))
    for name, value in parts.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<{width}}  {text}")


if __name__ == "__main__":
    command.run(main)
