"""Batches: pure in the step, every window once an epoch, every validation token once."""

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from foundry_jax.data import train_batches, validation_batches
from foundry_jax.data.batches import shuffled
from foundry_jax.errors import UserError

B, L = 6, 5
TOKENS = np.arange(1000, 1203, dtype=np.uint16)  # 203 tokens, each its own position + 1000


def make(tokens=TOKENS, batch_size=B, context_length=L, seed=3, rows=slice(None)):
    return train_batches(tokens, batch_size=batch_size, context_length=context_length, seed=seed, rows=rows)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def starts(batches, first, last):
    """The positions at which windows number first..last-1 of the run begin."""
    steps = range(first // B, -(-last // B))
    every = np.concatenate([batches.batch(step)["inputs"][:, 0] for step in steps]) - 1000
    return every[first % B :][: last - first].tolist()


def test_batch_has_the_promised_shapes_and_types():
    batch = make(TOKENS.astype(np.uint32)).batch(2)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((B, L), "int32"),
        "targets": ((B, L), "int32"),
        "weights": ((B, L), "float32"),
    }
    assert all(array.flags.c_contiguous for array in batch.values())


def test_targets_are_the_next_tokens_of_a_window():
    batch = make().batch(7)
    np.testing.assert_array_equal(batch["inputs"], batch["inputs"][:, :1] + np.arange(L))
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    assert batch["weights"].min() == 1


def test_batch_is_a_pure_function_of_the_step():
    one, other = make(), make()
    expected = [one.batch(step) for step in range(30)]
    for step in np.random.default_rng(0).permutation(30):
        assert_equal(other.batch(int(step)), expected[step])
    assert_equal(one.batch(10**9), other.batch(10**9))


def test_data_order_is_pinned():
    """A change here changes what every resumed run and every paired comparison has seen."""
    pinned = [[35, 60, 155, 175, 50, 25], [41, 111, 31, 121, 151, 6]]
    assert [starts(make(), first, first + B) for first in (0, 10**6 * B)] == pinned


def test_every_window_is_used_once_per_epoch():
    batches = make()
    per_epoch = batches.windows_per_epoch
    assert per_epoch % B != 0, "epochs must end inside a batch for this test to see that"
    for epoch in range(7):
        positions = sorted(starts(batches, epoch * per_epoch, (epoch + 1) * per_epoch))
        phase = positions[0]
        assert 0 <= phase < batches.num_phases == 8
        assert positions == list(range(phase, phase + per_epoch * L, L))


def test_epochs_differ_in_order_and_in_phase():
    batches = make()
    per_epoch = batches.windows_per_epoch
    orders = [starts(batches, epoch * per_epoch, (epoch + 1) * per_epoch) for epoch in range(40)]
    assert {min(order) for order in orders} == set(range(batches.num_phases))
    ranks = {tuple(np.argsort(order)) for order in orders}
    assert len(ranks) == len(orders)


