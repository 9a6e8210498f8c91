"""Tokenizers: exact round trips, control tokens, hashes, files."""

import itertools
import json
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from foundry_jax.data import tokenize
from foundry_jax.data.tokenize import (
    SEPARATOR,
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    batched,
    load_tokenizer,
    pieces,
)
from foundry_jax.errors import UserError

TEXTS = ["the cat sat on the mat\n", "def add(a, b):\n    return a + b\n", "über die Brücke, naïve café"]
AWKWARD = [
    "",
    " ",
    "\n\r\n\t  \x00\x1c\x85\u2028 end ",
    "\ufeffbyte order mark",
    "e\u0301 is not \u00e9",
    "👩‍👩‍👧‍👦 and 🇩🇪",
    "\U0010ffff\ue000\ufffd",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>",
    "  'll 's don't  x",
]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer(vocab_size=300).fit(TEXTS * 4)


def random_unicode(rng: random.Random, length: int) -> str:
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_any_unicode_text_survives_the_round_trip(name, bpe):
    tokenizer = bpe if name == "bpe" else ByteTokenizer()
    rng = random.Random(0)
    texts = AWKWARD + [random_unicode(rng, rng.randrange(40)) for _ in range(200)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bpe_learns_words_and_uses_them(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(" the")) == 1
    assert len(bpe.encode("qzx")) == 3


def every_character() -> str:
    """Returns every code point that is a character, or may become one, in order."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("around", [" {}", "a{} b", "1{}'s"])
def test_every_character_survives_in_every_neighbourhood(bpe, around):
    texts = ["".join(map(around.format, part)) for part in batched(every_character(), 4096)]
    for text, ids in zip(texts, bpe.encode_batch(texts), strict=True):
        assert bpe.decode(ids) == text


@pytest.mark.exhaustive
def test_no_character_makes_a_cut_change_the_ids(bpe):
    characters = every_character()[:0x3100] + every_character()[0x3100::31]  # white space is all in the first part
    texts = ["".join(f"a{c} b{c}\n{c} \n" for c in part) for part in batched(characters, 4096)]
    parts = [list(pieces(text, 7)) for text in texts]
    encode = partial(bpe._fitted.encode_batch_fast, add_special_tokens=False)
    whole = [index for encoding in encode(texts) for index in encoding.ids]
    assert [index for encoding in encode(list(itertools.chain(*parts))) for index in encoding.ids] == whole
    assert sum(map(len, parts)) > 10 * len(texts)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_text_that_spells_the_separator_is_not_encoded_as_one(name, bpe, tmp_path):
    tokenizer = bpe if name == "bpe" else ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, load_tokenizer(tmp_path)):
        ids = each.encode(f"a{SEPARATOR}b")
        assert each.separator_id not in ids
        assert each.separator_id not in each.encode_batch([SEPARATOR])[0]
        assert each.decode([each.separator_id, *ids]) == f"{SEPARATOR}a{SEPARATOR}b"


def test_text_cannot_spell_a_separator_that_its_file_left_unmarked(bpe):
    value = bpe.to_json()
    value["added_tokens"][0]["special"] = False
    tokenizer = BPETokenizer.from_json(value)
    assert tokenizer.separator_id == bpe.separator_id
    assert tokenizer.separator_id not in tokenizer.encode(SEPARATOR)


CONTROL = ("<|im_start|>", "<|im_end|>", SEPARATOR)


def test_special_tokens_follow_the_fitted_vocabulary(tmp_path):
    plain, special = BPETokenizer(300).fit(TEXTS * 4), BPETokenizer(300, CONTROL).fit(TEXTS * 4)
    assert (plain.vocab_size, special.vocab_size) == (300, 302)
    assert special.control_ids == {SEPARATOR: 0, "<|im_start|>": 300, "<|im_end|>": 301}
    assert special.separator_id == 0
    assert [special.encode(text) for text in AWKWARD] == [plain.encode(text) for text in AWKWARD]
    assert special.token_bytes.tolist() == [*plain.token_bytes.tolist(), 0, 0]
    special.save(tmp_path / "tokenizer.json")
    for each in (special, load_tokenizer(tmp_path), BPETokenizer.for_corpus(TEXTS * 4, [], 300, CONTROL)):
        assert each.hash == special.hash
        ids = each.encode("a<|im_start|>b <|im_end|>")
        assert (
            not {300, 301} & set(ids)
            and each.decode([300, *ids, 301]) == "<|im_start|>a<|im_start|>b <|im_end|><|im_end|>"
        )


def test_special_tokens_follow_what_was_reached_where_the_text_runs_out():
    tokenizer = BPETokenizer(400, ["<a>"]).fit(["abab"])
    assert tokenizer.control_ids["<a>"] == tokenizer.vocab_size - 1 < 300


def test_special_tokens_are_part_of_what_decides_the_outcome():
    specs = [BPETokenizer.spec(300), BPETokenizer.spec(300, ["<a>"]), BPETokenizer.spec(300, ["<b>"])]
    assert len(set(specs)) == 3 and specs[0] == BPETokenizer.spec(300, [])


@pytest.mark.parametrize("special", [["<a>", "<a>"], [""]])
def test_special_tokens_that_are_none_are_refused(special):
    with pytest.raises(UserError, match="must be different texts, and none empty"):
        BPETokenizer(300, special)


def test_a_special_token_that_text_has_already_is_refused():
    with pytest.raises(UserError, match="special_tokens: 'a' is a token of text already; choose another"):
        BPETokenizer(300, ["<a>", "a"]).fit(TEXTS)


@pytest.mark.parametrize("name", ["char", "byte"])
def test_other_tokenizers_have_no_control_tokens(name):
    with pytest.raises(UserError, match=f"data.tokenizer={name} has no control tokens, such as '<a>'; use data.tokeni"):
        TOKENIZERS[name].for_corpus(TEXTS, [], 300, ["<a>"])


def test_few_tokens_are_in_memory_at_once(bpe, monkeypatch):
    sizes = []
    encode = tokenizers.Tokenizer.encode_batch_fast

    class Watched:
        def encode_batch_fast(self, texts, add_special_tokens):
            sizes.append(sum(len(text.encode()) for text in texts))
            return encode(bpe._fitted, texts, add_special_tokens=add_special_tokens)

    watched = BPETokenizer.from_json(bpe.to_json())
    watched._backend = Watched()
    monkeypatch.setattr(tokenize, "GROUP_BYTES", 1000)
    monkeypatch.setattr(tokenize, "pieces", lambda text: pieces(text, 20))
    texts = ["é the cat " * 300, "", "the mat"]
    assert [ids.tolist() for ids in watched.encode_batch(texts)] == [bpe.encode(text) for text in texts]
    assert len(sizes) > 3 and max(sizes) < 1100


def test_char_ids_follow_code_points_as_in_nanogpt():
    text = "hello, Wörld\n"
    tokenizer = CharTokenizer.for_corpus([text[:6]], [text[6:]], vocab_size=999)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 11 and tokenizer.separator_id is None
    assert tokenizer.token_bytes[tokenizer.encode("ö")].tolist() == [2]


@pytest.mark.parametrize("unknown", ["z", "A", "\U0010ffff"])
def test_unknown_character_is_named(unknown):
    with pytest.raises(UserError, match=rf"U\+{ord(unknown):04X}\) is not among the 3 characters"):
        CharTokenizer("bcd").encode(f"bcd{unknown}b")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same_tokenizer(name, tmp_path):
    tokenizer = TOKENIZERS[name].for_corpus(TEXTS, TEXTS[:1], vocab_size=290)
    path = tmp_path / "any name.json"
    tokenizer.save(path)
    for loaded in (load_tokenizer(path), type(tokenizer).load(path)):
        assert type(loaded) is type(tokenizer)
        assert loaded.hash == tokenizer.hash
        assert (loaded.vocab_size, loaded.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)
        assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_hash_tells_tokenizers_apart(bpe):
    others = [CharTokenizer("ab"), CharTokenizer("abc"), ByteTokenizer(), bpe, BPETokenizer(280).fit(TEXTS * 4)]
    assert len({tokenizer.hash for tokenizer in others}) == len(others)


def test_fitting_gives_the_same_merges_in_another_process(bpe):
    program = (
        f"from foundry_jax.data.tokenize import BPETokenizer\nprint(BPETokenizer(300).fit({TEXTS!r} * 4).hash, end='')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == bpe.hash


def test_a_text_too_short_for_the_vocabulary_says_so(caplog):
    tokenizer = BPETokenizer(vocab_size=400).fit(["abab"])
    assert tokenizer.vocab_size < 400
    assert "not 400" in caplog.text


def test_long_texts_are_cut_without_changing_their_ids(bpe, monkeypatch):
    rng = random.Random(1)
    words = ["the", "cat", "don't", "1234", "++", "é", "\x1c", "\x85", "\u3000", " ", "  ", "\n", "\n\n", "\t", " \n "]
    text = "".join(rng.choice(words) for _ in range(3000))
    whole = bpe.encode(text)
    monkeypatch.setattr("foundry_jax.data.tokenize.GROUP_BYTES", 64)
    cut = list(pieces(text, 7))
    assert len(cut) > 300 and "".join(cut) == text
    monkeypatch.setattr("foundry_jax.data.tokenize.pieces", lambda text: iter(cut))
    assert bpe.encode(text) == whole


def test_long_texts_are_cut_where_digits_are_split_off_first(bpe, monkeypatch):
    value = bpe.to_json()
    digits = {"type": "Digits", "individual_digits": True}
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, value["pre_tokenizer"]]}
    smollm, rng = BPETokenizer.from_json(value), random.Random(2)
    words = ["the", "1", "22", " 333", "3 ", " ", "  ", "\n", "\n\n", "'s", "½", "٣", "+"]
    text = "".join(rng.choice(words) for _ in range(3000))
    whole = smollm._fitted.encode(text, add_special_tokens=False).ids
    cut = list(pieces(text, 7))
    assert len(cut) > 200 and smollm._can_cut
    monkeypatch.setattr("foundry_jax.data.tokenize.pieces", lambda text: iter(cut))
    assert smollm.encode(text) == whole


@pytest.mark.parametrize("steps", [[], ["Split"], ["Digits", "Split"]])
def test_texts_of_other_tokenizers_are_not_cut(steps, bpe):
    value, split = bpe.to_json(), {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    known = {"Split": split, "Digits": {"type": "Digits", "individual_digits": True}}
    last = [] if not steps else [value["pre_tokenizer"]]
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [known[step] for step in steps] + last}
    assert not BPETokenizer.from_json(value)._can_cut


def test_control_tokens_are_known_by_their_spelling_and_can_be_left_out_of_a_text(bpe):
    assert bpe.control_ids == {SEPARATOR: 0}
    for tokenizer in (bpe, ByteTokenizer()):
        ids = [tokenizer.separator_id, *tokenizer.encode("the cat"), tokenizer.separator_id]
        assert tokenizer.decode(ids) == f"{SEPARATOR}the cat{SEPARATOR}"
        assert tokenizer.decode(ids, skip_special=True) == "the cat"
    assert ByteTokenizer().control_ids == CharTokenizer("abc").control_ids == {}
    assert CharTokenizer("abc").decode([2, 0], skip_special=True) == "ca"


def test_what_a_template_puts_before_a_text_is_known_and_never_encoded(bpe):
    assert bpe.start_ids == ByteTokenizer().start_ids == ()
    backend = tokenizers.Tokenizer.from_str(bpe.tokenizer_json())
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer = BPETokenizer.from_json(json.loads(backend.to_str()))
    assert tokenizer.start_ids == (ids[0][1],)
    assert tokenizer.encode("the cat") == bpe.encode("the cat")


def test_without_a_known_separator_the_end_of_the_model_is_one(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.tokenizer_json().replace(SEPARATOR, "<end>"), "utf-8")
    with pytest.raises(UserError, match="no token for the end of a document"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no token for the end of a document"):
        load_tokenizer(path, end_id=9999)
    tokenizer = load_tokenizer(path, end_id=0)
    assert tokenizer.separator_id == 0 and tokenizer.decode([0]) == "<end>"
    assert 0 not in tokenizer.encode("a<end>b")
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert (again.hash, again.separator_id) == (tokenizer.hash, 0)
    assert load_tokenizer(path, end_id=5).separator_id == 0


def test_batched_keeps_order_and_ends_a_list_at_the_limit():
    assert list(batched(["aa", "b", "ccc", "d"], 3)) == [["aa", "b"], ["ccc"], ["d"]]


def foreign_tokenizer() -> tokenizers.Tokenizer:
    """A WordLevel tokenizer such as nobody here makes, with truncation and padding left on."""
    vocabulary = {"</s>": 7, "the": 0, "cat": 1, "[UNK]": 2}
    foreign = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.decoder = decoders.WordPiece()
    foreign.enable_truncation(2)
    foreign.enable_padding(length=9)
    return foreign


def test_any_hugging_face_file_loads_without_its_truncation_or_padding(tmp_path):
    foreign_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the cat the dog") == [0, 1, 0, 2]
    assert tokenizer.separator_id == 7
    assert tokenizer.unknown_id == 2
    assert tokenizer.vocab_size == 8  # one more than the largest id: ids may have gaps
    assert tokenizer.token_bytes is None


def test_a_file_without_a_separator_is_refused(tmp_path):
    path = tmp_path / "t.json"
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match=r"t\.json: The tokenizer has no token for the end of a document"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Cannot read the tokenizer .*t\.json: No such file"),
        ("{", r"t\.json is not JSON"),
        ("[]", r"t\.json must be a JSON object"),
        ("{}", r"t\.json holds no BPETokenizer"),
        ('{"type": "char"}', r"t\.json holds no CharTokenizer"),
        ('{"model": {"type": "BPE"}}', r"t\.json holds no BPETokenizer"),
    ],
)
def test_files_that_hold_no_tokenizer_are_named(content, message, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_bpe_says_what_to_do_before_it_is_fitted():
    with pytest.raises(UserError, match="call fit"):
        BPETokenizer().encode("a")
    with pytest.raises(UserError, match="at least 257"):
        BPETokenizer(vocab_size=256)


def test_saved_bpe_is_a_plain_hugging_face_file(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert plain.encode(TEXTS[0]).ids == bpe.encode(TEXTS[0])
    assert json.loads(path.read_text("utf-8"))["model"]["type"] == "BPE"


def test_bytes_that_are_not_text_decode_to_replacement_characters():
    assert ByteTokenizer().decode(np.array([0xFF, 97, 256])) == f"\ufffda{SEPARATOR}"
