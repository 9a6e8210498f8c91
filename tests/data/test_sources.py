"""Sources: which files become documents, in which order, and what is said of those that cannot."""

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from foundry_jax.data.document import Document
from foundry_jax.data.sources import SOURCES, bin, pystdlib, text
from foundry_jax.data.sources.text import TextFiles
from foundry_jax.errors import UserError


def write(folder: Path, **contents) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_gives_every_visible_file_in_order_of_its_id(tmp_path):
    write(tmp_path, b="2", a__z="1", c="3")
    write(tmp_path / ".git", config="hidden")
    write(tmp_path, **{".hidden": "no"})
    assert list(text.find(str(tmp_path))) == [Document("a/z", "1"), Document("b", "2"), Document("c", "3")]


def test_a_file_and_a_glob_give_what_they_name(tmp_path):
    write(tmp_path, **{"a.txt": "1", "sub/b.txt": "2", "c.md": "3"})
    assert list(text.find(str(tmp_path / "a.txt"))) == [Document("a.txt", "1")]
    assert [d.id for d in text.find(str(tmp_path / "*.txt"))] == ["a.txt"]
    assert [d.id for d in text.find(str(tmp_path / "**" / "*.txt"))] == ["a.txt", "sub/b.txt"]


def test_text_is_what_the_bytes_say(tmp_path):
    content = "\ufeffa\r\nb\rc\u2028"
    write(tmp_path, a=content)
    assert list(text.find(str(tmp_path))) == [Document("a", content)]


@pytest.mark.parametrize("block", [1, 2, 5, 7, 1000])
def test_a_file_is_cut_at_separators_wherever_they_fall(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text, "BLOCK", block)
    contents = {"a": "one<|>two, ü<|><|>\n<||>four<|>", "b": "five", "c": "<|>"}
    write(tmp_path, **contents)
    found = list(text.find(str(tmp_path), separator="<|>"))
    assert found == [
        Document(f"{name}:{number}", piece)
        for name, content in contents.items()
        for number, piece in enumerate(content.split("<|>"), start=1)
    ]
    prints = [text.find(str(tmp_path), separator=one).fingerprint() for one in ("", "<|>", "|")]
    assert len(set(map(str, prints))) == 3


def test_a_separated_document_that_is_not_utf8_is_named_with_its_offset_in_the_file(tmp_path):
    write(tmp_path, stories=b"one\n\ncaf\xe9 noir")
    with pytest.raises(UserError, match="stories is not UTF-8: byte 0xe9 at offset 8"):
        list(text.find(str(tmp_path), separator="\n\n"))


def test_fingerprint_follows_content_and_ids_but_not_place_or_time(tmp_path):
    first, second = write(tmp_path / "1", a="x", b="y"), write(tmp_path / "2", a="x", b="y")
    fingerprint = text.find(str(first)).fingerprint()
    os.utime(second / "a", (1, 1))
    assert text.find(str(second)).fingerprint() == fingerprint
    write(second, a="z")
    assert text.find(str(second)).fingerprint() != fingerprint
    (first / "b").rename(first / "c")
    assert text.find(str(first)).fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.path is empty"),
        ("nowhere.txt", "No file or folder at data.path='nowhere.txt'"),
        ("nowhere/*.txt", r"No files at data.path='nowhere/\*.txt'"),
    ],
)
def test_a_path_to_nothing_is_named(path, message):
    with pytest.raises(UserError, match=message):
        text.find(path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No files at data.path"):
        text.find(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path):
    write(tmp_path, good="ü", latin=b"caf\xe9 noir")
    with pytest.raises(UserError, match="latin is not UTF-8: byte 0xe9 at offset 3"):
        list(text.find(str(tmp_path)))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    files = TextFiles("gone", {"a": tmp_path / "gone"})
    with pytest.raises(UserError, match=r"Cannot read .*gone: No such file"):
        files.fingerprint()


def test_pystdlib_is_the_library_without_tests_packages_and_build_files():
    files = SOURCES["pystdlib"]("")
    ids = files.paths.keys()
    assert {"json/decoder.py", "os.py", "asyncio/tasks.py"} <= ids
    parts = {part for name in ids for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in ids)
    decoder = next(document.text for document in files if document.id == "json/decoder.py")
    assert decoder.encode() == Path(sysconfig.get_path("stdlib"), "json/decoder.py").read_bytes()


def test_pystdlib_leaves_out_what_is_not_utf8_and_says_so(tmp_path):
    write(tmp_path, **{"good.py": "x = 1", "latin.py": b"# caf\xe9", "notes.txt": "no", "pkg/tests/t.py": "no"})
    files = TextFiles("pystdlib", pystdlib.source_files(tmp_path), skip_undecodable=True)
    assert list(files) == [Document("good.py", "x = 1")]
    assert files.undecodable() == ["latin.py"]


def test_pystdlib_refuses_a_path_it_would_ignore():
    with pytest.raises(UserError, match=r"data.path='x' has no meaning"):
        SOURCES["pystdlib"]("x")


def test_bin_is_uint16_little_endian_unless_the_sidecar_says_otherwise(tmp_path):
    write(tmp_path, **{"train.bin": b"\x01\x02\x03\x00", "val.bin": b"\xff\xff\x00\x00"})
    files = bin.find(str(tmp_path))
    assert bin.open_tokens(files.train, files.dtype).tolist() == [0x0201, 3]
    assert files.scan()["max_id"] == 0xFFFF
    write(tmp_path, **{"meta.json": json.dumps({"dtype": "uint32", "vocab_size": 7, "tokenizer_hash": "ab"})})
    files = bin.find(str(tmp_path))
    assert bin.open_tokens(files.train, files.dtype).tolist() == [0x00030201]
    assert (files.vocab_size, files.tokenizer_hash) == (7, "ab")


def test_bin_sees_the_largest_id_beyond_the_first_slice(monkeypatch):
    monkeypatch.setattr(bin, "SCAN_TOKENS", 4)
    assert bin.max_id(np.array([1, 2, 3, 4, 5, 9, 5, 5, 8], np.uint16)) == 9


def test_bin_never_opens_a_pickle_and_says_so(tmp_path, caplog):
    write(tmp_path, **{"train.bin": b"\0\0", "val.bin": b"\0\0", "meta.pkl": b"cos\nabort\n(tR."})
    assert bin.find(str(tmp_path)).vocab_size is None
    assert "meta.pkl is not read" in caplog.text


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"train.bin": b"\0\0"}, r"No file .*val\.bin"),
        ({"train.bin": b"", "val.bin": b"\0\0"}, r"train\.bin is empty"),
        ({"train.bin": b"\0\0\0", "val.bin": b"\0\0"}, r"train\.bin has 3 bytes, no multiple of 2 \(uint16\)"),
        ({"meta.json": b"{"}, r"Cannot read .*meta\.json as a JSON object"),
        ({"meta.json": b"[]"}, r"Cannot read .*meta\.json as a JSON object"),
        ({"meta.json": b'{"dtype": "int8"}'}, r"meta\.json: dtype='int8' must be one of uint16, uint32"),
        ({"train.json": b'{"vocab_size": "7"}'}, r"train\.json: vocab_size='7' must be a positive whole number"),
    ],
)
def test_bin_folders_that_cannot_be_used_are_explained(contents, message, tmp_path):
    write(tmp_path, **contents)
    with pytest.raises(UserError, match=message):
        bin.find(str(tmp_path))


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_bin_needs_a_folder(path):
    with pytest.raises(UserError, match=r"must be a folder with train.bin and val.bin"):
        bin.find(path)
