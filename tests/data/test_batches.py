"""Batches: pure in the step, every row once an epoch, every validation token once; mixtures keep their shares."""

import hashlib
import itertools
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from foundry_jax.data.batches import Portion, TrainBatches, mixed, shuffled, train_batches, validation_batches
from foundry_jax.data.curriculum import curriculum, parse
from foundry_jax.data.pack import plan
from foundry_jax.data.stream import Stream
from foundry_jax.errors import UserError

B, L = 6, 5
TOKENS = np.arange(1000, 1203, dtype=np.uint16)  # 203 tokens, each its own position + 1000


def stream_of(tokens, trained=None, starts=None) -> Stream:
    return Stream(tokens, np.array([0, len(tokens)]) if starts is None else starts, trained)


def make(tokens=TOKENS, batch_size=B, context_length=L, seed=3, rows=slice(None)) -> TrainBatches:
    portions = [Portion(stream_of(tokens))]
    return train_batches(portions, batch_size=batch_size, context_length=context_length, seed=seed, rows=rows)


def validate(tokens, batch_size, context_length=L, **options):
    return validation_batches(stream_of(tokens), batch_size=batch_size, context_length=context_length, **options)


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


def digest_of(batches) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for name in ("inputs", "targets", "weights"):
            found.update(batch[name].tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    "num_tokens, dtype, batch_size, context_length, seed, train, validation",
    [
        (5003, np.uint16, 7, 19, 11, "cb538e3818d78be3", "9cbdba7c68e0e7fa"),
        (200_000, np.uint32, 32, 256, 0, "5fc984ed93e9c9ac", "aeb8cc52693b157f"),
        (3001, np.uint16, 4, 8, 2**33 + 5, "2048d4986c5ffe47", "0f4f2448d5307b41"),
    ],
)
def test_batches_of_an_endless_text_are_pinned(num_tokens, dtype, batch_size, context_length, seed, train, validation):
    """As they were before there were mixtures, packing and curricula, to the last bit."""
    rng = np.random.default_rng([5, num_tokens])
    tokens = rng.integers(0, 50000, num_tokens).astype(dtype)
    batches = make(tokens, batch_size, context_length, seed)
    assert digest_of(batches.batch(step) for step in [*range(60), 10**6, 10**9]) == train
    assert digest_of(validate(tokens[:5000], batch_size, context_length)) == validation


def test_every_window_is_used_once_per_epoch():
    batches = make()
    per_epoch = batches.parts[0].source.rows_per_epoch
    assert per_epoch % B != 0, "epochs must end inside a batch for this test to see that"
    for epoch in range(7):
        positions = sorted(starts(batches, epoch * per_epoch, (epoch + 1) * per_epoch))
        phase = positions[0]
        assert 0 <= phase < batches.parts[0].source.num_phases == 8
        assert positions == list(range(phase, phase + per_epoch * L, L))


def test_epochs_differ_in_order_and_in_phase():
    batches = make()
    per_epoch = batches.parts[0].source.rows_per_epoch
    orders = [starts(batches, epoch * per_epoch, (epoch + 1) * per_epoch) for epoch in range(40)]
    assert {min(order) for order in orders} == set(range(batches.parts[0].source.num_phases))
    ranks = {tuple(np.argsort(order)) for order in orders}
    assert len(ranks) == len(orders)


