"""Filters: what each removes and why, that the first copy stays, that blocks change nothing, and the report."""

import dataclasses
import itertools
import json
import random
import re
import sys

import numpy as np
import pytest
import rich.console

from foundry_jax.data.document import Document
from foundry_jax.data.filtering import filtered, fingerprint, parse
from foundry_jax.data.filters import FILTERS, RECIPES, knowing, running
from foundry_jax.data.filters import duplicates as duplicates_module
from foundry_jax.data.filters.duplicates import UNSEEN, FirstSeen, Near
from foundry_jax.data.filters.repetition import repeated, repeated_share, top_share
from foundry_jax.data.filters.running import Report
from foundry_jax.data.filters.table import render
from foundry_jax.data.filters.words import hashed, runs
from foundry_jax.data.tools import Tools
from foundry_jax.errors import UserError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."


@dataclasses.dataclass
class Scorer:
    """Costs as many nats a byte as the text has words."""

    fingerprint: str = "abc"

    def __call__(self, texts):
        return [float(len(text.split())) for text in texts]


TOOLS = Tools(scorer=lambda model: Scorer(), items=lambda tasks, data: [QUESTION, "What is it?"])
OPTIONS = {"decontaminate": "(tasks='gsm8k')"}
CALLS = [name + OPTIONS.get(name, "") for name in FILTERS]


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def verdicts(spec: str, *texts: str) -> list[str | None]:
    """Returns why one filter removes each text."""
    (filter,) = parse(spec)
    return filter.judge(TOOLS)(documents(*texts))


def kept(spec: str, *texts: str) -> list[str]:
    return [document.text for document in filtered(documents(*texts), spec, TOOLS)[0]]


def prose(rng: random.Random, num_words: int, vocabulary: int = 5000) -> list[str]:
    return [f"w{rng.randrange(vocabulary):x}" for _ in range(num_words)]


# ------------------------------------------------------------------------------------------------ spelling


def test_filters_are_calls_in_order_and_a_recipe_is_several():
    length, exact, near = parse("length(min=3), exact, near(threshold=0.5, unit='characters')")
    assert (length.min, length.max) == (3, 0)
    assert (exact.name, near.threshold, near.unit) == ("exact", 0.5, "characters")
    assert parse("exact, standard") == [exact, *parse(RECIPES["standard"])]
    assert parse("") == []


@pytest.mark.parametrize("call", CALLS)
def test_a_filter_is_written_as_it_is_read(call):
    (filter,) = parse(call)
    assert parse(str(filter)) == [filter]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght", r"Unknown data.filters 'lenght'. Did you mean 'length'\?"),
        ("length(mim=1)", r"Unknown option of data.filters=length 'mim'. Did you mean 'min'\?"),
        ("exact(min=1)", "data.filters=exact takes no options, and was given min; write exact"),
        ("standard(min=1)", r"data.filters=standard takes no options; it is: length\(min=200\)"),
        ("length(5)", r"data.filters='length\(5\)' must be names, each perhaps with options"),
        ("length(min=", "must be names, each perhaps with options"),
        ("length(min=1.5)", "data.filters=length: min=1.5 must be a whole number, not a number"),
        ("length(min=-1)", "data.filters=length: min=-1 must be a finite number at least 0"),
        ("length(min=5, max=4)", r"length\(min=5, max=4\): keeps nothing, min=5 is more than max"),
        ("near(threshold=0.1)", "near: threshold=0.1 must be a finite number between 0.2 and 1"),
        ("near(threshold=1.01)", "near: threshold=1.01 must be a finite number between 0.2 and 1"),
        ("near(threshold='nan')", "near: threshold=nan must be a finite number"),
        ("near(shingle=0)", "near: shingle=0 must be a finite number between 1 and 100"),
        ("near(num_perm=8)", "near: num_perm=8 must be a finite number between 16 and 1024"),
        ("near(unit='bytes')", "unit must be 'words' or 'characters'"),
        ("repetition(lines=1.1)", "repetition: lines=1.1 must be a finite number between 0 and 1"),
        ("repetition(paragraphs=-1)", "repetition: paragraphs=-1.0 must be a finite number between 0 and 1"),
        ("repetition(line_characters=2)", "repetition: line_characters=2.0 must be"),
        ("repetition(paragraph_characters=2)", "repetition: paragraph_characters=2.0 must be"),
        ("repetition(ngrams=1e999)", "repetition: ngrams=inf must be a finite number at least 0"),
        ("characters(letters=-0.1)", "characters: letters=-0.1 must be a finite number between 0 and 1"),
        ("characters(digits=2)", "characters: digits=2.0 must be"),
        ("characters(symbols=2)", "characters: symbols=2.0 must be"),
        ("characters(control=2)", "characters: control=2.0 must be"),
        ("urls(max=-1)", "urls: max=-1.0 must be a finite number between 0 and 1000"),
        ("language(keep=' ')", "keep must name a language"),
        ("language(min=2)", "language: min=2.0 must be a finite number between 0 and 1"),
        ("perplexity(max='x')", "perplexity: max='x' must be a number"),
        ("perplexity(min=-1)", "perplexity: min=-1.0 must be a finite number at least 0"),
        ("perplexity(min=3)", "keeps nothing, min=3 is more than max"),
        ("perplexity(model='')", "model must name a model"),
        ("decontaminate", "tasks must name evaluation tasks"),
        ("decontaminate(tasks='mmlu', n=7)", "decontaminate: n=7 must be a finite number between 8 and 1000"),
    ],
)
def test_what_is_not_allowed_is_explained_before_anything_is_read(spec, message):
    def unread():
        raise AssertionError("was read")
        yield

    with pytest.raises(UserError, match=message) as error:
        filtered(unread(), spec, TOOLS)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ every filter

