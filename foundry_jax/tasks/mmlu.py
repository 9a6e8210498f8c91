"""MMLU: questions with four choices in 57 subjects. Hendrycks et al. 2021, 2009.03300.

    python -m foundry_jax.eval --task=mmlu --model=smollm2-135m --data=../shared/data --limit=570

Prompts and scores are those of lm-eval's `mmlu` (version 2), with five examples by default: the first five of a
subject's dev split. Reported are the accuracy over all questions (so subjects count by their size), of each category
and of each subject, and, for models that are too small to answer, what the gold letter is given: its probability, its
share among the four letters, and its bits a byte. Under a limit the subjects take turns.

Data: a folder with test and dev, or with mmlu/test and mmlu/dev, or a file with the test, beside dev; or the folder of
Hendrycks' archive, with test/anatomy_test.csv and dev/anatomy_dev.csv; without any, cais/mmlu on the hub. A record is

    {"question": "...", "subject": "anatomy", "choices": ["...", "...", "...", "..."], "answer": 2}

where the answer may also be a letter. Files of MMLU-Redux (Gema et al. 2024, 2406.04127) are reported under that name;
if their records have an error_type, also the accuracy over those where it is "ok".
"""

import csv
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from foundry_jax.data.hashing import sha256_json
from foundry_jax.errors import UserError
from foundry_jax.registry import unknown
from foundry_jax.schema import require
from foundry_jax.tasks import data
from foundry_jax.tasks.base import Answer, Item, Metric, Outcome, Request, Row, Task, bits_per_byte, pooled
from foundry_jax.tasks.requests import Continuation

LAYOUT = data.Layout(
    "mmlu",
    '{"question": "...", "subject": "anatomy", "choices": ["...", "...", "...", "..."], "answer": 0 to 3}',
    {"test": ("mmlu/test", "test", "all/test"), "dev": ("mmlu/dev", "dev", "all/dev")},
    {"path": "cais/mmlu", "name": "all"},
)
LETTERS = ("A", "B", "C", "D")
ORIGINAL_SIZE = 14042  # questions of MMLU's test split
REDUX = re.compile(r"mmlu[ _-]?redux", re.IGNORECASE)

