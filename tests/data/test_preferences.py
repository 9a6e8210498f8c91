"""Pairs of completions: how they are read, which are held out, and how they are batched."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from foundry_jax.data import pair_files
from foundry_jax.data.batches import TrainBatches
from foundry_jax.data.conversation import ALL_CONTROL_TOKENS, codec_of
from foundry_jax.data.document import Conversation
from foundry_jax.data.preferences import Pairs, Reference, read_reference, with_reference, write_reference
from foundry_jax.data.sources import chat
from foundry_jax.data.split import in_validation
from foundry_jax.data.tokenize import BPETokenizer, ByteTokenizer, CharTokenizer
from foundry_jax.errors import UserError

END = ByteTokenizer.separator_id
HELD, TRAINED = (next(str(i) for i in range(99) if in_validation(str(i), 0.3) == side) for side in (True, False))
ASKED = next(asked for i in range(1, 99) if not in_validation(asked := f"one{i * '?'}", 0.3))
LAST = (HELD, "yes", "no")  # a pair that is held out: there must be one


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes pairs (prompt, chosen, rejected), objects, or lines of text, to a file."""

    def write(*rows, name="pairs.jsonl"):
        fields = ("prompt", "chosen", "rejected")
        rows = [dict(zip(fields, row, strict=True)) if isinstance(row, tuple) else row for row in rows]
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def talker():
    """A tokenizer that can spell every format."""
    return BPETokenizer(300, special_tokens=ALL_CONTROL_TOKENS).fit(["one two\n\none two three"])


def read(preferences, tokenizer=None, context_length=48, *, format="chatml", fraction=0.3):
    tokenizer = tokenizer or ByteTokenizer()
    return pair_files.read(str(preferences), tokenizer, format=format, fraction=fraction, context_length=context_length)


def ids(text):
    return list(text.encode())


def sequences(pairs):
    """Returns the tokens of all sequences."""
    return [pairs.tokens[a:b].tolist() for a, b in zip(pairs.starts[:-1], pairs.starts[1:], strict=True)]


def test_a_batch_of_a_pair_is_these_arrays(write):
    prompt = TRAINED[-1]
    pairs = read(write((f"a{prompt}", "c", "de"), LAST), context_length=6).train[0]
    batch = pairs.batch(np.array([0]))
    a, b, c, d, e = ids(f"a{prompt}cde")
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
    assert pairs.completion_lengths.tolist() == [[2, 3]]


def all_pairs(path, tokenizer=None, context_length=48):
    """Returns the pairs of a file, whatever side they are on."""
    encoder = pair_files._Encoder(tokenizer or ByteTokenizer(), "chatml", context_length)
    return pair_files._pairs(list(encoder.encode(pair_files.PairFile(str(path)))), context_length)


def test_a_tokenizer_without_a_separator_adds_none(write):
    pairs = all_pairs(write(("ab", "c", "de")), CharTokenizer("abcde"), 6)
    assert sequences(pairs) == [[0, 1, 2], [0, 1, 3, 4]]


def test_a_long_prompt_loses_its_beginning_the_same_for_both_completions(write, caplog):
    caplog.set_level(logging.INFO)
    pairs = all_pairs(write(("0123456789", "c", "def")), context_length=7)
    assert sequences(pairs) == [[*ids("6789c"), END], [*ids("6789def"), END]]
    assert pairs.prompt_lengths.tolist() == [4, 4]
    assert "1 pairs are longer than model.context_length=7: their prompts lose the beginning" in caplog.text
    assert "lose the end" not in caplog.text


def test_a_completion_that_is_too_long_by_itself_loses_its_end_and_keeps_one_token_before_it(write, caplog):
    pairs = all_pairs(write(("01", "abcd", "abcdefgh")), context_length=5)
    assert sequences(pairs) == [[*ids("1abcd"), END], ids("1abcde")]
    assert pairs.batch(np.array([0]))["weights"].tolist() == [[[1] * 5, [1] * 5]]
    assert "1 completions are longer than that by themselves and lose the end" in caplog.text


def test_without_a_prompt_the_separator_comes_first(write):
    path = write(("", "c", ""))
    assert sequences(all_pairs(path)) == [[END, *ids("c"), END], [END, END]]
    with pytest.raises(UserError, match="line 1 has no prompt, and the tokenizer no separator to stand in"):
        all_pairs(path, CharTokenizer("c"))


USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in zip(
    ("user", "assistant", "assistant"), (ASKED, "\n\ntwo <|im_end|>", "three"), strict=True))  # fmt: skip


def spelled(messages, tokenizer, format="chatml"):
    return codec_of(format, tokenizer).encode([chat.document(Conversation(messages))])[0]


