"""Checkpoints survive what happens to disks and processes: real damage on real checkpoints."""

import contextlib
import functools
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from foundry_jax import checkpoint
from foundry_jax.checkpoint import Checkpointer, Restored, find_damage, load_params
from foundry_jax.errors import UserError

# After a failed read or write Orbax leaves coroutines behind that Python complains of when it finds them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = pathlib.Path(__file__).parent.parent
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int, *, ema: bool = True):
    """A state shaped like the trainer's: optax NamedTuples, bf16, None, awkward floats."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"w": jnp.asarray(rng.normal(size=(64, 20)), jnp.float32)},
        "norm": {"scale": jnp.asarray(rng.normal(size=20), jnp.bfloat16)},
        "odd": jnp.asarray([-0.0, np.nan, np.inf, 1e-42], jnp.float32),
    }
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": jax.tree.map(lambda x: x + jnp.ones((), x.dtype), TX.init(params)),
        "ema_params": jax.tree.map(lambda x: x * jnp.asarray(0.5, x.dtype), params) if ema else None,
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = functools.cache(lambda: abstract(make_state(0)))


def assert_bit_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), jax.tree_util.keystr(path)


def open_checkpointer(directory, **options):
    return Checkpointer(directory, **{"keep_latest": 3, "keep_best": 0, **options})


def save(checkpointer, step, state=None, *, loss=1.0):
    state = make_state(step) if state is None else state
    metrics = {} if loss is None else {"loss": loss}  # not every saved step was evaluated
    checkpointer.save(step, state, metrics=metrics, metadata={"offset": step})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with open_checkpointer(directory) as checkpointer:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            save(checkpointer, step, loss=loss)
    return directory


@pytest.fixture
def saved(pristine, tmp_path):
    """A copy of checkpoints 10, 20 and 30 to damage."""
    return pathlib.Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


@pytest.fixture
def warnings():
    """All that reaches the log, Orbax's own lines included."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("foundry_jax").addHandler(handler)
    yield lines
    logging.getLogger("foundry_jax").removeHandler(handler)


def largest_file(step_folder):
    return max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_bit_in_the_largest_file(folder):
    flip_bit(largest_file(folder))
    return "checksum"


def truncate_the_largest_file(folder):
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 1)
    return "size"


def delete_the_largest_file(folder):
    largest_file(folder).unlink()
    return "missing"


def delete_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "empty"


def damage_the_seal(folder):
    (folder / checkpoint.SEAL).write_text('{"files": {')
    return "seal"


def truncate_before_the_seal_was_written(folder):
    (folder / checkpoint.SEAL).unlink()
    os.truncate(largest_file(folder), 10)
    return "unreadable"


def damage_metadata_before_the_seal_was_written(folder):
    (folder / checkpoint.SEAL).unlink()
    (folder / "_CHECKPOINT_METADATA").write_text("{")
    return "unreadable"


DAMAGES = [
    flip_bit_in_the_largest_file,
    truncate_the_largest_file,
    delete_the_largest_file,
    delete_everything,
    damage_the_seal,
    truncate_before_the_seal_was_written,
    damage_metadata_before_the_seal_was_written,
]


def test_nothing_saved_restores_nothing(tmp_path):
    with open_checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(ABSTRACT()) is None
        assert (checkpointer.steps(), checkpointer.latest_step()) == ([], None)


def test_state_with_optax_namedtuples_comes_back_bit_for_bit(saved):
    with open_checkpointer(saved) as checkpointer:
        restored = checkpointer.restore(ABSTRACT())
    assert (restored.step, restored.metadata, restored.metrics) == (30, {"offset": 30}, {"loss": 2.0})
    assert_bit_equal(restored.state, make_state(30))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_step_is_set_aside_and_the_older_one_is_bit_equal(saved, damage, warnings):
    reason = damage(saved / "30")
    left = names_in(saved / "30")
    with open_checkpointer(saved) as checkpointer:
        restored = checkpointer.restore(ABSTRACT())
        assert restored.step == 20
        assert_bit_equal(restored.state, make_state(20))
        assert checkpointer.steps() == [10, 20]
        save(checkpointer, 30)
        checkpointer.wait()
        assert_bit_equal(checkpointer.restore(ABSTRACT()).state, make_state(30))
    moved = saved / "quarantine" / f"30-{reason}"
    assert names_in(moved) == left  # moved, not deleted
    assert len(warnings) == 1 and str(moved) in warnings[0] and "\n" not in warnings[0]


