"""Every mistake ends with exit code 1 and one line, before anything is compiled; nothing in the run folder is lost."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from foundry_jax import command, compilation, config, data, main
from foundry_jax.runfolder import read_metrics
from tests.processes import SMALL_TEXT, SMOKE, Child, finish, start

pytestmark = pytest.mark.slow

ONE_DEVICE = "sharding.strategy=none"  # the test process has 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A finished run that nobody trains in."""
    return finish(tmp_path_factory.mktemp("finished") / "run").workdir


@pytest.fixture
def foundry(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process: (workdir, *overrides, spec=config and mutations) -> (exit code, stderr)."""

    def foundry(workdir: pathlib.Path, *overrides: str, spec: str = str(SMOKE)) -> tuple[int, str]:
        arguments = [f"--config={spec}", f"--workdir={workdir}", *(f"--config.{text}" for text in overrides)]
        monkeypatch.setattr(sys, "argv", ["foundry", *arguments])
        code = 0
        try:
            command.run(main.main)
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().err

    yield foundry
    logging.getLogger().handlers.clear()  # it writes to a stderr that capsys takes away


@pytest.fixture
def refused(foundry, tmp_path) -> Callable[..., str]:
    """Runs the command, which must refuse before it compiles, and returns its one line."""

    def refused(*overrides: str, workdir: pathlib.Path = tmp_path / "run", spec: str = str(SMOKE)) -> str:
        compiled, before = compilation.counts()["compiles"], content(workdir)
        code, stderr = foundry(workdir, *overrides, spec=spec)
        assert code == 1, stderr
        assert compilation.counts()["compiles"] == compiled
        assert {path: data for path, data in content(workdir).items() if path in before} == before
        return only_error(stderr)

    return refused


def only_error(stderr: str) -> str:
    """Returns the one line that says what is wrong; it is the last."""
    lines = stderr.splitlines()
    assert "Traceback" not in stderr
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], stderr
    return lines[-1]


def content(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Returns every file of a run folder but its lock, which names the last process."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lerning_rate=1", ["lerning_rate", "Did you mean 'optimizer.learning_rate'?"]),
        ("optimiser.learning_rate=1", ["optimiser", "Did you mean 'optimizer'?"]),
        ("model.num_layers=two", ["model.num_layers='two' must be a whole number"]),
        ("model.num_layers=2.5", ["model.num_layers='2.5' must be a whole number"]),
        ("model=3", ["model is a section; set one of its keys"]),
        ("seed", ["'seed' must look like"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate=nan must be a finite number between 0 and 1000"]),
        ("optimizer.learning_rate=-1e-3", ["optimizer.learning_rate=-0.001 must be a finite number"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate=inf must be a finite number"]),
        ("optimizer.name=adamm", ["'adamm'. Did you mean 'adamw'?"]),
        ("model.attention=gka", ["'gka'", "Did you mean 'gqa'?"]),
        ("data.source=txt", ["Unknown data.source 'txt'. Did you mean 'text'?"]),
        ("log.trackers=tensorbord", ["Unknown tracker 'tensorbord'. Did you mean 'tensorboard'?"]),
        ("model.num_heads=5", ["model.num_heads=5 must divide model.model_dim=16", "[1, 2, 4, 8, 16]"]),
        ("model.num_kv_heads=3", ["num_kv_heads=3", "4"]),
        ("model.context_length=100000", ["model.context_length=100000 needs 100001 training tokens"]),
        ("model.vocab_size=100", ["model.vocab_size=100 is smaller than the data's vocabulary of 257"]),
        ("data.path=/nowhere/at/all", ["No file or folder at data.path='/nowhere/at/all'"]),
    ],
)
def test_a_config_that_cannot_work_is_refused(refused, override, parts):
    line = refused(*SMALL_TEXT, ONE_DEVICE, override)
    assert all(part in line for part in parts), line


def test_an_unknown_mutation_or_config_file_is_refused(refused):
    assert "mlaa" in refused(spec=f"{SMOKE}:mlaa")
    assert "No config file 'configs/tinny.py'" in refused(spec="configs/tinny.py")


def test_a_mesh_larger_than_the_machine_is_refused(refused):
    line = refused(*SMALL_TEXT, "sharding.data=16")
    assert "The mesh data=16, fsdp=1, tensor=1 needs 16 devices, but 8 are present" in line


def test_the_same_holds_in_a_process_of_its_own(tmp_path):
    for overrides, part in [
        ([*SMALL_TEXT, "sharding.data=4"], "needs 4 devices, but 1 are present"),
        (["optimizer.lerning_rate=1"], "Did you mean 'optimizer.learning_rate'?"),
    ]:
        with start(tmp_path / "run", overrides) as child:
            assert child.wait() == 1
        assert part in only_error(child.stderr)
        assert child.stdout == ""


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "The data holds no text"),
        (b"short", "needs 33 training tokens"),
        (b"caf\xe9 " * 999, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_text_that_cannot_be_used_is_refused(refused, tmp_path, text, part):
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    line = refused(*SMALL_TEXT, ONE_DEVICE, f"data.path={path}")
    assert part in line, line


@pytest.mark.exhaustive
def test_a_mistake_can_be_corrected_in_the_same_folder(refused, foundry, tmp_path):
    """What was refused has left no config behind that the next try would have to agree with."""
    refused(*SMALL_TEXT, ONE_DEVICE, "model.context_length=100000")
    code, stderr = foundry(tmp_path / "run", *SMALL_TEXT, ONE_DEVICE, "num_steps=1")
    assert code == 0, stderr


def test_text_without_permission_to_read_is_refused(refused, monkeypatch, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("text " * 999)
    path.chmod(0)
    if os.access(path, os.R_OK):  # as root everything is readable
        read_bytes = pathlib.Path.read_bytes
        monkeypatch.setattr(
            pathlib.Path,
            "read_bytes",
            lambda self: refuse(self) if self == path else read_bytes(self),
        )
    assert f"Cannot read {path}: Permission denied." in refused(*SMALL_TEXT, f"data.path={path}")


def refuse(path: pathlib.Path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.fixture
def token_folder(tmp_path) -> pathlib.Path:
    """A folder in nanoGPT's layout, with ids below 300."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.arange(6000, dtype="<u2") % 300
    ids[:5000].tofile(folder / "train.bin")
    ids[5000:].tofile(folder / "val.bin")
    return folder


def test_token_ids_beyond_the_vocabulary_are_refused(refused, token_folder):
    bin_data = ("data.source=bin", f"data.path={token_folder}", ONE_DEVICE)
    assert "holds token id 299, but the vocabulary ends at 256" in refused(*bin_data, "data.vocab_size=257")
    line = refused(*bin_data, "data.vocab_size=300", "model.vocab_size=299")
    assert "model.vocab_size=299 is smaller than the data's vocabulary of 300; set it to 0 or 300." in line


def test_tokens_made_with_another_tokenizer_are_refused(refused, token_folder):
    (token_folder / "meta.json").write_text(json.dumps({"tokenizer_hash": "12ab"}))
    (token_folder / "tokenizer.json").write_text(json.dumps({"type": "byte"}))
    line = refused("data.source=bin", f"data.path={token_folder}", ONE_DEVICE)
    assert "were made with tokenizer 12ab, not with this one" in line


def test_token_files_that_are_cut_short_or_empty_are_refused(refused, token_folder):
    bin_data = ("data.source=bin", f"data.path={token_folder}", ONE_DEVICE)
    os.truncate(token_folder / "val.bin", 999)
    assert "val.bin has 999 bytes, no multiple of 2 (uint16); is it cut short?" in refused(*bin_data)
    os.truncate(token_folder / "val.bin", 0)
    assert "val.bin is empty" in refused(*bin_data)
    (token_folder / "val.bin").unlink()
    assert f"No file {token_folder / 'val.bin'}" in refused(*bin_data)


def test_a_damaged_token_cache_is_built_again(finished, tmp_path):
    overrides = [*SMALL_TEXT, f"data.cache_dir={tmp_path / 'cache'}"]
    data.prepare(config.load(str(SMOKE), overrides).data)
    tokens, _ = sorted((tmp_path / "cache" / "tokens").glob("*/tokens.bin"))
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("result.json"))
    whole = tokens.read_bytes()
    tokens.write_bytes(b"\xff" + whole[1:])
    child = finish(run, overrides)
    told = [line for line in child.stderr.splitlines() if " is damaged" in line]
    assert len(told) == 1, child.stderr
    assert f"The token cache {tokens.parent} is damaged" in told[0] and "building it again" in told[0]
    assert tokens.read_bytes() == whole


