"""GSM8K: grade-school arithmetic, answered in words that end in a number. Cobbe et al. 2021, 2110.14168.

    python -m foundry_jax.eval --task=gsm8k --model=smollm2-135m --data=../shared/data

Prompts, filters and metrics are those of lm-eval's `gsm8k` (version 3): five examples of the training set, drawn anew
for each question by one generator with seed 1234, and greedy writing of at most 256 tokens.

Data: a folder with test and train, or with gsm8k/test and gsm8k/train, or a file with the test, beside train; without
any, openai/gsm8k on the hub. A record is

    {"question": "Weng earns $12 an hour ...?", "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 ...\\n#### 10"}
"""

import functools
import os
import random
import re
from collections.abc import Iterator, Sequence

from foundry_jax.data.hashing import sha256_json
from foundry_jax.schema import require
from foundry_jax.tasks import data
from foundry_jax.tasks.base import Answer, Item, Outcome, Request, Task, bits_per_byte, scored_bytes
from foundry_jax.tasks.requests import Continuation, Generation

LAYOUT = data.Layout(
    "gsm8k",
    '{"question": "...", "answer": "... #### 10"}',
    {"test": ("gsm8k/test", "test", "main/test"), "train": ("gsm8k/train", "train", "main/train")},
    {"path": "openai/gsm8k", "name": "main"},
)
FEWSHOT_SEED = 1234
UNTIL = ("Question:", "</s>", "<|im_end|>")
MAX_TOKENS = 256

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))  # taken out of both sides, one after the other
INVALID = "[invalid]"


class GSM8K(Task):
    """See above."""

    name = "gsm8k"
    description = "grade-school arithmetic in words; the number at the end must be right"
    metrics = ("strict_match", "flexible_match", "bits_per_byte")

    def __init__(self, path: str | os.PathLike | None = None, *, shots: int = 5):
        """Reads the questions, and the examples if there are to be any.

        Raises:
            UserError: no data, malformed data, or too few examples.
        """
        splits = data.load(LAYOUT, path, ("test", "train") if shots else ("test",))
        self.dataset = "GSM8K"
        self._questions = [_pair(record) for record in splits["test"].records]
        self._examples = [_pair(record) for record in splits["train"].records] if "train" in splits else []
        require(
            len(self._examples) >= shots,
            f"shots={shots}, but there are {len(self._examples)} examples to draw them from: put a train file beside "
            f"the test file, or set shots=0.",
        )
        self._shots = shots
        self.settings = {
            "shots": shots,
            "max_tokens": MAX_TOKENS,
            "data": sha256_json(self._questions),
            "examples": sha256_json(self._examples) if shots else None,
        }

    @functools.cached_property
    def _items(self) -> list[Item]:
        numbered = enumerate(zip(self._before(), self._questions, strict=False))
        return [Item(f"test/{i}", before + _question(question), answer) for i, (before, (question, answer)) in numbered]

    def _before(self) -> Iterator[str]:
        """Yields the examples before each question: one generator draws for all, so the order of questions matters."""
        draw = random.Random(FEWSHOT_SEED)
        while True:
            shown = draw.sample(self._examples, self._shots) if self._shots else []
            yield "".join(f"{_question(question)} {answer}\n\n" for question, answer in shown)

    def items(self) -> list[Item]:
        return self._items

    def requests(self, item: Item) -> list[Request]:
        return [Generation(item.prompt, UNTIL, MAX_TOKENS), Continuation(item.prompt, f" {item.gold}")]

    def score(self, item: Item, answers: Sequence[Answer]) -> Outcome:
        """Returns whether the number is right, found strictly or flexibly, and the bits a byte of the gold answer."""
        text, gold = answers
        found = {"strict": strict(text), "flexible": flexible(text)}
        metrics = {f"{name}_match": matches(number, item.gold) for name, number in found.items()}
        metrics["bits_per_byte"] = bits_per_byte(gold.log_prob, scored_bytes(item.prompt, f" {item.gold}"))
        return Outcome(found, metrics, {"gold": gold.log_prob}, {"text": text})


def _pair(record: data.Record) -> tuple[str, str]:
    return record.text("question"), record.text("answer")


def _question(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def strict(text: str) -> str:
    """Returns the number after the first "#### "."""
    found = STRICT.search(text)
    return found[1].strip() if found else INVALID


def flexible(text: str) -> str:
    """Returns what looks like a number last."""
    found = FLEXIBLE.findall(text)
    return next((part.strip() for part in found[-1] if part), INVALID) if found else INVALID


def matches(prediction: str, gold: str) -> float:
    """Returns 1 if the two are the same after what does not matter is taken out of both, else 0."""
    return float(_plain(prediction) == _plain(gold))


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()
