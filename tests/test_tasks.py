"""Evaluation tasks: their data, prompts and scores; what is kept of a run, and how it goes on after a kill."""

import collections
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import importlib.machinery
import itertools
import json
import logging
import math
import os
import sys
import threading
import time
import types

import huggingface_hub
import numpy as np
import pytest
from scipy import stats

from foundry_jax.data import hub as hub_lib
from foundry_jax.errors import UserError
from foundry_jax.tasks import TASKS, data, results, run, running, sandbox
from foundry_jax.tasks.base import Item, Metric, Outcome, Row, Task, bits_per_byte, mean, pooled, scored_bytes
from foundry_jax.tasks.constitution import TURN, Constitution, first_is_higher
from foundry_jax.tasks.gsm8k import GSM8K, flexible, matches, strict
from foundry_jax.tasks.humaneval import HumanEval, pass_at_k
from foundry_jax.tasks.mmlu import CATEGORIES, CATEGORY, LETTERS, MMLU
from foundry_jax.tasks.requests import Continuation, Generation, Score

MANY = 5


class FakeScorer:
    """Answers by hashes of what it is asked, so that each answer depends on its own request alone."""

    def __init__(self, fail_after: int | None = None):
        self.asked: list[Continuation | Generation] = []
        self.truncated, self.longest = 0, math.inf
        self.fail_after = fail_after

    def reserve(self, requests):
        pass

    def is_cut(self, request):
        return len(request.context) > self.longest

    def loglikelihood(self, requests, progress=lambda n: None):
        self._note(requests, progress)
        return [Score(-30 * _fraction(request.context + request.continuation), False, 1) for request in requests]

    def generate_until(self, requests, progress=lambda n: None):
        self._note(requests, progress)
        return [f"It is {int(100 * _fraction(r.context))}. #### {len(r.context) % 7}" for r in requests]

    def _note(self, requests, progress):
        if self.fail_after is not None and len(self.asked) + len(requests) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += requests
        self.truncated += sum(map(self.is_cut, requests))
        progress(len(requests))


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def problem(i: int) -> dict:
    return {"question": f"What is {i} + {i}?", "answer": f"It is {i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def question(subject: str, i: int, **fields) -> dict:
    choices = [f"{subject} {i} {letter}" for letter in "wxyz"]
    return {"question": f" Which of {i}?\n", "subject": subject, "choices": choices, "answer": i % 4} | fields


def function(i: int) -> dict:
    return {
        "task_id": f"HumanEval/{i}",
        "prompt": f"def add{i}(x):\n    '''adds {i}'''\n",
        "entry_point": f"add{i}",
        "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}\n",
    }


@pytest.fixture
def gsm8k(tmp_path):
    write_lines(tmp_path / "gsm8k" / "train.jsonl", [problem(i) for i in range(100, 120)])
    write_lines(tmp_path / "gsm8k" / "test.jsonl", [problem(i) for i in range(90)])
    return tmp_path


SUBJECTS = ("anatomy", "philosophy", "virology", "sociology")
SIZES = (6, 2, 4, 1)


@pytest.fixture
def mmlu(tmp_path):
    test = [question(subject, i) for subject, size in zip(SUBJECTS, SIZES, strict=True) for i in range(size)]
    write_lines(tmp_path / "mmlu" / "test.jsonl", test)
    dev = [question(subject, 50 + i) for subject in SUBJECTS for i in range(MANY)]
    write_lines(tmp_path / "mmlu" / "dev.jsonl", dev)
    return tmp_path


@pytest.fixture
def humaneval(tmp_path):
    with gzip.open(tmp_path / "humaneval.jsonl.gz", "wt") as file:
        file.writelines(f"{json.dumps(function(i))}\n" for i in range(4))
    return tmp_path


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no, {i}"} for i in range(40)]
    return write_lines(tmp_path / "pairs.jsonl", rows)


def scored(task: Task, item: Item, *answers) -> Outcome:
    return task.score(item, [Score(answer, False, 1) if isinstance(answer, float) else answer for answer in answers])


# ------------------------------------------------------------------------------------------------ numbers


def test_the_mean_has_the_standard_error_of_a_sample():
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    found = mean("accuracy", values)
    p, n = 4 / 7, 7
    assert found[:2] == ("accuracy", pytest.approx(p)) and found.n == n
    assert found.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-12)
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(n), rel=1e-12)
    assert math.isnan(mean("x", [3.0]).stderr) and mean("x", [3.0]).value == 3.0
    assert mean("x", [0.1] * 10) == Metric("x", pytest.approx(0.1), 0.0, 10)
    with pytest.raises(UserError, match="no items to take the mean of x"):
        mean("x", [])


