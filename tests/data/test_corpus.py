"""prepare: the tokens of a DataConfig, what is counted about them, and every way it can go wrong."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from foundry_jax.config import DataConfig
from foundry_jax.data import prepare, training, validation
from foundry_jax.data.tokenize import BPETokenizer, ByteTokenizer
from foundry_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SHAKESPEARE = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt"
ENTRIES = 3  # of the cache: the tokenizer, the training tokens, the validation tokens
DOCUMENTS = {f"{number:02}.txt": f"Document {number}: café " + "la " * number for number in range(40)}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture
def config(tmp_path, folder):
    return DataConfig(
        source="text",
        preferences="",
        path=str(folder),
        tokenizer="byte",
        vocab_size=300,
        validation="document(0.2)",
        filters="",
        format="own",
        packing="stream",
        curriculum="none",
        batch_size=2,
        cache_dir=str(tmp_path / "cache"),
    )


def train_of(corpus):
    """The training tokens of a corpus of one source."""
    (part,) = corpus.train
    return part.stream.tokens


def held_of(corpus):
    """The validation tokens of a corpus of one source."""
    (held,) = corpus.validation
    return held.stream.tokens


def changed(config, **values):
    return dataclasses.replace(config, **values)


def cache_folders(config):
    return sorted(path for path in Path(config.cache_dir, "tokens").iterdir() if path.is_dir())


def documents_of(corpus, tokens):
    """The texts between the separators of a stream, which must begin with one."""
    first, *texts = corpus.tokenizer.decode(tokens).split("<|endoftext|>")
    assert first == "" and tokens[0] == corpus.tokenizer.separator_id
    return texts


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_streams_hold_every_document_once_after_a_separator(config, tokenizer):
    corpus = prepare(changed(config, tokenizer=tokenizer))
    train = documents_of(corpus, train_of(corpus))
    validation = documents_of(corpus, held_of(corpus))
    assert len(validation) > 3
    assert sorted(train + validation) == sorted(DOCUMENTS.values())
    assert corpus.vocab_size == {"byte": 257, "bpe": 300}[tokenizer]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "char"])
@pytest.mark.parametrize("validation", ["document(0.2)", "tail(0.2)"])
def test_validation_bytes_are_those_the_predicted_tokens_decode_to(config, tokenizer, validation):
    corpus = prepare(changed(config, tokenizer=tokenizer, validation=validation))
    predicted = held_of(corpus)[1:]
    assert corpus.validation_bytes == len(corpus.tokenizer.decode(predicted).replace("<|endoftext|>", "").encode())
    assert corpus.validation_bytes == corpus.tokenizer.token_bytes[predicted].sum()


def test_validation_hash_is_of_the_text_whatever_the_tokenizer(config):
    corpora = [prepare(changed(config, tokenizer=name)) for name in ("byte", "bpe", "char")]
    assert len({corpus.validation_hash for corpus in corpora}) == 1
    digest = hashlib.sha256()
    for text in documents_of(corpora[0], held_of(corpora[0])):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert corpora[0].validation_hash == digest.hexdigest()
    assert prepare(changed(config, validation="document(0.4)")).validation_hash != digest.hexdigest()


def test_char_concatenates_and_knows_every_character(config):
    corpus = prepare(changed(config, tokenizer="char", validation="tail(0.2)"))
    text = "".join(DOCUMENTS[name] for name in sorted(DOCUMENTS))
    cut = int(len(text) * 0.8)
    assert corpus.tokenizer.decode(train_of(corpus)) == text[:cut]
    assert corpus.tokenizer.decode(held_of(corpus)) == text[cut:]
    assert corpus.vocab_size == len(set(text))


def test_bpe_is_fitted_to_training_text_only(config, folder):
    before = prepare(changed(config, tokenizer="bpe"))
    (name,) = [name for name in DOCUMENTS if DOCUMENTS[name] in documents_of(before, held_of(before))][:1]
    (folder / name).write_text("zqzqzq " * 500)
    after = prepare(changed(config, tokenizer="bpe"))
    assert after.validation_hash != before.validation_hash
    assert after.tokenizer.hash == before.tokenizer.hash


def test_control_token_in_a_document_adds_no_document(config, folder):
    before = prepare(config)
    (folder / "00.txt").write_text("a<|endoftext|>b")
    for tokenizer in ("byte", "bpe"):
        corpus = prepare(changed(config, tokenizer=tokenizer))
        separators = np.concatenate([train_of(corpus), held_of(corpus)]) == corpus.tokenizer.separator_id
        assert separators.sum() == len(DOCUMENTS)
        assert len(train_of(corpus)) != len(train_of(before))


def test_empty_documents_add_no_tokens(config, folder):
    before = prepare(config)
    for number in range(20):
        (folder / f"empty{number}").write_text("")
    after = prepare(config)
    assert (len(train_of(after)), after.validation_hash) == (len(train_of(before)), before.validation_hash)


def test_many_batches_of_documents_give_the_same_stream(config, monkeypatch):
    whole = prepare(changed(config, tokenizer="bpe"))
    monkeypatch.setattr("foundry_jax.data.encoding.BATCH_CHARACTERS", 50)
    pieces = prepare(changed(config, tokenizer="bpe", cache_dir=config.cache_dir + "2"))
    np.testing.assert_array_equal(train_of(whole), train_of(pieces))


def test_a_large_vocabulary_is_stored_in_32_bits(config, tmp_path):
    tokenizer = BPETokenizer(300).fit(DOCUMENTS.values()).to_json()
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 70000, "content": "<far>"})
    tokenizer["model"]["vocab"]["<far>"] = 70000
    (tmp_path / "far.json").write_text(json.dumps(tokenizer))
    corpus = prepare(changed(config, tokenizer=str(tmp_path / "far.json")))
    assert corpus.vocab_size == 70001
    assert train_of(corpus).dtype == np.uint32
    assert train_of(prepare(config)).dtype == np.uint16
    assert sorted(documents_of(corpus, train_of(corpus)) + documents_of(corpus, held_of(corpus))) == sorted(
        DOCUMENTS.values()
    )


def test_tokenizer_path_replaces_fitting(config, tmp_path):
    tokenizer = BPETokenizer(280).fit(["other text"] * 3)
    tokenizer.save(tmp_path / "mine.json")
    corpus = prepare(changed(config, tokenizer=str(tmp_path / "mine.json")))
    assert corpus.tokenizer.hash == tokenizer.hash
    assert corpus.vocab_size == tokenizer.vocab_size


def test_a_tokenizer_that_loses_text_is_reported(config, tmp_path, caplog):
    value = BPETokenizer(300).fit(DOCUMENTS.values()).to_json()
    value["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower.json").write_text(json.dumps(value))
    prepare(changed(config, tokenizer=str(tmp_path / "lower.json")))
    assert "does not reproduce" in caplog.text


def test_second_call_reads_the_cache_and_tokens_are_mapped(config, monkeypatch):
    first = prepare(changed(config, tokenizer="bpe"))
    monkeypatch.setattr(BPETokenizer, "fit", lambda *_: pytest.fail("fitted again"))
    monkeypatch.setattr(BPETokenizer, "encode_batch", lambda *_: pytest.fail("encoded again"))
    again = prepare(changed(config, tokenizer="bpe"))
    assert isinstance(train_of(again), np.memmap) and not train_of(again).flags.writeable
    np.testing.assert_array_equal(train_of(first), train_of(again))
    assert again.tokenizer.hash == first.tokenizer.hash
    assert (again.validation_hash, again.validation_bytes) == (first.validation_hash, first.validation_bytes)


def test_what_changes_the_tokens_changes_the_entry_and_nothing_else_does(config, folder):
    prepare(config)
    same = [{"batch_size": 7}, {"vocab_size": 999}]  # bytes have no vocabulary to choose
    for values in same:
        prepare(changed(config, **values))
    assert len(cache_folders(config)) == ENTRIES
    different = [
        {"validation": "tail(0.2)"},
        {"validation": "document(0.3)"},
        {"tokenizer": "bpe"},
        {"tokenizer": "char"},
    ]
    for values in different:
        prepare(changed(config, **values))
    (folder / "00.txt").write_text("changed")
    prepare(config)
    assert len(cache_folders(config)) == ENTRIES * (2 + len(different))


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "tokenizer.json", "meta.json"])
def test_a_damaged_entry_is_reported_and_rebuilt(config, name, caplog):
    expected = train_of(prepare(config)).tolist()
    for path in [entry / name for entry in cache_folders(config) if (entry / name).is_file()]:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert train_of(prepare(config)).tolist() == expected
        assert "is damaged" in caplog.text
        assert path.read_bytes() == data


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"needs {SHAKESPEARE}")
def test_nanogpts_shakespeare_is_reproduced(config):
    corpus = prepare(changed(config, path=str(SHAKESPEARE), tokenizer="char", validation="tail(0.1)"))
    text = SHAKESPEARE.read_text("utf-8")
    assert corpus.vocab_size == 65
    assert (len(train_of(corpus)), len(held_of(corpus))) == (1003854, 111540)
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    assert train_of(corpus)[:1000].tolist() == [ids[character] for character in text[:1000]]
    assert held_of(corpus).tolist() == [ids[character] for character in text[int(len(text) * 0.9) :]]
    assert corpus.validation_bytes == 111539


def test_pystdlib_can_be_trained_on(config):
    corpus = prepare(changed(config, source="pystdlib", path="", validation="document(0.05)"))
    assert len(train_of(corpus)) > 5_000_000 and len(held_of(corpus)) > 100_000
    assert "import" in corpus.tokenizer.decode(train_of(corpus)[:20000])
    batch = training(corpus, config, context_length=64, num_steps=1, seed=0).batch(0)
    assert batch["inputs"].max() <= 256
    (batches,) = validation(corpus, batch_size=64, context_length=256)
    assert sum(batch["weights"].sum() for batch in batches) == len(held_of(corpus)) - 1
    start = time.perf_counter()
    prepare(changed(config, source="pystdlib", path="", validation="document(0.05)"))
    assert time.perf_counter() - start < 5  # measured 0.18 s; the room is for busy machines


# Token files made elsewhere.


@pytest.fixture
def bin_config(config, tmp_path):
    """nanoGPT's layout: bytes as uint16, no sidecar, 256 as the end of a document."""
    folder = tmp_path / "bin"
    folder.mkdir()
    np.array([256, *b"training text " * 20], "<u2").tofile(folder / "train.bin")
    np.array([*b"validation", 256, *b"text"], "<u2").tofile(folder / "val.bin")
    return changed(config, source="bin", path=str(folder), vocab_size=257)


