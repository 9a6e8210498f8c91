"""What filters and curricula ask models and tasks: a real checkpoint scores texts, real items are looked for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import config as config_lib
from foundry_jax import data, train
from foundry_jax.data_tools import TOOLS, ModelScorer, items
from foundry_jax.errors import UserError
from foundry_jax.tasks.encoding import Encoder
from foundry_jax.zoo import load_pretrained
from tests import checkpoints

TEXTS = ["", "a", "The cat sat on the mat.", "zqx jkw vvv 😀", "la " * 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.exhaustive
def test_a_model_scores_texts_in_nats_per_byte(model):
    scorer = ModelScorer(str(model))
    pretrained = load_pretrained(str(model))
    first = Encoder(pretrained.tokenizer, pretrained.stop_ids, "tiny").prefix_id  # what the first token follows
    found = scorer(TEXTS)
    for text, nats in zip(TEXTS, found, strict=True):
        ids = pretrained.tokenizer.encode(text)
        logits = pretrained.logits(jnp.array([[first, *ids]]))[0]
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))[np.arange(len(ids)), ids]
        assert nats == pytest.approx(-float(log_probs.sum()) / max(len(text.encode()), 1), rel=1e-4, abs=1e-6)
    assert scorer.fingerprint == ModelScorer(str(model)).fingerprint
    with pytest.raises(UserError, match="nowhere"):
        ModelScorer("nowhere/at/all")


def test_items_are_all_texts_of_a_task(tmp_path):
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is #### {2 * i}"} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows * 2))
    found = list(items("gsm8k", str(tmp_path)))
    assert len(found) == 4 and all(row["question"] in text for row, text in zip(rows, found, strict=True))
    with pytest.raises(UserError, match="Unknown task 'gsm9k'. Did you mean 'gsm8k'"):
        list(items("gsm9k", str(tmp_path)))


@pytest.fixture
def texts(tmp_path):
    """Documents of plain words, and two that hold an item of a task, word for word."""
    folder = tmp_path / "texts"
    folder.mkdir()
    question = "Ann has four apples and Ben gives her three more so how many apples does she have now?"
    for number in range(30):
        said = f"Number {number} is a number of words about nothing in particular, and here it ends. "
        (folder / f"{number:02}.txt").write_text(said + (question if number in (3, 17) else "") + "la " * number)
    for name in ("test", "train"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'question': question, 'answer': '#### 7'})}\n" * 6)
    return folder


def prepared(texts, tmp_path, *overrides):
    given = [f"data.source=text(path='{texts}')", f"data.cache_dir={tmp_path / 'cache'}", "num_steps=20"]
    config = config_lib.load("configs/smoke.py", [*given, "data.validation=document(0.2)", *overrides])
    return config, data.prepare(config.data, None, TOOLS)


def test_items_of_a_task_are_taken_out_of_the_training_text(texts, tmp_path):
    _, before = prepared(texts, tmp_path)
    _, after = prepared(texts, tmp_path, f"data.filters=decontaminate(tasks='gsm8k', data='{tmp_path}')")
    read = lambda corpus: corpus.tokenizer.decode(corpus.train[0].stream.tokens)  # noqa: E731
    assert "gives her three more" in read(before) and "gives her three more" not in read(after)
    (report,) = after.reports
    assert before.train[0].stream.num_documents - after.train[0].stream.num_documents in (1, 2) and report


@pytest.mark.exhaustive
def test_a_model_filters_and_orders_documents(texts, model, tmp_path):
    _, before = prepared(texts, tmp_path)
    limit = float(np.median(ModelScorer(str(model))([path.read_text() for path in sorted(texts.iterdir())])))
    _, after = prepared(texts, tmp_path, f"data.filters=perplexity(model='{model}', max={limit})")
    assert 0 < after.train[0].stream.num_documents < before.train[0].stream.num_documents
    curriculum = f"data.curriculum=perplexity(model='{model}', start=0.1)"
    config, corpus = prepared(texts, tmp_path, curriculum, "data.packing=pad")
    batches = train.batches_of(config, corpus).train
    order = batches.parts[0].curriculum
    assert order.pool_size(0) < len(order) == order.pool_size(10)
