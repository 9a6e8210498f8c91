"""Self-instruct: a model writes new tasks after the example of some given ones, and then their answers.

    for made in rounds(seeds, [], write, recipe, num=100, provenance={"model": "smollm2-135m"}): ...

Wang et al. 2022, 2212.10560. In a round the model is shown a few lists of instructions, seeds and its own, which it
continues. What is well formed and unlike all there is (ROUGE-L, Lin 2004) is asked for an input and an output; what
these are good for, too, is a row:

    {"id": "1f60...", "instruction": "Name a river in Asia.", "input": "", "output": "The Mekong.", "provenance":
     {"model": "smollm2-135m", ..., "round": 3, "of": 5, "seed_ids": ["77ab...", ...], "prompt_sha256": "c0de...",
      "answer_prompt_sha256": "90f1...", "similarity": 0.31}}

A round depends on the recipe, its number and the rows before it, and on nothing else: what was interrupted goes on as
if it had not been. `of` is how many rows the round made, so a file whose last round lacks some can be told.

Two steps of the paper are left out, as in Alpaca (Taori et al. 2023): tasks are not sorted into classifications and
others, and each gets one example.
"""

import collections
import dataclasses
import logging
import math
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rapidfuzz import process
from rapidfuzz.distance import Indel

from foundry_jax.data.hashing import sha256_json
from foundry_jax.errors import UserError
from foundry_jax.schema import require, require_range

log = logging.getLogger(__name__)

LIST_REQUEST = "Come up with a series of tasks:"
TASK, INPUT, OUTPUT = "Task:", "Input:", "Output:"
NO_INPUT = "<none>"
MEANS_NO_INPUT = {"", NO_INPUT, "none", "n/a", "<noinput>", "no input", "no input needed"}
UNTIL = (f"\n{TASK}", f"\n{INPUT}")  # the model goes on with a task of its own, or with another input
SHOWN_TASKS = 3  # whole examples before a task that is to get an input and an output
SHOWN_CHARACTERS = 600  # longest of these: they would fill a small model's context
NUMBER = re.compile(r"\n\s*\d+\s*[.)][^\S\n]*")
# The paper's: what a model that reads and writes text alone cannot do, or rarely states in one line.
BANNED = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b|^write a program", re.IGNORECASE)
WORDS = (4, 150)  # of an instruction
FRUITLESS_ROUNDS = 10  # in a row, and the model is given up