def test_the_warning_names_the_damaged_file(saved, warnings):
    name = str(largest_file(saved / "30").relative_to(saved / "30"))
    flip_bit_in_the_largest_file(saved / "30")
    with open_checkpointer(saved) as checkpointer:
        checkpointer.restore(ABSTRACT())
    assert name in warnings[0] and "has changed" in warnings[0]


def test_one_flipped_bit_is_found_in_whichever_file_it_is(saved):
    files = [p for p in (saved / "30").rglob("*") if p.is_file() and p.name != checkpoint.SEAL]
    assert len(files) > 8 and find_damage(saved / "30") is None
    for file in files:
        whole = file.read_bytes()
        flip_bit(file)
        assert find_damage(saved / "30").reason == "checksum", file
        file.write_bytes(whole)


def test_one_flipped_bit_in_the_seal_is_found_wherever_it_is(saved):
    seal = saved / "30" / checkpoint.SEAL
    whole = seal.read_bytes()
    for position in range(0, len(whole), 7):
        seal.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert find_damage(saved / "30") is not None, whole[:position]


def test_two_damaged_steps_fall_back_twice(saved, warnings):
    flip_bit_in_the_largest_file(saved / "30")
    delete_everything(saved / "20")
    with open_checkpointer(saved) as checkpointer:
        assert_bit_equal(checkpointer.restore(ABSTRACT()).state, make_state(10))
    assert len(warnings) == 2


def test_when_all_are_damaged_it_says_which_and_where_on_every_start(saved, warnings):
    for step, damage in ((10, flip_bit_in_the_largest_file), (20, truncate_the_largest_file), (30, delete_everything)):
        damage(saved / str(step))
    for _ in range(2):  # the second start must not begin from scratch either
        with open_checkpointer(saved) as checkpointer, pytest.raises(UserError) as refused:
            checkpointer.restore(ABSTRACT())
        message = str(refused.value)
        assert "10-checksum, 20-size, 30-empty" in message and str(saved / "quarantine") in message
        assert f"delete {saved} to start the run over" in message


def test_a_crash_between_commit_and_seal_loses_nothing(saved):
    (saved / "30" / checkpoint.SEAL).unlink()
    with open_checkpointer(saved) as checkpointer:
        assert_bit_equal(checkpointer.restore(ABSTRACT()).state, make_state(30))
    assert (saved / "30" / checkpoint.SEAL).exists()
    flip_bit(largest_file(saved / "30"))
    assert find_damage(saved / "30").reason == "checksum"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"step": jnp.float32(0)}, r"step is int32\[\], this run expects float32\[\]"),
        (
            lambda s: s | {"params": s["params"] | {"norm": {"scale": jnp.zeros(20)}}},
            r"params/norm/scale is bfloat16\[20\], this run expects float32\[20\]",
        ),
        (
            lambda s: s | {"params": s["params"] | {"embed": {"w": jnp.zeros((20, 64))}}},
            r"params/embed/w is float32\[64,20\], this run expects float32\[20,64\]",
        ),
        (lambda s: s | {"extra": {"w": jnp.zeros(3)}}, "extra/w is missing"),
        (
            lambda s: s | {"ema_params": None},
            r"ema_params/embed/w is not part of this run's state \(and 2 more differences\)",
        ),
    ],
    ids=["dtype", "bf16", "shape", "missing", "extra"],
)
def test_a_state_of_another_model_is_refused_and_nothing_is_set_aside(saved, change, message):
    with open_checkpointer(saved) as checkpointer:
        with pytest.raises(UserError, match=message):
            checkpointer.restore(abstract(change(make_state(0))))
        (saved / "30" / checkpoint.SEAL).unlink()
        with pytest.raises(UserError, match=message):
            checkpointer.restore(abstract(change(make_state(0))))
        assert checkpointer.steps() == [10, 20, 30]


def test_rolling_back_uses_an_older_step_and_sets_the_newer_ones_aside(saved):
    with open_checkpointer(saved) as checkpointer:
        assert checkpointer.restore(ABSTRACT(), before=10) is None
        restored = checkpointer.restore(ABSTRACT(), before=30)
        assert_bit_equal(restored.state, make_state(20))
        checkpointer.discard_newer(restored.step)
        assert checkpointer.steps() == [10, 20]
        save(checkpointer, 30, make_state(31))
        checkpointer.wait()
        assert_bit_equal(checkpointer.restore(ABSTRACT()).state, make_state(31))
        checkpointer.discard_newer(20)
    assert sorted(p.name for p in (saved / "quarantine").iterdir()) == ["30-rolled-back", "30-rolled-back-2"]