def test_a_second_process_in_the_same_folder_is_told_who_is_there(refused, tmp_path):
    with start(tmp_path / "run", pause="compile") as child:
        assert child.wait_until(lambda: "phase reached" in child.stderr), child.stderr
        line = refused(*SMALL_TEXT)
        assert f"is in use by process {child.process.pid} on " in line and "another --workdir" in line
        assert child.process.poll() is None


def test_a_folder_of_another_run_is_refused_with_all_that_differs(refused, finished):
    line = refused(*SMALL_TEXT, "seed=7", "optimizer.learning_rate=0.001", workdir=finished)
    assert "seed: was 0, now 7; optimizer.learning_rate: was 0.003, now 0.001" in line


def test_a_finished_run_gives_its_result_at_once(foundry, finished):
    compiled, before, began = compilation.counts()["compiles"], content(finished), time.monotonic()
    code, stderr = foundry(finished, *SMALL_TEXT)
    assert code == 0 and "is finished; delete it or use another --workdir" in stderr
    assert time.monotonic() - began < 2  # it takes 0.1 s; training takes 2 s and more
    assert compilation.counts()["compiles"] == compiled
    assert content(finished) == before


def in_namespace(mount: str) -> list[str]:
    """Returns the prefix of a command that runs it with something mounted which only it can see; skips without that."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "mount"], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts in user namespaces")
    return [*unshare, "sh", "-c", f'{mount} && exec "$0" "$@"']


def test_a_read_only_run_folder_is_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("result.json"))
    before = content(run)
    mount = f"mount --bind {run} {run} && mount -o remount,bind,ro {run}"
    with start(run, prefix=in_namespace(mount)) as child:
        assert child.wait() == 1, child.stderr
    line = only_error(child.stderr)
    assert line == f"error: Cannot write to {run}: Read-only file system; choose a --workdir you can write to."
    assert content(run) == before


def full_disk(tmp_path: pathlib.Path, kilobytes: int, *overrides: str) -> Child:
    """Returns an ended run whose folder lay on a disk of that size."""
    (tmp_path / "disk").mkdir()
    run, kept = tmp_path / "disk" / "run", tmp_path / "kept"
    # What is on the disk can only be seen by the processes there, so the shell copies it.
    script = f"mount -t tmpfs -o size={kilobytes}k none {tmp_path / 'disk'}"
    copy = ["sh", "-c", f'"$0" "$@"; code=$?; cp -r {run} {kept}; exit $code']
    with start(run, [*SMALL_TEXT, *overrides], prefix=[*in_namespace(script), *copy]) as child:
        child.wait()
    return child


def test_a_full_disk_costs_at_most_the_newest_checkpoints(tmp_path):
    """A checkpoint has 250 kB, and there is room for two while a third is being written."""
    child = full_disk(tmp_path, 600)
    assert child.process.returncode == 1, child.stderr
    line = only_error(child.stderr)
    assert "could not be saved: the disk is full" in line and "run the same command again" in line
    assert "Training goes on; older checkpoints are intact." in child.stderr
    kept = tmp_path / "kept"
    steps = [row["step"] for row in read_metrics(kept / "metrics.jsonl", "train")]
    assert steps == list(range(1, len(steps) + 1))
    shutil.move(kept, tmp_path / "run")
    again = finish(tmp_path / "run")  # with room it goes on from a checkpoint
    assert "Resuming from step " in again.stderr


def test_no_room_at_all_is_said_in_one_line(tmp_path):
    child = full_disk(tmp_path, 4)
    assert child.process.returncode == 1, child.stderr
    assert "No space left on device; free space or raise the quota." in only_error(child.stderr)
    assert not child.steps()
