"""Pretrained models on the command line: python -m foundry_jax.zoo list | convert | export | verify | chat"""

import argparse
import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from foundry_jax import command
from foundry_jax.errors import UserError

if TYPE_CHECKING:  # the commands import what they need: --help must not wait for JAX
    from foundry_jax.zoo.source import Source

log = logging.getLogger("foundry_jax.zoo")  # __name__ is "__main__" here

PROGRAM = "python -m foundry_jax.zoo"
DTYPES = ("bfloat16", "float32")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal might obey them
LINE_SECONDS = 5.0  # between lines of progress where there is no terminal


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line; flags.run is the command to run with them."""
    parser = command.Parser(
        prog=PROGRAM, description="Pretrained models: list, convert, export, compare, talk to them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], None], name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    model = "a name of the list, a Hugging Face folder, a GGUF file, a run folder, a folder of adapters, or owner/name"
    sub = add(show_list, "list", "Shows the models that have a name.")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add(convert, "convert", "Writes any model as a folder that transformers loads.")
    sub.add_argument("source", metavar="SRC", help=model)
    _add_output(sub)

    sub = add(export, "export", "Writes what a run has trained as a folder that transformers, or PEFT, loads.")
    sub.add_argument("source", metavar="RUN", help="a run folder")
    sub.add_argument("--step", type=_step, default="latest", help="best, latest or a number (default: latest)")
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument("--raw", action="store_true", help="the weights themselves (default)")
    weights.add_argument("--ema", action="store_true", help="their moving average")
    sub.add_argument(
        "--adapter", action="store_true", help="the adapters alone, in PEFT's format, instead of all merged"
    )
    _add_output(sub)

    sub = add(verify, "verify", "Compares the logits of two models on a few hundred tokens.")
    sub.add_argument("first", metavar="A", help=model)
    sub.add_argument("second", metavar="B", help="likewise")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add(chat, "chat", "Talks to a model that has a chat template; a line is a message.")
    sub.add_argument("model", metavar="MODEL", help=model)
    sub.add_argument("--system", metavar="TEXT", help="the system message")
    sub.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)")
    sub.add_argument("--top-k", type=int, default=0, help="draw among the likeliest so many; 0: all (default: 0)")
    sub.add_argument("--top-p", type=float, default=0.95, help="draw among those of this probability (default: 0.95)")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and products (default: float32)")
    return parser.parse_args(argv)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the tensors (default: bfloat16)")
    parser.add_argument("--shard-size", type=_size, default="5GB", help="most bytes of one file (default: 5GB)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _size(text: str) -> int:
    """Returns the bytes of "5GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 500MB")
    return size


def _step(text: str) -> int | str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be best, latest or a number")
    return int(text) if text.isdecimal() else text


def main() -> None:
    """The command."""
    flags = parse_arguments(sys.argv[1:])
    flags.run(flags)


def show_list(flags: argparse.Namespace) -> None:
    """Prints the table of names."""
    from foundry_jax.model.transformer import num_params
    from foundry_jax.zoo import hub
    from foundry_jax.zoo.catalog import ZOO

    rows = [
        {
            "name": name,
            "parameters": num_params(entry.model),
            "repository": entry.repository,
            "revision": entry.revision,
            "gated": entry.gated,
            "cached": _where(hub.find_cached(entry.repository, entry.revision), entry.packaged()),
            "description": entry.description,
        }
        for name, entry in ZOO.items()
    ]
    if flags.json:
        print(json.dumps(rows))
        return
    import rich.console
    import rich.table

    table = rich.table.Table("name", "repository", "gated", "cached", "description", box=None)
    table.columns.insert(1, rich.table.Column("parameters", justify="right"))
    for row in rows:
        gated, size = "yes" if row["gated"] else "", f"{row['parameters']:,}"
        table.add_row(row["name"], size, row["repository"], gated, row["cached"] or "", row["description"])
    rich.console.Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _where(cached: pathlib.Path | None, packaged: pathlib.Path | None) -> str | None:
    """Returns how a model is at hand: in the hub's cache, in an installed package, or not."""
    return "cache" if cached else "package" if packaged else None


def convert(flags: argparse.Namespace) -> None:
    """Writes any source as a Hugging Face folder."""
    from foundry_jax.zoo import open_source

    _write(flags, open_source(flags.source))


