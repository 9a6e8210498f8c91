"""attend() against softmax written out in float64 for every mask spec, option and placement; and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax.model.attention.core import attend
from foundry_jax.model.mask import EMPTY, Causal, Fixed, Mask, Placement, Strided, Window, whole_sequence
from tests.test_mask import RULES, packed
from tests.variants import often

B, L, N, K, H, V = 3, 29, 6, 2, 4, 5  # V: head dim of the values
SCALE, SOFTCAP, SLOPES = 0.7, 1.5, np.array([0.5, 0.25, 0.1, 0.4, 0.2, 0.05])
SPECS = (Causal(), Window(1), Window(5), Strided(4), Fixed(4, 1), Fixed(5, 2), Window(7) & Fixed(4, 2))

specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def arrays(seed: int = 0, batch: int = B, length: int = L, num_heads: int = N, num_kv_heads: int = K, dtype=np.float32):
    """Returns random (q, k, v, dy); logits of a few units, so that no key is negligible and the soft-cap bends."""
    shapes = [(num_heads, H), (num_kv_heads, H), (num_kv_heads, V), (num_heads, V)]
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(batch, length, *shape)).astype(dtype) for shape in shapes)


def aligned(spec, placement: Placement | None, length: int = L) -> Mask:
    """Returns the mask of a sequence against itself; None: one document."""
    whole = placement is None
    placement = whole_sequence(length) if whole else placement
    return Mask(placement, placement, spec, contiguous=whole, aligned=True)


@functools.cache
def compiled(spec, softcap: float = 0.0, alibi: bool = False, whole: bool = False):
    """Returns the compiled (q, k, v, dy, placement) -> (y, gradients)."""

    @jax.jit
    def run(q, k, v, dy, placement=None):
        mask = aligned(spec, placement, q.shape[1])
        slopes_N = SLOPES if alibi else None
        y, pull = jax.vjp(lambda *x: attend(*x, mask, scale=SCALE, softcap=softcap, slopes_N=slopes_N), q, k, v)
        return y, pull(dy)

    return run


def reference(q, k, v, dy, mask_BLS, distance_BLS, softcap: float = 0.0, alibi: bool = False):
    """Returns (y, gradients) in float64, head by head and row by row; a query that sees nothing gets 0."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    y, dq, dk, dv = np.zeros(dy.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(q.shape[:3]):
        m = n // group
        seen = np.flatnonzero(mask_BLS[b, i])
        if len(seen) == 0:
            continue
        keys, values = k[b, seen, m], v[b, seen, m]
        logits, slope = SCALE * keys @ q[b, i, n], np.ones(len(seen))
        if softcap:
            slope = 1 - np.tanh(logits / softcap) ** 2
            logits = softcap * np.tanh(logits / softcap)
        if alibi:
            logits = logits + SLOPES[n] * distance_BLS[b, i, seen]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        y[b, i, n] = probs @ values
        dprobs = values @ dy[b, i, n]
        dlogits = probs * (dprobs - probs @ dprobs) * slope * SCALE
        dq[b, i, n] = dlogits @ keys
        dk[b, seen, m] += dlogits[:, None] * q[b, i, n]
        dv[b, seen, m] += probs[:, None] * dy[b, i, n]
    return y, (dq, dk, dv)


