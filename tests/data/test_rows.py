"""Sources of rows: JSON Lines and Parquet files."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet as pq
import pytest

from foundry_jax.data.document import Document
from foundry_jax.data.sources import jsonl, parquet
from foundry_jax.errors import UserError

ROWS = [{"text": "one", "name": "a", "n": 1}, {"text": "zwei ü \u2028 \x00", "name": "b", "n": 2}]


def lines(rows) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[1:])))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\r\n \n" + lines(ROWS[1:]) + b"\n\n")
    (tmp_path / "README.md").write_text("no JSON")
    return tmp_path


def test_lines_are_documents_named_by_their_place(folder):
    first, second = (row["text"] for row in ROWS)
    expected = [Document("a.jsonl:1", first), Document("a.jsonl:3", second), Document("sub/x.jsonl.gz:1", second)]
    assert list(jsonl.find(str(folder))) == expected
    assert len(list(jsonl.find(str(folder / "a.jsonl")))) == 2
    assert [one.id for one in jsonl.find(str(folder / "**" / "*.gz"))] == ["sub/x.jsonl.gz:1"]


def test_fields_hold_the_text_and_the_name(folder):
    assert next(iter(jsonl.find(str(folder / "a.jsonl"), text="name", id="text"))) == Document("one", "a")
    assert [one.id for one in jsonl.find(str(folder / "a.jsonl"), id="n")] == ["1", "2"]


def test_fingerprint_follows_content(folder):
    before = jsonl.find(str(folder)).fingerprint()
    os.utime(folder / "a.jsonl", (1, 1))
    assert jsonl.find(str(folder)).fingerprint() == before
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    assert jsonl.find(str(folder)).fingerprint() != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", r"line 2: list instead of an object; a line is {\"text\": \"...\"}"),
        (b'{"body": "x", "id": 1}', r"line 2: no field 'text'; it has 'body', 'id'. Say .*jsonl\(text='...'\)"),
        (b"{}", "line 2: no field 'text'; it has none"),
        (b'{"text": null}', "line 2: 'text' must be text, not NoneType"),
        (b'{"text": ["x"]}', "line 2: 'text' must be text, not list"),
        (b'{"text": "caf\xe9"}', "line 2: not UTF-8: byte 0xe9 at offset 13 of the line"),
        (b'{"text": "\\ud800"}', "line 2: holds one half of a surrogate pair"),
        (b"[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b"\n" + line)
    with pytest.raises(UserError, match=message) as caught:
        list(jsonl.find(str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("oops", "no field 'oops'"), ("tags", "'tags' must be text or a whole")])
def test_a_name_that_is_none_is_refused(name, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "tags": []}')
    with pytest.raises(UserError, match=message):
        list(jsonl.find(str(path), id=name))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(os.urandom(9999).hex().encode())[:-20]])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged: "):
        list(jsonl.find(str(path)))


def test_a_folder_without_such_files_and_a_file_that_goes_away_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No \.jsonl or \.jsonl\.gz files at data\.path="):
        jsonl.find(str(tmp_path))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS))
    source = jsonl.find(str(path))
    path.unlink()
    for use in (list, jsonl.JsonLines.fingerprint):
        with pytest.raises(UserError, match=r"Cannot read .*a\.jsonl: No such file"):
            use(source)


# ------------------------------------------------------------------------------------------------ Parquet


@pytest.fixture
def write(tmp_path):
    def write(columns, **options):
        pq.write_table(pyarrow.table(columns), tmp_path / "a.parquet", **options)
        return str(tmp_path / "a.parquet")

    return write


def columns_of_text():
    texts = ["one", "", "zwei ü\x00"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary()):
        yield pyarrow.array(texts).cast(kind)
    yield pyarrow.array(texts).dictionary_encode()


def test_rows_are_documents_whatever_the_type_of_the_text(write):
    for column in columns_of_text():
        path = write({"text": column, "n": [1, 2, 3]}, row_group_size=2)
        assert list(parquet.find(path)) == [
            Document("a.parquet:1", "one"), Document("a.parquet:2", ""), Document("a.parquet:3", "zwei ü\x00")
        ]  # fmt: skip
    assert [one.id for one in parquet.find(path, id="n")] == ["1", "2", "3"]
    assert [one.id for one in parquet.find(path, id="text")] == ["one", "", "zwei ü\x00"]


def test_no_row_is_lost_between_batches(write, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 3)
    texts = [f"text {i}" for i in range(20)]
    source = parquet.find(write({"body": texts}, row_group_size=7), text="body")
    assert [one.text for one in source] == texts == [one.text for one in source]


def test_a_bad_table_is_named(write, tmp_path):
    for columns, message in [
        ({"body": ["x"], "b": [1]}, r"a\.parquet: no field 'text'; it has 'body', 'b'. Say .*parquet\(text='...'\)"),
        ({"text": ["x", None]}, r"a\.parquet, row 2: 'text' must be text, not NoneType"),
        ({"text": [1]}, "row 1: 'text' must be text, not int"),
        ({"text": [["x"]]}, "row 1: 'text' must be text, not list"),
        ({"text": [b"x", b"caf\xe9"]}, "row 2: not UTF-8: byte 0xe9 at offset 3 of the text"),
    ]:
        with pytest.raises(UserError, match=message):
            list(parquet.find(write(columns)))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet is no Parquet file: "):
        list(parquet.find(str(tmp_path / "a.parquet")))


# Linux keeps ru_maxrss of what a process was before it became another program; VmHWM is its own.
READ = """
import pathlib, re, sys
from foundry_jax.data.mixture import opened
for document in opened(*sys.argv[1:])[0].source:
    pass
print(document.id, *re.findall(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text()))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("source", ["jsonl", "parquet", "text(separator='<|endoftext|>')"])
def test_a_large_file_is_never_in_memory_whole(source, tmp_path):
    path, text = tmp_path / "large", os.urandom(20_000).hex()
    if source.startswith("text"):
        with open(path, "w") as file:
            file.writelines(f"{'<|endoftext|>' * (i > 0)}{i} {text}" for i in range(10_000))
    elif source == "jsonl":
        with open(path, "w") as file:
            file.writelines(f'{{"text": "{i} {text}"}}\n' for i in range(10_000))
    else:
        texts = pyarrow.array(f"{i} {text}" for i in range(10_000))
        pq.write_table(
            pyarrow.table({"text": texts}), path, row_group_size=10_000, compression="none", use_dictionary=False
        )
        del texts
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of a process's memory")
    assert path.stat().st_size > 390e6
    done = subprocess.run([sys.executable, "-c", READ, source, str(path)], capture_output=True, text=True, check=True)
    name, kilobytes = done.stdout.split()
    assert name.endswith(":10000") and int(kilobytes) < 300_000