def test_a_run_rolled_back_to_its_beginning_may_start_over(saved):
    with open_checkpointer(saved) as checkpointer:
        checkpointer.discard_newer(0)
        assert checkpointer.restore(ABSTRACT()) is None


def test_buffers_may_be_donated_while_the_save_runs(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = {"w": jnp.zeros((256, 512)), "n": jnp.int32(0)}
    with open_checkpointer(tmp_path, keep_latest=9) as checkpointer:
        for step in range(1, 5):
            state = step_fn(state)
            save(checkpointer, step, state)
            for _ in range(20):  # train on while the bytes are being written
                state = step_fn(state)
        checkpointer.wait()
        for step in range(1, 5):
            restored = checkpointer.restore(abstract(state), before=step + 1)
            assert int(restored.state["n"]) == 21 * step - 20
            assert np.unique(restored.state["w"]).tolist() == [21 * step - 20]


def test_save_returns_before_the_seal_is_written(tmp_path, monkeypatch):
    may_seal, seal = threading.Event(), checkpoint._seal
    monkeypatch.setattr(checkpoint, "_seal", lambda path: may_seal.wait(20) and seal(path))
    with open_checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)  # would hang here if sealing held it up
        assert not list(tmp_path.glob(f"*/{checkpoint.SEAL}"))
        may_seal.set()
        checkpointer.wait()
        assert (tmp_path / "1" / checkpoint.SEAL).exists()


def test_saving_the_newest_step_again_changes_nothing(saved):
    with open_checkpointer(saved) as checkpointer:
        save(checkpointer, 30, make_state(99))
        assert_bit_equal(checkpointer.restore(ABSTRACT()).state, make_state(30))
        with pytest.raises(AssertionError, match="discard_newer"):
            save(checkpointer, 20)


def test_metadata_that_json_cannot_hold_fails_at_the_save(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, make_state(1), metrics={}, metadata={"offset": np.int64(1)})
        assert checkpointer.steps() == []


LOSSES = {1: 0.5, 2: float("nan"), 3: 9.0, 4: 0.4, 5: None, 6: 2.0, 7: 1.0, 8: 8.0}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_latest": 1, "keep_best": 2}, [1, 4, 8]),
        ({"keep_latest": 2, "keep_best": 0}, [7, 8]),
        ({"keep_latest": 1, "keep_best": 1, "better": "higher"}, [3, 8]),
    ],
    ids=["lowest", "none", "highest"],
)
def test_the_best_and_the_latest_stay_across_restarts(tmp_path, options, kept):
    for steps in ((1, 2, 3), (4, 5), (6, 7, 8)):  # three runs of the program
        with open_checkpointer(tmp_path, **options) as checkpointer:
            for step in steps:
                save(checkpointer, step, {"x": jnp.int32(step)}, loss=LOSSES[step])
    with open_checkpointer(tmp_path, **options) as checkpointer:
        assert checkpointer.steps() == kept


def test_an_unknown_order_of_losses_is_refused(tmp_path):
    with pytest.raises(UserError, match="Unknown order of losses 'least'.*higher, lower"):
        open_checkpointer(tmp_path, better="least")


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount_point)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def big_state(step, megabytes):
    return {"w": jnp.full((megabytes, 1 << 18), step, jnp.float32)}


@contextlib.contextmanager
def filled(disk):
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    yield
    (disk / "ballast").unlink()


def test_a_full_disk_costs_one_checkpoint_and_no_more(small_disk, warnings):
    directory = small_disk / "checkpoints"
    with open_checkpointer(directory, keep_latest=1) as checkpointer:
        save(checkpointer, 1, big_state(1, 1))
        save(checkpointer, 2, big_state(2, 1))
        save(checkpointer, 3, big_state(3, 9))  # more than fits
        with pytest.raises(
            UserError, match=r"Checkpoint 3 could not be saved: the disk is full.*checkpoint in .* is 2"
        ):
            checkpointer.wait()
        assert_bit_equal(checkpointer.restore(abstract(big_state(0, 1))).state, big_state(2, 1))
        assert len(warnings) == 1 and "Checkpoint 3 could not be saved: the disk is full" in warnings[0]
        save(checkpointer, 4, big_state(4, 5))  # fits only if the remnants of 3 are gone
        checkpointer.wait()
        assert checkpointer.steps() == [4]  # and 2, which Orbax had forgotten, did not leak
        assert sorted(p.name for p in directory.iterdir()) == ["4"]