def test_a_stratified_standard_error_counts_the_spread_within_groups():
    groups = [[1.0, 0.0, 1.0], [0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    sizes, errors = zip(*[(len(g), np.std(g, ddof=1) / math.sqrt(len(g))) for g in groups], strict=True)
    N, k = sum(sizes), len(groups)
    by_hand = math.sqrt(sum((n - 1) * n * se**2 for n, se in zip(sizes, errors, strict=True)) / (N - k) / N)
    assert pooled("a", groups).stderr == pytest.approx(by_hand, rel=1e-12)
    assert pooled("a", groups).value == pytest.approx(5 / 9)
    # Where a group has no spread, as each has under a small limit, the whole sample's is taken.
    assert pooled("a", [*groups, [1.0]]) == mean("a", [value for group in groups for value in group] + [1.0])
    assert pooled("a", [[1.0], [0.0], [1.0]]).stderr == pytest.approx(1 / 3)


def test_bits_per_byte_are_of_the_text_that_is_scored():
    assert scored_bytes("Answer:", " é") == 3
    assert scored_bytes("def f():\n  ", "x") == 4  # white space before it moves to the continuation
    assert scored_bytes("", "ab") == 2
    assert bits_per_byte(-math.log(8.0), 3) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_every_format_holds_the_same_records(tmp_path, suffix):
    rows = [question("anatomy", i) for i in range(3)]
    path = tmp_path / f"test{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = "".join(f"{json.dumps(row)}\n\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else b"\xef\xbb\xbf" + lines)
    found = MMLU(path, shots=0)
    assert [item.gold for item in found.items()] == ["A", "B", "C"]
    assert found.items()[1].prompt.endswith("B. anatomy 1 x\nC. anatomy 1 y\nD. anatomy 1 z\nAnswer:")
    assert MMLU(tmp_path, shots=0).settings == found.settings


def test_the_parts_of_a_split_are_read_in_order(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "main").mkdir()
    for part in (1, 0):
        table = pyarrow.Table.from_pylist([problem(10 * part + i) for i in range(3)])
        parquet.write_table(table, tmp_path / "main" / f"test-0000{part}-of-00002.parquet")
    golds = [item.gold.rpartition(" ")[2] for item in GSM8K(tmp_path, shots=0).items()]
    assert golds == ["0", "2", "4", "20", "22", "24"]


GOOD = json.dumps(question("anatomy", 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"test.jsonl, line 2, is not JSON \("),
        (b"[" * 100_000, r"test.jsonl, line 2, is not JSON \("),
        (b"[1]", "test.jsonl, line 2, is no JSON object; a record is {"),
        (b'"\xff"', "line 2, is not UTF-8: byte 0xff at offset 1"),
        (b"{}", "line 2, has no text 'subject'; a record is {"),
        (GOOD.replace("anatomy", "anatomi", 1).encode(), "line 2, Unknown subject 'anatomi'. Did you mean 'anatomy'"),
        (GOOD.replace('"answer": 0', '"answer": 4').encode(), "line 2, has the answer 4, which is none of 0 to 3"),
        (GOOD.replace('"answer": 0', '"answer": true').encode(), "line 2, has the answer True"),
        (GOOD.replace('"answer": 0', '"answer": "E"').encode(), "line 2, has the answer 'E'"),
        (GOOD.replace('"choices": [', '"choices": ["", ').encode(), "line 2, has no list 'choices' of 4 texts"),
        (GOOD.replace('"choices": [', '"choices": [7, ').encode(), "line 2, has no list 'choices' of 4 texts"),
        (GOOD.replace("Which", "\\ud800").encode(), "line 2, has half of a surrogate pair in 'question'"),
        (GOOD.replace("{", '{"error_type": 3, ').encode(), "line 2, has an 'error_type' that is no text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    (tmp_path / "test.jsonl").write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        MMLU(tmp_path, shots=0)
    assert "\n" not in str(caught.value)


def test_what_is_no_data_is_refused(tmp_path, gsm8k):
    with pytest.raises(UserError, match=r"gsm8k: there is no .*nowhere; give --data=FILE or FOLDER with gsm8k/test"):
        GSM8K(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"gsm8k has no data at .*empty: .*: .jsonl, .jsonl.gz, .json, .parquet"):
        GSM8K(tmp_path / "empty")
    for name, content, message in [
        ("a.txt", b"", "a.txt is none of .jsonl, .jsonl.gz, .json, .parquet"),
        ("a.jsonl", b"\n\n", "a.jsonl has no records; one is {"),
        ("a.json", b"{}", "a.json must hold a list of records"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is damaged: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(os.urandom(999).hex().encode())[:-20], "a.jsonl.gz is damaged: "),
        ("a.parquet", b"no parquet", "a.parquet is no Parquet file"),
    ]:
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            GSM8K(tmp_path / name, shots=0)
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(UserError, match="gsm8k has no data at|Cannot read"):
        GSM8K(tmp_path / "test.jsonl", shots=0)


def test_data_is_looked_for_where_the_environment_says(monkeypatch, gsm8k):
    monkeypatch.setenv(data.VARIABLE, str(gsm8k))
    assert len(GSM8K().items()) == 90
    assert GSM8K().settings == GSM8K(gsm8k / "gsm8k").settings == GSM8K(gsm8k / "gsm8k" / "test.jsonl").settings


class Hub(types.ModuleType):
    """The package `datasets` as far as it is used; offline, it has what is in `cached`."""

    def __init__(self, rows, cached):
        super().__init__("datasets")
        self.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        self.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
        self.rows, self.cached, self.asked = rows, cached, []

    def load_dataset(self, path, name=None, data_dir=None, split=None):
        self.asked.append((path, name, data_dir, split, self.config.HF_HUB_OFFLINE))
        if self.config.HF_HUB_OFFLINE and not self.cached:
            raise ConnectionError("offline\nand more")
        return self.rows[split]


def hub(monkeypatch, info, *, cached=False):
    found = Hub({"test": [problem(1), problem(2)], "train": [problem(i) for i in range(9)]}, cached)
    monkeypatch.setitem(sys.modules, "datasets", found)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    monkeypatch.delenv(data.VARIABLE, raising=False)
    return found


def test_without_a_path_the_hub_is_asked(monkeypatch):
    found = hub(monkeypatch, lambda repository, timeout: None)
    task = GSM8K(shots=3)
    assert found.asked == [("openai/gsm8k", "main", None, split, False) for split in ("test", "train")]
    assert task.items()[1].gold == problem(2)["answer"] and task.items()[0].prompt.count("Question: ") == 4
    assert found.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("how", ["silence", "refusal"])
def test_without_a_network_it_takes_a_few_seconds_to_say_so(monkeypatch, tmp_path, how):
    forever = threading.Event()

    def info(repository, timeout):
        if how == "refusal":
            raise OSError("Name or service not known")
        forever.wait(60)

    assert hub_lib.HUB_SECONDS < 3  # the rest of 5 s is for starting Python and JAX
    monkeypatch.setattr(hub_lib, "HUB_SECONDS", 0.5)
    found = hub(monkeypatch, info)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"openai/gsm8k .* the hub does not answer, .*test.jsonl.*\.parquet") as caught:
        GSM8K()
    assert time.monotonic() - start < (2 if how == "silence" else 0.4) and "\n" not in str(caught.value)
    assert not found.asked
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "openai___gsm8k").mkdir()
    with pytest.raises(UserError, match="openai/gsm8k cannot be loaded: offline"):
        GSM8K()
    found.cached = True
    assert len(GSM8K(shots=0).items()) == 2
    assert found.asked == 2 * [("openai/gsm8k", "main", None, "test", True)]  # it was not let try for minutes
    assert not found.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE
    forever.set()


def test_what_the_hub_says_is_passed_on(monkeypatch):
    class Refused(Exception):
        response = object()

    def info(repository, timeout):
        raise Refused

    found = hub(monkeypatch, info)
    found.load_dataset = lambda *_, **__: (_ for _ in ()).throw(ValueError("is gated.\nGo there."))
    with pytest.raises(UserError, match=r"and openai/gsm8k cannot be loaded: is gated\. Instead, give --data"):
        GSM8K()


def test_without_the_package_it_says_what_else_to_give(monkeypatch):
    hub(monkeypatch, lambda repository, timeout: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs .* datasets: pip install 'foundry-jax\[data\]'\. Instead, give --data="
    ):
        MMLU()


# ------------------------------------------------------------------------------------------------ gsm8k


def test_gsm8k_prompts_are_examples_and_a_question(gsm8k):
    items = GSM8K(gsm8k, shots=2).items()
    *examples, last = items[3].prompt.split("\n\n")
    assert last == "Question: What is 3 + 3?\nAnswer:"
    assert len(examples) == 2 and len({item.prompt.partition("\n\n")[0] for item in items}) > 9
    number = int(examples[0].split()[3])
    shown = problem(number)
    assert examples[0] == f"Question: {shown['question']}\nAnswer: {shown['answer']}" and number >= 100
    assert GSM8K(gsm8k, shots=0).items()[3].prompt == last
    generation, gold = GSM8K(gsm8k, shots=2).requests(items[3])
    assert generation == Generation(items[3].prompt, ("Question:", "</s>", "<|im_end|>"), 256)
    assert gold == Continuation(items[3].prompt, f" {problem(3)['answer']}")


def test_gsm8k_examples_are_those_that_lm_eval_draws(shared_data):
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()]
    items = GSM8K(shared_data).items()
    drawn = [rows[i] for i in (6374, 3610, 957, 61, 742)]
    examples = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in drawn)
    assert items[0].prompt.startswith(f"{examples}Question: Janet") and len(items) == 900


