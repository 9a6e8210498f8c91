"""The tokenize command: fit, encode, stats."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from foundry_jax.cli import tokenize
from foundry_jax.data import token_folder
from foundry_jax.data.document import Document
from foundry_jax.data.sources import bin, text
from foundry_jax.data.split import in_validation
from foundry_jax.data.tokenize import SEPARATOR, ByteTokenizer, load_tokenizer
from foundry_jax.data.tokenizer_stats import measure
from foundry_jax.errors import MachineError, UserError
from tests.conftest import ROOT

TEXTS = {f"{i}.txt": f"the cat number {i} sat on the mat\n" * 3 for i in range(30)}


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name, content in TEXTS.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, books):
    """Runs the command on the books in this process and returns what it prints, as JSON."""

    def run(*arguments, shown=False):
        text = ["--source=text", f"--path={books}", *([] if shown else ["--json"])]
        monkeypatch.setattr(sys, "argv", ["tokenize", arguments[0], *text, *arguments[1:]])
        tokenize.main()
        out = capsys.readouterr().out
        return out if shown else json.loads(out)

    return run


@pytest.fixture
def fitted(run, tmp_path):
    return run("fit", "--vocab-size=290", "--special-token=<|im_end|>", f"--out={tmp_path / 'made' / 'tok'}")[
        "tokenizer"
    ]


def test_fit_writes_a_tokenizer_that_any_command_reads(fitted, run, tmp_path):
    tokenizer = load_tokenizer(tmp_path / "made" / "tok")
    assert fitted == str(tmp_path / "made" / "tok" / "tokenizer.json")
    assert tokenizer.vocab_size == 291 and tokenizer.control_ids == {SEPARATOR: 0, "<|im_end|>": 290}
    again = run("fit", "--vocab-size=290", "--special-token=<|im_end|>", f"--out={tmp_path / 'other.json'}")
    assert again["hash"] == tokenizer.hash and again["tokenizer"].endswith("other.json")


def test_fit_sees_training_documents_only_unless_told(run, tmp_path, books):
    assert any(in_validation(name, 0.5) for name in TEXTS)
    for name in TEXTS:
        if in_validation(name, 0.5):
            (books / name).write_text("zzyyzzyy " * 99)
    learned = {}
    for validation in ("document(fraction=0.5)", "none"):
        out = tmp_path / f"{validation[:4]}.json"
        run("fit", "--vocab-size=275", f"--validation={validation}", f"--out={out}")
        learned[validation] = "Ġzzyyzzyy" in tokenizers.Tokenizer.from_file(str(out)).get_vocab()
    assert list(learned.values()) == [False, True]


def test_encode_writes_a_folder_that_the_source_bin_reads(fitted, run, tmp_path):
    facts = run(
        "encode", f"--tokenizer={fitted}", "--validation=document(fraction=0.3)", f"--out={tmp_path / 'tokens'}"
    )
    files, tokenizer = bin.find(str(tmp_path / "tokens")), load_tokenizer(tmp_path / "tokens")
    assert (files.vocab_size, files.tokenizer_hash, files.dtype) == (291, tokenizer.hash, "uint16")
    for side, path in (("train", files.train), ("validation", files.validation)):
        names = [name for name in sorted(TEXTS) if in_validation(name, 0.3) == (side == "validation")]
        tokens = bin.open_tokens(path, files.dtype)
        assert tokenizer.decode(tokens) == "".join(SEPARATOR + TEXTS[name] for name in names)
        size = sum(len(TEXTS[name]) for name in names)
        assert facts[side] == {"documents": len(names), "tokens": len(tokens), "bytes": size}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "made", "tokens"]  # nothing unfinished


def test_encode_takes_the_tail_of_one_long_text(run, tmp_path):
    run("encode", "--tokenizer=byte", "--validation=tail(fraction=0.5)", f"--out={tmp_path / 'tokens'}")
    files = bin.find(str(tmp_path / "tokens"))
    texts = "".join(TEXTS[name] for name in sorted(TEXTS))
    ids = np.concatenate([bin.open_tokens(path, files.dtype) for path in (files.train, files.validation)])
    assert bytes(ids[ids < 256].astype(np.uint8)).decode() == texts


def test_stats_are_counted(fitted, run, books):
    found = run("stats", f"--tokenizer={fitted}")
    size, words = sum(map(len, TEXTS.values())), sum(len(content.split()) for content in TEXTS.values())
    tokenizer = load_tokenizer(fitted)
    ids = [index for content in TEXTS.values() for index in tokenizer.encode(content)]
    expected = {"documents": 30, "bytes": size, "words": words, "tokens": len(ids), "vocab_size": 291}
    expected |= {"used": len(set(ids)), "unknown": 0, "changed": 0, "share_used": len(set(ids)) / 291}
    expected |= {"bytes_per_token": size / len(ids), "tokens_per_word": len(ids) / words, "share_unknown": 0.0}
    assert {key: found[key] for key in expected} == expected
    assert found["megabytes_per_second"] == pytest.approx(size / 1e6 / found["seconds"])
    shown = run("stats", "--tokenizer=byte", shown=True)
    assert f"bytes                 {size:,}\n" in shown and "bytes per token       1\n" in shown


def test_text_that_a_tokenizer_loses_is_counted(tmp_path):
    words = tokenizers.models.WordLevel({"</s>": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]")
    foreign = tokenizers.Tokenizer(words)
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    foreign.save(str(tmp_path / "tokenizer.json"))
    found = measure(load_tokenizer(tmp_path), ["cat", "cat dog"])
    assert (found.tokens, found.unknown, found.changed) == (3, 1, 1)


def test_what_has_no_text_is_refused():
    with pytest.raises(UserError, match="The data holds no text"):
        measure(ByteTokenizer(), ["", ""])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "the following arguments are required: --out; see python -m foundry_jax.cli.tokenize fit --help"),
        ([], "the following arguments are required: COMMAND"),
        (["fit", "--vocab-size=9", "--out={out}"], "vocab_size=9 must be at least 257"),
        (["fit", "--out={books}/0.txt/x"], "Cannot write .*0.txt/x/tokenizer.json: Not a directory"),
        (["fit", "--out={books}", "--validation=half"], "Unknown data.validation 'half'"),
        (["fit", "--out={out}", "--path={empty}", "--validation=none"], "The data holds no text"),
        (["fit", "--out={out}", "--path={empty}"], "The data holds no text"),
        (["fit", "--out={out}", "--source=jsonl(txt='a')"], "Unknown option of data.source=jsonl 'txt'"),
        (["stats", "--tokenizer=nowhere"], "Cannot read the tokenizer nowhere"),
        (["stats", "--tokenizer=byte", "--source=text, text"], "names 2 sources, but the command takes one"),
        (["stats", "--tokenizer=byte", "--path={empty}"], "The data holds no text"),
        (["encode", "--tokenizer=byte", "--out={books}"], "books exists; name a folder that does not"),
        (
            ["encode", "--tokenizer=byte", "--out={out}", "--path={books}/1.txt"],
            "leaves no .* text; try data.validation=",
        ),
        (["encode", "--tokenizer=byte", "--out={books}/0.txt/x"], "Cannot write .*0.txt/x: Not a directory"),
        (
            ["encode", "--tokenizer=byte", "--out={out}", "--source=chat", "--path={chat}"],
            "holds conversations, and bare",
        ),
    ],
)
def test_a_mistake_is_explained(arguments, message, run, tmp_path, books, monkeypatch):
    (tmp_path / "empty").write_text("")
    talk = {"instruction": "Add.", "output": "3"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(talk))
    places = {"out": tmp_path / "out", "books": books, "empty": tmp_path / "empty", "chat": tmp_path / "chat.jsonl"}
    with pytest.raises(UserError, match=message) as caught:
        if arguments:
            run(*(argument.format(**places) for argument in arguments))
        else:
            tokenize.parse_arguments([])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fit_never_overwrites(fitted, run, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json exists; name another --out"):
        run("fit", f"--out={tmp_path / 'made' / 'tok'}")


def test_tokens_cannot_be_made_of_tokens(fitted, run, tmp_path):
    run("encode", f"--tokenizer={fitted}", f"--out={tmp_path / 'tokens'}")
    with pytest.raises(UserError, match="--source=bin holds tokens already"):
        run("stats", "--tokenizer=byte", "--source=bin", f"--path={tmp_path / 'tokens'}")


def test_a_full_disk_leaves_nothing_behind(books, tmp_path, monkeypatch):
    def full(documents, tokenizer, format):
        yield from ()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_folder, "encode_all", full)
    with pytest.raises(MachineError, match="Cannot write .*tokens: No space left on device; free some space"):
        token_folder.write(tmp_path / "tokens", text.find(str(books)), ByteTokenizer(), "document(fraction=0.3)")
    assert [path.name for path in tmp_path.iterdir()] == ["books"]


def test_a_vocabulary_of_more_than_65536_takes_four_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    sides = {"train": [Document("a", "ab")], "validation": [Document("b", "c")]}
    facts = token_folder._write(tmp_path, sides, ByteTokenizer(), "x")
    assert facts["dtype"] == "uint32"
    assert bin.open_tokens(tmp_path / "train.bin", "uint32").tolist() == [256, 97, 98]


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_an_exit_code(books):
    def command(*arguments):
        program = [sys.executable, "-m", "foundry_jax.cli.tokenize", *arguments]
        return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})

    done = command("stats", "--tokenizer=byte", "--source=text", f"--path={books}")
    assert done.returncode == 0 and done.stdout.startswith("hash ") and done.stderr == ""
    done = command("stats", "--tokenizer=byte", "--source=txt")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("error: Unknown data.source 'txt'. Did you mean 'text'?")
        and done.stderr.count("\n") == 1
    )
