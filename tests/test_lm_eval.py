"""lm-eval's tasks on our models: what it is told, what it tells, and what is refused. Needs the extra lm-eval."""

import importlib
import json
import math
import os
import subprocess
import sys
import time

import jax
import pytest

from foundry_jax import zoo
from foundry_jax.errors import UserError
from foundry_jax.generate import Sampling
from foundry_jax.tasks.requests import Continuation, Generation
from foundry_jax.tasks.scoring import Scorer
from tests import checkpoints
from tests.conftest import ROOT

ITEMS = [
    {"question": "the model", "choices": ["and", "theme", "other"], "answer": 1},
    {"question": "of that", "choices": ["end", "mother"], "answer": 0},
    {"question": "another", "choices": ["one", "word7", "."], "answer": 2},
    {"question": "and then", "choices": ["the", "a"], "answer": 0},
    {"question": "", "choices": ["the end", "them"], "answer": 0},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} the",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n", "zz"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
READING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[0]}} " + "the other mother of that theme " * 20,
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "foundry_jax.tasks.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"need it installed \(.*\): pip install 'foundry-jax\[lm-eval\]'"):
        importlib.import_module("foundry_jax.tasks.lm_eval")


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make oracle")
    return importlib.import_module("foundry_jax.tasks.lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """On one device: the plan for all of them would do everything eight times."""
    folder = checkpoints.write(tmp_path_factory.mktemp("lm_eval") / "model", max_position_embeddings=96)
    return zoo.load_pretrained(folder, device=jax.devices()[0])


@pytest.fixture
def scorer(model):
    return Scorer(model)


@pytest.fixture
def make_task(tmp_path):
    """Returns what writes a task of lm-eval as YAML, which JSON is."""

    def make(name: str, settings: dict, **more) -> str:
        items = tmp_path / "items.jsonl"
        items.write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
        files = {split: str(items) for split in ("train", "test")}
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
        found = {"task": name, "test_split": "test", "fewshot_split": "train", "metadata": {"version": 1}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**found, **source, **settings, **more}))
        return str(path)

    return make


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.oracle
def test_multiple_choice_is_the_largest_log_likelihood(adapter, scorer, make_task):
    right, normed = [], []
    for item in ITEMS:
        scores = scorer.loglikelihood([Continuation(item["question"], f" {choice}") for choice in item["choices"]])
        sizes = [len(choice) for choice in item["choices"]]
        values = [score.log_prob for score in scores]
        right.append(values.index(max(values)) == item["answer"])
        values = [value / size for value, size in zip(values, sizes, strict=True)]
        normed.append(values.index(max(values)) == item["answer"])
    assert 0 < sum(right) < len(ITEMS)
    seen = []
    found = adapter.run(make_task("words", CHOICE), scorer, progress=lambda *counts: seen.append(counts))
    assert [(metric.name, metric.value, metric.n) for metric in found] == [
        ("acc", sum(right) / 5, 5), ("acc_norm", sum(normed) / 5, 5)]  # fmt: skip
    p = sum(right) / 5
    assert math.isclose(found[0].stderr, math.sqrt(p * (1 - p) / 4))
    assert seen[-1] == (12, 12)


@pytest.mark.oracle
def test_shots_and_limit_are_those_asked_for(adapter, scorer, make_task, monkeypatch):
    asked = []
    ask = Scorer.loglikelihood
    monkeypatch.setattr(
        Scorer, "loglikelihood", lambda self, requests, *rest: asked.extend(requests) or ask(self, requests, *rest)
    )
    task = make_task("words", CHOICE)
    [metric, _] = adapter.run(task, scorer, 2, 1)
    assert metric.n == 2 and len(asked) == 5
    assert all("\n\n" in request.context for request in asked)
    shot = asked[0].context.partition("\n\n")[0]
    assert shot in [f"{item['question']} {item['choices'][item['answer']]}" for item in ITEMS]
    asked.clear()
    adapter.run(task, scorer, 2)  # the same task again, without examples
    assert [request.context for request in asked] == ["the model"] * 3 + ["of that"] * 2
    asked.clear()
    adapter.run(make_task("bare", CHOICE, num_fewshot=0), scorer, 1, 1)
    assert [request.context for request in asked] == ["the model"] * 3


@pytest.mark.oracle
def test_what_is_written_is_what_the_scorer_writes(adapter, scorer, make_task, monkeypatch):
    asked = []
    write = Scorer.generate_until
    monkeypatch.setattr(
        Scorer, "generate_until", lambda self, requests, *rest: asked.extend(requests) or write(self, requests, *rest)
    )
    answers = write(scorer, [Generation(f"{item['question']} the", ("\n", "zz"), 5) for item in ITEMS])
    targets = [item["choices"][0] for item in ITEMS]
    [metric] = adapter.run(make_task("writing", WRITING), scorer)
    assert metric.name == "exact_match"
    assert metric.value == sum(map(str.__eq__, answers, targets)) / 5
    assert asked == [Generation(f"{item['question']} the", ("\n", "zz"), 5) for item in ITEMS]
    assert len(set(answers)) > 1


@pytest.mark.oracle
def test_texts_are_read_in_windows(adapter, scorer, make_task):
    texts = [READING["doc_to_target"].replace("{{question}} {{choices[0]}}", f"{x['question']} {x['choices'][0]}")
             for x in ITEMS]  # fmt: skip
    nats = scorer.loglikelihood_rolling(texts)
    assert len(scorer._encoder.encode(texts[:1])[0]) > scorer.max_length
    found = adapter.run(make_task("reading", READING), scorer)
    assert sorted(metric.name for metric in found) == ["bits_per_byte", "word_perplexity"]
    [bits] = [metric for metric in found if metric.name == "bits_per_byte"]
    expected = -sum(nats) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert math.isclose(bits.value, expected, rel_tol=1e-9)
    sizes = [len(text.encode()) for text in texts]  # of a ratio, in its linear approximation
    rests = [-x / math.log(2) - expected * size for x, size in zip(nats, sizes, strict=True)]
    assert math.isclose(bits.stderr, math.hypot(*rests) / sum(sizes), rel_tol=0.2)


@pytest.mark.oracle
def test_draws_are_the_same_each_time_and_no_two_of_a_prompt_are(adapter, scorer):
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 8, "until": []}
    requests = [adapter.Instance("generate_until", {}, (text, drawn), i) for i, text in enumerate(["the", "of"] * 3)]
    model = adapter.FoundryLM(scorer)
    answers = model.generate_until(requests)
    assert len(set(answers)) == 6
    assert model.generate_until(requests) == answers
    assert model.generate_until(requests[::2]) == answers[::2]  # whatever else is asked


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Generation("a", (), 256)),
        ({"until": "b", "max_new_tokens": 3}, Generation("a", ("b",), 3)),
        ({"until": ["b", ""], "max_gen_toks": 3, "num_beams": 1}, Generation("a", ("b",), 3)),
        ({"do_sample": False, "temperature": 1.0, "top_p": 0.5}, Generation("a", (), 256)),
        ({"do_sample": True}, Generation("a", (), 256)),
    ],
)
def test_options_of_writing_mean_what_lm_eval_says(options, expected, adapter):
    [found] = adapter._generations([("a", options)])
    assert (found.context, found.until, found.max_tokens) == (expected.context, expected.until, expected.max_tokens)
    assert found.sampling.temperature == 0


@pytest.mark.oracle
def test_options_of_drawing_are_passed_on(adapter):
    options = {"temperature": 0.2, "top_p": 0.95, "top_k": 7}
    [found] = adapter._generations([("a", options)])
    sampling = found.sampling
    assert sampling == Sampling(temperature=0.2, top_p=0.95, top_k=7, seed=sampling.seed)


@pytest.mark.oracle
def test_a_group_has_its_own_score_and_those_of_its_tasks(adapter):
    results = {
        "low": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4, "alias": "low"},
        "all": {"acc,none": 0.4, "acc_stderr,none": 0.05, "sample_len": 10, "sample_count": {"acc,none": 9}},
        "high": {"acc,none": 0.3, "acc_stderr,none": "N/A", "sample_len": 5, "acc,strict": 0.2},
        "part": {"alias": "part"},
    }
    found = adapter._metrics(results, {"all": ["low", "part"], "part": ["high"]}, "all")
    assert [(metric.name, metric.value, metric.n) for metric in found] == [
        ("acc", 0.4, 9), ("acc/low", 0.5, 4), ("acc/part/high", 0.3, 5), ("acc (strict)/part/high", 0.2, 5),
    ]  # fmt: skip
    assert [metric.stderr for metric in found[:2]] == [0.05, 0.1] and math.isnan(found[2].stderr)


@pytest.mark.oracle
def test_lm_evals_own_function_finds_the_same(adapter, model, scorer, make_task):
    import lm_eval

    task = make_task("words", CHOICE)
    mine = adapter.run(task, scorer, shots=2)
    lm = adapter.FoundryLM(scorer, model.tokenizer)
    theirs = lm_eval.simple_evaluate(lm, tasks=[task], num_fewshot=2, bootstrap_iters=100)["results"]["words"]
    assert [metric.value for metric in mine] == [theirs["acc,none"], theirs["acc_norm,none"]]
    assert [metric.stderr for metric in mine] == [theirs["acc_stderr,none"], theirs["acc_norm_stderr,none"]]


@pytest.mark.oracle
def test_chats_are_spelled_by_the_models_template(adapter, model, scorer, make_task, monkeypatch):
    import lm_eval

    lm, asked = adapter.FoundryLM(scorer, model.tokenizer), []
    talk = [{"role": "user", "content": "the"}]
    assert lm.apply_chat_template(talk) == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    talk.append({"role": "assistant", "content": "model "})
    unfinished = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nmodel "
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == unfinished
    ask = Scorer.loglikelihood
    monkeypatch.setattr(
        Scorer, "loglikelihood", lambda self, requests, *rest: asked.extend(requests) or ask(self, requests, *rest)
    )
    lm_eval.simple_evaluate(lm, tasks=[make_task("words", CHOICE)], limit=1, apply_chat_template=True)
    assert asked[0] == Continuation("<|im_start|>user\nthe model<|im_end|>\n<|im_start|>assistant\n", "and")
    with pytest.raises(UserError, match="The model has no tokenizer.json"):
        adapter.FoundryLM(scorer).apply_chat_template(talk)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.oracle
def test_an_unknown_task_is_refused_with_a_suggestion(adapter):
    with pytest.raises(UserError, match=r"no task 'helaswag'\. Did you mean 'hellaswag'.*`lm-eval ls tasks`"):
        adapter.check("helaswag")


@pytest.mark.oracle
def test_a_task_without_its_data_is_refused(adapter, make_task, tmp_path):
    path = make_task("words", CHOICE, dataset_kwargs={"data_files": {"test": str(tmp_path / "none.jsonl")}})
    with pytest.raises(UserError, match=r"cannot load '.*words\.yaml' \(FileNotFoundError: .*none.jsonl.*data_files\)"):
        adapter.check(path)


@pytest.mark.oracle
def test_without_a_network_it_is_known_soon(adapter, monkeypatch):
    adapter._manager()
    monkeypatch.setattr(adapter, "hub_answers", lambda repository: lambda: False)
    start = time.perf_counter()
    with pytest.raises(UserError, match="cannot load 'hellaswag' .*comes from the hub, which does not answer, unless"):
        adapter.check("hellaswag")
    assert time.perf_counter() - start < 5


@pytest.mark.oracle
def test_a_task_that_runs_code_is_refused_though_its_file_does_not_say_so(adapter, make_task, monkeypatch):
    """As the file of a group does not."""
    monkeypatch.setattr(adapter, "load_yaml", lambda *_, **__: {})
    with pytest.raises(UserError, match=r"run what the model writes for 'coding' without a sandbox"):
        adapter.check(make_task("coding", WRITING, unsafe_code=True))


@pytest.mark.oracle
def test_a_file_that_is_no_task_is_refused(adapter, tmp_path):
    for name, text in {"a.yaml": "a: [", "b.yaml": "- a", "c.yaml": "a: b"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"cannot load '.*{name}' "):
            adapter.check(str(tmp_path / name))


@pytest.mark.oracle
def test_a_task_that_runs_code_is_refused(adapter, make_task, scorer):
    path = make_task("coding", WRITING, unsafe_code=True)
    for name in (path, "humaneval", "mbpp_instruct"):
        for ask in (adapter.check, lambda name: adapter.run(name, scorer)):
            with pytest.raises(UserError, match=r"run what the model writes for '.*' without a sandbox: use --task"):
                ask(name)


@pytest.mark.oracle
def test_a_way_of_writing_that_there_is_not_is_refused(adapter, make_task, scorer):
    path = make_task("beams", WRITING, generation_kwargs={"until": ["\n"], "num_beams": 10, "min_p": 0.1})
    with pytest.raises(UserError, match=r"wants its text written with num_beams=10, min_p=0\.1, which is not offered"):
        adapter.run(path, scorer)


WITHOUT_TORCH = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in ("torch", "transformers") else self.finder.find_spec(name, *rest)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import torch
except ImportError:
    pass
else:
    raise AssertionError
from foundry_jax import zoo
from foundry_jax.tasks import lm_eval
from foundry_jax.tasks.scoring import Scorer
assert len(lm_eval.TaskManager().all_tasks) > 1000
scorer = Scorer(zoo.load_pretrained(sys.argv[1]))
for task in sys.argv[2:]:
    print(lm_eval.run(task, scorer)[0].name)
"""


@pytest.mark.oracle
@pytest.mark.slow
def test_neither_torch_nor_transformers_is_needed(adapter, make_task, tmp_path):
    folder = checkpoints.write(tmp_path / "model", max_position_embeddings=96)
    tasks = [make_task("words", CHOICE), make_task("writing", WRITING), make_task("reading", READING)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder), *tasks], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["acc", "exact_match", "word_perplexity"]  # lm-eval's own words are on stderr