@pytest.mark.parametrize(
    ("text", "strictly", "flexibly"),
    [
        ("so\n#### 72", "72", "72"),
        ("#### 1,234\n#### 5", "1,234", "5"),
        ("#### -3.", "-3.", "-3."),
        ("#### $70,000", "[invalid]", "$70,000"),
        ("####72", "[invalid]", "72"),
        ("it costs $7.50.", "[invalid]", "$7.50."),
        ("7", "[invalid]", "7"),
        ("it is -7", "[invalid]", "-7"),
        ("three", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
        ("12 apples and 5 pears...", "[invalid]", "..."),
    ],
)
def test_gsm8k_finds_numbers(text, strictly, flexibly):
    assert (strict(text), flexible(text)) == (strictly, flexibly)


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [("3.", "x #### 3", 1), ("$70,000", "#### 70000", 1), ("70000", "y\n#### 70,000", 1), ("3.0", "#### 3", 0),
     ("[invalid]", "#### 3", 0), ("-3", "#### 3", 0), ("3", "a #### 4\n#### 3", 1), ("3.,", "#### 3", 1),
     ("[invalid]", "#### [INVALID]", 1)],
)  # fmt: skip
def test_gsm8k_compares_numbers(prediction, gold, same):
    assert matches(prediction, gold) == same


def test_gsm8k_scores_both_and_the_cost_of_the_answer(gsm8k):
    task = GSM8K(gsm8k, shots=0)
    item = task.items()[3]  # gold: 6
    outcome = scored(task, item, "3 + 3 = 6\n#### 5", -math.log(2) * 100)
    assert outcome.metrics["strict_match"] == 0.0 == outcome.metrics["flexible_match"]
    assert outcome.metrics["bits_per_byte"] == pytest.approx(100 / len(f" {item.gold}"))
    outcome = scored(task, item, "#### 6\nthat is 7", -1.0)
    assert (outcome.metrics["strict_match"], outcome.metrics["flexible_match"]) == (1.0, 0.0)
    assert outcome.prediction == {"strict": "6", "flexible": "7"} and outcome.notes["text"].endswith("7")


def test_gsm8k_needs_as_many_examples_as_it_shows(gsm8k):
    with pytest.raises(UserError, match="shots=21, but there are 20 examples"):
        GSM8K(gsm8k, shots=21)
    (gsm8k / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(UserError, match="shots=5, but there are 0 examples .* put a train file beside"):
        GSM8K(gsm8k)
    assert len(GSM8K(gsm8k, shots=0).items()) == 90


# ------------------------------------------------------------------------------------------------ mmlu


def test_mmlu_prompts_are_a_heading_examples_and_a_question(tmp_path):
    rows = [question("high_school_us_history", 5), question("anatomy", 0)]
    write_lines(tmp_path / "test.jsonl", rows)
    dev = [question("anatomy", 7), *(question("high_school_us_history", i) for i in (9, 8))]
    write_lines(tmp_path / "dev.jsonl", dev)
    items = MMLU(tmp_path, shots=1).items()
    assert items[0].prompt == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "Which of 9?\nA. high_school_us_history 9 w\nB. high_school_us_history 9 x\nC. high_school_us_history 9 y\n"
        "D. high_school_us_history 9 z\nAnswer: B\n\n"
        "Which of 5?\nA. high_school_us_history 5 w\nB. high_school_us_history 5 x\nC. high_school_us_history 5 y\n"
        "D. high_school_us_history 5 z\nAnswer:"
    )
    task = MMLU(tmp_path, shots=1)
    assert task.requests(items[0]) == [Continuation(items[0].prompt, f" {letter}") for letter in "ABCD"]
    assert [item.id for item in items] == ["high_school_us_history/0", "anatomy/0"]


