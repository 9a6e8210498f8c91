"""Makes instructions and answers with a model:

    python -m foundry_jax.cli.synthesize --seeds=seed_tasks.jsonl --model=smollm2-135m --num=20 --out=made.jsonl

What comes out is data for data.source=chat, one row a line; data/synthetic.py says how it is made. The file only
grows: the same command goes on where it stopped, or was killed, and ends with the same bytes.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foundry_jax import command
from foundry_jax.errors import MachineError
from foundry_jax.schema import require

if TYPE_CHECKING:  # --help must not wait for JAX
    from foundry_jax.data.synthetic import Example, Recipe, Round, Row
    from foundry_jax.zoo.writer import Writer

log = logging.getLogger("foundry_jax.synthesize")  # __name__ is "__main__" here

STYLES = ("auto", "chat", "text")
ROW_START = b'{"id": "'


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a command line."""
    parser = command.Parser(
        prog="python -m foundry_jax.cli.synthesize",
        description="Writes new instructions and answers with a model, after the example of some (self-instruct).",
        epilog="The same command goes on where it stopped. Exit codes: 0 done, 1 a mistake in what was asked.",
    )

    def add(name: str, kind: type, default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")

    parser.add_argument(
        "--seeds", required=True, metavar="PATH", help="tasks and answers, as data.source=chat has them"
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="a zoo model, folder, GGUF file or run folder")
    parser.add_argument("--num", required=True, type=int, help="rows to have in the end")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSONL file that rows are added to")
    add("--seed", int, 0, "of all draws")
    add("--batch-size", int, 8, "texts that are written at once; changes no row")
    parser.add_argument("--style", choices=STYLES, default="auto", help="how to ask (default: auto, a chat if it can)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--temperature", float, 0.7, "of the draws")
    add("--top-p", float, 0.9, "draw among the tokens of this probability")
    add("--novelty", float, 0.7, "largest ROUGE-L of an instruction with another")
    add("--non-ascii", float, 0.1, "largest share of the characters of an instruction")
    add("--prompts", int, 8, "lists of instructions to continue in a round")
    add("--seed-examples", int, 6, "seed tasks in such a list")
    add("--own-examples", int, 2, "tasks made before in such a list")
    add("--new-examples", int, 8, "most new tasks of a list")
    add("--list-tokens", int, 256, "most tokens of these")
    add("--answer-tokens", int, 256, "most tokens of an input and its output")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, to stdout")
    flags = parser.parse_args(argv)
    for name in ("num", "batch_size"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(flags, name)} must be 1 or more")
    return flags


def main() -> None:
    """The command. What can be refused is refused before the model's weights are read."""
    flags = parse_arguments(sys.argv[1:])
    from foundry_jax.data.synthetic import Recipe

    recipe = Recipe(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Recipe)})
    seeds = read_seeds(flags.seeds)
    open_writer, provenance = prepare(flags, recipe, seeds)
    started = time.perf_counter()
    with RowFile(flags.out, provenance) as file:
        before, made = len(file.rows), []
        if before < flags.num:
            file.drop_unfinished_round()
            made = make(file, seeds, recipe, open_writer(), flags.num)
        rejected = sum((one.rejected for one in made), collections.Counter())
        summary = {"out": flags.out, "rows": len(file.rows), "new": len(file.rows) - before, "rounds": len(made),
                   "rejected": rejected, "seconds": round(time.perf_counter() - started, 1), **provenance}  # fmt: skip
    if flags.json:
        print(json.dumps(summary))
    else:
        print(f"{flags.out}: {summary['rows']} rows, {summary['new']} of them new, in {summary['seconds']:,} s")


def make(file: "RowFile", seeds: "Sequence[Example]", recipe: "Recipe", write: "Writer", num: int) -> "list[Round]":
    """Returns the rounds that it took to have `num` rows in a file."""
    from foundry_jax.data.synthetic import described, rounds

    found = []
    with progress_of(file.path.name, len(file.rows), num) as progress:
        for made in rounds(seeds, file.rows, write, recipe, num=num, provenance=file.provenance):
            file.add(made.rows[: num - len(file.rows)])
            progress(len(file.rows), f"Round {made.number}: left out: {described(made.rejected)}")
            found.append(made)
    return found


def read_seeds(path: str) -> "list[Example]":
    """Returns the tasks of a file, each instruction once.

    Raises:
        UserError: no such file, a line that is none of data.source=chat, or a conversation of several turns.
    """
    from foundry_jax.data.sources import chat
    from foundry_jax.data.synthetic import Example

    found: dict[str, Example] = {}
    for document in chat.find(path):
        messages = [message for message in document.conversation.messages if message["role"] != "system"]
        said = [message["role"] for message in messages if message.get("content")]
        require(
            said == ["user", "assistant"] and len(messages) == 2,
            f"{path}: a seed task is one question and its answer in text, which the conversation that begins "
            f"{document.text[:40]!r} is not; take it out.",
        )
        question, answer = messages
        example = Example(question["content"], question.get("input") or "", answer["content"])
        found.setdefault(example.instruction, example)
    return list(found.values())