def test_a_disk_without_one_free_byte_ends_the_run_at_the_third_failure(small_disk, warnings):
    directory = small_disk / "checkpoints"
    with open_checkpointer(directory) as checkpointer:
        save(checkpointer, 1, big_state(1, 1))
        checkpointer.wait()
        with filled(small_disk):
            save(checkpointer, 2, big_state(2, 1))
            save(checkpointer, 3, big_state(3, 1))
            with pytest.raises(UserError, match=r"3 failed saves in a row; the newest checkpoint in .* is 1"):
                for step in (4, 5):
                    save(checkpointer, step, big_state(step, 1))
        assert len(warnings) == 2
        save(checkpointer, 6, big_state(6, 1))
        checkpointer.wait()  # after room was made it works again
        assert checkpointer.steps() == [1, 6]


def test_a_lost_last_checkpoint_is_an_error_but_hides_no_other(small_disk, warnings):
    checkpointer = open_checkpointer(small_disk)
    save(checkpointer, 1, big_state(1, 9))
    with pytest.raises(UserError, match="Checkpoint 1 could not be saved"):
        checkpointer.close()
    with pytest.raises(KeyError, match="the first error"), open_checkpointer(small_disk) as checkpointer:
        save(checkpointer, 1, big_state(1, 9))
        raise KeyError("the first error")
    assert "Checkpoint 1 could not be saved" in warnings[-1]


# --- other processes -----------------------------------------------------------------------------


def python(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


SAVE_FOR_EVER = """
import sys, itertools, jax.numpy as jnp
from foundry_jax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep_latest=2, keep_best=0)
for step in itertools.count(1):
    checkpointer.save(step, {"w": jnp.full((16, 1 << 18), step, jnp.float32)}, metrics={}, metadata={})
"""


def test_kill_9_in_the_middle_of_a_save_loses_only_that_save(tmp_path):
    process = python(SAVE_FOR_EVER, tmp_path)
    deadline = time.monotonic() + 30
    while not (in_progress := [p for p in tmp_path.glob("*tmp*") if int(p.name.split(".")[0]) > 3]):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    torn = list(tmp_path.glob("*tmp*"))
    assert torn, f"the save of {in_progress} was over before the signal came; make the state larger"
    with open_checkpointer(tmp_path) as checkpointer:
        newest = checkpointer.latest_step()
        restored = checkpointer.restore(abstract(big_state(0, 16)))
        assert restored.step == newest == int(torn[0].name.split(".")[0]) - 1
        assert_bit_equal(restored.state, big_state(newest, 16))
        save(checkpointer, newest + 1, {"x": jnp.zeros(3)})
        checkpointer.wait()
        assert not list(tmp_path.glob("*tmp*"))
    assert not (tmp_path / "quarantine").exists()


RESHARD = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from foundry_jax.checkpoint import Checkpointer, load_params
directory, num_devices = sys.argv[1], int(sys.argv[2])
assert jax.device_count() == num_devices
mesh = jax.make_mesh((num_devices,), ("fsdp",), axis_types=(AxisType.Auto,))
specs = {"params": {"w": P("fsdp"), "b": P()}, "step": P()}
values = {"params": {"w": np.arange(16 * 6, dtype=np.float32).reshape(16, 6), "b": np.ones(3, jnp.bfloat16)},
          "step": np.int32(7)}
shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
state = jax.device_put(values, shardings)
with Checkpointer(directory, keep_latest=1, keep_best=0) as checkpointer:
    if num_devices == 8:
        checkpointer.save(7, state, metrics={}, metadata={})
    else:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        found = checkpointer.restore(target).state
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y, strict=True), found, values)
        assert found["params"]["w"].sharding == shardings["params"]["w"]
        assert {s.data.shape for s in found["params"]["w"].addressable_shards} == {(16 // num_devices, 6)}
        loaded = load_params(directory, abstract_params=target["params"]).state
        assert loaded["w"].sharding == shardings["params"]["w"]
print("done", num_devices)
"""


def test_saved_on_eight_devices_restores_on_one_and_on_two(tmp_path):
    for counts in ((8,), (1,), (2,)):
        runs = [python(RESHARD, tmp_path, count, JAX_NUM_CPU_DEVICES=str(count), XLA_FLAGS="") for count in counts]
        for run, count in zip(runs, counts, strict=True):
            output, errors = finish(run)
            assert output == f"done {count}\n", errors


TWO_PROCESSES = """
import os, pathlib, sys, jax
port, index, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import jax.numpy as jnp
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from foundry_jax.checkpoint import Checkpointer
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
make = jax.jit(lambda step: {"w": jnp.arange(12e4).reshape(12, -1) + step},
               out_shardings=NamedSharding(mesh, P("fsdp")))
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))