def test_mmlu_has_57_subjects_in_4_categories(shared_data):
    assert len(CATEGORY) == 57 and {len(names.split()) for names in CATEGORIES.values()} == {19, 13, 12}
    task = MMLU(shared_data)
    subjects = collections.Counter(item.group for item in task.items())
    assert len(task.items()) == 3610 and set(subjects) <= set(CATEGORY) and set(subjects.values()) == {95}
    assert task.dataset == "MMLU-Redux, 38 of 57 subjects"  # as the file has them


def test_mmlu_takes_the_likeliest_letter_and_the_first_of_equals(mmlu):
    task = MMLU(mmlu)
    item = task.items()[2]
    assert item.gold == "C"
    outcome = scored(task, item, -3.0, -2.0, -1.0, -9.0)
    assert outcome.prediction == "C" and outcome.log_probs == {"A": -3.0, "B": -2.0, "C": -1.0, "D": -9.0}
    assert outcome.metrics == {
        "accuracy": 1.0,
        "gold_probability": pytest.approx(math.exp(-1)),
        "gold_share": pytest.approx(math.exp(-1) / sum(map(math.exp, (-3, -2, -1, -9)))),
        "bits_per_byte": pytest.approx(1 / math.log(2) / 2),
    }
    assert scored(task, item, -1.0, -2.0, -1.0, -9.0).metrics["accuracy"] == 0.0
    assert scored(task, item, -5000.0, -4000.0, -3000.0, -2000.0).metrics["gold_share"] == 0.0


def test_mmlu_subjects_take_turns_under_a_limit(mmlu):
    task = MMLU(mmlu)
    expected = {1: [1], 4: [1, 1, 1, 1], 6: [2, 2, 1, 1], 9: [3, 2, 3, 1], 12: [5, 2, 4, 1], 99: list(SIZES)}
    for limit, sizes in expected.items():
        chosen = {item.id for item in task.ranked()[:limit]}
        found = [item for item in task.items() if item.id in chosen]
        assert list(collections.Counter(item.group for item in found).values()) == sizes
    assert [item.group for item in task.items()] == [s for s, n in zip(SUBJECTS, SIZES, strict=True) for _ in range(n)]


def test_mmlu_reports_all_categories_and_subjects(mmlu):
    task = MMLU(mmlu)
    right = {"anatomy": [1, 0, 1, 1, 0, 0], "philosophy": [1, 1], "virology": [0, 1, 0, 0], "sociology": [1]}
    rows = []
    for item in task.items():
        gold = LETTERS.index(item.gold)
        best = gold if right[item.group][int(item.id[-1])] else (gold + 1) % 4
        rows.append(Row.of(item, scored(task, item, *[-1.0 if i == best else -2.0 for i in range(4)])))
    found = {metric.name: metric for metric in task.summarise(rows)}
    groups = [[float(x) for x in values] for values in right.values()]
    assert found["accuracy"] == pooled("accuracy", groups) and found["accuracy"].value == pytest.approx(7 / 13)
    assert found["accuracy/stem"] == mean("accuracy/stem", groups[0])
    assert found["accuracy/humanities"].value == 1.0 and found["accuracy/social_sciences"].n == 1
    assert found["accuracy/stem/anatomy"].value == 0.5 and found["accuracy/other/virology"].n == 4
    assert "accuracy/ok" not in found and found["gold_share"].n == 13
    by_category = [found[f"accuracy/{name}"] for name in CATEGORIES]
    assert sum(metric.value * metric.n for metric in by_category) == pytest.approx(7)


def test_mmlu_needs_examples_of_every_subject(mmlu):
    with pytest.raises(UserError, match="shots=6, but anatomy has 5 examples .* put a dev file beside .* set shots=5"):
        MMLU(mmlu, shots=6)
    (mmlu / "mmlu" / "dev.jsonl").unlink()
    with pytest.raises(UserError, match="shots=5, but anatomy has 0 examples"):
        MMLU(mmlu)


def test_mmlu_answers_may_be_letters_and_subjects_may_have_spaces(tmp_path):
    rows = [question("high school physics", 0, answer="D"), question("World_Religions", 1, answer=2)]
    items = MMLU(write_lines(tmp_path / "x.jsonl", rows), shots=0).items()
    assert [(item.group, item.gold) for item in items] == [("high_school_physics", "D"), ("world_religions", "C")]


def test_reannotated_questions_are_called_so_and_the_good_ones_counted_apart(tmp_path):
    kinds = ["OK", "ok", "bad_question_clarity", "Ok", "Bad Question Clarity"]
    rows = [question("anatomy", i, error_type=kind) for i, kind in enumerate(kinds)]
    task = MMLU(write_lines(tmp_path / "a" / "test.jsonl", rows), shots=0)
    assert task.dataset == "MMLU-Redux, 1 of 57 subjects"
    rows = [Row.of(item, scored(task, item, -1.0, -2.0, -3.0, -4.0)) for item in task.items()]
    found = {metric.name: metric for metric in task.summarise(rows)}
    assert (found["accuracy/ok"].n, found["accuracy/ok"].value) == (3, pytest.approx(1 / 3))
    assert found["accuracy"].value == pytest.approx(2 / 5)
    plain = [question("anatomy", i) for i in range(3)]
    assert MMLU(write_lines(tmp_path / "b" / "test.jsonl", plain), shots=0).dataset.startswith(
        "3 questions of MMLU, 1 of"
    )
    assert MMLU(write_lines(tmp_path / "mmlu-redux" / "test.jsonl", plain), shots=0).dataset.startswith("MMLU-Redux")
    all_subjects = [question(subject, 0) for subject in CATEGORY]
    assert MMLU(write_lines(tmp_path / "mmlu_redux" / "x.jsonl", all_subjects), shots=0).dataset == "MMLU-Redux"
    (tmp_path / "README.md").write_text("| mmlu/test.jsonl | MMLU-Redux |\n")
    assert MMLU(write_lines(tmp_path / "b" / "test.jsonl", plain), shots=0).dataset.startswith("MMLU-Redux")