@pytest.mark.parametrize("format", ["chatml", "llama3", "alpaca", "chatml(train='all')"])
def test_messages_are_spelled_by_the_format_and_compared_from_the_last_answer_on(write, talker, format):
    path = write({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, (HELD, "a", "b"))
    pairs = read(path, talker, 400, format=format).train[0]
    plain = format.removesuffix("(train='all')")
    for sequence, prompt_length, answer in zip(sequences(pairs), pairs.prompt_lengths, (ANSWER, OTHER), strict=True):
        whole = spelled([USER, answer], talker, plain)
        last = np.flatnonzero(whole.trained)
        assert sequence == whole.ids[: last[-1] + 1].tolist() and prompt_length == last[0]
        assert (sequence.count(talker.control_ids["<|im_end|>"]) == 2) == ("chatml" in format)


def test_only_the_last_answer_is_compared_and_an_earlier_one_belongs_to_the_prompt(write, talker):
    prompt = [USER, OTHER, USER]
    pairs = read(write({"prompt": prompt, "chosen": [ANSWER], "rejected": [OTHER]}, LAST), talker, 400).train[0]
    completion = pairs.tokens[pairs.starts[1] + pairs.prompt_lengths[1] : pairs.starts[2]]
    assert talker.decode(completion) == "three<|im_end|>"


def test_a_principle_is_what_the_system_says(write, talker):
    row = {"principle": "Be kind.", "prompt": ASKED, "chosen": "two", "rejected": "three"}
    pairs = read(write(row, LAST), talker, 400).train[0]
    system = {"role": "system", "content": "Be kind."}
    whole = spelled([system, USER, OTHER], talker)
    assert sequences(pairs)[1] == whole.ids[: np.flatnonzero(whole.trained)[-1] + 1].tolist()


def test_texts_of_a_constitution_are_conversations_and_dialogues_are_split_into_turns(write, talker):
    rows = [(f"\n\nHuman: {ASKED}\n\nAssistant: three\n\nHuman: {ASKED}\n\nAssistant:", " two", " three"), LAST]
    path = write(*rows)
    pairs = read(f"constitution(path={str(path)!r})", talker, 400).train[0]
    whole = spelled([USER, OTHER, USER, OTHER], talker)
    assert sequences(pairs)[1] == whole.ids[: np.flatnonzero(whole.trained)[-1] + 1].tolist()
    as_text = read(path, talker, 400).train[0]
    assert talker.decode(as_text.tokens[: as_text.prompt_lengths[0]]) == rows[0][0]


@pytest.fixture
def hundred(write):
    """The path of a hundred pairs, whose prompts are their numbers."""
    return write(*[(str(i), "yes", "no") for i in range(100)])


def prompts(pairs):
    """Returns what the prompts of some pairs say."""
    return [bytes(tokens[:length]).decode() for tokens, length in zip(
        sequences(pairs)[::2], pairs.prompt_lengths[::2], strict=True)]  # fmt: skip


def test_pairs_are_held_out_by_a_hash_of_their_prompt(hundred, write):
    found = read(hundred)
    held_out = [str(i) for i in range(100) if in_validation(str(i), 0.3)]
    assert prompts(found.held_out) == held_out and 10 < len(held_out) < 50
    assert sorted(prompts(found.train[0]) + held_out) == sorted(map(str, range(100)))
    twice = write(*[(str(i), word, "no") for i in range(100) for word in ("yes", "oh yes")])
    assert set(prompts(read(twice).held_out)) == set(held_out), "all pairs of a prompt are on one side"


def test_no_prompt_is_on_both_sides_whatever_its_shape_and_its_file(write, talker):
    asked = f"\n\nHuman: {HELD}\n\nAssistant: Human:\n\nHuman: \n\nAssistant:"  # hh-rlhf has such turns
    one = write(*[(str(i), "yes", "no") for i in range(20)], name="one.jsonl")
    user = {"role": "user", "content": HELD}
    rows = [
        (HELD, "yes", "no"),
        {"prompt": [user], "chosen": [ANSWER], "rejected": [OTHER]},
        {"principle": "Be kind.", "prompt": f"  {asked} ", "chosen": "a", "rejected": "b"},
        {"principle": "Be kind.", "prompt": "new", "chosen": "a", "rejected": "b"},
    ]
    other = write(*rows, name="other.jsonl")
    one, other = f"pairs(path={str(one)!r})", f"pairs(path={str(other)!r}, held_out=False)"
    for files in ([one, other], [other, one]):
        found = read(", ".join(files), talker, 400)
        assert found.held_out.hash == read(one, talker, 400).held_out.hash, "what is held out is that of the one file"
        assert sorted(map(len, found.train)) == [1, len(read(one, talker, 400).train[0])]


def test_the_shares_of_a_mixture_are_its_weights(hundred, write):
    small = write(*[(f"x{i}", "yes", "no") for i in range(7)], name="small.jsonl")
    found = read(f"pairs(path={str(hundred)!r}, weight=3), pairs(path={str(small)!r}, held_out=False)")
    assert found.weights == (3, 1) and len(found.train[1]) == 7
    batches = found.batches(8, 0)
    firsts = np.concatenate([batches.batch(step)["inputs"][:, 0, 0] for step in range(50)])
    assert np.mean(firsts == ord("x")) == pytest.approx(0.25, abs=0.01)
    seen = [tuple(row) for row in np.concatenate([batches.batch(step)["inputs"][:, 0, :3] for step in range(50)])]
    assert all(seen.count((ord("x"), ord("0") + i, ord("y"))) in (14, 15) for i in range(7)), "epochs of its own"


@pytest.fixture
def ten():
    """Ten pairs, whose prompts are their numbers."""
    rows = [np.array([*ids(f"{i}{word}"), END]) for i in range(10) for word in ("yes", "no")]
    return Pairs.of(rows, [1] * 20, 5)


def batches_of(pairs, rows=slice(None), seed=0):
    return pair_files.Preferences((pairs,), (1.0,), pairs).batches(4, seed, rows)


def numbers(batch):
    """Returns which pairs a batch holds."""
    return [token - ord("0") for token in batch["inputs"][:, 0, 0].tolist()]


def test_every_epoch_has_every_pair_once_in_an_order_of_its_own(ten):
    order = [pair for step in range(5) for pair in numbers(batches_of(ten).batch(step))]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] != list(range(10))
    assert [pair for step in range(5) for pair in numbers(batches_of(ten, seed=1).batch(step))] != order
    assert order[:10] == [6, 1, 7, 3, 9, 4, 5, 8, 2, 0], "a change here changes the order of every run"


