"""The cache: built once, whole or not at all, and never believed without a look."""

import json
import shutil

import pytest

from foundry_jax.data.cache import cache_root, open_or_build
from foundry_jax.errors import UserError

SPEC = {"of": "tests"}


class Builder:
    """Writes one file and counts how often it was asked to."""

    def __init__(self, content=b"tokens"):
        self.content, self.calls = content, 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "train.bin").write_bytes(self.content)
        return {"num_tokens": 3}


def flip_a_bit(folder):
    data = bytearray((folder / "train.bin").read_bytes())
    data[2] ^= 4
    (folder / "train.bin").write_bytes(data)


def change_a_number(folder):
    text = (folder / "meta.json").read_text()
    assert '"num_tokens": 3' in text
    (folder / "meta.json").write_text(text.replace('"num_tokens": 3', '"num_tokens": 4'))


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a truncated file": lambda folder: (folder / "train.bin").write_bytes(b"tok"),
    "a longer file": lambda folder: (folder / "train.bin").write_bytes(b"tokens and more"),
    "a missing file": lambda folder: (folder / "train.bin").unlink(),
    "a missing sidecar": lambda folder: (folder / "meta.json").unlink(),
    "an empty sidecar": lambda folder: (folder / "meta.json").write_bytes(b""),
    "a garbled sidecar": lambda folder: (folder / "meta.json").write_bytes(b"\xff{"),
    "a sidecar that is a list": lambda folder: (folder / "meta.json").write_text("[]"),
    "a sidecar without checksums": lambda folder: (folder / "meta.json").write_text('{"num_tokens": 3}'),
    "a changed number in the sidecar": change_a_number,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def test_built_once_and_opened_ever_after(tmp_path):
    build = Builder()
    first = open_or_build(tmp_path / "new" / "folder", SPEC, build)
    again = open_or_build(tmp_path / "new" / "folder", SPEC, build)
    assert build.calls == 1
    assert first.folder == again.folder and first.facts == again.facts
    assert (again.folder / "train.bin").read_bytes() == b"tokens"
    assert again.facts["num_tokens"] == 3


def test_another_spec_is_another_entry(tmp_path):
    build = Builder()
    entries = [open_or_build(tmp_path, spec, build) for spec in (SPEC, {"of": "others"})]
    assert build.calls == 2 and entries[0].folder != entries[1].folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_reported_and_repaired(damage, tmp_path, caplog):
    folder = open_or_build(tmp_path, SPEC, Builder()).folder
    DAMAGES[damage](folder)
    build = Builder()
    entry = open_or_build(tmp_path, SPEC, build)
    assert build.calls == 1
    assert "is damaged" in caplog.text
    assert (entry.folder / "train.bin").read_bytes() == b"tokens"
    open_or_build(tmp_path, SPEC, build)
    assert build.calls == 1, "the repaired entry must be whole"


def test_what_a_killed_build_left_behind_is_cleared_away(tmp_path):
    folder = open_or_build(tmp_path, SPEC, Builder()).folder
    shutil.rmtree(folder)
    unfinished = folder.with_suffix(".building")
    unfinished.mkdir()
    (unfinished / "half.bin").write_bytes(b"to")
    entry = open_or_build(tmp_path, SPEC, Builder())
    assert sorted(path.name for path in entry.folder.iterdir()) == ["meta.json", "train.bin"]
    assert not unfinished.exists()


@pytest.mark.parametrize("error", [UserError("the text is bad"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_build_that_fails_leaves_nothing(error, tmp_path):
    def build(folder):
        (folder / "half.bin").write_bytes(b"to")
        raise error

    with pytest.raises(type(error)) as caught:
        open_or_build(tmp_path, SPEC, build)
    assert caught.value is error
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_no_space_is_a_users_error_that_leaves_other_entries_alone(tmp_path):
    other = open_or_build(tmp_path, {"of": "others"}, Builder(b"other")).folder

    def build(folder):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"tokens")

    with pytest.raises(UserError, match=r"Cannot write the token cache .*: No space left on device; free some space"):
        open_or_build(tmp_path, SPEC, build)
    assert (other / "train.bin").read_bytes() == b"other"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [other.name]


def test_a_place_that_cannot_be_a_folder_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write the token cache .*: Not a directory; .* data\.cache_dir"):
        open_or_build(tmp_path / "file" / "tokens", SPEC, Builder())


def test_sidecar_says_what_the_entry_was_built_from(tmp_path):
    folder = open_or_build(tmp_path, SPEC, Builder()).folder
    assert json.loads((folder / "meta.json").read_text())["spec"] == SPEC


def test_cache_is_where_it_was_asked_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FOUNDRY_CACHE", raising=False)
    assert str(cache_root("")) == "/home/someone/.cache/foundry_jax/tokens"
    monkeypatch.setenv("FOUNDRY_CACHE", "/scratch/cache")
    assert str(cache_root("")) == "/scratch/cache/tokens"
    assert cache_root(str(tmp_path)) == tmp_path / "tokens"