def test_mmlu_reads_the_original_archive(tmp_path):
    rows = {split: [question(subject, i) for subject in SUBJECTS[:2] for i in range(count)] for split, count in
            (("test", 3), ("dev", 5))}  # fmt: skip
    for split, questions in rows.items():
        write_lines(tmp_path / "same" / f"{split}.jsonl", questions)
        (tmp_path / "archive" / split).mkdir(parents=True)
        for subject in SUBJECTS[:2]:
            with open(tmp_path / "archive" / split / f"{subject}_{split}.csv", "w", newline="") as file:
                cells = (
                    [q["question"], *q["choices"], LETTERS[q["answer"]]] for q in questions if q["subject"] == subject
                )
                csv.writer(file).writerows(cells)
    archive = MMLU(tmp_path / "archive")
    assert archive.items() == MMLU(tmp_path / "same").items() and len(archive.items()) == 6
    (tmp_path / "archive" / "test" / "anatomy_test.csv").write_text('q,a,b,c,d,A\nq,"a\nb",c,d,B\n')
    with pytest.raises(UserError, match=r"anatomy_test.csv, line 3, has 5 cells instead of 6"):
        MMLU(tmp_path / "archive")


# ------------------------------------------------------------------------------------------------ humaneval


def test_humaneval_runs_nothing_unless_it_is_allowed(humaneval):
    with pytest.raises(UserError, match="runs programs that a model wrote.* add --allow-code-execution"):
        HumanEval(humaneval)


@pytest.mark.parametrize(("n", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 4), (6, 6)])
def test_pass_at_k_is_the_chance_of_a_subset_with_one_that_passes(n, passed):
    results = [True] * passed + [False] * (n - passed)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(results, k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pass_at": (1, 10)}, "pass@10 needs at least 10 samples of each problem, but samples=1: k must be 1 to 1"),
        ({"pass_at": (0,)}, "pass@0 needs"),
        ({"pass_at": ()}, "pass_at is empty"),
        ({"samples": 0}, "samples=0 must be 1 or more"),
        ({"samples": 3, "temperature": 0.0}, "samples=3 at temperature 0 would all be the same"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number"),
    ],
)
def test_humaneval_refuses_options_that_do_not_fit(humaneval, options, message):
    with pytest.raises(UserError, match=message):
        HumanEval(humaneval, allow_code_execution=True, **options)


def test_humaneval_asks_for_the_solution_and_for_samples(humaneval):
    task = HumanEval(humaneval, allow_code_execution=True)
    item = task.items()[2]
    gold, drawn = task.requests(item)
    assert gold == Continuation(function(2)["prompt"], function(2)["canonical_solution"])
    assert drawn == Generation(function(2)["prompt"], ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024)
    assert drawn.sampling.temperature == 0 and task.metrics == ("pass@1", "bits_per_byte")
    many = HumanEval(humaneval, allow_code_execution=True, samples=3, pass_at=(2, 1), seed=5)
    _, *drawn = many.requests(item)
    assert {(x.sampling.temperature, x.sampling.top_p) for x in drawn} == {(0.2, 0.95)}
    other = HumanEval(humaneval, allow_code_execution=True, samples=3, seed=6)
    seeds = [x.sampling.seed for task in (many, other) for item in task.items() for x in task.requests(item)[1:]]
    assert len(set(seeds)) == 2 * 3 * 4
    assert many.requests(item) == HumanEval(humaneval, allow_code_execution=True, samples=3, seed=5).requests(item)