def test_a_batch_is_a_function_of_its_step_and_processes_share_it(ten):
    reference = np.arange(20, dtype=np.float32).reshape(10, 2)
    batches = with_reference(batches_of(ten), reference)
    assert isinstance(batches, TrainBatches)
    whole = [batches.batch(step) for step in range(6)]
    assert whole[3]["reference"].tolist() == [[2 * i, 2 * i + 1] for i in numbers(whole[3])]
    for step, batch in batches.iterate(3, 6):
        jax.tree.map(np.testing.assert_array_equal, batch, whole[step])
    halves = [dataclasses.replace(batches, rows=rows).batch(3) for rows in (slice(0, 2), slice(2, 4))]
    for name, x in whole[3].items():
        np.testing.assert_array_equal(x, np.concatenate([half[name] for half in halves]))


def test_the_parts_of_a_mixture_get_their_own_reference(ten):
    mixture = pair_files.Preferences((ten, ten), (1.0, 1.0), ten).batches(4, 0)
    parts = with_reference(mixture, np.arange(40, dtype=np.float32).reshape(20, 2)).parts
    assert [part.source.reference[0].tolist() for part in parts] == [[0, 1], [20, 21]]


def test_pairs_in_order_are_all_of_them_and_full_batches(ten):
    assert [numbers(batch) for batch in ten.in_order(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [numbers(batch) for batch in ten.in_order(4, slice(2, 4))] == [[2, 3], [6, 7], [0, 1]]


def test_a_reference_is_kept_under_its_key_and_a_damaged_one_is_noticed(tmp_path, caplog):
    path = tmp_path / "references" / "a.npz"
    reference = Reference(np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(4, dtype=np.float32))
    assert read_reference(path, "a") is None and not caplog.text
    write_reference(path, "a", reference)
    jax.tree.map(np.testing.assert_array_equal, read_reference(path, "a"), reference)
    assert read_reference(path, "b") is None and "of other pairs or another model" in caplog.text
    content = path.read_bytes()
    at = content.index(reference.train.tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert read_reference(path, "a") is None and "a.npz is damaged" in caplog.text
    path.write_bytes(content[:-9])
    assert read_reference(path, "a") is None
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_a_full_disk_is_no_reason_to_end_a_run(tmp_path, caplog):
    (tmp_path / "references").touch()
    write_reference(tmp_path / "references" / "a.npz", "a", Reference(np.zeros((1, 2)), np.zeros(1)))
    assert "Cannot keep" in caplog.text


MISTAKES = [
    ((), r"pairs.jsonl has no pairs; a line is one: \{"),
    (("", "  "), "has no pairs"),
    ((("a", "b", "c"), "{"), r"pairs.jsonl, line 2: not JSON \(.*\); a line is \{"),
    (("[1, 2]",), "line 1: list instead of an object"),
    (("", '{"prompt": "a", "chosen": "b"}'), "line 2 has no text 'rejected'"),
    (('{"prompt": "a", "chosen": 1, "rejected": "c"}',), "line 1 has no text 'chosen'"),
    ((LAST, ("a", "b", "b")), "pairs.jsonl, line 2: chosen and rejected are the same"),
    (
        ({"prompt": [USER], "chosen": [OTHER], "rejected": [OTHER]},),
        "line 1: chosen and rejected are the same",
    ),
    (({"prompt": [USER], "chosen": [OTHER]},), "line 1: no field 'rejected'"),
    (({"prompt": [USER], "chosen": [USER, OTHER], "rejected": [OTHER]},), "line 1: chosen must be one message"),
    (({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]},), "line 1: chosen ends with 'user'"),
    (({"prompt": [{"role": "who"}], "chosen": [OTHER], "rejected": [OTHER]},), "Unknown role 'who'"),
    (({"prompt": [], "chosen": [ANSWER], "rejected": [OTHER]},), "line 1: prompt must be a list of one or more"),
    (({"principle": 1, "prompt": "a", "chosen": "b", "rejected": "c"},), "line 1: principle must be text"),
    (({"principle": "a", "prompt": "a", "chosen": "b", "rejected": "\ufdd2"},), "line 1: .*noncharacters"),
    (((TRAINED, "b", "c"),), "has no pair left to train on: all prompts are held out; give more pairs"),
    (((HELD, "b", "c"),), "has no pair left to train on"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES)
def test_a_file_that_holds_no_pairs_is_refused_by_line(write, talker, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(*rows), talker)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_or_encoded_is_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none.jsonl: No such file or directory"):
        read(tmp_path / "none.jsonl")
    path = write(("a", "b", "a"), ("a", "b", "c"))
    with pytest.raises(UserError, match="data.preferences needs a tokenizer, but data.source has none"):
        pair_files.read(str(path), None, format="own", fraction=0.1, context_length=5)
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: Character 'c' \(U\+0063\) is not among the 2"):
        read(path, CharTokenizer("ab"))
    path.write_bytes(b'\n{"prompt": "\xff"}')
    with pytest.raises(UserError, match="pairs.jsonl, line 2: not UTF-8: byte 0xff at offset 12"):
        read(path)
    path = write({"principle": "a", "prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(
        UserError, match="data.format=own is the tokenizer's chat template, and this tokenizer has none"
    ):
        read(path, format="own")
    with pytest.raises(UserError, match="needs the control tokens"):
        read(path, format="chatml")
    path = write({"prompt": [USER, OTHER, USER], "chosen": [ANSWER], "rejected": [OTHER]})
    with pytest.raises(UserError, match="line 1: .*Alpaca is one message of the user and one of the assistant"):
        read(path, format="alpaca")


SPECS = [
    ("pair(path='a')", "Unknown kind of data.preferences 'pair'. Did you mean 'pairs'"),
    ("pairs()", "needs its path: pairs"),
    ("pairs(path='')", "needs its path: pairs"),
    ("", "needs its path"),
    ("pairs(path='a', wight=1)", "Unknown config key 'data.preferences=pairs: wight'. Did you mean .*weight"),
    ("pairs(path='a', weight='x')", "weight='x' must be a number"),
    ("pairs(path='a', held_out=2)", "held_out=2 must be true or false"),
    ("pairs(path='a'), ", None),
    ("pairs(path='a'), b.jsonl", "must be names, each perhaps with options"),
    ("pairs(path='a', held_out=False)", "holds nothing out, but what is learned is measured"),
    *[(f"pairs(path='a', weight={x})", "weight=.* of a must be a finite number above 0") for x in (0, -1, "1e999")],
]


@pytest.mark.parametrize(("text", "message"), SPECS)
def test_what_the_config_says_is_checked_before_anything_is_read(text, message):
    if message is None:
        assert [file.path for file in pair_files.parse(text)] == ["a"]
        return
    with pytest.raises(UserError, match=message):
        pair_files.parse(text)


def test_a_path_is_a_file_of_pairs_whatever_it_looks_like():
    for path in ("pairs.jsonl", "pairs", "a b(1).jsonl", "data(1).jsonl"):
        assert pair_files.parse(path) == [pair_files.PairFile(path)]
    first, second = pair_files.parse("pairs(path='a', weight=2), constitution(path='b', held_out=False)")
    assert first == pair_files.PairFile("a", 2.0) and second == pair_files.ConstitutionFile("b", 1.0, False)


def test_real_pairs(shared_data):
    found = read(shared_data / "preferences" / "harmless.jsonl", fraction=0.05, context_length=256)
    assert len(found.held_out) == 64 and len(found.train[0]) == 1136
    assert found.held_out.is_completion(np.arange(64)).sum() == found.held_out.completion_lengths.sum()
