"""Pairs of completions: how they are read, batched and trained on, and the reference they are measured against."""

import dataclasses
import functools
import json
import logging

import jax
import numpy as np
import pytest

from foundry_jax import train
from foundry_jax.config import load
from foundry_jax.data.preferences import PreferenceBatches, read_pairs, read_reference, write_reference
from foundry_jax.data.tokenize import ByteTokenizer, CharTokenizer
from foundry_jax.errors import Preempted, UserError
from foundry_jax.optimizer import hyperparameters
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics
from foundry_jax.train_step import Program, init_state, reference_step, train_step, unbox
from tests.processes import SMALL_TEXT, assert_bitwise_equal
from tests.variants import forward, params_of, tiny

END = ByteTokenizer.separator_id


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes pairs (prompt, chosen, rejected), or lines of text, to a file."""

    def write(*rows):
        path = tmp_path / "pairs.jsonl"
        names = ("prompt", "chosen", "rejected")
        lines = [row if isinstance(row, str) else json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def harmless(shared_data):
    """The path of 1200 real pairs."""
    return shared_data / "preferences" / "harmless.jsonl"


def ids(text):
    return list(text.encode())


def sequences(pairs):
    """Returns the tokens of all sequences."""
    return [pairs.tokens[a:b].tolist() for a, b in zip(pairs.starts[:-1], pairs.starts[1:], strict=True)]


def test_a_batch_of_a_pair_is_these_arrays(write):
    pairs = read_pairs(write(("ab", "c", "de")), ByteTokenizer(), 6)
    batch = pairs.batch(np.array([0]))
    a, b, c, d, e = ids("abcde")
    expected = {
        "inputs": [[[a, b, c, 0, 0, 0], [a, b, d, e, 0, 0]]],
        "targets": [[[b, c, END, 0, 0, 0], [b, d, e, END, 0, 0]]],
        "weights": [[[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]],
        "positions": [[[0, 1, 2, -1, -1, -1], [0, 1, 2, 3, -1, -1]]],
    }
    assert {name: x.tolist() for name, x in batch.items()} == expected
    assert {name: x.dtype.name for name, x in batch.items()} == dict.fromkeys(expected, "int32") | {
        "weights": "float32"
    }


def test_a_tokenizer_without_a_separator_adds_none(write):
    pairs = read_pairs(write(("ab", "c", "de")), CharTokenizer("abcde"), 6)
    assert sequences(pairs) == [[0, 1, 2], [0, 1, 3, 4]]


def test_a_long_prompt_loses_its_beginning_the_same_for_both_completions(write, caplog):
    caplog.set_level(logging.INFO)
    pairs = read_pairs(write(("0123456789", "c", "def")), ByteTokenizer(), 7)
    assert sequences(pairs) == [[*ids("6789c"), END], [*ids("6789def"), END]]
    assert pairs.prompt_lengths.tolist() == [4, 4]
    assert "1 of them are longer than model.context_length=7: their prompts lose the beginning" in caplog.text
    assert "lose the end" not in caplog.text


def test_a_completion_that_is_too_long_by_itself_loses_its_end_and_keeps_one_token_before_it(write, caplog):
    pairs = read_pairs(write(("01", "abcd", "abcdefgh")), ByteTokenizer(), 5)
    assert sequences(pairs) == [[*ids("1abcd"), END], ids("1abcde")]
    assert pairs.batch(np.array([0]))["weights"].tolist() == [[[1] * 5, [1] * 5]]
    assert "1 completions are longer by themselves and lose the end" in caplog.text


def test_without_a_prompt_the_separator_comes_first(write):
    path = write(("", "c", ""))
    assert sequences(read_pairs(path, ByteTokenizer(), 5)) == [[END, *ids("c"), END], [END, END]]
    with pytest.raises(UserError, match=r"Pair 1 of .* has no prompt, and the tokenizer no separator to stand in"):
        read_pairs(path, CharTokenizer("c"), 5)


NEEDED = "it must have the texts prompt, chosen and rejected"
MISTAKES = [
    ((), r"data.preferences='.*pairs.jsonl' has no pairs; a line is one, with the texts prompt, chosen and rejected"),
    (("", "  "), "has no pairs"),
    ((("a", "b", "c"), "{"), rf"pairs.jsonl, line 2, is not JSON \(.*\); {NEEDED}"),
    (("", '{"prompt": "a", "chosen": "b"}'), f"pairs.jsonl, line 2, has no text 'rejected'; {NEEDED}"),
    (('{"prompt": "a", "chosen": 1, "rejected": "c"}',), f"line 1, has no text 'chosen'; {NEEDED}"),
    (("[1, 2]",), f"line 1, has no text 'prompt'; {NEEDED}"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES)
def test_a_file_that_holds_no_pairs_is_refused_by_line(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(write(*rows), ByteTokenizer(), 5)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_or_encoded_is_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read data.preferences='.*none.jsonl': No such file or directory"):
        read_pairs(tmp_path / "none.jsonl", ByteTokenizer(), 5)
    path = write(("a", "b", "c"))
    with pytest.raises(UserError, match="data.preferences needs a tokenizer, but data.source has none"):
        read_pairs(path, None, 5)
    with pytest.raises(UserError, match=r"pairs.jsonl: Character 'c' \(U\+0063\) is not among the 2 characters"):
        read_pairs(path, CharTokenizer("ab"), 5)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"data.preferences='.*pairs.jsonl' is not UTF-8"):
        read_pairs(path, ByteTokenizer(), 5)


@pytest.fixture
def ten(write):
    """Ten pairs, whose prompts are their numbers."""
    return read_pairs(write(*[(str(i), "yes", "no") for i in range(10)]), ByteTokenizer(), 5)


def numbers(batch):
    """Returns which pairs a batch holds."""
    return [token - ord("0") for token in batch["inputs"][:, 0, 0].tolist()]


def test_every_epoch_has_every_pair_once_in_an_order_of_its_own(ten):
    batches = PreferenceBatches(ten, 4, 0, slice(None))
    order = [pair for step in range(5) for pair in numbers(batches.batch(step))]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] != list(range(10))
    other = dataclasses.replace(batches, seed=1)
    assert [pair for step in range(5) for pair in numbers(other.batch(step))] != order


def test_a_batch_is_a_function_of_its_step_and_processes_share_it(ten):
    reference = np.arange(20, dtype=np.float32).reshape(10, 2)
    batches = PreferenceBatches(ten, 4, 0, slice(None), reference)
    whole = [batches.batch(step) for step in range(6)]
    assert whole[3]["reference"].tolist() == [[2 * i, 2 * i + 1] for i in numbers(whole[3])]
    for step, batch in batches.iterate(3, 6):
        jax.tree.map(np.testing.assert_array_equal, batch, whole[step])
    halves = [dataclasses.replace(batches, rows=rows).batch(3) for rows in (slice(0, 2), slice(2, 4))]
    for name, x in whole[3].items():
        np.testing.assert_array_equal(x, np.concatenate([half[name] for half in halves]))


def test_pairs_in_order_are_all_of_them_and_full_batches(ten):
    assert [numbers(batch) for batch in ten.in_order(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [numbers(batch) for batch in ten.in_order(4, slice(2, 4))] == [[2, 3], [6, 7], [0, 1]]


def test_a_reference_is_kept_under_its_key_and_a_damaged_one_is_noticed(tmp_path, caplog):
    path, reference = tmp_path / "reference.npz", np.arange(6, dtype=np.float32).reshape(3, 2)
    assert read_reference(path, "a") is None and not caplog.text
    write_reference(path, "a", reference)
    np.testing.assert_array_equal(read_reference(path, "a"), reference)
    assert read_reference(path, "b") is None and "of other pairs or another model" in caplog.text
    content = path.read_bytes()
    at = content.index(reference.tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert read_reference(path, "a") is None and "reference.npz is damaged" in caplog.text
    path.write_bytes(content[:-9])
    assert read_reference(path, "a") is None
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


# The model of the tests below: byte tokens, weights far from zero.
MODEL = tiny(vocab_size=257, context_length=48)
PAIRS = (("Hi. ", "Hello!", "Go away."), ("Who are you? ", "I am a model.", "No one"), ("2+2=", "4", "I will not say"))


def dpo(loss="dpo", **optimizer):
    """Returns (program, hyperparameters) of preference training."""
    config = load("configs/tiny.py:warmup=0,lr=1e-3", [f"loss.name={loss}", "data.preferences=x"])
    optimizer = dataclasses.replace(config.optimizer, **optimizer)
    config = dataclasses.replace(config, model=MODEL, optimizer=optimizer)
    return Program.of(config), hyperparameters(config)


@functools.cache
def jitted(function, program):
    without = {"base": {}} if function is train_step else {"hyper": None, "base": {}}  # no adapters
    return jax.jit(functools.partial(function, program, **without))


def state_of(program, hyper):
    """Returns the state at step 0, but with parameters far from zero."""
    state = jax.jit(lambda hyper: unbox(init_state(program, hyper)))(hyper)
    return state.replace(params=params_of(MODEL)["params"])


def with_reference(program, params, batch):
    return batch | {"reference": np.asarray(jitted(reference_step, program)(params, batch))}


def test_log_probabilities_are_sums_over_the_completion_and_its_end(write):
    """Of each sequence alone, without padding, by a plain log-softmax."""
    program, _ = dpo()
    pairs = read_pairs(write(*PAIRS), ByteTokenizer(), 48)
    found = jitted(reference_step, program)(params_of(MODEL)["params"], pairs.batch(np.arange(3)))
    for (prompt, *completions), row in zip(PAIRS, np.asarray(found), strict=True):
        for completion, log_prob in zip(completions, row, strict=True):
            tokens = np.array([*ids(prompt + completion), END, *[0] * (48 - len(prompt + completion) - 1)])
            logits = forward(MODEL)(params_of(MODEL), tokens[None])[0]
            log_probs = jax.nn.log_softmax(logits)[np.arange(47), tokens[1:]]
            first, last = len(prompt) - 1, len(prompt + completion)
            assert log_prob == pytest.approx(float(log_probs[first:last].sum()), rel=1e-5)


def test_padding_changes_nothing(write):
    program, _ = dpo()
    path, params = write(*PAIRS), params_of(MODEL)["params"]
    short, long = (read_pairs(path, ByteTokenizer(), length).batch(np.arange(3)) for length in (32, 48))
    other = dict(long, inputs=np.where(long["positions"] < 0, 7, long["inputs"]))
    found = [jitted(reference_step, program)(params, batch) for batch in (short, long, other)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_array_equal(found[1], found[2])


@pytest.mark.parametrize(("loss", "parts", "expected"), [("dpo", 2, np.log(2)), ("ipo", 1, 25.0)])
def test_at_step_0_nothing_is_preferred(harmless, loss, parts, expected):
    """Exactly: the compiled step and the compiled reference find the same bits for the same rows."""
    program, hyper = dpo(loss, accumulation_steps=parts)
    pairs = read_pairs(harmless, ByteTokenizer(), 48)
    state = state_of(program, hyper)
    size = 8 // parts
    reference = [
        jitted(reference_step, program)(state.params, pairs.batch(np.arange(i, i + size))) for i in range(0, 8, size)
    ]
    batch = pairs.batch(np.arange(8)) | {"reference": np.concatenate(reference)}
    _, metrics = jitted(train_step, program)(state, batch, hyper)
    assert float(metrics["loss"]) == pytest.approx(expected, abs=1e-7 * expected)
    assert float(metrics["reward_margin"]) == 0 and float(metrics["reward_accuracy"]) == 0
    assert float(metrics["tokens"]) == batch["weights"].sum()


def test_training_prefers_what_was_chosen(write):
    program, hyper = dpo()
    state = state_of(program, hyper)
    batch = read_pairs(write(*PAIRS), ByteTokenizer(), 48).batch(np.array([0, 1, 2, 2]))
    batch, rows = with_reference(program, state.params, batch), []
    for _ in range(15):
        state, metrics = jitted(train_step, program)(state, batch, hyper)
        rows.append(metrics)
    assert float(rows[0]["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(rows[-1]["loss"]) < 0.3
    assert float(rows[-1]["reward_accuracy"]) == 1 and float(rows[-1]["reward_margin"]) > 1


@pytest.fixture
def run_dpo(harmless, tmp_path):
    """Returns a function that trains configs/smoke.py on real pairs in this process, on all its devices."""

    def run_dpo(name):
        overrides = [*SMALL_TEXT, "loss.name=dpo", f"data.preferences={harmless}", "num_steps=12", "eval.every=6"]
        overrides += ["model.num_layers=1", "data.batch_size=16"]
        return train.run(load("configs/smoke.py", overrides), tmp_path / name, quiet=True)

    return run_dpo


@pytest.mark.exhaustive
def test_a_run_on_pairs_is_measured_on_text_and_goes_on_where_it_was_stopped(run_dpo, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    result = run_dpo("whole")
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl", "train")
    assert (rows[0]["loss"], rows[0]["reward_accuracy"]) == (pytest.approx(np.log(2), abs=1e-6), 0)
    assert result["validation"]["bits_per_byte"] == pytest.approx(8, abs=0.3)  # of text, by a model that knows nothing
    assert result["tokens"] == 12 * 16 * 2 * 32

    def stop_at(wanted):
        with monkeypatch.context() as patch:
            patch.setattr(Preemption, "requested", lambda self, step: step == wanted)
            with pytest.raises(Preempted, match=f"step {wanted} of 12 is saved" if wanted else "has no reference yet"):
                run_dpo("stopped")

    stop_at(0)  # while the reference is computed
    stop_at(7)
    assert caplog.text.count("Computing the reference log-probabilities of 1,200 pairs") == 3
    stop_at(9)
    assert caplog.text.count("Computing the reference") == 3  # it was kept
    (tmp_path / "stopped" / "reference.npz").unlink()
    run_dpo("stopped")
    assert caplog.text.count("Computing the reference") == 4
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped")