def damage(step, change):
    sync_global_devices("all are here")
    if index == 0:
        files = (directory / str(step) / "state" / "ocdbt.process_1" / "d").iterdir()
        change(max(files, key=lambda path: path.stat().st_size))
    sync_global_devices("the damage is done")

def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

def truncate_unsealed(path):
    (directory / "3" / "SEAL.json").unlink()
    os.truncate(path, 10)

checkpointer = Checkpointer(directory, keep_latest=9, keep_best=0)
for step in (1, 2, 3, 4):
    checkpointer.save(step, make(step), metrics={}, metadata={})
checkpointer.wait()
damage(4, flip_bit)
assert checkpointer.restore(target).step == 3
damage(3, truncate_unsealed)
restored = checkpointer.restore(target)
assert restored.step == 2
for x, y in zip(restored.state["w"].addressable_shards, make(2)["w"].addressable_shards):
    assert (x.data == y.data).all()
checkpointer.discard_newer(1)
assert checkpointer.restore(target).step == 1
print("done", flush=True)
"""


def test_two_processes_agree_on_the_step_when_one_of_them_has_damaged_files(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    runs = [python(TWO_PROCESSES, port, i, tmp_path, JAX_NUM_CPU_DEVICES="2", XLA_FLAGS="") for i in range(2)]
    for run in runs:
        output, errors = finish(run)
        assert output.endswith("done\n"), errors
    quarantined = sorted(path.name for path in (tmp_path / "quarantine").iterdir())
    assert quarantined == ["2-rolled-back", "3-unreadable", "4-checksum"]


# --- parameters for evaluation -------------------------------------------------------------------


def test_parameters_load_alone_raw_and_averaged(saved):
    raw, averaged = load_params(saved), load_params(saved, ema=True)
    assert raw.step == averaged.step == 30
    assert_bit_equal(raw.state, jax.tree.map(np.asarray, make_state(30)["params"]))
    assert_bit_equal(averaged.state, jax.tree.map(np.asarray, make_state(30)["ema_params"]))
    placed = load_params(saved, 20, abstract_params=ABSTRACT()["params"]).state
    assert_bit_equal(placed, make_state(20)["params"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))


def test_the_best_step_is_the_one_with_the_lowest_loss(saved):
    assert load_params(saved, "best").step == 20
    assert load_params(saved, "best", better="higher").step == 10


def test_loading_passes_over_damage_without_touching_the_run(saved, warnings):
    flip_bit_in_the_largest_file(saved / "30")
    flip_bit_in_the_largest_file(saved / "20")
    before = sorted(saved.rglob("*"))
    assert load_params(saved, "latest").step == load_params(saved, "best").step == 10
    with pytest.raises(UserError, match=r"30 is damaged .*choose from \[10, 20, 30\]"):
        load_params(saved, 30)
    assert sorted(saved.rglob("*")) == before and len(warnings) == 4


def test_the_best_step_is_found_beside_steps_too_damaged_to_have_a_loss(saved, warnings):
    delete_everything(saved / "10")
    damage_metadata_before_the_seal_was_written(saved / "30")
    assert load_params(saved, "best").step == 20
    delete_everything(saved / "20")
    with pytest.raises(UserError, match="No checkpoint to load"):
        load_params(saved, "best")
    assert len(warnings) == 3


def test_loading_says_what_is_not_there(saved, tmp_path):
    with open_checkpointer(tmp_path / "raw") as checkpointer:
        save(checkpointer, 1, make_state(1, ema=False))
    cases = [
        ((saved, 25), {}, r"No checkpoint 25 .*\[10, 20, 30\]"),
        ((saved, "newest"), {}, "step='newest' must be"),
        ((tmp_path / "nowhere",), {}, "No checkpoint to load in"),
        ((tmp_path / "raw",), {"ema": True}, "holds no ema_params, only opt_state, params, step"),
        ((saved,), {"abstract_params": {"w": jnp.zeros(3)}}, "is of another model"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(UserError, match=message):
            load_params(*arguments, **options)


def test_a_run_writes_while_another_process_reads(saved):
    with open_checkpointer(saved) as checkpointer:
        save(checkpointer, 40, big_state(40, 4))
        assert isinstance(load_params(saved, 20), Restored)  # must not sweep away the save in progress
        checkpointer.wait()
        assert find_damage(saved / "40") is None