def export(flags: argparse.Namespace) -> None:
    """Writes a run's checkpoint as a Hugging Face folder, or its adapters as one of PEFT."""
    from foundry_jax.zoo import open_source
    from foundry_jax.zoo.run import Grafted, open_run, run_config

    path = pathlib.Path(flags.source).expanduser()
    config = run_config(path)
    source = open_run(path, open_source, flags.step, ema=flags.ema)
    if not flags.adapter:
        _write(flags, source)
        return
    from foundry_jax.zoo import peft
    from foundry_jax.zoo.catalog import ZOO

    if not config.lora.rank:
        raise UserError(f"{path} trained all parameters (lora.rank=0): there are no adapters; leave out --adapter.")
    if isinstance(source.base, Grafted):
        raise UserError(
            f"{path} trained adapters on a changed architecture, and PEFT would put them on {config.init.source} as it "
            f"is; leave out --adapter, and they are merged into a whole model."
        )
    start, base = time.perf_counter(), config.init.source
    peft.save(
        flags.destination, source.adapters, model=source.model, alpha=config.lora.alpha, rslora=config.lora.rslora,
        dropout=config.lora.dropout, base_name=ZOO[base].repository if base in ZOO else base,
    )  # fmt: skip
    _report(flags, "adapters", start)


def _write(flags: argparse.Namespace, source: "Source") -> None:
    from foundry_jax.model.transformer import num_params
    from foundry_jax.zoo.export import export as write

    start, total = time.perf_counter(), num_params(source.model) * {"bfloat16": 2, "float32": 4}[flags.dtype]
    with progress_of(f"Writing {flags.destination}", total) as progress:
        family = write(source, flags.destination, dtype=flags.dtype, shard_bytes=flags.shard_size, progress=progress)
    _report(flags, family.architecture, start)


def _report(flags: argparse.Namespace, what: str, start: float) -> None:
    folder = pathlib.Path(flags.destination).expanduser().absolute()
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = time.perf_counter() - start
    if flags.json:
        print(json.dumps({"destination": str(folder), "wrote": what, "bytes": size, "seconds": seconds}))
    else:
        print(f"{folder}: {what}, {size / 1e6:,.1f} MB in {seconds:.1f} s")


def verify(flags: argparse.Namespace) -> None:
    """Compares two models."""
    from foundry_jax import compilation
    from foundry_jax.zoo.verify import verify as compare

    compilation.enable_cache()
    found = compare(flags.first, flags.second)
    if flags.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(f"{found.first} and {found.second}, {found.tokens} tokens of {found.prompts}:")
    print(f"largest difference of logits {found.max_difference:.3g}, the largest logit being {found.largest_logit:.3g}")
    print(
        f"mean KL divergence {found.mean_kl:.3g} nats; same likeliest token at {found.top1_agreement:.2%} of positions"
    )


@contextlib.contextmanager
def progress_of(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes of each part: a bar on a terminal, now and then a line elsewhere."""
    if sys.stderr.isatty():
        import rich.console
        import rich.progress

        columns = ["{task.description}", rich.progress.BarColumn(), rich.progress.DownloadColumn(),
                   rich.progress.TransferSpeedColumn(), rich.progress.TimeRemainingColumn()]  # fmt: skip
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda size: bar.advance(task, size)
        return
    done, last = 0, time.monotonic()

    def line(size: int) -> None:
        nonlocal done, last
        done += size
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            log.info("%s: %.1f of %.1f GB.", what, done / 1e9, total / 1e9)

    yield line


def chat(flags: argparse.Namespace) -> None:
    """Reads messages line by line and writes the model's answers as it finds them."""
    from foundry_jax import compilation
    from foundry_jax.data.chat import Chat
    from foundry_jax.generate import Sampling
    from foundry_jax.zoo import open_source
    from foundry_jax.zoo.conversation import Conversation
    from foundry_jax.zoo.pretrained import pretrained

    sampling = Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed)
    if flags.max_tokens < 1:
        raise UserError(f"--max-tokens={flags.max_tokens} must be 1 or more.")
    source = open_source(flags.model)
    Chat.of(source.tokenizer(), source.name)  # a model that cannot chat is refused before its weights are read
    compilation.enable_cache()
    conversation = Conversation(pretrained(source, dtype=flags.dtype), system=flags.system)
    for said in _messages():
        _show(conversation.answer(said, max_tokens=flags.max_tokens, sampling=sampling))
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + 1) % 2**31)


def _messages() -> Iterator[str]:
    """Yields what the user types, until the end of the input or Ctrl-C."""
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        try:
            said = input("> ") if is_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not said and not is_terminal:
            return
        if said.strip():
            yield said.rstrip("\n")


def _show(answer: Iterator[str]) -> None:
    """Prints an answer piece by piece. On a terminal Ctrl-C ends it early, and a message too long ends nothing else."""
    is_terminal = sys.stdin.isatty()
    with contextlib.closing(answer):
        try:
            for piece in answer:
                print(UNPRINTABLE.sub("\ufffd", piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        except UserError as error:
            if not is_terminal:
                raise
            print(f"error: {error}", end="", file=sys.stderr)
    print()


if __name__ == "__main__":
    command.run(main)