def test_bin_without_a_tokenizer_is_tokens_and_no_more(bin_config):
    corpus = prepare(bin_config)
    assert bytes(train_of(corpus)[1:9].tolist()) == b"training"
    assert corpus.tokenizer is None and corpus.validation_bytes is None
    assert corpus.vocab_size == 257
    assert corpus.validation_hash == hashlib.sha256(Path(bin_config.path, "val.bin").read_bytes()).hexdigest()


def test_bin_with_a_tokenizer_knows_its_bytes(bin_config, tmp_path):
    ByteTokenizer().save(tmp_path / "byte.json")
    corpus = prepare(changed(bin_config, tokenizer=str(tmp_path / "byte.json")))
    assert corpus.validation_bytes == len(b"alidationtext")
    assert corpus.tokenizer.decode(held_of(corpus)[:10]) == "validation"


def test_bin_is_scanned_once_until_it_changes(bin_config, monkeypatch):
    prepare(bin_config)
    with monkeypatch.context() as patch:
        patch.setattr("foundry_jax.data.sources.bin.max_id", lambda *_: pytest.fail("scanned again"))
        prepare(bin_config)
    np.array([1, 2, 999], "<u2").tofile(Path(bin_config.path, "train.bin"))
    with pytest.raises(UserError, match="holds token id 999"):
        prepare(bin_config)