def test_humaneval_counts_what_passes(monkeypatch, humaneval):
    ran = []

    def judge(programs, *, timeout):
        ran.extend(programs)
        return [sandbox.Verdict("right" in program.completion, "no") for program in programs]

    monkeypatch.setattr(sandbox, "run_all", judge)
    task = HumanEval(humaneval, allow_code_execution=True, samples=3, pass_at=(1, 2, 3))
    gold = Score(-10 * math.log(2), False, 3)
    outcomes = task.score_all(task.items()[:2], [[gold, "right", "wrong", "right"], [gold, "a", "b", "c"]])
    assert [program.completion for program in ran] == ["right", "wrong", "right", "a", "b", "c"]
    assert ran[3] == sandbox.Program(function(1)["prompt"], "a", function(1)["test"], "add1")
    assert [outcomes[0].metrics[f"pass@{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 3, 1, 1])
    assert [outcomes[1].metrics[f"pass@{k}"] for k in (1, 2, 3)] == [0, 0, 0]
    # The newline that ends the prompt is scored with the solution.
    assert outcomes[0].metrics["bits_per_byte"] == pytest.approx(10 / (1 + len(function(0)["canonical_solution"])))
    assert outcomes[0].notes["verdicts"][1] == {"passed": False, "reason": "no"}


def test_humaneval_completions_are_run_in_the_sandbox(humaneval):
    try:
        sandbox.require()
    except UserError as error:
        pytest.skip(str(error))
    task = HumanEval(humaneval, allow_code_execution=True)
    gold = Score(-1.0, False, 1)
    wrong = "    return x - 1\n"
    answers = [[gold, item.gold if i % 2 else wrong] for i, item in enumerate(task.items())]
    outcomes = task.score_all(task.items(), answers)
    assert [outcome.metrics["pass@1"] for outcome in outcomes] == [0, 1, 0, 1]
    assert outcomes[0].notes["verdicts"][0] == {"passed": False, "reason": "AssertionError"}


def test_humaneval_refuses_a_problem_twice(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [function(1), function(2), function(1)])
    with pytest.raises(UserError, match="line 3, has the task_id 'HumanEval/1' again, after .*x.jsonl, line 1"):
        HumanEval(path, allow_code_execution=True)


# ------------------------------------------------------------------------------------------------ constitution


def test_constitution_scores_both_answers_to_one_prompt(tmp_path):
    rows = [{"prompt": "Hi:", "chosen": " ab", "rejected": " abcdefgh"}, {"prompt": "", "chosen": "x", "rejected": "x"}]
    task = Constitution(write_lines(tmp_path / "mine.jsonl", rows))
    first, second = task.items()
    assert task.requests(first) == [Continuation("Hi:", " ab"), Continuation("Hi:", " abcdefgh")]
    outcome = scored(task, first, -6.0, -9.0)
    assert outcome.metrics == {
        "accuracy": 1.0,
        "accuracy_per_byte": 0.0,
        "margin": 3.0,
        "bits_per_byte": pytest.approx(6 / math.log(2) / 3),
    }
    assert outcome.prediction == "chosen" and outcome.log_probs == {"chosen": -6.0, "rejected": -9.0}
    tie = scored(task, second, -6.0, -6.0)
    assert (tie.metrics["accuracy"], tie.metrics["accuracy_per_byte"], tie.prediction) == (0.5, 0.5, "tie")
    assert scored(task, first, -9.0, -6.0).prediction == "rejected"
    assert [first_is_higher(*x) for x in ((1, 0), (0, 0), (0, 1))] == [1.0, 0.5, 0.0]


def test_constitution_reads_any_file_or_a_folder_of_them(tmp_path, pairs):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    write_lines(tmp_path / "preferences" / "b.jsonl", rows)
    write_lines(tmp_path / "preferences" / "a.jsonl", rows * 2)
    task = Constitution(tmp_path)
    assert [item.id for item in task.items()] == ["a/0", "a/1", "b/0"] and task.dataset == "a, b"
    rows = [Row.of(item, scored(task, item, -1.0, -2.0 + i)) for i, item in enumerate(task.items())]
    found = {metric.name: metric.value for metric in task.summarise(rows)}
    assert (found["accuracy"], found["accuracy/a"], found["accuracy/b"]) == (0.5, 0.75, 0.0)
    assert len(Constitution(pairs).items()) == 40
    with pytest.raises(UserError, match=r"constitution has no data at .*: give a file \(.jsonl"):
        (tmp_path / "none").mkdir()
        Constitution(tmp_path / "none")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "line 1, has an empty text 'chosen', of which there is"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "line 1, has no text 'prompt'"),
        ({"prompt": "p", "rejected": "r"}, "line 1, has no text 'chosen'; a record is {\"prompt\""),
        ({"chosen": "a", "rejected": "b"}, "line 1, is, like all others, no pair of dialogues that begin alike"),
    ],
)
def test_constitution_refuses_a_malformed_pair(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        Constitution(write_lines(tmp_path / "x.jsonl", [row]))


def test_dialogues_are_parted_after_the_last_turn_they_share(tmp_path, caplog):
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"
    short = "\n\nHuman: a\n\nAssistant:"
    rows = [
        {"chosen": f"{start} A.", "rejected": f"{start} Because."},
        {"chosen": f"{short} x\n\nHuman: b{TURN} c", "rejected": f"{short} y\n\nAssistant:"},
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b\n\nAssistant:"},
        {"chosen": start, "rejected": f"{start} x"},
    ]
    with caplog.at_level(logging.WARNING):
        items = Constitution(write_lines(tmp_path / "x.jsonl", rows)).items()
    assert [(item.prompt, item.fields["chosen"], item.fields["rejected"]) for item in items] == [
        (start, " A.", " Because."),
        (short, f" x\n\nHuman: b{TURN} c", " y\n\nAssistant:"),
    ]
    assert "2 of 4 pairs are left out" in caplog.text


def test_real_dialogues_are_parted_as_the_file_of_pairs_has_them(tmp_path, shared_data):
    source = shared_data / "preferences" / "harmless.jsonl"
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    parted = Constitution(write_lines(tmp_path / "harmless.jsonl", whole)).items()
    assert parted == Constitution(source).items() and len(parted) == len(rows) == 1200


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(running, "FIRST_CHUNK", 4)
    monkeypatch.setattr(running, "CHUNK_SECONDS", 0.0)  # one item at a time from then on


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_a_result_says_what_each_item_came_to(tmp_path, mmlu):
    seen = []
    result = run(MMLU(mmlu), FakeScorer(), tmp_path / "out", model={"weights": "w"}, facts={"here": 1},
                 progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen[0] == (0, 52) and seen[-1] == (52, 52) and len(seen) > 5
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["task"] == "mmlu" and saved["n"] == 13 and saved["here"] == 1 and saved["truncated"] == 0
    assert saved["settings"] == {"task": "mmlu", "weights": "w"} | MMLU(mmlu).settings
    first = result.metrics[0]
    assert saved["metrics"]["accuracy"] == {"value": first.value, "stderr": first.stderr, "n": 13}
    assert saved["metrics"]["accuracy/social_sciences/sociology"]["stderr"] is None
    rows = {row["id"]: row for row in lines(tmp_path / "out")}
    item = MMLU(mmlu).items()[7]
    row = rows[item.id]
    log_probs = {letter: -30 * _fraction(f"{item.prompt} {letter}") for letter in LETTERS}
    assert row["log_probs"] == log_probs and row["prediction"] == max(log_probs, key=log_probs.get)
    assert row["gold"] == item.gold and row["metrics"]["accuracy"] == float(row["prediction"] == item.gold)
    assert row["prompt_sha256"] == hashlib.sha256(item.prompt.encode()).hexdigest()
    assert sum(row["metrics"]["accuracy"] for row in rows.values()) / 13 == pytest.approx(first.value)


def test_a_run_that_was_stopped_goes_on_and_comes_to_the_same(tmp_path, gsm8k):
    whole = run(GSM8K(gsm8k), FakeScorer(), tmp_path / "whole", limit=20)
    stopped = FakeScorer(fail_after=19)
    with pytest.raises(KeyboardInterrupt):
        run(GSM8K(gsm8k), stopped, tmp_path / "out", limit=20)
    assert not (tmp_path / "out" / "result.json").exists()
    done = {row["id"] for row in lines(tmp_path / "out")}
    assert 4 < len(done) < 20
    rest, seen = FakeScorer(), []
    result = run(GSM8K(gsm8k), rest, tmp_path / "out", limit=20, progress=lambda *x: seen.append(x))
    assert seen[0] == (2 * len(done), 40)
    asked = {request.context for request in rest.asked}
    assert asked == {item.prompt for item in GSM8K(gsm8k).items()[:20] if item.id not in done}
    assert result == whole
    unchanged = FakeScorer()
    assert run(GSM8K(gsm8k), unchanged, tmp_path / "out", limit=20) == whole and not unchanged.asked
    assert run(GSM8K(gsm8k), FakeScorer(), limit=20) == whole  # kept nowhere


def test_a_limit_can_be_raised_and_lowered(tmp_path, mmlu):
    few = run(MMLU(mmlu), FakeScorer(), tmp_path / "out", limit=4)
    assert few.n == 4 and {row.group for row in few.rows} == set(SUBJECTS)
    more = FakeScorer()
    assert run(MMLU(mmlu), more, tmp_path / "out") == run(MMLU(mmlu), FakeScorer()) and len(more.asked) == 4 * 9
    assert run(MMLU(mmlu), FakeScorer(), tmp_path / "out", limit=4) == few
    assert results.read(tmp_path / "out") == dataclasses.replace(few, rows=results.read(tmp_path / "out").rows)
    assert {row.id for row in results.read(tmp_path / "out").rows} == {row.id for row in few.rows}
    with pytest.raises(UserError, match="limit=0 must be 1 or more"):
        run(MMLU(mmlu), FakeScorer(), limit=0)


def test_half_a_line_is_as_if_it_had_not_been_written(tmp_path, mmlu):
    whole = run(MMLU(mmlu), FakeScorer(), tmp_path / "out")
    path = tmp_path / "out" / "items.jsonl"
    full = path.read_bytes()
    for kept in (full[:-1], full[:-30], full[: full.rindex(b"\n", 0, -1) + 2], full + b"\0" * 50):
        path.write_bytes(kept)
        again = FakeScorer()
        assert run(MMLU(mmlu), again, tmp_path / "out") == whole
        assert len(again.asked) == (0 if kept.startswith(full) else 4)
        assert path.read_bytes() == full
    damaged = full.splitlines(keepends=True)
    damaged[3] = b"{}\n"
    path.write_bytes(b"".join(damaged))
    with pytest.raises(UserError, match=r"items.jsonl, line 4, is damaged: delete that line"):
        run(MMLU(mmlu), FakeScorer(), tmp_path / "out")


def test_a_folder_of_another_evaluation_is_refused(tmp_path, gsm8k, mmlu):
    run(GSM8K(gsm8k, shots=2), FakeScorer(), tmp_path / "out", limit=3, model={"weights": "w", "model": "a"})
    for task, model, message in [
        (GSM8K(gsm8k, shots=1), {"weights": "w"}, "another config: .*shots: was 2, now 1. Use another --workdir"),
        (GSM8K(gsm8k, shots=2), {"weights": "v"}, 'weights: was "w", now "v"'),
        (MMLU(mmlu), {"weights": "w"}, 'task: was "gsm8k", now "mmlu"'),
    ]:
        with pytest.raises(UserError, match=message):
            run(task, FakeScorer(), tmp_path / "out", model=model | {"model": "a"})
    same = FakeScorer()
    run(GSM8K(gsm8k, shots=2), same, tmp_path / "out", limit=3, model={"weights": "w", "model": "b"})
    assert not same.asked
    write_lines(gsm8k / "gsm8k" / "test.jsonl", [problem(i) for i in range(1, 90)])
    with pytest.raises(UserError, match="data: was"):
        run(GSM8K(gsm8k, shots=2), FakeScorer(), tmp_path / "out", model={"weights": "w", "model": "b"})
    with results.Journal(tmp_path / "busy", {}), pytest.raises(UserError, match="is in use by process"):
        run(MMLU(mmlu), FakeScorer(), tmp_path / "busy")


def test_a_changed_prompt_is_noticed_even_if_the_settings_are_not(tmp_path, pairs):
    run(Constitution(pairs), FakeScorer(), tmp_path / "out", limit=3)
    task = Constitution(pairs)
    task.__dict__["_items"] = [dataclasses.replace(item, prompt="other") for item in task.items()]
    with pytest.raises(UserError, match="has item pairs/0 with another prompt"):
        run(task, FakeScorer(), tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_is_no_score(tmp_path, mmlu, value):
    scorer = FakeScorer()
    scorer.loglikelihood = lambda requests, progress: [Score(value, False, 1) for _ in requests]
    with pytest.raises(UserError, match="The model gives ' A' the log-probability .*: its weights or its dtype"):
        run(MMLU(mmlu), scorer, tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()


def test_items_that_lost_their_beginning_are_counted_once(tmp_path, gsm8k):
    items = GSM8K(gsm8k).items()[:20]
    middle = sorted(len(item.prompt) for item in items)[9]  # those of two digits are longer
    longer = {item.id for item in items if len(item.prompt) > middle}
    for scorer in (FakeScorer(fail_after=19), FakeScorer()):
        scorer.longest = middle
        with contextlib.suppress(KeyboardInterrupt):
            result = run(GSM8K(gsm8k), scorer, tmp_path / "out", limit=20)
    assert {row.id: row.truncated for row in result.rows} == {i.id: 2 * (i.id in longer) for i in items}
    assert (
        0
        < result.truncated
        == 2 * len(longer)
        == json.loads((tmp_path / "out" / "result.json").read_text())["truncated"]
    )


def test_what_a_task_lacks_is_noticed_before_anything_is_asked(monkeypatch, tmp_path, humaneval):
    def refuse():
        raise UserError("There is no sandbox.")

    monkeypatch.setattr(sandbox, "require", refuse)
    scorer = FakeScorer()
    with pytest.raises(UserError, match="There is no sandbox"):
        run(HumanEval(humaneval, allow_code_execution=True), scorer, tmp_path / "out")
    assert not scorer.asked and not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_no_older_result(tmp_path, mmlu):
    run(MMLU(mmlu), FakeScorer(), tmp_path / "out", limit=2)
    with pytest.raises(KeyboardInterrupt):
        run(MMLU(mmlu), FakeScorer(fail_after=3), tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()


def test_chunks_grow_to_take_their_time(monkeypatch):
    clock = itertools.chain([0.0, 10.0, 10.0, 70.0, 70.0, 100.0, 100.0, 130.0, 130.0, 130.1], itertools.repeat(130.1))
    monkeypatch.setattr(running, "CHUNK_SECONDS", 30.0)
    monkeypatch.setattr(running.time, "perf_counter", lambda: next(clock))
    assert [len(chunk) for chunk in running._chunks(range(100))] == [4, 12, 6, 6, 6, 24, 42]


# ------------------------------------------------------------------------------------------------ comparing


@pytest.fixture
def two(tmp_path, pairs):
    a = run(Constitution(pairs), FakeScorer(), tmp_path / "a")
    other = FakeScorer()
    other.loglikelihood = lambda asked, progress: [Score(-30 * _fraction(r.continuation), False, 1) for r in asked]
    return a, run(Constitution(pairs), other, tmp_path / "b")


def test_the_difference_of_two_models_is_that_of_a_paired_t_test(tmp_path, two):
    for metric in ("accuracy", "margin"):
        x, y = ([row.metrics[metric] for row in result.rows] for result in two)
        found = results.paired_difference(tmp_path / "a", tmp_path / "b", metric)
        interval = stats.ttest_rel(x, y).confidence_interval(0.95)
        assert found.difference == pytest.approx(np.mean(x) - np.mean(y), abs=1e-12) and found.n == 40
        assert found.interval == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert found == results.paired_difference(*two, metric)
    assert results.paired_difference(*two) == results.paired_difference(*two, "accuracy")
    wide, narrow = (results.paired_difference(*two, confidence=c).interval for c in (0.99, 0.9))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    same = results.paired_difference(tmp_path / "a", tmp_path / "a")
    assert same == (0.0, (0.0, 0.0), 40)


def test_results_of_different_items_are_not_compared(tmp_path, two, pairs, mmlu):
    few = run(Constitution(pairs), FakeScorer(), limit=30)
    with pytest.raises(UserError, match=r"different items \(10 only in the first, 0 only in the second, 30 in both\)"):
        results.paired_difference(two[0], few)
    with pytest.raises(UserError, match="One result is of constitution, the other of mmlu"):
        results.paired_difference(two[0], run(MMLU(mmlu), FakeScorer()))
    five, none = (run(MMLU(mmlu, shots=shots), FakeScorer()) for shots in (5, 0))
    with pytest.raises(UserError, match="Item anatomy/0 of mmlu had different prompts: evaluate both with the same"):
        results.paired_difference(five, none)
    with pytest.raises(UserError, match="Unknown metric of items 'acuracy'. Did you mean 'accuracy'"):
        results.paired_difference(*two, "acuracy")
    with pytest.raises(UserError, match="1 items in common"):
        one = run(Constitution(pairs), FakeScorer(), limit=1)
        results.paired_difference(one, one)
    with pytest.raises(UserError, match="confidence=95 must be between 0 and 1"):
        results.paired_difference(*two, confidence=95)
    with pytest.raises(UserError, match="has no finished result"):
        results.paired_difference(two[0], tmp_path)


# ------------------------------------------------------------------------------------------------ all tasks


@pytest.mark.parametrize("name", TASKS)
def test_every_task_tells_what_it_measures(name, monkeypatch, gsm8k, mmlu, humaneval, pairs):
    monkeypatch.setattr(sandbox, "require", lambda: None)
    monkeypatch.setattr(sandbox, "run_all", lambda programs, **_: [sandbox.Verdict(True, "") for _ in programs])
    options = {"allow_code_execution": True} if name == "humaneval" else {}
    task = TASKS[name](pairs if name == "constitution" else gsm8k, **options)
    items = task.items()
    assert task.items() == items and len({item.id for item in items}) == len(items)
    assert sorted(item.id for item in task.ranked()) == sorted(item.id for item in items)
    scorer = FakeScorer()
    result = run(task, scorer)
    assert [metric.name for metric in result.metrics][: len(task.metrics)] == list(task.metrics)
    assert all(math.isfinite(metric.value) for metric in result.metrics)
    assert all(metric.stderr >= 0 for metric in result.metrics if metric.n > 1)
    assert all(result.rows[0].metrics.keys() == row.metrics.keys() for row in result.rows)
    assert "bits_per_byte" in task.metrics and name == task.name
    json.dumps([task.settings, result.to_json()], allow_nan=False)