ODD_TEXTS = [
    *(" ", "\n\n", "\0", "\ufeff", "x", "e\u0301", "\U0001f468\u200d\U0001f469", "\x01\x02 \ufffd"),
    *("ab" * 3000, "中文" * 9, "www.a.b\n" * 40, "1 " * 99, QUESTION, QUESTION.upper(), "x"),
]


@pytest.mark.parametrize("call", CALLS)
def test_blocks_change_no_verdict_and_runs_repeat(call):
    if call == "language":
        pytest.importorskip("py3langid")
    (filter,) = parse(call)
    texts = documents(*ODD_TEXTS)
    whole = filter.judge(TOOLS)(texts)
    one_by_one = filter.judge(TOOLS)
    assert [why for text in texts for why in one_by_one([text])] == whole
    assert all(why is None or (why and "\n" not in why) for why in whole)


@pytest.mark.parametrize("call", CALLS)
def test_a_fingerprint_is_json_that_follows_the_options(call):
    if call == "language":
        pytest.importorskip("py3langid")
    (values,) = json.loads(json.dumps(fingerprint(call, TOOLS)))
    assert str(parse(call)[0]) in (values if isinstance(values, str) else values[0])


def test_fingerprints_follow_models_and_items():
    other = Tools(scorer=lambda model: Scorer("def"), items=lambda tasks, data: ["something else"])
    for call in ("perplexity", "decontaminate(tasks='gsm8k')"):
        assert fingerprint(call, TOOLS) == fingerprint(call, TOOLS) != fingerprint(call, other)


# ------------------------------------------------------------------------------------------------ the surface


def test_length_counts_characters_and_keeps_its_bounds():
    assert verdicts("length(min=2, max=3)", "é", "éé", "ééé", "éééé") == [
        "1 characters, fewer than min=2", None, None, "4 characters, more than max=3"]  # fmt: skip
    assert kept("length(min=0)", "", "x") == ["x"]  # without text there is no document


def test_characters_are_shares_of_all_but_white_space():
    assert verdicts("characters(letters=0.5, digits=0.3, symbols=0.3, control=0.1)",
                    "ab12 \n\t\u3000", "aab1", "a123", "aaa--", "aa--", "aaaaa\x00", "aaaaaaaaa\x00") == [
        "0.500 of it digits, more than digits=0.3", None, "0.250 of it letters, less than letters=0.5", "0.400 of it "
        "symbols, more than symbols=0.3", "0.500 of it symbols, more than symbols=0.3",
        "0.167 of it control, more than control=0.1", None]  # fmt: skip


def test_letters_of_any_script_with_their_marks_are_letters():
    strict = "characters(letters=1, digits=0, symbols=0, control=0)"
    assert verdicts(strict, "\ufeffहिन्दी e\u0301 中文 עברית\u200f", "\u03b3\u200d\u03b2") == [None, None]
    for text, share in (("\ufffd\ufffda", "0.667"), ("\ue000", "1.000"), ("\x9f", "1.000")):
        assert verdicts("characters(letters=0)", text) == [f"{share} of it control, more than control=0.01"]