def dense(q, k, v, mask_BLS, distance_BLS):
    """Returns y_BLNH with soft-cap and ALiBi in the plainest jnp, every mask a matrix."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits_BNLS = SOFTCAP * jnp.tanh(SCALE * jnp.einsum("BLNH,BSNH->BNLS", q, k) / SOFTCAP)
    logits_BNLS += SLOPES.astype(np.float32)[None, :, None, None] * distance_BLS[:, None]
    probs_BNLS = jax.nn.softmax(jnp.where(mask_BLS[:, None], logits_BNLS, -1e9), axis=-1)
    return jnp.einsum("BNLS,BSNH->BLNH", jnp.where(mask_BLS[:, None], probs_BNLS, 0), v)


def pairs_of(spec, placement: Placement | None, length: int = L, batch: int = B) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mask_BLS by the rule of RULES, distance_BLS)."""
    placement = placement or whole_sequence(length)
    positions = np.broadcast_to(placement.positions_BL, (batch, length))
    segments = np.broadcast_to(0 if placement.segments_BL is None else placement.segments_BL, (batch, length))
    mask = np.zeros((batch, length, length), bool)
    for b, i, j in np.ndindex(mask.shape):
        query, key = positions[b, i], positions[b, j]
        mask[b, i, j] = EMPTY not in (query, key) and segments[b, i] == segments[b, j] and RULES[spec](query, key)
    return mask, positions[:, None, :] - positions[:, :, None]


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@specs
@pytest.mark.parametrize(
    ("softcap", "alibi"), often([(0.0, False), (0.0, True), (SOFTCAP, False), (SOFTCAP, True)], [(SOFTCAP, True)])
)
def test_packed_and_padded_rows_equal_softmax_written_out(spec, softcap, alibi):
    found = compiled(spec, softcap, alibi)(*arrays(), packed())
    assert_close(found, reference(*arrays(), *pairs_of(spec, packed()), softcap, alibi))


def test_the_gradient_written_out_is_that_of_differentiating_the_plainest_softmax():
    q, k, v, dy = arrays()
    pairs = pairs_of(Strided(4), packed())
    y, pull = jax.vjp(jax.jit(lambda *x: dense(*x, *pairs)), q, k, v)
    assert_close((y, pull(dy)), reference(q, k, v, dy, *pairs, SOFTCAP, alibi=True))


@specs
def test_whole_sequences_equal_softmax_written_out(spec):
    assert_close(compiled(spec)(*arrays()), reference(*arrays(), *pairs_of(spec, None)))


@pytest.mark.parametrize("spec", [Window(5), Strided(4), Fixed(4, 1)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [{"length": 1}, {"length": 3}, {"length": 24, "num_kv_heads": 6}, {"length": 31, "num_kv_heads": 1}],
    ids=str,
)
def test_any_length_and_any_number_of_key_heads(spec, sizes):
    inputs = arrays(**sizes)
    assert_close(compiled(spec)(*inputs), reference(*inputs, *pairs_of(spec, None, sizes["length"])))


@pytest.mark.parametrize("spec", [Window(5), Strided(4), Fixed(4, 1)], ids=str)
def test_a_row_may_start_in_the_middle_of_a_document(spec):
    placement = Placement(jnp.arange(L)[None] + 7)
    assert_close(compiled(spec)(*arrays(), placement), reference(*arrays(), *pairs_of(spec, placement)))


def test_queries_at_the_end_of_a_cache_read_it_by_position():
    q, k, v, dy = arrays()
    slots = Placement(jnp.array([[5, 6, 7, 8, 9, EMPTY, 2, 3, 4]]))
    queries = Placement(jnp.array([[8, 9]]))
    mask = Mask(queries, slots, Window(5), contiguous=False, aligned=False)
    y = attend(q[:, :2], k[:, :9], v[:, :9], mask, scale=SCALE, slopes_N=SLOPES)
    query, key = np.array([8, 9])[:, None], np.array(slots.positions_BL)
    visible = np.broadcast_to((key <= query) & (query - key < 5) & (key >= 0), (B, 2, 9))
    distance = np.broadcast_to(key - query, (B, 2, 9))
    expected, _ = reference(q[:, :2], k[:, :9], v[:, :9], dy[:, :2], visible, distance, alibi=True)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@specs
@pytest.mark.parametrize("t", [0, 4, 17, L - 1])
def test_changing_a_token_leaves_all_earlier_outputs_bit_equal(spec, t):
    inputs, others = arrays(), arrays(seed=1)
    changed = [x.copy() for x in inputs]
    for x, other in zip(changed[:3], others[:3], strict=True):
        x[:, t] = 1e3 * other[:, t]
    before, after = compiled(spec)(*inputs)[0], compiled(spec)(*changed)[0]
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert (before[:, t] != after[:, t]).any(axis=(1, 2)).all()


@specs
def test_documents_and_rows_do_not_reach_each_other_in_either_direction(spec):
    inputs, others = arrays(), arrays(seed=1)
    document = np.asarray((packed().segments_BL == 2) & (np.arange(B)[:, None] == 1))
    changed = [np.where(document[..., None, None], other, x) for x, other in zip(inputs, others, strict=True)]
    before, after = (compiled(spec)(*x, packed()) for x in (inputs, changed))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[~document], b[~document]), before, after)