def prepare(
    flags: argparse.Namespace, recipe: "Recipe", seeds: "Sequence[Example]"
) -> "tuple[Callable[[], Writer], dict[str, Any]]":
    """Returns (what reads the weights, what every row says of where it comes from).

    Raises:
        UserError: no such model, it has no tokenizer, or it cannot be asked in that style.
    """
    from foundry_jax import compilation
    from foundry_jax.data.chat import Chat
    from foundry_jax.data.hashing import sha256_json
    from foundry_jax.generate import Sampling
    from foundry_jax.zoo import open_source
    from foundry_jax.zoo.pretrained import pretrained
    from foundry_jax.zoo.writer import Writer

    sampling = Sampling(temperature=flags.temperature, top_p=flags.top_p)
    source = open_source(flags.model)
    tokenizer = source.tokenizer()
    require(
        tokenizer is not None, f"{source.name} has no tokenizer and can write no text: put its tokenizer.json there."
    )
    is_chat = flags.style == "chat" or (flags.style == "auto" and tokenizer.chat_template is not None)
    chat = Chat.of(tokenizer, source.name) if is_chat else None
    provenance = {
        "model": flags.model, "fingerprint": source.fingerprint, "tokenizer": tokenizer.hash, "dtype": flags.dtype,
        "style": "chat" if is_chat else "text", "temperature": flags.temperature, "top_p": flags.top_p,
        "seeds": sha256_json([example.id for example in seeds]), **dataclasses.asdict(recipe),
    }  # fmt: skip

    def open_writer() -> Writer:
        compilation.enable_cache()
        return Writer(pretrained(source, dtype=flags.dtype), chat, sampling, flags.batch_size)

    return open_writer, provenance


class RowFile:
    """A JSONL file of rows that only this process adds to, until it is closed.

    rows: what it holds. provenance: what is alike in all of them.
    """

    def __init__(self, path: str | os.PathLike, provenance: Mapping[str, Any]):
        """Makes the file if need be, and cuts off what a process that was killed left of its last line.

        Raises:
            UserError: another process holds it, a line is no row, or its rows were made in another way.
            MachineError: it cannot be written.
        """
        self.path, self.provenance = pathlib.Path(path).expanduser(), dict(provenance)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  closed by __exit__
        try:
            self._lock()
            self._file.seek(0)
            *lines, torn = self._file.read().split(b"\n")
            self.rows = [self._parsed(line, number) for number, line in enumerate(lines, start=1)]
            self._drop(torn, after=sum(len(line) + 1 for line in lines))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: "Sequence[Row]") -> None:
        """Adds rows, so that they survive whatever comes.

        Raises:
            MachineError: they cannot be written.
        """
        with self._explained():
            self._file.write("".join(map(_line, rows)).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += rows

    def drop_unfinished_round(self) -> None:
        """Takes out the rows of the last round if there are fewer than it made: it will be made again."""
        last = self.rows[-1]["provenance"] if self.rows else None
        rows = [row for row in self.rows if row["provenance"]["round"] == last["round"]]
        if rows and len(rows) < last["of"]:
            self.rows = self.rows[: -len(rows)]
            self._truncate(sum(len(_line(row).encode()) for row in self.rows))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                f"Another process writes to {self.path}; wait for it, or choose another --out."
            ) from None

    def _drop(self, torn: bytes, *, after: int) -> None:
        """Cuts off the beginning of a row that stands after so many bytes; what is none of ours is left alone."""
        start = ROW_START[: len(torn)]
        require(torn.startswith(start), f"{self.path} ends with what is no row of this command; choose another --out.")
        if torn:
            self._truncate(after)

    def _truncate(self, size: int) -> None:
        with self._explained():
            self._file.truncate(size)
            os.fsync(self._file.fileno())

    def _parsed(self, line: bytes, number: int) -> "Row":
        try:
            row = json.loads(line)
            found = {name: row["provenance"][name] for name in self.provenance}
            complete = _line(row).encode() == line + b"\n" and {"round", "of"} <= row["provenance"].keys()
        except (ValueError, TypeError, KeyError):
            complete = False
        require(complete, f"{self.path}, line {number} is no row of this command; choose another --out.")
        for name, value in self.provenance.items():
            require(
                found[name] == value,
                f"{self.path} was made with {name}={found[name]}, not {value}: use the same again, or another --out.",
            )
        return row

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(f"Cannot write to {self.path}: {error.strerror}; choose another --out.") from error


def _line(row: "Row") -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def progress_of(what: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """Gives a function to call with (rows so far, what to say of the last round): a bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield lambda done, said: log.info("%s; %d of %d rows.", said, done, total)
        return
    import rich.console
    import rich.progress

    columns = ["{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
               rich.progress.TimeRemainingColumn()]  # fmt: skip
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda done, _: bar.update(task, completed=done)


if __name__ == "__main__":
    command.run(main)
