"""The scorer: what lm-eval means by a request, numbers of the full forward pass, bits that are the request's own."""

import collections
import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from foundry_jax import generate, sharding, zoo
from foundry_jax.config import ShardingConfig
from foundry_jax.data.tokenize import BPETokenizer, ByteTokenizer, CharTokenizer
from foundry_jax.errors import UserError
from foundry_jax.generate import CHUNK, Reader, Sampling
from foundry_jax.tasks import scoring
from foundry_jax.tasks.encoding import Encoder
from foundry_jax.tasks.requests import Continuation, Generation
from foundry_jax.tasks.scoring import Scorer, fitting_rows
from foundry_jax.zoo.pretrained import Pretrained
from tests import checkpoints
from tests.variants import forward, often, params_of, tiny

CONTEXT = 700  # tokens; more than two blocks of a cache
VARIANTS = ("gqa", "mla", "window", "window_and_full", "strided", "alibi", "learned", "moe_softmax")
COMMON = ("gqa", "mla", "window_and_full", "moe_softmax")
ATOL = 1e-4  # nats, of up to 300 tokens of 5 nats each; one position that is off by one moves it by more than 1

COMPILED = []  # an entry for each program


def _note(event: str, _: float, fun_name: str = "", **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_note)


@functools.cache
def model(variant: str = "gqa", **changes) -> Pretrained:
    """Returns a random model of bytes."""
    config = tiny(variant, **{"vocab_size": 257, "context_length": CONTEXT, "window": 70} | changes)
    return Pretrained("tiny", config, params_of(config)["params"], ByteTokenizer(), (256,), None)


def placed(model: Pretrained, strategy: str, devices: int, tensor: int = 1) -> Pretrained:
    """Returns a model laid out over some devices."""
    settings = ShardingConfig(strategy=strategy, fsdp_min_params=1, data=0, fsdp=0, tensor=tensor)
    plan = sharding.plan(1000, devices, settings)
    boxed = jax.eval_shape(functools.partial(generate.transformer.init_params, model.config), jax.random.key(0))
    return dataclasses.replace(model, params=jax.device_put(model.params, plan.shardings(boxed)), plan=plan)


def text(size: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list("abcdefgh ,.\n"), size))


def questions(shots: int = 3 * CHUNK + 9) -> list[Continuation]:
    """Returns the choices of two groups of questions, each group after the same examples; as MMLU asks."""
    found = []
    for group, question in itertools.product(range(2), range(3)):
        prompt = text(shots, seed=group) + text(20 + 30 * question, seed=10 + question) + "?\nAnswer:"
        found += [Continuation(prompt, f" {letter}") for letter in "AB"]
    return found


def mixed() -> list[Continuation]:
    """Returns requests of all kinds: long and short, alike and not, one with a context in a context."""
    whole = text(400, seed=3)
    return [
        *questions(),
        Continuation("", "no context at all"),
        Continuation("short", " and shorter"),
        Continuation(whole[:300], whole[300:]),
        Continuation(whole[:40], whole[40:350]),
        Continuation(whole[:300], whole[300:302]),
    ]


