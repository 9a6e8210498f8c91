"""Every mask spec against matrices written by hand, against its rule in words of one pair, and its layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.errors import UserError
from foundry_jax.model.mask import (
    EMPTY,
    SPARSE,
    Causal,
    Fixed,
    Mask,
    Placement,
    Strided,
    Window,
    whole_sequence,
)

# One row a query, one column a key; x where the query sees the key.
LITERAL = {
    Causal(): """
        x.......
        xx......
        xxx.....
        xxxx....
        xxxxx...
        xxxxxx..
        xxxxxxx.
        xxxxxxxx""",
    Window(1): """
        x.......
        .x......
        ..x.....
        ...x....
        ....x...
        .....x..
        ......x.
        .......x""",
    Window(3): """
        x.......
        xx......
        xxx.....
        .xxx....
        ..xxx...
        ...xxx..
        ....xxx.
        .....xxx""",
    Strided(3): """
        x.......
        xx......
        xxx.....
        xxxx....
        .xxxx...
        ..xxxx..
        x..xxxx.
        .x..xxxx""",
    Fixed(3, 1): """
        x.......
        xx......
        xxx.....
        ..xx....
        ..xxx...
        ..xxxx..
        ..x..xx.
        ..x..xxx""",
    Fixed(4, 2): """
        x.......
        xx......
        xxx.....
        xxxx....
        ..xxx...
        ..xxxx..
        ..xxxxx.
        ..xxxxxx""",
    Strided(3) & Window(5): """
        x.......
        xx......
        xxx.....
        xxxx....
        .xxxx...
        ..xxxx..
        ...xxxx.
        ....xxxx""",
}

# The definitions of Child et al. 2019, 1904.10509, and of Mistral, 2310.06825, for query i and key j.
RULES = {
    Causal(): lambda i, j: j <= i,
    Window(1): lambda i, j: j == i,
    Window(5): lambda i, j: i - 5 < j <= i,
    Window(6): lambda i, j: i - 6 < j <= i,
    Strided(1): lambda i, j: j <= i,
    Strided(4): lambda i, j: j <= i and (i - j < 4 or (i - j) % 4 == 0),
    Strided(5): lambda i, j: j <= i and (i - j < 5 or (i - j) % 5 == 0),
    Fixed(1, 1): lambda i, j: j <= i,
    Fixed(4, 1): lambda i, j: j <= i and (j // 4 == i // 4 or j % 4 >= 3),
    Fixed(5, 2): lambda i, j: j <= i and (j // 5 == i // 5 or j % 5 >= 3),
    Fixed(9, 1): lambda i, j: j <= i and (j // 9 == i // 9 or j % 9 >= 8),
    Window(7) & Fixed(4, 2): lambda i, j: i - 7 < j <= i and (j // 4 == i // 4 or j % 4 >= 2),
    Strided(3) & Fixed(5, 1): lambda i, j: (
        j <= i and (i - j < 3 or (i - j) % 3 == 0) and (j // 5 == i // 5 or j % 5 == 4)
    ),
}
LENGTHS = (1, 2, 7, 24, 29)

specs = pytest.mark.parametrize("spec", RULES, ids=str)


def double_loop(spec, length: int) -> np.ndarray:
    return np.array([[RULES[spec](i, j) for j in range(length)] for i in range(length)])


def matrix(spec, queries: Placement, keys: Placement | None = None) -> np.ndarray:
    return np.asarray(Mask(queries, keys or queries, spec, contiguous=False).matrix())


@pytest.mark.parametrize("spec", LITERAL, ids=str)
def test_the_matrix_is_the_one_written_by_hand(spec):
    rows = [[sign == "x" for sign in line] for line in LITERAL[spec].split()]
    np.testing.assert_array_equal(matrix(spec, whole_sequence(len(rows)))[0], rows)


@specs
def test_the_matrix_follows_the_rule_pair_by_pair(spec):
    np.testing.assert_array_equal(matrix(spec, whole_sequence(29))[0], double_loop(spec, 29))


@specs
def test_visible_keys_are_the_row_sums_of_the_matrix(spec):
    for length in LENGTHS:
        expected = double_loop(spec, length).sum(axis=1)
        np.testing.assert_array_equal(spec.visible_keys(length), expected)
        assert spec.mean_visible_keys(length) == expected.sum() / length


def test_counting_a_long_context_needs_no_matrix():
    for spec in (Causal(), Window(4096), Strided(128), Fixed(128, 8)):
        assert spec.visible_keys(1_000_000).shape == (1_000_000,)


def packed() -> Placement:
    """Returns three rows of 29: padding, then a document; three documents; two documents, then padding."""
    rows = [[(0, 4), (1, 25)], [(1, 1), (2, 13), (3, 15)], [(1, 9), (2, 14), (0, 6)]]  # (0: padding, length)
    positions = [[EMPTY if segment == 0 else i for segment, length in row for i in range(length)] for row in rows]
    segments = [[segment for segment, length in row for _ in range(length)] for row in rows]
    return Placement(jnp.array(positions), jnp.array(segments))


def test_padding_and_other_documents_are_invisible():
    placement = packed()
    positions, segments = np.asarray(placement.positions_BL), np.asarray(placement.segments_BL)
    for spec, rule in RULES.items():
        for row, mask in enumerate(matrix(spec, placement)):
            for i, j in np.ndindex(29, 29):
                query, key = positions[row, i], positions[row, j]
                both = query != EMPTY and key != EMPTY and segments[row, i] == segments[row, j]
                assert mask[i, j] == (both and rule(query, key))


def test_a_query_in_a_cache_sees_the_slots_by_their_positions():
    slots = Placement(jnp.array([[8, 9, 6, 7, EMPTY]]))
    np.testing.assert_array_equal(matrix(Window(3), Placement(jnp.array([[8]])), slots)[0], [[1, 0, 1, 1, 0]])


@specs
@pytest.mark.parametrize(
    "placement",
    [whole_sequence(29), packed(), Placement(jnp.arange(8, 37)[None])],
    ids=["whole", "packed", "from_position_8"],
)
def test_an_arrangement_computes_every_visible_pair_once_and_no_other(spec, placement):
    positions_BL = placement.positions_BL
    index_BL = jnp.broadcast_to(jnp.arange(29), positions_BL.shape)
    found = np.zeros((len(positions_BL), 29, 29), int)
    computed = 0
    for part, layout in spec.arrangement(29):

        def arrange(x, side, layout=layout):
            return layout.queries(x, EMPTY) if side == "queries" else layout.keys(x, positions_BL, EMPTY)

        def place(side, arrange=arrange):
            segments_BL = None if placement.segments_BL is None else arrange(placement.segments_BL, side)
            return Placement(arrange(positions_BL, side), segments_BL)

        mask = matrix(part, place("queries"), place("keys"))
        rows, groups, t, s = np.nonzero(mask)
        i, j = np.asarray(arrange(index_BL, "queries")), np.asarray(arrange(index_BL, "keys"))
        np.add.at(found, (rows, i[rows, groups, t], j[rows, groups, s]), 1)
        np.testing.assert_array_equal(layout.restore(layout.queries(index_BL), 29), index_BL)
        computed += mask[0].size
    np.testing.assert_array_equal(found, matrix(spec, placement).astype(int))
    assert spec.computed_keys(29) == computed / 29


@pytest.mark.parametrize(
    ("spec", "limit"),
    [(Window(256), 1.25 * 256), (Strided(64), 1.5 * 64 + 4096 / 64), (Fixed(64, 8), 1.5 * 64 + 4096 / 8 + 8)],
    ids=str,
)
def test_narrow_masks_compute_few_more_keys_than_they_show(spec, limit):
    assert spec.mean_visible_keys(4096) < spec.computed_keys(4096) <= limit


@pytest.mark.parametrize("spec", [Causal(), Window(29), Window(100), Strided(1), Strided(29), Fixed(3, 3)], ids=str)
def test_where_cutting_saves_nothing_all_pairs_are_computed_at_once(spec):
    assert spec.computed_keys(29) == 29
    assert [part for part, _ in spec.arrangement(29)] == [spec]


@pytest.mark.parametrize("spec", [Strided(4), Strided(7), Fixed(4, 1), Fixed(7, 2)], ids=str)
def test_two_sparse_layers_reach_everything_before(spec):
    once = double_loop(spec, 29) if spec in RULES else matrix(spec, whole_sequence(29))[0]
    np.testing.assert_array_equal(once @ once, np.tril(np.ones((29, 29), bool)))
    assert not once[20].all()


def test_a_window_reaches_one_token_less_than_its_size_a_layer():
    once = double_loop(Window(5), 29)
    np.testing.assert_array_equal(once @ once, matrix(Window(9), whole_sequence(29))[0])


def test_sparse_variants_are_frozen_dataclasses_that_a_config_can_name():
    assert SPARSE["strided"]() == Strided(stride=16)
    assert SPARSE["fixed"]() == Fixed(stride=16, summary=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), r"model\.window=0 must be at least 1, the token itself; try window=256\.$"),
        (lambda: Window(-3), r"model\.window=-3 must be at least 1"),
        (lambda: Strided(0), r"model\.sparse=strided\(stride=0\): stride must be at least 1; try strided\(stride=16\)"),
        (lambda: Fixed(0, 1), r"model\.sparse=fixed\(stride=0, summary=1\): stride must be at least 1; try fixed\("),
        (lambda: Fixed(8, 9), r"summary must be between 1 and stride=8; try summary=8\.$"),
        (lambda: Fixed(8, 0), r"fixed\(stride=8, summary=0\): summary must be between 1 and stride=8; try summary=1"),
    ],
)
def test_numbers_that_make_no_mask_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
