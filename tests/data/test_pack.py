"""Packing: no token lost, no document cut that fits, Grain's rows, and documents that do not see each other."""

import numpy as np
import pytest

from foundry_jax.data.batches import Portion, train_batches
from foundry_jax.data.pack import PACKINGS, Rows, figures, plan
from foundry_jax.data.stream import Stream
from foundry_jax.errors import UserError
from tests import variants

L = 6
PACKED = [name for name, kind in PACKINGS.items() if kind]
# Documents of 4, 2, 13, 0, 1 and 3 tokens; the last token of the stream has no next one.
STARTS = np.array([0, 4, 6, 19, 19, 20, 23])


def laid(rows: Rows) -> list[list[tuple[int, int]]]:
    """The pieces of each row."""
    return [[tuple(piece) for piece in part] for part in np.split(rows.pieces, rows.offsets[1:-1])]


def random_starts(seed: int, documents: int = 300, mean: float = 8) -> np.ndarray:
    sizes = np.random.default_rng(seed).geometric(1 / mean, documents) - 1  # some are empty
    return np.concatenate([[0], np.cumsum(sizes)])


@pytest.mark.parametrize(
    "packing, expected",
    [
        ("split", [[(0, 4), (4, 2)], [(6, 6)], [(12, 6)], [(18, 1), (19, 1), (20, 2)]]),
        ("pad", [[(0, 4)], [(4, 2)], [(6, 6)], [(12, 6)], [(18, 1)], [(19, 1)], [(20, 2)]]),
        ("first_fit(bins=1)", [[(0, 4), (4, 2)], [(6, 6)], [(12, 6)], [(18, 1), (19, 1), (20, 2)]]),
        ("first_fit(bins=2)", [[(0, 4), (4, 2)], [(6, 6)], [(12, 6)], [(18, 1), (19, 1), (20, 2)]]),
    ],
)
def test_rows_in_full(packing, expected):
    assert laid(plan(STARTS, packing, L)) == expected


def test_best_fit_takes_the_fullest_row_that_has_room():
    starts = np.cumsum([0, 3, 4, 2, 1, 3])  # two rows of 6: 3, then 4 beside it; 2 fits both, the second better
    assert laid(plan(starts, "first_fit(bins=2)", L)) == [[(0, 3), (7, 2), (9, 1)], [(3, 4), (10, 2)]]
    assert laid(plan(starts, "best_fit(bins=2)", L)) == [[(0, 3), (9, 1), (10, 2)], [(3, 4), (7, 2)]]


def test_the_endless_text_has_no_plan():
    assert plan(STARTS, "stream", L) is None


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("length", [1, 5, 8, 64])
def test_every_target_is_in_one_piece_and_no_piece_crosses_a_border(packing, length):
    for seed in range(3):
        starts = random_starts(seed)
        rows = plan(starts, packing, length)
        begins, sizes = rows.pieces.T
        inputs = np.concatenate([np.arange(begin, begin + size) for begin, size in rows.pieces])
        assert sorted(inputs.tolist()) == list(range(starts[-1] - 1))
        document = np.searchsorted(starts, begins, side="right") - 1
        assert np.all(begins + sizes <= starts[document + 1])
        per_row = np.add.reduceat(sizes, rows.offsets[:-1])
        assert per_row.max() <= length and np.all(np.diff(rows.offsets) >= 1)
        if packing != "split":  # what fits into a row is whole
            fits = np.diff(starts)[document] <= length
            assert np.all(
                sizes[fits] == np.minimum(starts[1:], starts[-1] - 1)[document[fits]] - starts[document[fits]]
            )


@pytest.mark.parametrize("length", [1, 5, 8])
def test_split_cuts_where_the_windows_of_the_text_do(length):
    starts = random_starts(1)
    rows = plan(starts, "split", length)
    assert [row[0][0] for row in laid(rows)] == list(range(0, starts[-1] - 1, length))
    assert figures(rows, starts, length)["efficiency"] == (starts[-1] - 1) / (len(rows) * length)


@pytest.mark.parametrize("bins", [1, 4, 32])
@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_rows_are_those_of_grain(packing, bins):
    import grain

    length, starts = 16, random_starts(bins, documents=400)
    pieces = plan(starts, "pad", length).pieces
    source = grain.MapDataset.range(len(pieces)).map(lambda i: {"x": np.zeros(pieces[i, 1], np.int8), "piece": int(i)})
    packer = {
        "first_fit": grain.experimental.FirstFitPackIterDataset,
        "best_fit": grain.experimental.BestFitPackIterDataset,
    }[packing]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    packed = packer(
        source.to_iter_dataset(options),
        length_struct={"x": length},
        num_packing_bins=bins,
        shuffle_bins=False,
        meta_features=("piece",),
    )
    expected = [[tuple(pieces[i]) for i in row["piece"]] for row in packed]
    assert laid(plan(starts, f"{packing}(bins={bins})", length)) == expected


def test_packing_saves_rows():
    starts, length = random_starts(0, documents=2000, mean=20), 64
    found = {packing: figures(plan(starts, packing, length), starts, length) for packing in PACKED}
    efficiency = {packing: figure["efficiency"] for packing, figure in found.items()}
    assert efficiency["pad"] < 0.4 < 0.9 < efficiency["first_fit"] <= efficiency["best_fit"] <= 1
    assert efficiency["split"] > 0.99
    assert found["split"]["split_documents"] > found["pad"]["split_documents"] == found["best_fit"]["split_documents"]