def written_out(model: Pretrained, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Returns (log-probability, is greedy) by one full forward pass, softmax in float64."""
    ids = [*context, *continuation]
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(model.config)(model.variables, padded)[0], np.float64)
    rows = logits[len(context) - 1 : len(ids) - 1]
    log_probs = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= rows.max(-1, keepdims=True)
    return log_probs[np.arange(len(continuation)), continuation].sum(), rows.argmax(-1).tolist() == continuation


# ------------------------------------------------------------------------------------------------ what a request means


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def bpe(folder) -> Encoder:
    return Encoder(BPETokenizer.load(folder / "tokenizer.json"), (0,), "tiny")


def ids_of(encoder: Encoder, string: str) -> list[int]:
    return encoder.encode([string])[0].tolist()


def pair(encoder: Encoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
    [(a, b)] = encoder.pairs([Continuation(context, continuation)])
    return a.tolist(), b.tolist()


def test_white_space_that_ends_a_context_belongs_to_the_continuation(bpe):
    for space in (" ", "  ", "\n\n", " \n\t"):
        assert pair(bpe, f"the model{space}", "mother") == pair(bpe, "the model", f"{space}mother")
    context, continuation = pair(bpe, "the model ", "mother")
    assert (context, continuation) == (ids_of(bpe, "the model"), ids_of(bpe, " mother"))
    assert continuation != ids_of(bpe, "mother")


def test_both_are_encoded_as_one_text_and_a_token_of_both_is_the_contexts(bpe):
    whole = ids_of(bpe, "the mother of")
    assert whole != ids_of(bpe, "the mot") + ids_of(bpe, "her of")
    context, continuation = pair(bpe, "the mot", "her of")
    assert context == ids_of(bpe, "the mot")
    assert continuation == whole[len(context) :]


def test_a_continuation_without_a_token_of_its_own_is_refused(bpe):
    assert len(ids_of(bpe, " mother")) == len(ids_of(bpe, " mothe")) - 1 or ids_of(bpe, "th") != ids_of(bpe, "t")
    for context, continuation in (("the", ""), ("", ""), ("t", "he")):
        with pytest.raises(UserError, match=re.escape(f"{continuation!r} has no token of its own after {context!r}")):
            pair(bpe, context, continuation)


def test_an_empty_context_is_the_first_token_of_a_text(bpe):
    assert pair(bpe, "", "the model") == ([0], ids_of(bpe, "the model"))
    assert pair(bpe, " \n", "the model") == ([0], ids_of(bpe, " \nthe model"))
    assert pair(bpe, "", "<|endoftext|>the model") == ([0], ids_of(bpe, "the model"))


def test_without_a_first_or_last_token_there_must_be_a_context():
    encoder = Encoder(CharTokenizer("abc"), (), "tiny")
    assert pair(encoder, "a", "bc") == ([0], [1, 2])
    with pytest.raises(
        UserError, match="the tokenizer of tiny has neither a token that begins a text nor one that ends"
    ):
        pair(encoder, "", "bc")


def test_text_that_spells_a_control_token_is_that_token(bpe, folder):
    plain = BPETokenizer.load(folder / "tokenizer.json")
    assert (
        ids_of(bpe, "a<|im_end|>")
        == [*plain.encode("a"), plain.control_ids["<|im_end|>"]]
        != plain.encode("a<|im_end|>")
    )


@pytest.fixture(scope="module")
def templated(folder, tmp_path_factory) -> Encoder:
    """A tokenizer that puts <|im_start|> before every text, as Llama 3's does its <|begin_of_text|>."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = ("<|im_start|>", backend.token_to_id("<|im_start|>"))
    backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    where = tmp_path_factory.mktemp("templated") / "tokenizer.json"
    backend.save(str(where))
    return Encoder(BPETokenizer.load(where), (0,), "tiny")


def test_what_a_tokenizer_puts_before_a_text_is_there_once(templated, bpe):
    [first] = templated._tokenizer.start_ids
    assert templated.prefix_id == first != 0
    assert ids_of(templated, "the model") == [first, *ids_of(bpe, "the model")]
    assert ids_of(templated, "<|im_start|>the model") == [first, *ids_of(bpe, "the model")]
    assert pair(templated, "the", " model") == ([first, *ids_of(bpe, "the")], ids_of(bpe, " model"))
    assert pair(templated, "", "the model") == ([first], ids_of(bpe, "the model"))


def test_long_texts_are_scored_in_windows_each_token_once():
    encoder = Encoder(ByteTokenizer(), (256,), "tiny")
    found = [(a.tolist(), b.tolist()) for a, b in encoder.windows("0123456789", 4)]
    code = [ord(character) for character in "0123456789"]
    assert found == [([256], code[:4]), (code[3:4], code[4:8]), (code[5:8], code[8:])]  # lm-eval's own example
    assert encoder.windows("", 4) == []
    for size, length in itertools.product((1, 3, 4, 5, 8, 9), (1, 2, 4)):
        windows = encoder.windows("x" * size, length)
        assert sum(len(b) for _, b in windows) == size
        assert all(len(a) >= 1 and len(a) + len(b) <= length + 1 for a, b in windows)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("variant", often(VARIANTS, COMMON))
def test_scores_are_those_of_a_full_forward_pass(variant):
    scorer, requests = Scorer(model(variant)), mixed()
    for request, score in zip(requests, scorer.loglikelihood(requests), strict=True):
        [(context, continuation)] = scorer._encoder.pairs([request])
        expected, is_greedy = written_out(model(variant), context.tolist(), continuation.tolist())
        assert score.log_prob == pytest.approx(expected, abs=ATOL)
        assert (score.is_greedy, score.num_tokens) == (is_greedy, len(continuation))
    assert scorer.truncated == 0


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest():
    prompt = np.arange(90, 110, dtype=np.int32)
    likely = np.array(model().generate_ids([prompt], max_tokens=12)[0], np.int32)
    assert len(likely) == 12
    other = likely.copy()
    other[5] ^= 1
    scores = Scorer(model())._scores([(prompt, likely), (prompt, other)], range(2), lambda _: None)
    assert [score.is_greedy for score in scores] == [True, False]


def exact(scores) -> list[tuple]:
    return [(score.log_prob.hex(), score.is_greedy, score.num_tokens) for score in scores]


@pytest.mark.parametrize("variant", often(VARIANTS, COMMON))
def test_every_bit_of_a_score_is_the_requests_own(variant):
    requests = mixed()
    expected = exact(Scorer(model(variant), batch_size=1).loglikelihood(requests))
    for batch_size in (3, 8):
        assert exact(Scorer(model(variant), batch_size=batch_size).loglikelihood(requests)) == expected
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = exact(Scorer(model(variant)).loglikelihood([requests[i] for i in order]))
    assert shuffled == [expected[i] for i in order]
    scorer = Scorer(model(variant))
    alone = [exact(scorer.loglikelihood([request]))[0] for request in reversed(requests)]
    assert alone[::-1] == expected


def test_other_requests_may_need_longer_caches_without_changing_a_bit():
    short, long = mixed()[:4], Continuation(text(600, seed=8), " end")
    assert exact(Scorer(model()).loglikelihood(short)) == exact(Scorer(model()).loglikelihood([*short, long])[:4])


def test_rows_that_stand_beside_each_other_do_not_change_a_bit(monkeypatch):
    """As on an accelerator, where a Reader has several rows."""
    monkeypatch.setattr(scoring, "batch_shards", lambda: 8)
    requests, scorer = mixed(), Scorer(model())
    expected = exact(scorer.loglikelihood(requests))
    order = np.random.default_rng(1).permutation(len(requests))
    assert exact(Scorer(model()).loglikelihood([requests[i] for i in order])) == [expected[i] for i in order]
    assert [exact(scorer.loglikelihood([request]))[0] for request in requests] == expected


def test_requests_that_are_too_long_lose_their_beginning_and_are_counted(caplog):
    scorer, whole = Scorer(model(), max_length=100), text(250)
    requests = [Continuation(whole[: 101 - 7], whole[101 - 7 : 101]), Continuation(whole[:200], whole[200:230])]
    fits, cut = scorer.loglikelihood(requests)
    assert scorer.truncated == 1
    assert "1 requests are longer than 100 tokens and lose their beginning" in caplog.text
    ids = list(whole.encode())
    assert fits.log_prob == pytest.approx(written_out(model(), ids[:94], ids[94:101])[0], abs=ATOL)
    assert cut.log_prob == pytest.approx(written_out(model(), ids[129:200], ids[200:230])[0], abs=ATOL)


def test_a_whole_text_is_the_sum_of_its_windows():
    scorer, texts = Scorer(model(), max_length=90), [text(200, seed=1), "", text(90, seed=2), text(91, seed=3)]
    found = scorer.loglikelihood_rolling(texts)
    for string, total in zip(texts, found, strict=True):
        windows = [(a.tolist(), b.tolist()) for a, b in scorer._encoder.windows(string, 90)]
        assert total == pytest.approx(sum(written_out(model(), a, b)[0] for a, b in windows), abs=ATOL)
    assert found[1] == 0.0 and scorer.truncated == 0


def test_progress_counts_every_request_once():
    for ask, requests in (
        (Scorer(model()).loglikelihood, [*mixed(), *mixed()[:3]]),
        (Scorer(model(), max_length=50).loglikelihood_rolling, [text(120), "", text(20)]),
        (Scorer(model()).generate_until, [Generation("ab", (), 3), Generation("b", (), 0), Generation("c", (), 5)]),
    ):
        counts = []
        ask(requests, counts.append)
        assert sum(counts) == len(requests) and min(counts) >= 0


# ------------------------------------------------------------------------------------------------ work


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The number of chunks of each step of a Reader."""
    found, read = [], Reader.read

    def counted(self, work):
        found.append(sum(item is not None for item in work))
        return read(self, work)

    monkeypatch.setattr(Reader, "read", counted)
    return found


def test_what_questions_have_in_common_is_read_once(reads):
    scorer, requests = Scorer(model()), questions()
    pairs = scorer._encoder.pairs(requests)
    scorer.loglikelihood(requests)
    own = sum(-(-(len(a) + len(b) - 1 - 3 * CHUNK) // CHUNK) for a, b in pairs[::2])
    assert sum(reads) == 2 * 3 + own  # the examples of two groups; choices that differ in the last token are one text
    reads.clear()
    scorer.loglikelihood(requests[-2:])  # the row still holds these examples
    assert sum(reads) <= 3


def test_only_tokens_of_continuations_go_through_the_output_map():
    config, variables = model().config, model().variables
    reader = Reader(config, variables, 1, 512)
    tokens = np.zeros((1, CHUNK), np.int32)
    read = generate._read.lower(variables, tokens, tokens, reader.cache, config=config).as_text()
    x_TCD, at = jnp.zeros((1, CHUNK, config.model_dim)), np.zeros(scoring.LOOKUPS, np.int32)
    look_up = scoring._look_up.lower(variables, x_TCD, at, at, config=config).as_text()
    assert not re.search(r"tensor<[\dx]*x257xf32>", read)
    shapes = [map(int, shape.split("x")) for shape in re.findall(r"tensor<([\dx]*)x257xf32>", look_up)]
    assert {math.prod(shape) for shape in shapes} == {scoring.LOOKUPS, config.model_dim}


@pytest.mark.parametrize("devices", often([None, 1, 8], [1]))
def test_a_task_compiles_six_programs(devices):
    """Of any kind, little ones too: empty caches, reading, looking up; putting a prompt in its row, writing."""
    asked = model(mlp_dim=24)
    scorer = Scorer(placed(asked, "ddp" if devices == 8 else "none", devices) if devices else asked, batch_size=3)
    contexts = [text(size, seed=size) for size in (5, 600, 90, 300)]
    generations = [Generation(context, ("\n\n",), 9) for context in contexts]
    continuations = [Continuation(context, " end") for context in contexts]
    scorer.reserve([*continuations, *generations])
    start = len(COMPILED)
    for i in range(4):  # one item at a time
        scorer.loglikelihood(continuations[i : i + 1])
        scorer.generate_until(generations[i : i + 1])
    scorer.loglikelihood(continuations)
    assert len(COMPILED) - start <= 6, COMPILED[start:]


def test_no_more_rows_are_chosen_than_fit():
    config = model().config
    one = 512 * 3 * 2 * 2 * 4 * 4  # tokens, layers, keys and values, heads, dims, bytes
    assert [fitting_rows(config, 512, budget) for budget in (0, one, 5.5 * one, 1e12)] == [1, 1, 5, 8]


def test_rows_get_about_as_much_to_read_each():
    requests = [Continuation(text(64 * size, seed=size), " end") for size in (1, 2, 3, 4, 5, 6)]
    texts = scoring._texts(Scorer(model())._encoder.pairs(requests), range(6), CONTEXT)
    dealt = scoring._dealt(texts, 3)
    assert collections.Counter(id(one) for part in dealt for one in part) == collections.Counter(map(id, texts))
    chunks = [sum(generate.num_chunks(len(one.ids)) for one in part) for part in dealt]
    assert len(chunks) <= 3 and max(chunks) <= math.ceil(sum(chunks) / 3) + 6


# ------------------------------------------------------------------------------------------------ writing


def prompts() -> list[str]:
    return [text(size, seed=size) for size in (3, 200, 70, 1, 66, 150, 131, 20, 64, 65, 129)]


@pytest.mark.parametrize("variant", often(["gqa", "mla", "window", "window_and_full", "moe_softmax"], ["window"]))
def test_more_prompts_than_rows_are_continued_as_each_is_alone(variant):
    scorer = Scorer(model(variant), batch_size=3)
    found = scorer.generate_until([Generation(prompt, (), 4 + i) for i, prompt in enumerate(prompts())])
    for i, prompt in enumerate(prompts()):
        [ids] = model(variant).generate_ids([list(prompt.encode())], max_tokens=4 + i)
        assert found[i] == ByteTokenizer().decode(ids)


def test_what_is_written_depends_on_neither_batch_size_nor_order():
    requests = [Generation(prompt, (), 5 + i) for i, prompt in enumerate(prompts())]
    requests += [
        Generation(prompt, (), 9, Sampling(temperature=1.5, top_k=9, seed=i)) for i, prompt in enumerate(prompts())
    ]
    expected = Scorer(model(), batch_size=1).generate_until(requests)
    assert len(set(expected)) > 15
    for batch_size in (3, 8):
        assert Scorer(model(), batch_size=batch_size).generate_until(requests) == expected
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = Scorer(model()).generate_until([requests[i] for i in order])
    assert shuffled == [expected[i] for i in order]


def test_draws_differ_by_seed_and_by_prompt():
    def draw(prompt: str, seed: int) -> Generation:
        return Generation(prompt, (), 12, Sampling(temperature=1.0, seed=seed))

    one, same, other, elsewhere = Scorer(model()).generate_until(
        [draw("abc", 1), draw("abc", 1), draw("abc", 2), draw("abd", 1)]
    )
    assert one == same != other and one != elsewhere


@pytest.fixture(scope="module")
def words(folder, tmp_path_factory) -> Pretrained:
    """A model that writes words and parts of words: the likeliest token is never a byte that is no character."""
    tokenizer, tensors = BPETokenizer.load(folder / "tokenizer.json"), checkpoints.tensors()
    for index in range(checkpoints.VOCAB):
        if not tokenizer.decode([index], skip_special=True).replace(" ", "").isalnum():
            tensors["model.embed_tokens.weight"][index] = 0  # and its logit
    where = checkpoints.write(tmp_path_factory.mktemp("words"), tensors, max_position_embeddings=CONTEXT)
    return zoo.load_pretrained(where, device=jax.devices()[0])


def written(words: Pretrained, prompt: str, max_tokens: int = 40) -> tuple[list[int], str]:
    [ids] = words.generate_ids([words.encode(prompt)], max_tokens=max_tokens)
    return ids, words.tokenizer.decode(ids, skip_special=True)


PROMPT, STOP = "word17 word", "w234"  # after "w" and "23" there comes a token that begins with "4"


def test_a_text_ends_before_the_first_stop_even_in_the_middle_of_tokens(words):
    _, whole = written(words, PROMPT)
    later = "7Qwww"
    assert 0 < whole.find(STOP) < whole.find(later)
    for until in ((STOP,), ("not in it", STOP), (later, STOP)):
        [found] = Scorer(words).generate_until([Generation(PROMPT, until, 40)])
        assert found == whole[: whole.find(STOP)]


def test_writing_stops_with_the_token_that_completes_a_stop(words, monkeypatch):
    ids, whole = written(words, PROMPT)
    asked, add = [], scoring._End.add
    monkeypatch.setattr(scoring._End, "add", lambda self, index: asked.append(index) or add(self, index))
    Scorer(words).generate_until([Generation(PROMPT, (STOP,), 40)])
    sizes = [len(words.tokenizer.decode(ids[: n + 1], skip_special=True)) for n in range(len(ids))]
    last = next(n for n, size in enumerate(sizes) if size >= whole.find(STOP) + len(STOP))
    assert asked == ids[: last + 1] and sizes[last] > whole.find(STOP) + len(STOP)  # it ends in the middle of a token


def test_texts_are_cut_at_one_stop_after_the_other(words):
    end = scoring._End(Scorer(words)._encoder, words, ("bc", "ab"))
    assert end.cut("xabcx") == "xa"  # as lm-eval does it: "ab" is no longer there
    assert end.cut("xabxbc") == "x"
    assert end.cut("x<|endoftext|>y") == "x"


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_a_control_token_ends_a_text_though_it_is_not_spelled_in_it(words, stop, monkeypatch):
    encoder = Scorer(words)._encoder
    end = scoring._End(encoder, words, (stop,))
    ids = words.tokenizer.encode("the model")
    assert [end.add(index) for index in ids] == [False] * len(ids)
    assert end.add(encoder.control_ids[stop])
    other = scoring._End(encoder, words, ())
    assert not other.add(encoder.control_ids["<|im_end|>"]) and other.add(encoder.control_ids["<|endoftext|>"])


def test_stops_are_seen_however_characters_fall_on_tokens():
    snowman = "ab☃☃cd"
    for stop in ("☃", "b☃", "☃c", "☃☃c"):
        end = scoring._End(Scorer(model())._encoder, model(), (stop,))
        seen = [end.add(index) for index in snowman.encode()]
        assert sum(seen[: seen.index(True)]) == 0
        assert seen.index(True) + 1 == len(snowman[: snowman.index(stop) + len(stop)].encode())


def test_a_context_that_is_too_long_leaves_room_for_the_answer():
    scorer, whole = Scorer(model(), max_length=100), text(300)
    found = scorer.generate_until([Generation(whole, (), 30), Generation(whole[:70], (), 30), Generation("", (), 5)])
    assert scorer.truncated == 1
    for string, ids in zip(found, ([*whole.encode()][-70:], [*whole[:70].encode()]), strict=False):
        assert string == ByteTokenizer().decode(model().generate_ids([ids], max_tokens=30)[0], skip_special=True)
    assert found[2] == ByteTokenizer().decode(model().generate_ids([[256]], max_tokens=5)[0], skip_special=True)


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(("strategy", "tensor"), [("fsdp", 2), ("ddp", 1)])
@pytest.mark.exhaustive
def test_eight_devices_answer_as_one_does(strategy, tensor):
    one = model("gqa", model_dim=24, mlp_dim=32)
    many = placed(one, strategy, 8, tensor)
    requests, generations = mixed(), [Generation(prompt, (), 6) for prompt in prompts()]
    expected, found = Scorer(one).loglikelihood(requests), Scorer(many).loglikelihood(requests)
    np.testing.assert_allclose(
        [score.log_prob for score in found], [score.log_prob for score in expected], atol=ATOL, rtol=1e-6
    )
    shuffled = Scorer(many, batch_size=3).loglikelihood(requests[::-1])[::-1]
    assert exact(shuffled) == exact(found)
    assert Scorer(many).generate_until(generations) == Scorer(one).generate_until(generations)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"max_length": CONTEXT + 1}, f"max_length={CONTEXT + 1} must be between 1 and the {CONTEXT} tokens"),
        ({"max_length": 0}, "max_length=0 must be between"),
    ],
)
def test_a_wrong_number_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Scorer(model(), **options)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="tiny has no tokenizer"):
        Scorer(Pretrained("tiny", model().config, model().params, None, (), None))


def test_what_cannot_fit_is_refused():
    scorer = Scorer(model(), max_length=50)
    with pytest.raises(UserError, match="max_tokens=50 leaves no room for a context in the 50 tokens"):
        scorer.generate_until([Generation("a", (), 50)])
    with pytest.raises(UserError, match="A continuation of 60 tokens is longer than the 50 tokens of the context"):
        scorer.loglikelihood([Continuation("a", "b" * 60)])
    with pytest.raises(UserError, match="max_tokens=-1 must be 0 or more"):
        Generation("a", (), -1)
    assert scorer.loglikelihood([]) == scorer.generate_until([]) == scorer.loglikelihood_rolling([]) == []