class Example(NamedTuple):
    """A task: an instruction, the text that it is about (often none), and the answer."""

    instruction: str
    input: str
    output: str

    @property
    def id(self) -> str:
        """A hash of the content."""
        return sha256_json(list(self))[:16]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the outcome besides the model and the seeds.

    prompts: lists to continue in a round. seed_examples, own_examples: instructions in such a list.
    new_examples: how many more a list may get.
    novelty: an instruction whose ROUGE-L with another is above this is none.
    non_ascii: largest share of characters of an instruction that are not ASCII.
    list_tokens, answer_tokens: most tokens that the model writes after a list, and after an instruction.
    """

    seed: int
    prompts: int
    seed_examples: int
    own_examples: int
    new_examples: int
    novelty: float
    non_ascii: float
    list_tokens: int
    answer_tokens: int

    def __post_init__(self):
        counts = ("prompts", "seed_examples", "new_examples", "list_tokens", "answer_tokens")
        require_range(self, "", seed=(0, 2**31 - 1), own_examples=(0, math.inf), novelty=(0, 1), non_ascii=(0, 1))
        require_range(self, "", **dict.fromkeys(counts, (1, math.inf)))


@dataclasses.dataclass(frozen=True)
class Request:
    """What the model is asked: it has answered some turns, and goes on with the beginning of its next answer.

    turns: (question, answer). until: texts that end the answer and are no part of it. seed: of the draws.
    """

    turns: tuple[tuple[str, str], ...]
    question: str
    start: str
    until: tuple[str, ...]
    max_tokens: int
    seed: int

    @property
    def sha256(self) -> str:
        """The hash of all of it."""
        return sha256_json(dataclasses.asdict(self))


class Written(NamedTuple):
    """What the model wrote; not whole if it would have gone on."""

    text: str
    is_whole: bool


Write = Callable[[Sequence[Request]], list[Written]]
Row = dict[str, Any]


class Round(NamedTuple):
    """The rows of one round, and why the others are none: {"too alike": 3, ...}."""

    number: int
    rows: list[Row]
    rejected: collections.Counter[str]


class _Candidate(NamedTuple):
    """An instruction that is good, and where it comes from."""

    instruction: str
    request: Request
    shown: list[str]
    similarity: float


def example_of(row: Mapping[str, Any]) -> Example:
    """Returns the task of a row."""
    return Example(row["instruction"], row["input"], row["output"])


def rounds(
    seeds: Sequence[Example],
    rows: Sequence[Row],
    write: Write,
    recipe: Recipe,
    *,
    num: int,
    provenance: Mapping[str, Any],
) -> Iterator[Round]:
    """Yields rounds until there are `num` rows or more, those that exist counted.

    Args:
        rows: those of earlier rounds, all of them.
        write: asks the model; an answer must depend on its request alone.
        provenance: what every row says of the model.

    Raises:
        UserError: too few seeds, or FRUITLESS_ROUNDS rounds in a row without a row.
    """
    require(
        len(seeds) >= recipe.seed_examples,
        f"{len(seeds)} seed tasks are too few: a list shows seed_examples={recipe.seed_examples} of them.",
    )
    rows = list(rows)
    number = rows[-1]["provenance"]["round"] + 1 if rows else 0
    rejected: list[collections.Counter[str]] = []  # of the last rounds, those that made nothing
    while len(rows) < num:
        made = _round(number, seeds, [example_of(row) for row in rows], write, recipe)
        rejected = [] if made.rows else [*rejected, made.rejected]
        for row in made.rows:
            row["provenance"] = {**provenance, **row["provenance"]}
        yield made
        rows += made.rows
        number += 1
        if len(rejected) == FRUITLESS_ROUNDS:
            reasons = described(sum(rejected, collections.Counter()))
            raise UserError(
                f"{FRUITLESS_ROUNDS} rounds in a row made nothing ({reasons}); the {len(rows)} rows before are kept. "
                f"Try a larger model, another temperature or seed, or more seed tasks."
            )


def described(rejected: Mapping[str, int]) -> str:
    """Returns why things were left out, the most frequent reason first: "too alike 3, too short 1"."""
    ordered = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count}" for reason, count in ordered) or "nothing was written"


def _round(number: int, seeds: Sequence[Example], own: Sequence[Example], write: Write, recipe: Recipe) -> Round:
    """Returns one round; `own` are the examples made before it."""
    rejected: collections.Counter[str] = collections.Counter()
    candidates = _candidates(number, seeds, own, write, recipe, rejected)
    requests = [
        _task_request(candidate.instruction, i, number, seeds, recipe) for i, candidate in enumerate(candidates)
    ]
    known = {(example.input, example.output) for example in (*seeds, *own)}
    rows = []
    for candidate, request, written in zip(candidates, requests, write(requests) if requests else [], strict=True):
        example = parse_answer(candidate.instruction, written)
        reason = fault_of_answer(example, known)
        if reason:
            rejected[reason] += 1
            continue
        known.add((example.input, example.output))
        rows.append({"id": example.id, **example._asdict(), "provenance": _provenance(candidate, request, number)})
    for row in rows:
        row["provenance"]["of"] = len(rows)
    return Round(number, rows, rejected)


def _provenance(candidate: _Candidate, request: Request, number: int) -> dict[str, Any]:
    return {
        "round": number,
        "seed_ids": candidate.shown,
        "prompt_sha256": candidate.request.sha256,
        "answer_prompt_sha256": request.sha256,
        "similarity": round(candidate.similarity, 4),
    }


def _candidates(
    number: int,
    seeds: Sequence[Example],
    own: Sequence[Example],
    write: Write,
    recipe: Recipe,
    rejected: collections.Counter[str],
) -> list[_Candidate]:
    """Returns the good instructions of a round, in the order of the lists; counts the others in `rejected`."""
    shown = [_shown(_draw(recipe, number, "list", i), seeds, own, recipe) for i in range(recipe.prompts)]
    requests = [_list_request(examples, i, number, recipe) for i, examples in enumerate(shown)]
    words = [words_of(example.instruction) for example in (*seeds, *own)]
    found = []
    for examples, request, written in zip(shown, requests, write(requests), strict=True):
        for instruction in parse_list(written):
            similarity = nearest(instruction, words)
            reason = fault(instruction, recipe.non_ascii) or ("too alike" if similarity > recipe.novelty else None)
            if reason:
                rejected[reason] += 1
                continue
            words.append(words_of(instruction))
            found.append(_Candidate(instruction, request, [example.id for example in examples], similarity))
    return found


def _draw(recipe: Recipe, number: int, *what: Any) -> random.Random:
    """Returns the random numbers of one thing in a round."""
    return random.Random("/".join(map(str, (recipe.seed, number, *what))))


def _shown(draw: random.Random, seeds: Sequence[Example], own: Sequence[Example], recipe: Recipe) -> list[Example]:
    """Returns the examples of one list, in the order in which they are shown."""
    mine = draw.sample(own, min(recipe.own_examples, len(own)))
    chosen = draw.sample(seeds, recipe.seed_examples) + mine
    draw.shuffle(chosen)
    return chosen


def _list_request(examples: Sequence[Example], index: int, number: int, recipe: Recipe) -> Request:
    """Returns what asks for more instructions."""
    lines = [f"{i}. {_one_line(example.instruction).rstrip(':')}" for i, example in enumerate(examples, start=1)]
    start = "\n".join([*lines, f"{len(lines) + 1}."])
    until = ("\n\n", f"\n{len(lines) + 1 + recipe.new_examples}.")
    seed = _draw(recipe, number, "list", index, "seed").getrandbits(31)
    return Request((), LIST_REQUEST, start, until, recipe.list_tokens, seed)


def _task_request(instruction: str, index: int, number: int, seeds: Sequence[Example], recipe: Recipe) -> Request:
    """Returns what asks for an input and an output; shows a few seeds that have short ones."""
    draw = _draw(recipe, number, "task", index)
    short = [example for example in seeds if sum(map(len, example)) <= SHOWN_CHARACTERS]
    shown = draw.sample(short, min(SHOWN_TASKS, len(short)))
    turns = tuple((f"{TASK} {_one_line(example.instruction)}", _spelled(example)) for example in shown)
    return Request(turns, f"{TASK} {instruction}", INPUT, UNTIL, recipe.answer_tokens, draw.getrandbits(31))


def _spelled(example: Example) -> str:
    return f"{INPUT} {example.input or NO_INPUT}\n{OUTPUT} {example.output}"


def parse_list(written: Written) -> list[str]:
    """Returns the instructions of a list that was continued after a number; the last one may be cut off, and is left
    out then."""
    items = NUMBER.split(f"\n0. {written.text}")[1:]
    if not written.is_whole:
        items.pop()
    lines = [_one_line(item) for item in items]
    return [line[0].upper() + line[1:] for line in lines if line]


def fault(instruction: str, non_ascii: float = 1.0) -> str | None:
    """Returns what is wrong with an instruction, None if it is one that a model of text can follow."""
    size = len(instruction.split())
    if size < WORDS[0]:
        return "too short"
    if size > WORDS[1]:
        return "too long"
    if BANNED.search(instruction):
        return "not about text"
    if instruction[0] in string.punctuation:
        return "begins with punctuation"
    if not instruction.isprintable():
        return "unprintable"
    if sum(not character.isascii() for character in instruction) > non_ascii * len(instruction):
        return "not ASCII"
    return None


def parse_answer(instruction: str, written: Written) -> Example | None:
    """Returns the task with what was written after "Input:"; None if it has no output or is cut off.

    Of several outputs the first counts.
    """
    given, mark, output = written.text.partition(f"\n{OUTPUT}")
    output, more, _ = output.partition(f"\n{OUTPUT}")
    if not mark or not (written.is_whole or more):
        return None
    given = given.strip()
    return Example(instruction, "" if given.lower().rstrip(".") in MEANS_NO_INPUT else given, output.strip())


def fault_of_answer(example: Example | None, known: set[tuple[str, str]]) -> str | None:
    """Returns what is wrong with a task's input and output, of which those in `known` exist; None if nothing is."""
    if example is None:
        return "answer without end or output"
    if not example.output:
        return "empty output"
    if example.output in (example.input, example.instruction):
        return "output repeats the task"
    if example.output.endswith(":"):
        return "output ends with a colon"
    if not all(character.isprintable() or character in "\n\t" for character in example.input + example.output):
        return "unprintable"
    if (example.input, example.output) in known:
        return "answer of another task"
    return None


def words_of(text: str) -> list[str]:
    """Returns what ROUGE compares: letters and digits, in lower case. Of ASCII these are the words of Google's."""
    return re.findall(r"[^\W_]+", text.lower())


def nearest(instruction: str, others: Sequence[list[str]]) -> float:
    """Returns the largest ROUGE-L (F1) with the words of others, 0 if there are none.

    It is 2 LCS / (lengths together), which is what RapidFuzz calls the normalised similarity of insertions and
    deletions: 0.014 s for 50,000 others, where rouge_score 0.1.2 takes 0.23 s for 2,000 (2 busy cores, 2026-11).
    """
    found = process.extractOne(words_of(instruction), others, scorer=Indel.normalized_similarity)
    return found[1] if found else 0.0


def _one_line(text: str) -> str:
    return " ".join(text.split())