def test_urls_are_counted_for_1000_characters():
    text = "https://a.b HTTP://c www.d.e awww.f www .g"
    assert verdicts("urls(max=71)", text) == ["71.4 URLs for 1000 characters, more than max=71"]
    assert 3 / len(text) * 1000 == pytest.approx(71.43, abs=0.01)
    assert verdicts("urls(max=72)", text) == [None]


# ------------------------------------------------------------------------------------------------ repetition


def test_repeats_are_what_stood_before():
    assert repeated(["aa", "b", "aa", "aa", "", ""]) == (0.5, 4 / 7)
    assert repeated(["", ""]) == (0, 0)


def brute_repeated_share(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    inside = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
    return sum(len(words[i]) for i in inside) / sum(map(len, words))


def brute_top_share(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = {gram: grams.count(gram) for gram in grams}
    most = max(counts.values(), default=1)
    longest = max((sum(map(len, gram)) for gram in grams if counts[gram] == most), default=0)
    return min(most * longest / sum(map(len, words)), 1) if most > 1 else 0


def test_ngram_shares_follow_their_definition():
    rng = random.Random(0)
    for _ in range(200):
        words = [rng.choice(["a", "bb", "ccc", "dddd"]) for _ in range(rng.randrange(1, 30))]
        n = rng.randrange(1, 8)
        hashes, sizes = hashed([words])[0], np.array([len(word) for word in words])
        assert repeated_share(hashes, sizes, n) == pytest.approx(brute_repeated_share(words, n))
        assert top_share(hashes, sizes, n) == pytest.approx(brute_top_share(words, n))


def test_each_rule_of_repetition_removes_what_only_it_forbids():
    unique = [" ".join(prose(random.Random(seed), 40)) for seed in range(8)]
    off = "lines=1, paragraphs=1, line_characters=1, paragraph_characters=1, ngrams=0"
    text = "\n\n".join([*unique, unique[0], unique[0]])  # 2 of 10 paragraphs are repeats
    for rule in ("lines", "paragraphs", "line_characters", "paragraph_characters"):
        others = re.sub(rf"\b{rule}=1", f"{rule}=0.19", off)
        (why,) = verdicts(f"repetition({others})", text)
        assert f"more than {rule}=0.19" in why and why.startswith("0.2")
    assert verdicts(f"repetition({off})", text) == [None]
    assert verdicts(f"repetition({off.replace('ngrams=0', 'ngrams=1')})", text) == [
        "0.20 of it are repeated runs of 5 words, more than 0.15"]  # fmt: skip


def test_prose_passes_and_one_phrase_again_and_again_does_not():
    rng = random.Random(1)
    phrase = " ".join(word for _ in range(60) for word in ("buy now", *prose(rng, 2)))
    assert verdicts("repetition", " ".join(prose(rng, 300)))[0] is None
    assert "of it is one run of 2 words, more than 0.2" in verdicts("repetition", phrase)[0]
    assert verdicts("repetition(ngrams=5)", phrase) == [None]


# ------------------------------------------------------------------------------------------------ copies


def test_exact_keeps_the_first_of_equal_texts_to_the_character():
    assert kept("exact", "a", "b", "a", "a ", "A", "b") == ["a", "b", "a ", "A"]
    assert verdicts("exact", "a", "a")[1] == "the same text as an earlier document"


def changed(rng: random.Random, words: list[str], share: float) -> list[str]:
    words = list(words)
    for at in rng.sample(range(len(words)), round(share * len(words))):
        words[at] = "other"
    return words


def test_near_removes_what_differs_in_some_words_and_says_what_it_is_like():
    rng = random.Random(0)
    base = [prose(rng, 80) for _ in range(60)]
    copies = [changed(rng, words, 0.05) for words in base]
    far = [changed(rng, words, 0.3) for words in base]
    why = verdicts("near", *(" ".join(words) for words in base + copies + far))
    assert why[:60] == [None] * 60
    for number, reason in enumerate(why[60:120]):
        assert re.fullmatch(rf"0\.\d\d like 'd{number}'", reason)
    assert why[120:] == [None] * 60


def test_near_looks_at_neither_case_nor_white_space():
    text = " ".join(prose(random.Random(0), 50))
    assert verdicts("near", text, text.upper().replace(" ", "\n\t"))[1] == "1.00 like 'd0'"
    assert (
        verdicts("near(unit='characters', shingle=5)", text, text.upper().replace(" ", "\n\t"))[1] == "1.00 like 'd0'"
    )


def test_near_compares_with_what_was_kept_only():
    """Each text is like the one before it; were removed ones compared with, all but the first would be removed."""
    rng = random.Random(0)
    chain = [prose(rng, 200)]
    for _ in range(9):
        at = 15 * len(chain)
        chain.append(chain[-1][:at] + prose(rng, 15) + chain[-1][at + 15 :])
    texts = [" ".join(words) for words in chain]
    whys = verdicts("near", *texts)
    stayed = [f"d{number}" for number, why in enumerate(whys) if why is None]
    assert 1 < len(stayed) < len(texts)
    assert {why.rpartition(" ")[2].strip("'") for why in whys if why} <= set(stayed)


def test_characters_find_copies_in_scripts_without_spaces():
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x6000)) for _ in range(300))
    copy = text[:100] + "字" + text[101:200] + "字" + text[201:]
    assert verdicts("near", text, copy) == [None, None]
    assert verdicts("near(unit='characters', shingle=4)", text, copy)[1].endswith("like 'd0'")