def test_no_token_stays_unseen_over_some_epochs():
    batches = make()
    seen = set()
    for step in range(40 * batches.parts[0].source.rows_per_epoch // B):
        seen.update(batches.batch(step)["targets"].ravel().tolist())
    assert seen == set(TOKENS[1:].tolist())


def test_seeds_give_unrelated_orders():
    per_epoch = make().parts[0].source.rows_per_epoch
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
    batches = validate(TOKENS[:num_tokens], batch_size)
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
    batches = validate(np.arange(10, 18, dtype=np.uint32), 3, 4)
    (batch,) = batches
    assert batch["inputs"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [15, 16, 17, 0], [0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert [array.dtype.name for array in batch.values()] == ["int32", "int32", "float32"]


def test_validation_can_be_repeated_and_shared_between_processes():
    whole = validate(TOKENS, 4)
    halves = [validate(TOKENS, 4, rows=slice(i, i + 2)) for i in (0, 2)]
    for first, again, *parts in zip(whole, whole, *halves, strict=True):
        assert_equal(first, again)
        assert_equal(first, {name: np.concatenate([part[name] for part in parts]) for name in first})
    with pytest.raises(IndexError):
        whole[len(whole)]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_validation_without_anything_to_predict_is_refused(num_tokens):
    with pytest.raises(UserError, match=f"has {num_tokens} tokens but needs 2"):
        validate(TOKENS[:num_tokens], 2)


STARTS = np.concatenate([[0], np.cumsum(np.random.default_rng(1).geometric(0.15, 30))])
DOCUMENTS = np.arange(1000, 1000 + STARTS[-1], dtype=np.uint16)
TRAINED = (np.random.default_rng(2).random(STARTS[-1]) < 0.5).astype(np.uint8)


def packed_portion(packing="first_fit(bins=4)", trained=TRAINED, weight=1.0) -> Portion:
    return Portion(Stream(DOCUMENTS, STARTS, trained), weight, plan(STARTS, packing, L, trained))


def test_packed_batch_in_full():
    starts = np.array([0, 3, 5, 11])
    stream = Stream(np.arange(20, 31, dtype=np.uint16), starts, np.array([0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1], np.uint8))
    batches = validation_batches(stream, plan(starts, "first_fit", 5), batch_size=3, context_length=5)
    (batch,) = batches
    assert batches.is_packed
    assert {name: x.tolist() for name, x in batch.items()} == {
        "inputs": [[20, 21, 22, 23, 24], [25, 26, 27, 28, 29], [0, 0, 0, 0, 0]],
        "targets": [[21, 22, 23, 24, 25], [26, 27, 28, 29, 30], [0, 0, 0, 0, 0]],
        "weights": [[1, 0, 1, 1, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [-1, -1, -1, -1, -1]],
        "segments": [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    }
    assert {name: x.dtype.name for name, x in batch.items()} == {
        "inputs": "int32", "targets": "int32", "weights": "float32", "positions": "int32", "segments": "int32",
    }  # fmt: skip


@pytest.mark.parametrize("packing", ["split", "pad", "first_fit(bins=4)", "best_fit(bins=4)"])
def test_a_packed_epoch_has_every_target_that_counts_once(packing):
    portion = packed_portion(packing)
    batches = train_batches([portion], batch_size=1, context_length=L, seed=3)
    for epoch in range(3):
        steps = range(epoch * len(portion.packed), (epoch + 1) * len(portion.packed))
        targets = []
        for step in steps:
            batch = batches.batch(step)
            counts = batch["weights"] > 0
            assert counts.any()
            np.testing.assert_array_equal(batch["targets"][counts], batch["inputs"][counts] + 1)
            targets += batch["targets"][counts].tolist()
        assert targets != sorted(targets)
        assert sorted(targets) == DOCUMENTS[1:][TRAINED[1:] == 1].tolist()


def test_positions_count_up_within_a_segment():
    batch = train_batches([packed_portion()], batch_size=B, context_length=L, seed=3).batch(1)
    positions, segments = batch["positions"], batch["segments"]
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    np.testing.assert_array_equal(positions[:, 1:] == positions[:, :-1] + 1, follows)
    np.testing.assert_array_equal(positions == -1, segments == 0)
    np.testing.assert_array_equal(positions[:, 1:] == 0, (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("packing", ["stream", "split", "pad", "best_fit(bins=4)"])
def test_validation_has_every_target_that_counts_once(packing, batch_size):
    stream = Stream(DOCUMENTS, STARTS, TRAINED)
    batches = validation_batches(stream, plan(STARTS, packing, L, TRAINED), batch_size=batch_size, context_length=L)
    assert batches.is_packed == (packing != "stream")
    targets = [batch["targets"][batch["weights"] > 0] for batch in batches]
    assert sorted(np.concatenate(targets).tolist()) == DOCUMENTS[1:][TRAINED[1:] == 1].tolist()


def test_weights_of_a_text_are_what_is_trained_on():
    portion = Portion(stream_of(DOCUMENTS, TRAINED))
    batch = train_batches([portion], batch_size=B, context_length=L, seed=3).batch(4)
    np.testing.assert_array_equal(batch["weights"], TRAINED[batch["targets"] - 1000])
    assert batch["weights"].dtype == np.float32


def mixture(*weights: float, packed: bool = False, **options) -> TrainBatches:
    """Batches of streams whose tokens are 1000, 1001, ... of the first, 2000, 2001, ... of the second."""
    portions = []
    for number, weight in enumerate(weights, start=1):
        stream = stream_of(np.arange(1000 * number, 1000 * number + 40 + 30 * number))
        portions.append(Portion(stream, weight, plan(stream.starts, "pad", L) if packed else None))
    return train_batches(portions, **{"batch_size": B, "context_length": L, "seed": 3} | options)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.05, 0.95), (5, 3, 2), (1, 1, 1, 1, 1, 1, 1), (0.7, 0.2, 0.1)])
def test_shares_of_a_mixture_are_its_weights(weights):
    batches = mixture(*weights)
    counts = np.zeros(len(weights))
    for step in range(120):
        counts += np.bincount(batches.batch(step)["inputs"][:, 0] // 1000 - 1, minlength=len(weights))
        if (step + 1) * B >= 200:
            assert np.abs(counts / counts.sum() - np.array(weights) / sum(weights)).max() < 0.01


def test_shares_stay_exact_for_ever():
    slots = np.arange(10**12, 10**12 + 1000)
    part, index = mixed(slots, [3, 2**20 - 3])
    for number, share in enumerate((3, 2**20 - 3)):
        assert np.all(np.abs(index[part == number] - slots[part == number] * share / 2**20) <= 1)


@pytest.mark.parametrize("weights", [(1, 1), (5, 3, 2), (1, 7), (2, 2, 3, 1)])
def test_a_mixture_takes_turns_as_that_of_grain(weights):
    import grain

    count = 300
    sources = [grain.MapDataset.range(10**6 * number, 10**6 * number + count) for number in range(len(weights))]
    expected = grain.MapDataset.mix(sources, weights=[float(weight) for weight in weights])
    part, index = mixed(np.arange(count), weights)
    assert (part * 10**6 + index).tolist() == [int(expected[i]) for i in range(count)]


def test_each_part_of_a_mixture_has_its_own_epochs():
    batches = mixture(3, 1, batch_size=8)
    windows = [[], []]
    for step in range(200):
        rows = batches.batch(step)["inputs"][:, 0]
        part_B, index_B = batches._slots(step)
        for number in range(2):
            windows[number] += zip(index_B[part_B == number], rows[part_B == number], strict=True)
    for number, found in enumerate(windows):
        per_epoch = batches.parts[number].source.rows_per_epoch
        assert sorted(index for index, _ in found) == list(range(len(found)))
        starts = [start - 1000 * (number + 1) for _, start in sorted(found)]
        for epoch in range(len(starts) // per_epoch):
            once = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
            assert once == list(range(once[0], once[0] + per_epoch * L, L))


def test_the_first_part_of_a_mixture_has_the_order_that_it_has_alone():
    alone, mixed_in = mixture(1, batch_size=1), mixture(1, 2, batch_size=9)
    rows = []
    for step in range(8):
        part_B, index_B = mixed_in._slots(step)
        rows += zip(index_B[part_B == 0], mixed_in.batch(step)["inputs"][part_B == 0].tolist(), strict=True)
    assert [row for _, row in sorted(rows)] == [alone.batch(step)["inputs"][0].tolist() for step in range(24)]


def test_parts_of_one_size_have_different_orders():
    tokens = np.arange(100)
    batches = train_batches([Portion(stream_of(tokens)), Portion(stream_of(tokens))], batch_size=36,
                            context_length=5, seed=0)  # fmt: skip
    part_B, index_B = batches._slots(0)
    one, other = (batches.batch(0)["inputs"][part_B == i][np.argsort(index_B[part_B == i]), 0] for i in (0, 1))
    assert one.tolist() != other.tolist()


def test_micro_batches_are_mixtures_too():
    """Micro-batch i of A has the rows i, i + A, ...; parts that took turns would fill one each."""
    batches = mixture(1, 1, batch_size=16)
    odd = [np.count_nonzero(batches.batch(step)["inputs"][1::2, 0] >= 2000) for step in range(50)]
    assert len(set(odd)) > 2 and abs(np.mean(odd) - 4) < 1


def curricular_portion(name: str) -> Portion:
    portion = packed_portion(trained=None)
    difficulty = np.diff(STARTS).astype(float)
    return portion._replace(curriculum=curriculum(parse(name), 40, difficulty, STARTS, portion.packed, L))


EVERY_KIND = {
    "stream": lambda **options: train_batches([Portion(stream_of(DOCUMENTS, TRAINED))], **options),
    "packed": lambda **options: train_batches([packed_portion()], **options),
    "mixture": lambda **options: mixture(3, 1, 2, **options),
    "packed mixture": lambda **options: mixture(1, 2, packed=True, **options),
    "curriculum": lambda **options: train_batches([curricular_portion("length")], **options),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_is_the_same_for_any_number_of_processes(kind):
    def made(rows):
        return EVERY_KIND[kind](batch_size=8, context_length=L, seed=3, rows=rows)

    for step in (0, 1, 5, 17, 1000):
        whole = made(slice(None)).batch(step)
        for processes in (2, 4, 8):
            share = 8 // processes
            parts = [made(slice(rank * share, (rank + 1) * share)).batch(step) for rank in range(processes)]
            assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_resumes_at_any_step(kind):
    batches = EVERY_KIND[kind](batch_size=4, context_length=L, seed=3)
    whole = list(batches.iterate(0, 30))
    for start in range(0, 30, 7):
        again = EVERY_KIND[kind](batch_size=4, context_length=L, seed=3).iterate(start, 30)
        for (step, batch), (expected_step, expected) in itertools.zip_longest(again, whole[start:]):
            assert step == expected_step
            assert_equal(batch, expected)


def test_packed_validation_is_shared_between_processes():
    portion = packed_portion()

    def made(**options):
        return validation_batches(portion.stream, portion.packed, batch_size=4, context_length=L, **options)

    halves = [made(rows=slice(i, i + 2)) for i in (0, 2)]
    for whole, *parts in zip(made(), *halves, strict=True):
        assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_a_stream_without_a_target_is_refused():
    nothing = np.zeros(len(TOKENS), np.uint8)
    nothing[0] = 1  # the first token is no target
    message = "There is no token to learn from: data.format trains on none of its 203; try other data."
    packed = plan(np.array([0, 203]), "first_fit", L, nothing)
    for rows in (None, packed):
        portion = Portion(stream_of(TOKENS, nothing), packed=rows)
        with pytest.raises(UserError, match=message):
            train_batches([portion], batch_size=B, context_length=L, seed=0)
        with pytest.raises(UserError, match="None of the 203 tokens of the validation stream counts"):
            validation_batches(portion.stream, rows, batch_size=B, context_length=L)


def test_a_source_that_is_too_short_is_named_by_its_number():
    portions = [Portion(stream_of(TOKENS)), Portion(stream_of(TOKENS[:4]))]
    with pytest.raises(UserError, match="needs 6 training tokens, but there are only 4 in source 2 of 2; try"):
        train_batches(portions, batch_size=B, context_length=L, seed=0)


def test_data_and_its_batches_need_no_jax():
    program = (
        "import sys, numpy as np\n"
        "from foundry_jax.data import batches, pack, stream\n"
        "text = stream.Stream(np.arange(50), np.array([0, 20, 50]))\n"
        "portion = batches.Portion(text, packed=pack.plan(text.starts, 'best_fit', 4))\n"
        "batches.train_batches([portion], batch_size=2, context_length=4, seed=0).batch(0)\n"
        "loaded = {'jax', 'grain', 'foundry_jax.model'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
