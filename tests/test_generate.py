"""Generation: what the cache writes is what full forward passes would, whoever stands beside it; draws; programs."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import generate as generation
from foundry_jax import sharding
from foundry_jax.config import ShardingConfig
from foundry_jax.errors import UserError
from foundry_jax.generate import Prompt, Reader, Sampling, continued, generate, left_over, sample, stream
from tests.variants import VOCAB, forward, often, params_of, tiny

NEW = 9
LENGTHS = (1, 11, 4)  # the longest is longer than the window of 3, the shortest shorter
ROOM = 40  # tokens of a full forward pass, prompt and all that is new
COMPILED = []  # an entry for each program that reads or writes tokens


def _note(event: str, _: float, fun_name: str = "", **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and fun_name == "jit(_advance)":
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_note)


def prompts_of(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def by_full_passes(config, variables, prompt: list[int], number: int = NEW, room: int = ROOM) -> list[int]:
    """Returns the greedy continuation without any cache; what follows the text cannot be seen by it."""
    tokens = list(prompt)
    for _ in range(number):
        padded = np.zeros((1, room), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(forward(config)(variables, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@functools.cache
def model(variant: str, **changes):
    config = tiny(variant, context_length=ROOM, **changes)
    return config, params_of(config)


@pytest.mark.parametrize(
    "variant",
    often(
        ["gqa", "mla", "window", "window_and_full", "fixed", "alibi", "learned", "nope", "moe_softmax"],
        {"gqa", "mla", "window_and_full", "learned"},
    ),
)
def test_greedy_is_the_argmax_of_full_forward_passes_for_every_row_of_a_batch(variant):
    config, variables = model(variant)
    prompts = prompts_of()
    expected = [by_full_passes(config, variables, prompt) for prompt in prompts]
    assert generate(config, variables, prompts, max_tokens=NEW) == expected
    assert len({token for row in expected for token in row}) > 3  # not one token over and over


def test_a_prompt_is_continued_alike_alone_and_in_company():
    config, variables = model("window_and_full")
    prompts = prompts_of()
    together = generate(config, variables, prompts, max_tokens=NEW)
    alone = [generate(config, variables, [prompt], max_tokens=NEW)[0] for prompt in prompts]
    assert together == alone


def test_scanned_layers_write_the_same():
    config, variables = model("window_and_full", scan_layers=True, num_layers=4)
    prompts = prompts_of()
    assert generate(config, variables, prompts, max_tokens=NEW) == [
        by_full_passes(config, variables, prompt) for prompt in prompts
    ]


@pytest.mark.parametrize("variant", ["gqa", "window"])
def test_a_long_prompt_is_read_in_pieces(monkeypatch, variant):
    monkeypatch.setattr(generation, "PIECE", 32)
    config, variables = model(variant)
    prompts = prompts_of((70, 3))  # four pieces, of which the second row fills only the last
    expected = [by_full_passes(config, variables, prompt, 3, room=80) for prompt in prompts]
    assert generate(config, variables, prompts, max_tokens=3) == expected


def test_writing_ends_at_a_stop_id_in_each_row_by_itself():
    config, variables = model("gqa")
    prompts = prompts_of()
    whole = generate(config, variables, prompts, max_tokens=NEW)
    stop = whole[0][4]
    cut = generate(config, variables, prompts, max_tokens=NEW, stop_ids=[stop])
    assert cut == [list(itertools.takewhile(lambda token: token != stop, row)) for row in whole]
    assert len(cut[0]) <= 4
    every = generate(config, variables, prompts, max_tokens=NEW, stop_ids=range(VOCAB))
    assert every == [[], [], []]


def test_no_token_is_written_where_none_is_asked_for():
    config, variables = model("gqa")
    assert generate(config, variables, prompts_of(), max_tokens=0) == [[], [], []]


def test_ids_come_one_by_one():
    config, variables = model("gqa")
    prompts = prompts_of()
    steps = list(stream(config, variables, prompts, max_tokens=NEW))
    assert [step.shape for step in steps] == [(3,)] * NEW
    assert np.stack(steps, axis=1).tolist() == generate(config, variables, prompts, max_tokens=NEW)


def test_a_seed_gives_the_same_text_again_and_another_one_another():
    config, variables = model("gqa")
    prompts = prompts_of()

    def draw(**options):
        return generate(config, variables, prompts, max_tokens=NEW, sampling=Sampling(temperature=1.0, **options))

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert draw(seed=3, top_k=5, top_p=0.9) == draw(seed=3, top_k=5, top_p=0.9)


def test_the_likeliest_of_one_is_greedy():
    config, variables = model("gqa")
    prompts = prompts_of()
    greedy = generate(config, variables, prompts, max_tokens=NEW)
    for sampling in (Sampling(temperature=3.0, top_k=1), Sampling(temperature=3.0, top_p=1e-6)):
        assert generate(config, variables, prompts, max_tokens=NEW, sampling=sampling) == greedy


def test_what_top_k_and_top_p_leave_is_what_numpy_says():
    rng = np.random.default_rng(0)
    logits = -np.sort(-rng.normal(0, 3, (50, 23)).astype(np.float32), axis=-1)
    for top_k, top_p in itertools.product((1, 2, 7, 23), (1e-6, 0.3, 0.8, 1.0)):
        kept = np.isfinite(left_over(jnp.asarray(logits), top_k, top_p))
        for row, found in zip(logits, kept, strict=True):
            probs = np.exp(row[:top_k] - row.max())
            sums = np.cumsum(probs / probs.sum())
            # The fewest that reach top_p: all before it is reached, and the one that reaches it.
            expected = top_k if top_p == 1 else min(np.searchsorted(sums, top_p) + 1, top_k)
            assert found.tolist() == [True] * expected + [False] * (23 - expected)


def test_of_equal_logits_no_more_than_top_k_are_drawn():
    draw = functools.partial(sample, jnp.zeros((500, 7)), restricted=True)
    found = np.asarray(draw(generation._Draw.of(Sampling(temperature=1.0, top_k=3), 7, 0)))
    assert set(found.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.7}])
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    draws, temperature = 4000, 1.7
    logits = np.array([0.3, 2.0, -1.0, 1.1, 0.0, -3.0], np.float32)
    sampling = Sampling(temperature=temperature, seed=5, **options)
    step = generation._Draw.of(sampling, len(logits), 3)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    found = np.bincount(sample(rows, step, restricted=sampling.kind == "restricted"), minlength=len(logits)) / draws
    order = np.argsort(-logits)
    probs = np.exp(logits[order] / temperature)
    probs[options.get("top_k", 6) :] = 0
    probs /= probs.sum()
    probs[1 + np.searchsorted(np.cumsum(probs), options.get("top_p", 1.0)) :] = 0
    expected = np.zeros(len(logits))
    expected[order] = probs / probs.sum()
    assert np.all((found > 0) <= (expected > 0))
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(draws))  # four standard deviations


def test_few_programs_serve_many_lengths_and_all_numbers():
    config, variables = model("gqa", mlp_dim=24)  # a model of its own: programs are counted by it

    def run(lengths, **options):
        generate(config, variables, prompts_of(lengths), max_tokens=NEW, sampling=Sampling(**options))
        return len(COMPILED)

    start = len(COMPILED)
    assert run((3, 5)) == start + 2  # one reads prompts, one writes
    assert run((21, 14)) == start + 2
    drawn = run((3, 5), temperature=0.5)
    assert drawn == start + 4
    assert run((3, 5), temperature=0.9, seed=9) == drawn
    assert run((3, 5), temperature=0.9, top_k=3) == run((3, 5), temperature=0.1, top_p=0.3, top_k=9) == drawn + 2


@pytest.mark.parametrize(
    ("variant", "strategy", "tensor"),
    [
        ("gqa", "fsdp", 2),
        *[
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("window_and_full", "ddp", 1), ("moe_softmax", "fsdp", 1), ("mla", "fsdp", 1))
        ],
    ],
)
def test_eight_devices_write_what_one_writes(monkeypatch, variant, strategy, tensor):
    monkeypatch.setattr(generation, "PIECE", 32)
    config, variables = model(variant, model_dim=24, mlp_dim=32)
    prompts = prompts_of((1, 36, 4))  # three rows, which eight devices do not divide among themselves; two pieces
    expected = generate(config, variables, prompts, max_tokens=NEW)
    plan = sharding.plan(1000, 8, ShardingConfig(strategy=strategy, fsdp_min_params=1, data=0, fsdp=0, tensor=tensor))
    start = len(COMPILED)
    boxed = jax.eval_shape(functools.partial(generation.transformer.init_params, config), jax.random.key(0))
    placed = {"params": jax.device_put(variables["params"], plan.shardings(boxed))}
    with plan.context():
        found = [generate(config, placed, prompts, max_tokens=NEW) for _ in range(2)]
    assert found == [expected, expected]
    assert len(COMPILED) == start + 2


def test_no_device_holds_the_whole_cache():
    config, variables = model("window_and_full", scan_layers=True, num_layers=4)
    plan = sharding.plan(1000, 8, ShardingConfig(strategy="fsdp", fsdp_min_params=1, data=0, fsdp=0, tensor=2))
    with plan.context():
        cache = generation._empty_cache(variables, config=config, batch=4, length=32)
    for x in jax.tree.leaves(cache.layers):
        assert x.addressable_shards[0].data.size == x.size // 8, x.sharding


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "There is no prompt to continue"),
        ([[1], []], "A prompt must have at least one token"),
        ([[1, VOCAB]], f"Token id {VOCAB} in a prompt is none of the model's, 0 to {VOCAB - 1}"),
        ([[1, -1]], "Token id -1 in a prompt"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_one_line(prompts, message):
    config, variables = model("gqa")
    with pytest.raises(UserError, match=message):
        generate(config, variables, prompts, max_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be a finite number between"),
        ({"top_k": -1}, "top_k=-1 must be"),
    ],
)
def test_a_wrong_number_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_learned_positions_end_where_they_end():
    config, variables = model("learned")
    assert len(generate(config, variables, prompts_of((30,)), max_tokens=ROOM - 30)[0]) == ROOM - 30
    with pytest.raises(UserError, match=f"A cache of 41 tokens needs model.context_length=41, not {ROOM}"):
        generate(config, variables, prompts_of((30,)), max_tokens=11)


def test_a_text_longer_than_the_context_is_warned_about(caplog):
    config, variables = model("gqa")
    with caplog.at_level(logging.WARNING):
        generate(config, variables, prompts_of((30,)), max_tokens=10)
        assert not caplog.records
        generate(config, variables, prompts_of((30,)), max_tokens=11)
        assert "now longer than the model's 40 tokens" in caplog.text


def written(config, variables, prompts, *, max_tokens, rows=2, reader_rows=1, is_end=lambda index, token: False):
    """Returns what `continued` writes after each prompt, and the order in which they were finished."""
    reader = Reader(config, variables, reader_rows, ROOM)
    wanted = [Prompt(np.array(ids, np.int32), max_tokens) for ids in prompts]
    found = dict(continued(wanted, reader, rows=rows, is_end=is_end))
    return [found[i] for i in range(len(prompts))], list(found)


@pytest.mark.parametrize(
    "variant",
    often(
        ["gqa", "mla", "window", "window_and_full", "fixed", "alibi", "learned", "nope", "moe_softmax"],
        {"mla", "window_and_full"},
    ),
)
def test_rows_that_take_one_prompt_after_another_write_what_generate_writes(monkeypatch, variant):
    monkeypatch.setattr(generation, "CHUNK", 8)
    config, variables = model(variant)
    prompts = prompts_of((1, 25, 4, 17, 9, 8, 2))
    expected = generate(config, variables, prompts, max_tokens=NEW)
    assert written(config, variables, prompts, max_tokens=NEW)[0] == expected
    assert written(config, variables, prompts, max_tokens=NEW, rows=3, reader_rows=4)[0] == expected


def test_a_row_that_has_finished_takes_the_next_prompt():
    config, variables = model("gqa")
    prompts, asked = prompts_of((5, 6, 7, 8)), []
    whole = generate(config, variables, prompts, max_tokens=NEW)
    first = min(range(4), key=lambda i: np.array(prompts[i], ">i4").tobytes())

    def is_end(index, token):
        asked.append((index, token))
        return index != first and token == whole[index][1]

    found, order = written(config, variables, prompts, max_tokens=NEW, is_end=is_end)
    for i in range(4):
        ended = whole[i].index(whole[i][1]) + 1
        assert found[i] == (whole[i] if i == first else whole[i][:ended])
        assert [token for index, token in asked if index == i] == found[i]
    assert order[-1] == first  # the others went through the other row meanwhile


def test_only_what_differs_is_read(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 8)
    config, variables = model("gqa")
    shared = prompts_of((25,))[0]
    prompts = [[*shared, i] for i in range(4)]
    chunks, read = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, work: chunks.append(len(work)) or read(self, work))
    found, _ = written(config, variables, prompts, max_tokens=3)
    assert found == generate(config, variables, prompts, max_tokens=3)
    assert len(chunks) == 4 + 3 * 1  # 25 tokens are 4 chunks, of which 3 whole ones are the same in all