def test_texts_shorter_than_a_shingle_are_compared_whole_and_blank_ones_never():
    assert verdicts("near(shingle=5)", "a b", "a b", "a c", " ", "\n") == [None, "1.00 like 'd0'", None, None, None]


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_sketches_estimate_the_jaccard_similarity(unit, share):
    rng, near = random.Random(0), Near(unit=unit, shingle=3, num_perm=256)
    errors = []
    for _ in range(60):
        words = prose(rng, rng.randrange(20, 200))
        pair = [" ".join(words), " ".join(changed(rng, words, share))]
        units = [text.split() if unit == "words" else text for text in pair]
        a, b = ({tuple(u[i : i + 3]) for i in range(len(u) - 2)} for u in units)
        sketch_a, sketch_b = near.sketches(pair)
        errors.append(np.mean(sketch_a == sketch_b) - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.012  # a single error is at most 0.031, the mean of 60 at most 0.004
    assert np.std(errors) < 0.04


def test_sketches_are_the_same_on_every_machine_and_in_every_version():
    """An update of rensa that changes them must change VERSION too, which the keys of the token cache hold."""
    assert Near(num_perm=16).sketches(["The quick brown fox jumps", "中文 x"]).tolist() == PINNED


PINNED = [
    [1844, 15733, 56861, 57761, 57554, 48087, 30530, 10871, 40736, 49535, 15007, 47631, 57283, 23462, 31241, 57324],
    [99, 17746, 9835, 27411, 42064, 3880, 635, 47473, 1845, 33476, 45905, 32199, 33178, 28546, 14556, 11995],
]


def test_bands_are_as_wide_as_pairs_at_the_threshold_allow():
    for threshold, num_perm in itertools.product((0.2, 0.5, 0.75, 0.9, 1.0), (16, 128, 1024)):
        near = Near(threshold=threshold, num_perm=num_perm)
        rows = near.rows_per_band()
        assert 1 <= rows <= num_perm
        assert 1 - (1 - threshold**rows) ** (num_perm // rows) >= 0.95
    assert Near(threshold=1.0, num_perm=16).rows_per_band() == 16


def test_first_seen_is_a_dict(monkeypatch):
    monkeypatch.setattr(duplicates_module, "RECENT", 10)
    rng, seen, reference = np.random.default_rng(0), FirstSeen(), {}
    for number in range(300):
        keys = np.unique(rng.integers(400, size=5).astype(np.uint64) * np.uint64(2**64 // 399))
        found = seen.find(keys)
        assert found.tolist() == [reference.get(key, UNSEEN) for key in keys.tolist()]
        seen.add(keys[found == UNSEEN], number)
        for key in keys.tolist():
            reference.setdefault(key, number)
    assert 2**64 - 1 - (2**64 - 1) % (2**64 // 399) in reference


def test_runs_are_equal_for_equal_neighbours_only():
    hashes = hashed([["a", "b", "c", "a", "b", "d"]])[0]
    two = runs(hashes, 2)
    assert len(two) == 5 and two[0] == two[3] and len(set(two.tolist())) == 4
    assert runs(hashed([["ab", "c"]])[0], 2) != runs(hashed([["a", "bc"]])[0], 2)
    assert len(runs(hashes, 7)) == 0


# ------------------------------------------------------------------------------------------------ knowing


def test_language_keeps_those_named():
    pytest.importorskip("py3langid")
    english = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun all day long."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und schläft dann den ganzen Tag in der Sonne."
    why = verdicts("language", english, german)
    assert why[0] is None and re.fullmatch(r"language de with probability [01]\.\d\d, not en", why[1])
    assert verdicts("language(keep='en, de')", english, german) == [None, None]
    assert "less than min=1" in verdicts("language(min=1)", "x")[0] or "not en" in verdicts("language(min=1)", "x")[0]


def test_an_unknown_language_is_named():
    pytest.importorskip("py3langid")
    with pytest.raises(UserError, match=r"Unknown language in data.filters=language: keep 'english'"):
        filtered([], "language(keep='english')", TOOLS)


def test_language_names_the_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    knowing._identifier.cache_clear()
    with pytest.raises(UserError, match=r"data.filters=language needs the package py3langid: pip install"):
        filtered([], "language", TOOLS)


def test_perplexity_asks_the_named_model_and_refuses_what_is_no_number():
    asked = []

    def scorer(model):
        asked.append(model)
        return lambda texts: [float(text) for text in texts]

    (filter,) = parse("perplexity(model='mine', min=0.5, max=1)")
    why = filter.judge(Tools(scorer=scorer))(documents("0.4", "0.5", "1", "1.01", "nan"))
    assert asked == ["mine"]
    assert [reason and reason.partition(",")[0] for reason in why] == [
        "0.400 nats a byte", None, None, "1.010 nats a byte", "nan nats a byte"]  # fmt: skip
    assert why[0].endswith(", not between min=0.5 and max=1")


def test_tools_that_were_not_handed_in_are_named():
    for call, message in (("perplexity", "score texts"), ("decontaminate(tasks='x')", "items of tasks='x'")):
        with pytest.raises(UserError, match=message):
            filtered([], call, Tools())


def test_decontaminate_finds_items_whatever_case_and_punctuation():
    inside = "Here it is: NATALIA -- sold clips, to 48 of her friends (in April) and then she slept."
    almost = "Natalia sold clips to 48 of her friends in June, and then she slept in April and then she sold half."
    why = verdicts("decontaminate(tasks='gsm8k')", inside, almost, "What is it? Natalia!")
    assert why[0] == "13 words of an item of gsm8k: 'natalia sold clips to 48 of her friends in april and then she'"
    assert why[1:] == [None, None]
    assert "18 words" in verdicts("decontaminate(tasks='gsm8k', n=18)", QUESTION)[0]
    assert verdicts("decontaminate(tasks='gsm8k', n=18)", inside) == [None]


def test_items_of_fewer_words_are_looked_for_whole_down_to_eight():
    tools = Tools(items=lambda tasks, data: ["a b c d e f g h", "1 2 3 4 5 6 7", QUESTION])
    (filter,) = parse("decontaminate(tasks='t')")
    whys = filter.judge(tools)(documents("x a b c d e f g h y", "a b c d e f g", "1 2 3 4 5 6 7", QUESTION))
    assert [why is None for why in whys] == [False, True, True, False]
    assert "8 words of an item of t: 'a b c d e f g h'" in whys[0]


def test_decontaminate_agrees_with_looking_through_all():
    rng = random.Random(0)
    items = [" ".join(prose(rng, rng.randrange(5, 30), 12)) for _ in range(40)]
    texts = [" ".join(prose(rng, 20, 12) + rng.choice(items).split()[: rng.randrange(14)]) for _ in range(200)]
    (filter,) = parse("decontaminate(tasks='t', n=10)")
    whys = filter.judge(Tools(items=lambda tasks, data: items))(documents(*texts))
    for text, why in zip(texts, whys, strict=True):
        grams = [item.split()[i : i + 10] for item in items for i in range(max(len(item.split()) - 9, 1))]
        expected = any(f" {' '.join(gram)} " in f" {text} " for gram in grams if len(gram) >= 8)
        assert (why is not None) == expected
    assert 20 < sum(why is not None for why in whys) < 180


def test_items_that_are_all_too_short_are_refused():
    with pytest.raises(UserError, match=r"none of the 1 items has 8 words to look for"):
        filtered([], "decontaminate(tasks='t')", Tools(items=lambda tasks, data: ["a b c"]))


# ------------------------------------------------------------------------------------------------ at work


def test_each_filter_sees_what_those_before_it_kept_and_the_report_counts_it():
    texts = ("ü" * 4, "a", "b" * 5, "b" * 5, "", "c" * 9)
    some, report = filtered(documents(*texts), "length(min=4, max=8), exact", TOOLS)
    assert [document.id for document in some] == ["d0", "d2"]
    length, exact = report.filters
    assert (length.filter, exact.filter) == ("length(min=4, max=8)", "exact")
    assert (length.documents_in, length.documents_removed, length.documents_out) == (5, 2, 3)
    assert (length.bytes_in, length.bytes_removed) == (28, 10)
    assert (exact.documents_in, exact.documents_out, exact.bytes_in, exact.bytes_removed) == (3, 2, 18, 5)
    assert length.samples == [("d1", "1 characters, fewer than min=4", "a"),
                              ("d5", "9 characters, more than max=8", "c" * 9)]  # fmt: skip
    assert exact.samples == [("d3", "the same text as an earlier document", "b" * 5)]


def test_no_filters_change_nothing():
    some, report = filtered(documents("a", "a"), "", TOOLS)
    assert [document.text for document in some] == ["a", "a"] and report.filters == []


def test_samples_are_few_and_short():
    some, report = filtered(documents(*["x" * 999] * 50, "y"), "length(min=0, max=9)", TOOLS)
    assert len(list(some)) == 1
    assert [sample.id for sample in report.filters[0].samples] == ["d0", "d1", "d2", "d3", "d4"]
    assert {len(sample.text) for sample in report.filters[0].samples} == {200}


def test_a_report_survives_json():
    some, report = filtered(documents("a", "a", "\x1b[31m"), "exact, characters", TOOLS)
    list(some)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_documents_are_read_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(running, "BLOCK_DOCUMENTS", 3)
    read = []

    def source():
        for number in range(100):
            read.append(number)
            yield Document(str(number), f"text {number}")

    some, _ = filtered(source(), "exact", TOOLS)
    assert read == []
    next(some)
    assert len(read) == 3


def test_long_documents_make_small_blocks(monkeypatch):
    monkeypatch.setattr(running, "BLOCK_CHARACTERS", 10)
    sizes = []

    def scorer(model):
        return lambda texts: sizes.append(len(texts)) or [1.0 for _ in texts]

    assert len(list(filtered(documents("a" * 9, "b", "c" * 30, "d"), "perplexity", Tools(scorer=scorer))[0])) == 4
    assert sizes == [2, 1, 1]


def test_removing_everything_is_refused_with_names_counts_and_a_reason():
    some, report = filtered(documents("a", "b", "bb", "bb"), "length(min=2), exact, length(min=3), exact", TOOLS)
    message = (
        r"data.filters removes every document: length\(min=2, max=0\) 2 of 4, exact 1 of 2, "
        r"length\(min=3, max=0\) 1 of 1; 'd2' for one, because: 2 characters, fewer than min=3. Loosen one"
    )
    with pytest.raises(UserError, match=message):
        list(some)
    assert [tally.documents_out for tally in report.filters] == [2, 1, 0, 0]


def test_a_source_without_text_is_not_the_filters_fault():
    assert kept("exact, length") == [] and kept("exact", "", "") == []


def test_conversations_are_judged_by_their_text_and_stay_what_they_are():
    conversation = Document("c", "Hello", conversation=object())
    some, _ = filtered([conversation, conversation], "exact", TOOLS)
    assert list(some) == [conversation]


def test_the_report_is_a_table_in_which_texts_are_harmless():
    texts = ("keep me here", "\x1b[31m [bold]x")
    some, report = filtered(documents(*texts), "length(min=12), characters(letters=1)", TOOLS)
    assert [document.id for document in some] == ["d0"]
    console = rich.console.Console(width=160)
    with console.capture() as capture:
        console.print(render(report.to_json()))
    shown = capture.get()
    assert "\x1b" not in shown and r"'\x1b[31m [bold]x'" in shown
    assert re.search(r"length\(min=12, max=0\) +2 +0 +0.0% +25 +0 +0.0%", shown)