def test_figures_count_what_is_split():
    assert figures(plan(STARTS, "pad", L), STARTS, L) == {
        "rows": 7, "pieces": 7, "documents": 5, "split_documents": 1, "efficiency": 22 / 42}  # fmt: skip
    assert figures(plan(STARTS, "split", L), STARTS, L)["split_documents"] == 1
    assert figures(plan(STARTS, "pad", 20), STARTS, 20)["split_documents"] == 0


@pytest.mark.parametrize("packing", PACKED)
def test_pieces_without_a_target_that_counts_are_left_out(packing):
    starts = random_starts(5)
    trained = np.random.default_rng(0).random(starts[-1]) < 0.08
    trained[0] = True  # the first token is no target
    rows = plan(starts, packing, 8, trained.astype(np.uint8))
    counts = [trained[begin + 1 : begin + size + 1].sum() for begin, size in rows.pieces]
    assert min(counts) > 0 and sum(counts) == trained[1:].sum()
    assert len(rows.pieces) < len(plan(starts, packing, 8).pieces)
    assert np.all(np.diff(rows.offsets) >= 1), "no row is empty"


def test_long_documents_with_more_than_255_targets_stay():
    trained = np.ones(257, np.uint8)  # 256 targets: 0 in eight bits
    assert len(plan(np.array([0, 257]), "pad", 256, trained).pieces) == 1


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 1], [0, 0, 1]])
def test_a_stream_without_a_target_has_no_rows(packing, starts):
    assert len(plan(np.array(starts), packing, L, np.ones(starts[-1], np.uint8))) == 0


@pytest.mark.parametrize("starts", [[0, 2], [0, 1, 2], [0, 0, 2, 2]])
@pytest.mark.parametrize("packing", PACKED)
def test_one_target_is_one_row(packing, starts):
    assert laid(plan(np.array(starts), packing, L)) == [[(0, 1)]]


def test_rows_come_back_as_they_were_kept(tmp_path):
    rows = plan(random_starts(2), "best_fit", 8)
    rows.save(tmp_path)
    again = Rows.load(tmp_path)
    assert isinstance(again.pieces, np.memmap) and len(again) == len(rows)
    assert [again.pieces.dtype.name, again.offsets.dtype.name] == ["int64", "int64"]
    np.testing.assert_array_equal(again.pieces, rows.pieces)
    np.testing.assert_array_equal(again.offsets, rows.offsets)


@pytest.mark.parametrize(
    "packing, message",
    [
        ("first_fitt", "Unknown data.packing 'first_fitt'. Did you mean 'first_fit'?"),
        ("pad(bins=3)", "Unknown number of data.packing=pad 'bins'"),
        ("first_fit(bin=3)", "Did you mean 'bins'?"),
        ("first_fit(bins=0)", "data.packing: bins=0 must be a finite number between 1 and 4096"),
        ("best_fit(bins=10**9)", "must be a name, or a name with numbers"),
        ("best_fit(bins=1000000000)", "data.packing: bins=1000000000 must be"),
        ("best_fit(bins=2.5)", "must be a whole number, not a number"),
        ("first_fit(", "must be a name, or a name with numbers"),
    ],
)
def test_a_bad_packing_is_one_line(packing, message):
    with pytest.raises(UserError) as error:
        plan(STARTS, packing, L)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("packing", PACKED)
def test_changing_one_document_changes_no_logit_of_the_others(packing):
    config = variants.tiny()
    rng = np.random.default_rng(0)
    starts = random_starts(3, documents=12, mean=5)
    tokens = rng.integers(0, variants.VOCAB, starts[-1]).astype(np.uint16)
    before = logits_of_documents(config, tokens, starts, packing)
    for changed in np.flatnonzero(np.diff(starts))[:4].tolist():
        other = tokens.copy()
        span = slice(starts[changed], starts[changed + 1])
        other[span] = (other[span] + 1) % variants.VOCAB
        after = logits_of_documents(config, other, starts, packing)
        assert {i for i in range(starts[-1] - 1) if (before[i] != after[i]).any()} == {
            i for i in range(starts[-1] - 1) if starts[changed] <= i < starts[changed + 1]
        }


def logits_of_documents(config, tokens, starts, packing) -> np.ndarray:
    """The logits of each token of the stream, read from one packed batch: [tokens - 1, V]."""
    rows = plan(starts, packing, variants.LENGTH)
    portion = Portion(Stream(tokens, starts), packed=rows)
    batch = train_batches([portion], batch_size=len(rows), context_length=variants.LENGTH, seed=0).batch(0)
    padded = {name: np.zeros((12, variants.LENGTH), np.int32) for name in ("inputs", "positions", "segments")}
    for name, x in padded.items():  # one shape, one program
        x[: len(rows)] = batch[name]
    logits = variants.placed(config)(variants.params_of(config), *padded.values())
    order = train_batches([portion._replace(stream=Stream(np.arange(starts[-1]), starts))], batch_size=len(rows),
                          context_length=variants.LENGTH, seed=0).batch(0)  # fmt: skip
    found = np.empty((starts[-1] - 1, variants.VOCAB), np.float32)
    found[order["inputs"][batch["positions"] >= 0]] = np.asarray(logits)[: len(rows)][batch["positions"] >= 0]
    return found