CATEGORIES = {
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law
        world_religions""",
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy""",
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question. is_ok: whether MMLU-Redux found nothing wrong with it; None: it does not say."""

    subject: str
    question: str
    choices: Sequence[str]
    answer: int
    is_ok: bool | None

    def prompt(self) -> str:
        """Returns the question, up to where the letter belongs."""
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question.strip()}\n{listed}Answer:"


class MMLU(Task):
    """See above."""

    name = "mmlu"
    description = "questions with four choices in 57 subjects; the likeliest letter must be right"
    metrics = ("accuracy", "gold_probability", "gold_share", "bits_per_byte")

    def __init__(self, path: str | os.PathLike | None = None, *, shots: int = 5):
        """Reads the questions, and the examples if there are to be any.

        Raises:
            UserError: no data, malformed data, or a subject with too few examples.
        """
        splits = load(path, ("test", "dev") if shots else ("test",))
        questions = [parse(record) for record in splits["test"].records]
        by_subject = _by_subject(questions)
        self._questions = [question for subject in by_subject.values() for question in subject]
        self._examples = _by_subject([parse(record) for record in splits["dev"].records] if "dev" in splits else [])
        for subject in by_subject:
            has = len(self._examples.get(subject, ()))
            require(
                has >= shots,
                f"shots={shots}, but {subject} has {has} examples to take them from: put a dev file beside the test "
                f"file, or set shots={has}.",
            )
        self._shots = shots
        self.dataset = _dataset(splits["test"], questions)
        shown = [example for kept in self._examples.values() for example in kept[:shots]]
        self.settings = {
            "shots": shots,
            "data": sha256_json([dataclasses.astuple(question) for question in self._questions]),
            "examples": sha256_json([dataclasses.astuple(example) for example in shown]) if shots else None,
        }

    @functools.cached_property
    def _items(self) -> list[Item]:
        heads, seen, items = {}, dict.fromkeys(CATEGORY, 0), []
        for question in self._questions:
            subject = question.subject
            if subject not in heads:
                heads[subject] = head(subject, self._examples.get(subject, ())[: self._shots])
            number, seen[subject] = seen[subject], seen[subject] + 1
            fields = {"answer": question.answer, "is_ok": question.is_ok}
            prompt = heads[subject] + question.prompt()
            items.append(Item(f"{subject}/{number}", prompt, LETTERS[question.answer], subject, fields))
        return items

    def items(self) -> list[Item]:
        """Returns the items, those of a subject together: they share the beginning of their prompts."""
        return self._items

    def ranked(self) -> list[Item]:
        """Returns the items so that the subjects take turns."""
        return sorted(self._items, key=lambda item: int(item.id.rpartition("/")[2]))

    def requests(self, item: Item) -> list[Request]:
        return [Continuation(item.prompt, f" {letter}") for letter in LETTERS]

    def score(self, item: Item, answers: Sequence[Answer]) -> Outcome:
        """Returns whether the likeliest letter is right (the first of equal ones), and what the gold letter got."""
        log_probs = [answer.log_prob for answer in answers]
        gold = item.fields["answer"]
        prediction = LETTERS[log_probs.index(max(log_probs))]
        metrics = {
            "accuracy": float(prediction == item.gold),
            "gold_probability": math.exp(log_probs[gold]),
            "gold_share": _softmax(log_probs)[gold],
            "bits_per_byte": bits_per_byte(log_probs[gold], len(f" {item.gold}")),
        }
        notes = {} if item.fields["is_ok"] is None else {"is_ok": item.fields["is_ok"]}
        return Outcome(prediction, metrics, dict(zip(LETTERS, log_probs, strict=True)), notes)

    def summarise(self, rows: Sequence[Row]) -> list[Metric]:
        """Returns each metric over all questions, then the accuracy by category, by subject, and where all is ok.

        Standard errors are those of samples stratified by subject, as lm-eval's groups have them.
        """
        overall = [_over(name, name, rows) for name in self.metrics]
        categories = [
            _over(f"accuracy/{category}", "accuracy", [row for row in rows if CATEGORY[row.group] == category])
            for category in CATEGORIES
            if any(CATEGORY[row.group] == category for row in rows)
        ]
        subjects = [
            _over(f"accuracy/{CATEGORY[subject]}/{subject}", "accuracy", [row for row in rows if row.group == subject])
            for subject in dict.fromkeys(row.group for row in rows)
        ]
        ok = [row for row in rows if row.notes.get("is_ok")]
        return [*overall, *categories, *([_over("accuracy/ok", "accuracy", ok)] if ok else []), *subjects]


def _over(name: str, metric: str, rows: Sequence[Row]) -> Metric:
    by_subject: dict[str, list[float]] = {}
    for row in rows:
        by_subject.setdefault(row.group, []).append(row.metrics[metric])
    return pooled(name, list(by_subject.values()))


def head(subject: str, examples: Sequence[Question]) -> str:
    """Returns what stands before every question of a subject."""
    title = subject.replace("_", " ")
    shown = "".join(f"{example.prompt()} {LETTERS[example.answer]}\n\n" for example in examples)
    return f"The following are multiple choice questions (with answers) about {title}.\n\n{shown}"


def _softmax(log_probs: Sequence[float]) -> list[float]:
    highest = max(log_probs)
    weights = [math.exp(log_prob - highest) for log_prob in log_probs]
    return [weight / math.fsum(weights) for weight in weights]


def _by_subject(questions: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.subject, []).append(question)
    return found


# ------------------------------------------------------------------------------------------------ data


def load(path: str | os.PathLike | None, wanted: Sequence[str]) -> dict[str, data.Split]:
    """Returns the wanted splits, from Hendrycks' archive if that is what lies there."""
    given = path if path is not None else os.environ.get(data.VARIABLE) or None
    if given is not None:
        for folder in (pathlib.Path(given).expanduser() / "mmlu", pathlib.Path(given).expanduser()):
            if any((folder / "test").glob("*_test.csv")):
                return {split: _archive(folder, split) for split in wanted if (folder / split).is_dir()}
    return data.load(LAYOUT, path, wanted)


def _archive(folder: pathlib.Path, split: str) -> data.Split:
    """Returns a split of Hendrycks' archive: a CSV file for each subject, without a header."""
    paths = sorted((folder / split).glob(f"*_{split}.csv"))
    records = [record for path in paths for record in _read_csv(path, path.stem.removesuffix(f"_{split}"))]
    require(bool(records), f"{folder / split} has no questions in files named SUBJECT_{split}.csv.")
    return data.Split(records, paths)


def _read_csv(path: pathlib.Path, subject: str) -> list[data.Record]:
    shape = "question,choice,choice,choice,choice,letter"
    records = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                where = f"{path}, line {reader.line_num},"
                require(len(cells) == 6, f"{where} has {len(cells)} cells instead of 6; a line is {shape}.")
                fields = {"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": cells[5]}
                records.append(data.Record(where, fields, shape))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Cannot read {path}: {error}.") from None
    return records


def parse(record: data.Record) -> Question:
    """Returns the question of a record.

    Raises:
        UserError: a field that is missing or malformed: names the file and the line.
    """
    subject = record.text("subject").strip().replace(" ", "_").lower()
    if subject not in CATEGORY:
        raise UserError(f"{record.where} {unknown(subject, CATEGORY, 'subject')}")
    choices = record.fields.get("choices")
    is_list = isinstance(choices, (list, tuple)) and all(isinstance(choice, str) for choice in choices)
    record.require(is_list and len(choices) == len(LETTERS), "has no list 'choices' of 4 texts")
    error_type = record.fields.get("error_type")
    record.require(error_type is None or isinstance(error_type, str), "has an 'error_type' that is no text")
    is_ok = None if error_type is None else error_type.strip().lower() == "ok"
    return Question(subject, record.text("question"), tuple(choices), _answer(record), is_ok)


def _answer(record: data.Record) -> int:
    answer: Any = record.fields.get("answer")
    if isinstance(answer, str) and answer.strip() in LETTERS:
        return LETTERS.index(answer.strip())
    is_number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS)
    record.require(is_number, f"has the answer {answer!r}, which is none of 0 to 3 or A to D")
    return answer


def _dataset(split: data.Split, questions: Sequence[Question]) -> str:
    """Returns what these questions are called: MMLU alone only if all of its test split is there."""
    if isinstance(split.origin, str) or len(questions) == ORIGINAL_SIZE:
        return "MMLU"
    subjects = len({question.subject for question in questions})
    if _is_redux(split):
        return "MMLU-Redux" if subjects == len(CATEGORY) else f"MMLU-Redux, {subjects} of {len(CATEGORY)} subjects"
    return f"{len(questions):,} questions of MMLU, {subjects} of {len(CATEGORY)} subjects"


def _is_redux(split: data.Split) -> bool:
    """Returns whether a field of the records, a name on the way to them or a README beside them says MMLU-Redux."""
    first: Mapping[str, Any] = split.records[0].fields
    if "error_type" in first or any(REDUX.search(str(first.get(name, ""))) for name in ("dataset", "source")):
        return True
    path = split.origin[0].absolute()
    if any(REDUX.search(part) for part in path.parts[-3:]):
        return True
    readmes = [readme for folder in list(path.parents)[:2] for readme in sorted(folder.glob("README*"))]
    return any(REDUX.search(line) and "mmlu/" in line for readme in readmes for line in _lines(readme))


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines()
