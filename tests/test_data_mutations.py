"""Mutations of the data: what they change of the stream, that nothing else changes, and that it trains."""

import itertools
import json

import numpy as np
import pytest

from foundry_jax import config as config_lib
from foundry_jax import data, mutate, train
from foundry_jax.errors import UserError
from foundry_jax.mutate import data as mutations

SMOKE = "configs/smoke.py"
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve")


@pytest.fixture
def texts(tmp_path):
    """Forty texts of different lengths, four of them twice."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        same = number % 36
        text = f"Story {same}. " + "".join(
            f"{NAMES[(same + i) % 5]} saw {same * i} birds. " for i in range(same % 9 + 2)
        )
        (folder / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Add {i} and {i}."},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(60)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def principles(tmp_path):
    path = tmp_path / "principles.jsonl"
    row = {"principle": "Be kind.", "prompt": "Who are you?", "chosen": "A friend.", "rejected": "Nobody."}
    path.write_text("".join(json.dumps(row | {"prompt": f"Who are you, {i}?"}) + "\n" for i in range(20)))
    return path


def prepared(tmp_path, argument, *overrides):
    """Returns (config, corpus, its batches) of the smoke config with an argument."""
    common = [f"data.cache_dir={tmp_path / 'cache'}", "data.validation=document(0.2)", "num_steps=40"]
    config = config_lib.load(f"{SMOKE}:{argument}", [*common, *overrides])
    corpus = data.prepare(config.data)
    return config, corpus, train.batches_of(config, corpus)


def assert_same_batches(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def assert_same_validation(before, after):
    """Nothing that a run is measured on has changed."""
    (_, old, old_batches), (_, new, new_batches) = before, after
    assert (new.validation_hash, new.validation_bytes) == (old.validation_hash, old.validation_bytes)
    assert new.tokenizer.hash == old.tokenizer.hash
    for one, other in zip(new_batches.validation, old_batches.validation, strict=True):
        assert_same_batches(one, other)


@pytest.mark.parametrize("argument", ["split", "pad", "first_fit", "packing=best_fit:4"])
def test_packing_lays_out_the_same_tokens_and_nothing_else(texts, tmp_path, argument):
    source = ["data.source=text", f"data.path={texts}"]
    before, after = (prepared(tmp_path, name, *source) for name in ("", argument))
    assert after[1].train[0].key == before[1].train[0].key
    assert_same_validation(before, after)
    assert "segments" not in before[2].train.batch(0) and "segments" in after[2].train.batch(0)


def test_a_curriculum_ends_in_the_order_without_one(texts, tmp_path):
    source = ["data.source=text", f"data.path={texts}"]
    before, after = (prepared(tmp_path, name, *source) for name in ("", "curriculum=length:linear:0.1:0.5"))
    assert after[1].train[0].key == before[1].train[0].key
    assert_same_validation(before, after)
    steps = [before[2].train.batch, after[2].train.batch]
    assert any((steps[0](step)["inputs"] != steps[1](step)["inputs"]).any() for step in range(20))
    assert_same_batches(map(steps[1], range(20, 40)), map(steps[0], range(20, 40)))


def test_a_filter_takes_training_documents_and_nothing_else(texts, tmp_path):
    source = ["data.source=text", f"data.path={texts}"]
    before, after = (prepared(tmp_path, name, *source) for name in ("", "data_filter=length(min=60):exact"))
    assert_same_validation(before, after)

    def documents(corpus):
        stream = corpus.train[0].stream
        return [
            corpus.tokenizer.decode(stream.tokens[a:b], skip_special=True) for a, b in itertools.pairwise(stream.starts)
        ]

    kept, all_of_them = documents(after[1]), documents(before[1])
    assert kept == list(dict.fromkeys(text for text in all_of_them if len(text) >= 60))
    assert 0 < len(kept) < len(all_of_them)


@pytest.mark.parametrize("name", ["llama3", "alpaca"])
def test_a_format_spells_the_same_conversations(chats, tmp_path, name):
    source = ["data.source=chat", f"data.path={chats}", "data.tokenizer=bpe", "data.vocab_size=300"]
    before, after = (prepared(tmp_path, one, *source) for one in ("chatml,first_fit", f"{name},first_fit"))
    (_, old, _), (_, new, batches) = before, after
    assert (new.validation_hash, new.tokenizer.hash) == (old.validation_hash, old.tokenizer.hash)
    assert new.validation_bytes == old.validation_bytes  # of what the assistant says
    assert new.train[0].key != old.train[0].key
    batch = batches.train.batch(0)
    trained = new.tokenizer.decode(batch["targets"][batch["weights"] > 0])
    assert "It is" in trained and "Add" not in trained


def test_a_constitution_is_mixed_in_and_the_rest_stays(texts, principles, tmp_path):
    source = ["data.source=text", f"data.path={texts}", "data.tokenizer=bpe", "data.vocab_size=300"]
    before = prepared(tmp_path, "", *source)
    config = mutate.apply(config_lib.load_dict(SMOKE, source), f"constitution={principles}:0.25")
    assert config.data.source == f"text, constitution(path='{principles}', weight=0.333333, held_out=False)"
    assert config.data.format == "chatml"
    mixed = [*source[1:], f"data.source={config.data.source}", "data.format=chatml"]
    after = prepared(tmp_path, "", *mixed)
    rows = [row for step in range(40) for row in after[2].train.batch(step)["weights"]]
    assert sum((row == 0).any() for row in rows) / len(rows) == pytest.approx(0.25, abs=0.01)
    assert after[1].validation_hash == before[1].validation_hash
    np.testing.assert_array_equal(after[1].validation[0].stream.tokens, before[1].validation[0].stream.tokens)
    np.testing.assert_array_equal(after[1].train[0].stream.tokens, before[1].train[0].stream.tokens)


def test_a_constitution_joins_the_pairs_of_dpo(principles):
    config = config_lib.load_dict(f"{SMOKE}:dpo=pairs.jsonl")
    changes = mutate.call("constitution", config, str(principles), "0.5")
    path = f"constitution(path='{principles}', weight=1, held_out=False)"
    assert changes["data.preferences"] == f"pairs(path='pairs.jsonl'), {path}"
    assert mutate.apply(config, f"constitution={principles}:0.5").data.preferences.endswith(path)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("packing=first_fit:8", {"data.packing": "first_fit(bins=8)"}),
        ("pad", {"data.packing": "pad"}),
        ("curriculum=compression", {"data.curriculum": "compression"}),
        ("curriculum=length:root:0.3", {"data.curriculum": "length(pacing='root', start=0.3)"}),
        ("conversation_format=chatml:all", {"data.format": "chatml(train='all')"}),
        ("alpaca", {"data.format": "alpaca"}),
        ("data_filter=near(threshold=0.7):urls", {"data.filters": "near(threshold=0.7), urls"}),
        ("data_filter=none", {"data.filters": ""}),
    ],
)
def test_mutations_set_what_they_say(argument, expected):
    name, values = mutate.parse(argument)
    assert mutate.call(name, config_lib.load_dict(SMOKE), *values) == expected
    config_lib.load(f"{SMOKE}:{argument}")


def test_the_tables_name_what_there_is():
    assert mutations.PACKING_VARIANTS.keys() == data.PACKINGS.keys()
    assert mutations.CURRICULUM_VARIANTS.keys() == data.CURRICULA.keys()
    assert mutations.FORMAT_VARIANTS.keys() | {"template"} == data.FORMATS.keys()
    assert mutations.FILTER_VARIANTS.keys() - {"none", "standard"} <= data.FILTERS.keys()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("packing=fisrt_fit", "Unknown packing 'fisrt_fit'. Did you mean 'first_fit'"),
        ("packing=first_fit:0", "bins=0 must be a finite number between 1 and"),
        ("curriculum=depth", "Unknown curriculum 'depth'"),
        ("curriculum=length:fast", "Unknown data.curriculum: pacing 'fast'"),
        ("conversation_format=chatlm", "Unknown format of conversations 'chatlm'. Did you mean 'chatml'"),
        ("data_filter=exakt", "Unknown filter 'exakt'. Did you mean 'exact'"),
        ("constitution=a.jsonl:1.5", "share=1.5 must be between 0 and 1"),
        ("dpo=pairs.jsonl,first_fit", "data.packing='first_fit' has no meaning with loss.name=dpo"),
    ],
)
def test_mistakes_are_named_in_one_line(argument, message):
    with pytest.raises(UserError, match=message) as caught:
        config_lib.load(f"{SMOKE}:{argument}")
    assert "\n" not in str(caught.value)