@specs
def test_padding_gives_zero_and_passes_nothing_on(spec):
    padding = np.asarray(packed().positions_BL == EMPTY)
    inputs, others = arrays(), arrays(seed=1)
    garbage = [np.where(padding[..., None, None], 1e4 * other, x) for x, other in zip(inputs, others, strict=True)]
    clean, dirty = compiled(spec)(*inputs, packed()), compiled(spec)(*garbage, packed())
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for x in jax.tree.leaves(clean):
        assert np.isfinite(x).all()
        assert not x[padding].any()


def test_bfloat16_keeps_its_dtype_and_stays_close_to_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    y, gradients = compiled(Strided(4))(*half)
    assert {x.dtype for x in (y, *gradients)} == {jnp.dtype("bfloat16")}
    expected = compiled(Strided(4))(*(x.astype(jnp.float32) for x in half))
    for a, b in zip(jax.tree.leaves((y, gradients)), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.02 * jnp.abs(b).max()  # three roundings to 8 bits


def test_many_members_at_once_equal_one_after_another():
    members = [arrays(seed) for seed in (0, 1)]
    together = jax.vmap(compiled(Strided(4)))(*(jnp.stack(x) for x in zip(*members, strict=True)))
    apart = [compiled(Strided(4))(*member) for member in members]
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *apart))


@pytest.mark.parametrize("spec", [Causal(), Window(5), Window(L)], ids=str)
def test_a_gpu_computes_whole_sequences_in_half_precision_with_the_fused_kernel(spec, monkeypatch):
    calls, attention = [], jax.nn.dot_product_attention

    def fused(q, k, v, *, implementation, **options):
        calls.append(implementation)
        return attention(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, L, heads, 8)), jnp.bfloat16) for heads in (N, K, K))
    whole, placed = (
        jax.jit(lambda *x, p=p: attend(*x, aligned(spec, p), scale=SCALE)) for p in (None, whole_sequence(L))
    )
    np.testing.assert_allclose(whole(q, k, v).astype(np.float32), placed(q, k, v).astype(np.float32), atol=0.05)
    assert calls == ["cudnn"]
    others = [
        (jnp.float32, spec, 8, {}),
        (jnp.bfloat16, spec & Causal(), 8, {}),
        (jnp.bfloat16, spec, 5, {}),
        (jnp.bfloat16, spec, 8, {"softcap": SOFTCAP}),
        (jnp.bfloat16, spec, 8, {"slopes_N": SLOPES}),
    ]
    for dtype, other, value_dim, options in others:
        run = functools.partial(attend, mask=aligned(other, None), scale=SCALE, **options)
        jax.eval_shape(run, q.astype(dtype), k.astype(dtype), v[..., :value_dim].astype(dtype))
    assert calls == ["cudnn"]


SLOTS = 600  # more than two blocks of a cache, and no multiple of one


def cached(spec, queries_BL, slots_BS, k, v, q, **options):
    mask = Mask(Placement(queries_BL), Placement(slots_BS), spec, contiguous=False, aligned=False)
    return jax.jit(lambda *x: attend(*x, mask, scale=SCALE, **options))(q, k, v)


