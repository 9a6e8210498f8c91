"""Tasks against lm-eval's own: request strings, extraction, metrics and standard errors, on the same local data."""

import itertools
import json
import math
import pathlib
import random

import numpy as np
import pytest

from foundry_jax.tasks.base import Row, mean
from foundry_jax.tasks.gsm8k import GSM8K
from foundry_jax.tasks.humaneval import HumanEval, program
from foundry_jax.tasks.mmlu import CATEGORY, MMLU
from foundry_jax.tasks.requests import Score

pytestmark = pytest.mark.oracle
lm_eval = pytest.importorskip("lm_eval", reason="needs the oracle extra: make oracle")
datasets = pytest.importorskip("datasets", reason="needs the oracle extra: make oracle")
evaluate = pytest.importorskip("evaluate", reason="needs the oracle extra: make oracle")
from lm_eval.api import metrics as theirs  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.defaults import DEFAULT_OTHER_SEED  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

YAMLS = pathlib.Path(lm_eval.__file__).parent / "tasks"
CHECKED = 200  # items of GSM8K and MMLU
OUTPUTS = 500


def task_of(yaml: str, shots: int, **splits) -> ConfigurableTask:
    """Returns one of lm-eval's tasks with records of ours as its data."""
    config = load_yaml(YAMLS / yaml)
    for name in ("tag", "group"):
        config.pop(name, None)
    tables = {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
    config |= {"custom_dataset": lambda **_: datasets.DatasetDict(tables), "metadata": {}}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.set_config("num_fewshot", shots)
    return task


def asked(task: ConfigurableTask, limit: int | None = None) -> list:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def records(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ gsm8k


@pytest.fixture(scope="module")
def gsm8k(shared_data):
    return {split: records(shared_data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}


@pytest.mark.parametrize("shots", [5, 0])
def test_gsm8k_requests_are_the_same(shared_data, gsm8k, shots):
    ours, instances = GSM8K(shared_data, shots=shots), asked(task_of("gsm8k/gsm8k.yaml", shots, **gsm8k), CHECKED)
    assert len(instances) == CHECKED
    for item, instance in zip(ours.items(), instances, strict=False):
        generation, _ = ours.requests(item)
        assert (generation.context, list(generation.until)) == (instance.args[0], instance.args[1]["until"])
        assert instance.args[1]["temperature"] == 0.0 == generation.sampling.temperature
        assert instance.doc["answer"] == item.gold


NUMBERS = (
    "{g}", "-{g}", "{g}.", "{g}.0", "{g}.00", "${g}", "${g}.", "$ {g}", "{c}", "${c}", "{c}.", "{g}%", "{g}.,", "+{g}",
    "--{g}", "0{g}", "{g}e3", "{g},", ".{g}", "{g}.5", "-${g}", "${g}.50", "{g}/2", "{g}\u00a0", "\uff13{g}", "\u0663",
    "\u00bd", "{g}{g}{g}{g}{g}{g}", "-", ".", ",", "$", "...", "$,.", "", "none", "\x00{g}", "{g}\x00", "{G}",
    "\ufffd{g}",
)  # fmt: skip
TEXTS = (
    "{x}", " {x}", "The answer is {x}", "The answer is {x}.", "so it is {y}.\n#### {x}", "#### {x}\n\nQuestion: {y}?",
    "#### {x} apples", "#### {x}\n#### {y}", "{y} + {y} = {x}", "####{x}", "#### \n{x}", "####  {x}", "\n\n#### {x}\n",
    "{x}...", "{x}, {y}", "{x} and {y}", "<<{y}*2={x}>>{x}\n#### {x}", "### {x}", "##### {x}", "#### {y} #### {x}",
    "\u00e9\u4e2d {x} \U0001f600", "{x}\r\n", "#### {x}\u2028{y}", "answer: **{x}**", "\\boxed{{{x}}}",
    "{y}\n{y}\n{y}\n{x}",
)  # fmt: skip


def outputs(answers: list[str], count: int) -> list[tuple[str, str]]:
    """Returns (gold answer, what a model might write): right, wrong, negative, with commas, decimals, or no number."""
    draw, found = random.Random(0), []
    odd = [f"x\n#### {n}" for n in ("70,000", "-5", "3.5", "$12", "8.", "0", "1,234,567.", "ABC", "\u00bd")]
    odd += ["no number", "#### 3\n#### 4", "#### 5 \n", "", "A\n#### Yes"]
    for text, number in itertools.islice(itertools.cycle(itertools.product(TEXTS, NUMBERS)), 7, None, 3):
        gold = draw.choice(odd) if draw.random() < 0.1 else draw.choice(answers)
        g = gold.rpartition(" ")[2].replace(",", "") or "1"
        other = str(draw.randrange(10 ** draw.randrange(1, 7)))
        shown = number.format(g=g, c=f"{int(g):,}" if g.isascii() and g.isdecimal() else g, G=other)
        found.append((gold, text.format(x=shown, y=other)))
        if len(found) == count - 20:
            break
    return found + [(answer, answer) for answer in answers[: count - len(found)]]


def test_gsm8k_extraction_and_metrics_are_the_same_on_odd_outputs(tmp_path, gsm8k):
    written = outputs([row["answer"] for row in gsm8k["test"]], OUTPUTS)
    rows = [{"question": f"{i}?", "answer": gold} for i, (gold, _) in enumerate(written)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    ours, task = GSM8K(path, shots=0), task_of("gsm8k/gsm8k.yaml", 0, train=rows, test=rows)
    instances = asked(task)
    for instance, (_, text) in zip(instances, written, strict=True):
        instance.resps = [text]
    task.apply_filters()
    totals = {"strict": [], "flexible": []}
    seen = set()
    for item, instance, (_, text) in zip(ours.items(), instances, written, strict=True):
        outcome = ours.score(item, [text, Score(-1.0, False, 1)])
        for kind, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
            extracted = instance.filtered_resps[name]
            assert outcome.prediction[kind] == extracted, (kind, text)
            score = task.process_results(instance.doc, [extracted])["exact_match"]
            assert outcome.metrics[f"{kind}_match"] == score, (kind, text, item.gold)
            totals[kind].append(float(score))
            seen.add((kind, float(score), extracted == "[invalid]"))
    assert len(ours.items()) == OUTPUTS
    assert {(kind, *x) for kind in totals for x in ((1.0, False), (0.0, False), (0.0, True))} <= seen
    for kind, values in totals.items():
        found = mean(kind, values)
        assert 0.1 < found.value < 0.9
        assert found.value == pytest.approx(theirs.mean(values), rel=1e-12)
        assert found.stderr == pytest.approx(theirs.mean_stderr(values), rel=1e-12)


# ------------------------------------------------------------------------------------------------ mmlu


@pytest.fixture(scope="module")
def subjects(shared_data):
    """lm-eval's task of each subject."""
    splits = {split: records(shared_data / "mmlu" / f"{split}.jsonl") for split in ("dev", "test")}
    for rows in splits.values():
        for row in rows:
            row.pop("error_type", None)
    there = dict.fromkeys(row["subject"] for row in splits["test"])
    return {
        subject: task_of(
            f"mmlu/default/mmlu_{subject}.yaml",
            5,
            **{split: [row for row in rows if row["subject"] == subject] for split, rows in splits.items()},
        )
        for subject in there
    }


def test_mmlu_categories_are_the_same():
    for subject, category in CATEGORY.items():
        assert load_yaml(YAMLS / f"mmlu/default/mmlu_{subject}.yaml")["tag"] == f"mmlu_{category}_tasks"
    assert len(list((YAMLS / "mmlu" / "default").glob("mmlu_*.yaml"))) == len(CATEGORY)


@pytest.mark.parametrize("shots", [5, 0])
def test_mmlu_requests_are_the_same(shared_data, subjects, shots):
    ours = MMLU(shared_data, shots=shots)
    items = ours.ranked()[:CHECKED]
    for subject, task in subjects.items():
        task.set_config("num_fewshot", shots)
        mine = [item for item in items if item.group == subject]
        expected = [instance.args for instance in asked(task, len(mine))]
        assert [(r.context, r.continuation) for item in mine for r in ours.requests(item)] == expected
    assert len(items) == CHECKED and {item.group for item in items} == set(subjects)


def test_mmlu_metrics_and_group_scores_are_the_same(shared_data, subjects):
    ours, rng = MMLU(shared_data, shots=0), np.random.default_rng(0)
    rows, scores = [], {subject: [] for subject in subjects}
    for item in ours.ranked()[:1000]:
        task = subjects[item.group]
        log_probs = np.round(-4 * rng.random(4), 1).tolist()  # many are equal
        doc = task.task_docs[len(scores[item.group])]
        expected = task.process_results(doc, [(log_prob, False) for log_prob in log_probs])["acc"]
        outcome = ours.score(item, [Score(log_prob, False, 1) for log_prob in log_probs])
        assert outcome.metrics["accuracy"] == expected
        scores[item.group].append(expected)
        rows.append(Row.of(item, outcome))
    found = {metric.name: metric for metric in ours.summarise(rows)}
    values, errors, sizes = ([f(x) for x in scores.values()] for f in (theirs.mean, theirs.mean_stderr, len))
    assert found["accuracy"].value == pytest.approx(theirs.aggregate_subtask_metrics(values, sizes), rel=1e-12)
    assert found["accuracy"].stderr == pytest.approx(theirs.pooled_sample_stderr(errors, sizes), rel=1e-12)
    for i, subject in enumerate(subjects):
        metric = found[f"accuracy/{CATEGORY[subject]}/{subject}"]
        assert metric[1:] == (pytest.approx(values[i]), pytest.approx(errors[i]), sizes[i])
    for category in dict.fromkeys(CATEGORY.values()):
        inside = [i for i, subject in enumerate(subjects) if CATEGORY[subject] == category]
        parts = [[x[i] for i in inside] for x in (values, errors, sizes)]
        metric = found[f"accuracy/{category}"]
        assert metric.value == pytest.approx(theirs.aggregate_subtask_metrics(parts[0], parts[2]), rel=1e-12)
        assert metric.stderr == pytest.approx(theirs.pooled_sample_stderr(parts[1], parts[2]), rel=1e-12)
    assert {found["accuracy"].n, sum(sizes)} == {1000}


# ------------------------------------------------------------------------------------------------ humaneval


def test_humaneval_requests_and_programs_are_the_same(monkeypatch, shared_data):
    class CodeEval:
        def compute(self, **_):
            return [{}]

    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())  # it would be fetched
    ours = HumanEval(shared_data, allow_code_execution=True)
    task = task_of("humaneval/humaneval.yaml", 0, test=[item.fields for item in ours.items()])
    instances = asked(task)
    completions = ["    return 1\n", "", "\n  pass", "é\tx  "]
    for i, instance in enumerate(instances):
        instance.resps = [completions[i % 4]]
    task.apply_filters()
    assert len(instances) == 164
    for i, (item, instance) in enumerate(zip(ours.items(), instances, strict=True)):
        _, generation = ours.requests(item)
        context, options = instance.args
        assert (generation.context, list(generation.until)) == (context, options["until"])
        assert generation.max_tokens == options["max_gen_toks"] and options["do_sample"] is False
        assert generation.sampling.temperature == 0
        found = program(item, completions[i % 4])
        assert [found.prompt + found.completion] == instance.filtered_resps["create_test"]
        assert f"{found.test}\ncheck({found.entry_point})" == task.doc_to_target(instance.doc)


@pytest.mark.parametrize(("n", "passed", "k"), [(64, 0, 8), (64, 3, 8), (64, 60, 8), (5, 5, 2), (200, 17, 100)])
def test_pass_at_k_is_that_of_the_paper(n, passed, k):
    from foundry_jax.tasks.humaneval import pass_at_k

    papers = 1.0 if n - passed < k else 1.0 - np.prod(1.0 - k / np.arange(n - passed + 1, n + 1))
    assert pass_at_k(n, passed, k) == pytest.approx(papers, abs=1e-12) and math.isfinite(papers)