def test_no_token_stays_unseen_over_some_epochs():
    batches = make()
    seen = set()
    for step in range(40 * batches.windows_per_epoch // B):
        seen.update(batches.batch(step)["targets"].ravel().tolist())
    assert seen == set(TOKENS[1:].tolist())


def test_seeds_give_unrelated_orders():
    per_epoch = make().windows_per_epoch
    epochs = [
        tuple(starts(make(seed=seed), epoch * per_epoch, (epoch + 1) * per_epoch))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(epochs)) == 16, "seed + epoch would make run 0's second epoch run 1's first"


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_global_batch_does_not_depend_on_the_number_of_processes(processes):
    share = B // processes
    parts = [make(rows=slice(rank * share, (rank + 1) * share)) for rank in range(processes)]
    for step in (0, 6, 7):
        joined = {
            name: np.concatenate([part.batch(step)[name] for part in parts])
            for name in ("inputs", "targets", "weights")
        }
        assert_equal(joined, make().batch(step))


def test_iterate_resumes_at_any_step():
    whole = list(make().iterate(0, 20))
    assert [step for step, _ in whole] == list(range(20))
    for start in (1, 13, 19):
        for (step, batch), (expected_step, expected) in zip(make().iterate(start, 20), whole[start:], strict=True):
            assert step == expected_step
            assert_equal(batch, expected)
            assert_equal(batch, make().batch(step))


def test_iterate_shifts_the_data_by_the_offset_and_not_the_step():
    for step, batch in make().iterate(4, 8, offset=lambda step: 100):
        assert_equal(batch, make().batch(step + 100))


def test_iterate_over_no_steps_yields_nothing():
    assert list(make().iterate(5, 5)) == []


def test_an_iterator_left_early_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in range(5):
        steps = make().iterate(0, 10**6)
        next(steps)
        steps.close()
    del steps
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(timeout=5)
    assert threading.active_count() <= before


@pytest.mark.parametrize("num_tokens", [6, 7, 9, 10, 11, 14, 15, 16])
def test_little_data_still_gives_whole_windows(num_tokens):
    batches = make(TOKENS[:num_tokens])
    inputs = np.concatenate([batches.batch(step)["inputs"] for step in range(30)])
    targets = np.concatenate([batches.batch(step)["targets"] for step in range(30)])
    np.testing.assert_array_equal(targets, inputs + 1)
    assert set(targets.ravel().tolist()) == set(TOKENS[1:num_tokens].tolist())


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_a_context_longer_than_the_data_names_both(num_tokens):
    message = rf"context_length=5 needs 6 training tokens, but there are only {num_tokens}; try"
    with pytest.raises(UserError, match=message):
        make(TOKENS[:num_tokens])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(size):
    keys = np.arange(11, 19, dtype=np.uint64)
    assert sorted(shuffled(np.arange(size), size, keys).tolist()) == list(range(size))


def test_shuffled_reaches_large_sizes_without_listing_them():
    keys = np.arange(11, 19, dtype=np.uint64)
    size = 10**12 + 39
    indices = np.arange(size - 1000, size)
    result = shuffled(indices, size, keys)
    assert len(set(result.tolist())) == 1000
    assert result.min() >= 0 and result.max() < size
    np.testing.assert_array_equal(result[3:5], shuffled(indices[3:5], size, keys))


def test_shuffled_uses_all_orders_about_equally():
    rng = np.random.default_rng(0)
    orders = Counter(
        tuple(shuffled(np.arange(3), 3, keys).tolist()) for keys in rng.integers(2**63, size=(600, 8), dtype=np.uint64)
    )
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 expected, standard deviation 9


def test_shuffled_separates_neighbours():
    rng = np.random.default_rng(0)
    size, trials = 50, 400
    steps = np.zeros(size)
    for keys in rng.integers(2**63, size=(trials, 8), dtype=np.uint64):
        order = shuffled(np.arange(size), size, keys)
        steps += np.bincount(np.diff(order) % size, minlength=size)
    expected = trials * (size - 1) / (size - 1)
    assert abs(steps[1:] - expected).max() < 5 * expected**0.5  # four rounds instead of eight miss this by far


@pytest.mark.parametrize("num_tokens", [2, 5, 6, 7, 30, 31, 32, 61, 203])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_validation_predicts_every_token_but_the_first_once(num_tokens, batch_size):
    batches = validation_batches(TOKENS[:num_tokens], batch_size=batch_size, context_length=L)
    predicted = []
    for batch in batches:
        assert {array.shape for array in batch.values()} == {(batch_size, L)}
        counts = batch["weights"] == 1
        assert np.all(counts | (batch["weights"] == 0))
        np.testing.assert_array_equal(batch["targets"][counts], batch["inputs"][counts] + 1)
        predicted += batch["targets"][counts].tolist()
    assert predicted == TOKENS[1:num_tokens].tolist()
    assert len(batches) == -(-(num_tokens - 1) // (batch_size * L))


def test_validation_batch_in_full():
    batches = validation_batches(np.arange(10, 18, dtype=np.uint32), batch_size=3, context_length=4)
    (batch,) = batches
    assert batch["inputs"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [15, 16, 17, 0], [0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert [array.dtype.name for array in batch.values()] == ["int32", "int32", "float32"]


def test_validation_can_be_repeated_and_shared_between_processes():
    whole = validation_batches(TOKENS, batch_size=4, context_length=L)
    halves = [validation_batches(TOKENS, batch_size=4, context_length=L, rows=slice(i, i + 2)) for i in (0, 2)]
    for first, again, *parts in zip(whole, whole, *halves, strict=True):
        assert_equal(first, again)
        assert_equal(first, {name: np.concatenate([part[name] for part in parts]) for name in first})
    with pytest.raises(IndexError):
        whole[len(whole)]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_validation_without_anything_to_predict_is_refused(num_tokens):
    with pytest.raises(UserError, match=f"has {num_tokens} tokens but needs 2"):
        validation_batches(TOKENS[:num_tokens], batch_size=2, context_length=L)


def test_data_and_its_batches_need_no_jax():
    program = (
        "import sys, numpy as np, foundry_jax.data as data\n"
        "data.train_batches(np.arange(50), batch_size=2, context_length=4, seed=0).batch(0)\n"
        "loaded = {'jax', 'grain', 'foundry_jax.model'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