def long_cache(length: int = SLOTS):
    """Returns (queries, slots, arrays): rows at the end of a cache, near its beginning, and nowhere."""
    slots = np.full((B, length), EMPTY, np.int32)
    slots[0, :SLOTS], slots[1, :20] = np.arange(SLOTS), np.arange(20)
    queries = np.array([[597, 598, 599], [17, 18, EMPTY], [EMPTY] * 3], np.int32)
    q, k, v, _ = arrays(length=SLOTS)
    grown = [np.pad(x, [(0, 0), (0, length - SLOTS), (0, 0), (0, 0)], constant_values=7.0) for x in (k, v)]
    return queries, slots, (q[:, :3], *grown)


@specs
@pytest.mark.parametrize("alibi", [False, True])
def test_a_long_cache_is_read_block_by_block(spec, alibi):
    queries, slots, (q, k, v) = long_cache()
    slots[1, 300:400] = np.arange(500, 600)  # what a longer text has left behind
    options = {"softcap": SOFTCAP, "slopes_N": SLOPES if alibi else None}
    found = cached(spec, queries, slots, k, v, q, **options)
    visible = np.zeros((B, 3, SLOTS), bool)
    for b, i, j in np.ndindex(visible.shape):
        visible[b, i, j] = EMPTY not in (queries[b, i], slots[b, j]) and RULES[spec](queries[b, i], slots[b, j])
    expected, _ = reference(
        q, k, v, np.zeros((B, 3, N, V)), visible, slots[:, None] - queries[:, :, None], SOFTCAP, alibi
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@specs
def test_no_bit_depends_on_the_length_of_the_cache_or_on_the_other_rows(spec):
    queries, slots, (q, k, v) = long_cache()
    expected = cached(spec, queries, slots, k, v, q)[1]
    for length in (512, 768, 1024):
        queries, slots, (q, k, v) = long_cache(max(length, SLOTS))
        slots, k, v = (x[:, :length] for x in (slots, k, v))
        np.testing.assert_array_equal(cached(spec, queries, slots, k, v, q)[1], expected)
        queries[0] = EMPTY
        np.testing.assert_array_equal(cached(spec, queries, slots, k, v, q)[1], expected)


@pytest.mark.parametrize(("spec", "first"), [(Causal(), 0), (Window(5), 512)], ids=str)
def test_blocks_that_nobody_sees_are_not_read(spec, first):
    queries, slots, (q, k, v) = long_cache(1024)
    queries[1], slots[1] = EMPTY, EMPTY
    for x in (k, v):
        x[:, :first], x[:, 768:] = np.nan, np.nan
    assert np.isfinite(cached(spec, queries, slots, k, v, q)).all()
    k[0, max(first, 255)] = np.nan
    assert np.isfinite(cached(spec, queries, slots, k, v, q)).all() == (first == 512)


LONG = 4096


@functools.cache
def long_program(spec):
    """Returns (lowered text, FLOPs, temporary bytes) of forward and backward over 4096 tokens; nothing is run."""
    shapes = [(8, 64), (2, 64), (2, 64), (8, 64)]
    inputs = [jax.ShapeDtypeStruct((1, LONG, *shape), jnp.float32) for shape in shapes]
    lowered = compiled(spec).lower(*inputs)
    program = lowered.compile()
    return lowered.as_text(), program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("spec", [Window(256), Strided(64), Fixed(64, 8)], ids=str)
def test_a_narrow_mask_costs_what_it_computes_and_makes_no_square_matrix(spec):
    full_text, full_flops, full_temporary = long_program(Causal())
    text, flops, temporary = long_program(spec)
    assert flops < 0.2 * full_flops
    assert flops / full_flops == pytest.approx(spec.computed_keys(LONG) / LONG, rel=0.1)
    square = f"{LONG}x{LONG}x"
    assert square in full_text
    assert square not in text
    assert temporary < 0.25 * full_temporary
    assert temporary < 8 * LONG * LONG * 4  # bytes of the probabilities of all pairs