def test_token_ids_beyond_the_vocabulary_are_refused(bin_config):
    np.array([1, 300, 2], "<u2").tofile(Path(bin_config.path, "val.bin"))
    for _ in range(2):  # scanned, then from the cache
        with pytest.raises(UserError, match=r"holds token id 300, but the vocabulary ends at 256; set .* to 301"):
            prepare(bin_config)
    assert prepare(changed(bin_config, vocab_size=301)).vocab_size == 301


def test_the_vocabulary_of_the_sidecar_wins_over_the_config(bin_config):
    Path(bin_config.path, "meta.json").write_text('{"vocab_size": 256}')
    with pytest.raises(UserError, match="holds token id 256, but the vocabulary ends at 255"):
        prepare(bin_config)


def test_tokens_of_another_tokenizer_are_refused_with_both_hashes(bin_config, tmp_path):
    ByteTokenizer().save(tmp_path / "byte.json")
    Path(bin_config.path, "meta.json").write_text('{"tokenizer_hash": "abc123"}')
    with pytest.raises(UserError, match=f"made with tokenizer abc123, not with this one, {ByteTokenizer().hash}"):
        prepare(changed(bin_config, tokenizer=str(tmp_path / "byte.json")))


# Mistakes.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "txt"}, r"Unknown data\.source 'txt'\. Did you mean 'text'\? Choose from: bin, chat"),
        ({"tokenizer": "bpee"}, r"Unknown data\.tokenizer 'bpee'\. Did you mean 'bpe'\? Choose from: bpe, byte, char"),
        ({"path": "nowhere"}, "No file or folder at data.path='nowhere'"),
        ({"tokenizer": "nowhere.json"}, r"Cannot read the tokenizer nowhere\.json: No such file"),
        ({"validation": "document(0.0001)"}, "leaves no validation text; try data.validation=tail"),
    ],
)
def test_mistakes_are_named_in_one_line(config, values, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare(changed(config, **values))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_leaves_no_entry(config, folder):
    (folder / "99.txt").write_bytes(b"good until \xff")
    with pytest.raises(UserError, match=r"99\.txt is not UTF-8: byte 0xff at offset 11"):
        prepare(config)
    assert not any((entry / "tokens.bin").exists() for entry in cache_folders(config))


def test_empty_text_is_refused(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="The data holds no text"):
        prepare(changed(config, path=str(tmp_path / "empty.txt")))


@pytest.fixture
def read_only_cache(config):
    """A built cache that this process may read but not write; root would otherwise write anywhere."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        texts = Path(place, "texts")
        texts.mkdir()
        (texts / "a.txt").write_text("some text " * 20)
        config = changed(config, path=str(texts), validation="tail(0.2)", cache_dir=str(Path(place, "cache")))
        prepare(config)
        tokens = Path(config.cache_dir, "tokens")
        mode = tokens.stat().st_mode
        tokens.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            yield config
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            tokens.chmod(mode)


def test_a_read_only_cache_serves_what_it_has_and_says_so_when_it_has_not(read_only_cache):
    assert len(train_of(prepare(read_only_cache))) == 161
    with pytest.raises(UserError, match=r"Cannot write the token cache .*: Permission denied; free some space, or set"):
        prepare(changed(read_only_cache, tokenizer="char"))


# Several processes, and processes that die. BUILD stops in the middle of writing tokens until the test says go.

BUILD = """
import logging, pathlib, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from types import SimpleNamespace
from foundry_jax.data import prepare
from foundry_jax.data.tokenize import ByteTokenizer

encode_batch = ByteTokenizer.encode_batch
meeting = pathlib.Path(sys.argv[2])

def stop_halfway(self, texts):
    (meeting / "building").touch()
    while not (meeting / "go").exists():
        time.sleep(0.01)
    return encode_batch(self, texts)

ByteTokenizer.encode_batch = stop_halfway
import json
(part,) = prepare(SimpleNamespace(**json.loads(sys.argv[1]))).train
print(len(part.stream.tokens))
"""


def start_build(config, meeting):
    command = [sys.executable, "-c", BUILD, json.dumps(dataclasses.asdict(config)), str(meeting)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_of_two_processes_at_once_one_builds_and_the_other_waits(config, tmp_path):
    builder = start_build(config, tmp_path)
    wait_until((tmp_path / "building").exists)
    waiter = start_build(config, tmp_path)
    line = waiter.stderr.readline()
    assert "Waiting for another process" in line
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=30) for process in (builder, waiter)]
    assert [process.returncode for process in (builder, waiter)] == [0, 0]
    assert sum(output[1].count("Building") for output in outputs) == ENTRIES  # whoever is first builds the next one
    assert outputs[0][0] == outputs[1][0] == f"{len(train_of(prepare(config)))}\n"


def test_kill_9_during_a_build_leaves_no_half_entry(config, tmp_path):
    builder = start_build(config, tmp_path)
    wait_until((tmp_path / "building").exists)
    unfinished = [path.suffix for path in cache_folders(config)]
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=30)
    assert sorted(unfinished) == ["", ".building"] == sorted(path.suffix for path in cache_folders(config))
    corpus = prepare(config)
    assert [entry.suffix for entry in cache_folders(config)] == [""] * ENTRIES
    assert sorted(documents_of(corpus, train_of(corpus)) + documents_of(corpus, held_of(corpus))) == sorted(
        DOCUMENTS.values()
    )


LIMITED = """
import json, resource, signal, sys
from types import SimpleNamespace
from foundry_jax.data import prepare
from foundry_jax.errors import UserError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    prepare(SimpleNamespace(**json.loads(sys.argv[1])))
except UserError as error:
    print(error)
"""


def test_a_disk_that_fills_up_during_a_build_leaves_the_old_entries(config):
    expected = train_of(prepare(config)).tolist()
    larger = changed(config, validation="document(0.1)")
    command = [sys.executable, "-c", LIMITED, json.dumps(dataclasses.asdict(larger))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "Cannot write the token cache" in result.stdout and "File too large" in result.stdout
    assert len(cache_folders(config)) == ENTRIES
    assert train_of(prepare(config)).tolist() == expected
