"""Lineage files: promotions that configs replay, undone and kept ones, what damages them, and what was tried."""

import concurrent.futures
import copy
import errno
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from foundry_jax.cli import lineage as command
from foundry_jax.config import load, load_dict
from foundry_jax.errors import UserError
from foundry_jax.mutate import promotions as file_lib
from foundry_jax.search import history, lineage
from tests.conftest import ROOT

TINY = "configs/tiny.py"
FILE = pathlib.Path("configs/tiny.lineage.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the configs, which is where we are."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__", "children"))
    for path in (tmp_path / "configs").glob("*.lineage.jsonl"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contestant(argument: str, verdict: str | None = "better", **changed) -> dict:
    """Returns a contestant as a sweep's result has it."""
    found = {"verdict": verdict, "effect": 0.0123456, "interval": [0.008, 0.016], "why": f"It is {verdict}."}
    its = {"argument": argument, "status": "trained", "reason": None, "verdict": found if verdict else None}
    return its | {"learning_rate": 3e-3, "rates": None, "changes": {}, "mean": {"bits_per_byte": 2.1}} | changed


def result(started: float = 1.0, config: str = TINY, **contestants) -> dict:
    """Returns what a sweep came to, as far as a lineage wants to know."""
    incumbent = contestant("", None, status="incumbent")
    failed = contestant("moe", None, status="failed", reason="it diverged")
    return {
        "format": 1, "command": "python -m foundry_jax.cli.sweep", "config": config, "overrides": ["num_steps=50"],
        "metric": {"name": "bits_per_byte", "unit": "bits per byte", "higher_is_better": False}, "alpha": 0.05,
        "min_effect": 0.005, "match": "steps", "seeds": [0, 1, 2], "incumbent": "incumbent",
        "contestants": {"incumbent": incumbent, "moe": failed, **contestants},
        "decision": {"promoted": None, "best": None, "why": "Nobody is better."},
        "hashes": {"code": "4f", "validation": "9b", "lineage": ""}, "started": started,
    }  # fmt: skip


LAYERNORM = {"layernorm": contestant("norm=layernorm")}
MLA = {"mla": contestant("attention=mla,lr=1e-3")}


def promote(found: dict, name: str, **options):
    options = {"expected_head": lineage.head(FILE), "sweep": "runs/sweeps/x", "config_path": TINY} | options
    return lineage.promote(found, name, **options)


def test_a_promotion_is_replayed_before_the_argument_and_undone_again():
    one = promote(result(1, **LAYERNORM), "layernorm")
    assert (one.id, one.overrides, one.parent) == (1, {"model.norm": "layernorm"}, None)
    two = promote(result(2, **MLA), "mla")
    assert two.parent == 1 and two.record["previous"] == one.sha256 == lineage.records(TINY)[0]["sha256"]
    config = load(TINY)
    assert (config.model.norm, config.model.attention, config.optimizer.learning_rate) == ("layernorm", "mla", 1e-3)
    assert load(f"{TINY}:rmsnorm").model.norm == "rmsnorm"
    assert load(TINY, ["model.norm=layernorm_nobias"]).model.norm == "layernorm_nobias"
    assert lineage.undo(TINY, "undo").name == "mla"
    assert load(TINY).model.attention == "gqa" and load(TINY).model.norm == "layernorm"
    assert lineage.undo(FILE, "undo").name == "layernorm"
    assert load(TINY) == load(f"{TINY}:rmsnorm") and lineage.head(TINY) == ""
    with pytest.raises(UserError, match="tiny.lineage.jsonl has no promotion in force, so there is nothing to undo"):
        lineage.undo(TINY, "undo")
    assert [record["kind"] for record in lineage.records(TINY)] == ["promotion"] * 2 + ["undo"] * 2


def test_a_record_says_all_that_it_takes_to_judge_it():
    record = promote(result(**LAYERNORM), "layernorm", sweep=pathlib.Path.cwd() / "runs/sweeps/x").record
    assert record["sweep"] == "runs/sweeps/x"  # not where this checkout lies
    assert record["verdict"]["interval"] == [0.008, 0.016] and record["verdict"]["effect"] == 0.0123456
    assert record["mean"] == {"incumbent": {"bits_per_byte": 2.1}, "layernorm": {"bits_per_byte": 2.1}}
    assert record["contestants"]["moe"] == {
        "argument": "moe", "status": "failed", "reason": "it diverged", "verdict": None, "effect": None,
        "interval": None,
    }  # fmt: skip
    assert (record["seeds"], record["measured_with"], record["match"]) == ([0, 1, 2], ["num_steps=50"], "steps")
    assert set(record["hashes"]) == {"code", "validation", "lineage", "config"}


def test_sizes_stay_derived_and_a_tuned_rate_and_a_matched_width_are_part_of_it():
    gelu = contestant("activation=gelu", changes={"model.mlp": ["swiglu", "gelu"], "model.mlp_dim": [384, 576]})
    assert lineage.overrides_of(result(gelu=gelu), "gelu") == {"model.mlp": "gelu"}
    matched = result(gelu=gelu) | {"match": "params"}
    assert lineage.overrides_of(matched, "gelu") == {"model.mlp": "gelu", "model.mlp_dim": 576}
    tuned = contestant("norm=layernorm", rates={"0.001": 2.3, "0.003": 2.4}, learning_rate=1e-3)
    assert lineage.overrides_of(result(tuned=tuned), "tuned") == {
        "model.norm": "layernorm", "optimizer.learning_rate": 1e-3, "optimizer.min_learning_rate": 1e-4,
    }  # fmt: skip


def test_a_config_with_an_argument_is_promoted_unless_the_argument_sets_the_same():
    spec = f"{TINY}:layernorm,lr=1e-3"
    promote(result(config=spec, mqa=contestant("attention=mqa")), "mqa", config_path=spec)
    assert load(TINY).model.num_kv_heads == 1
    again = result(2, config=spec, x=contestant("lr=2e-3"))
    with pytest.raises(UserError, match="x cannot be promoted: optimizer.learning_rate, .* would be set again by the"):
        promote(again, "x", config_path=spec)


@pytest.mark.parametrize(
    ("name", "its", "message"),
    [
        ("layrnorm", contestant("norm=layernorm"), "Unknown contestant 'layrnorm'. Did you mean 'layernorm'"),
        ("moe", contestant("norm=layernorm"), "moe is not promoted, because it is not better: it diverged"),
        (
            "layernorm",
            contestant("norm=layernorm", "worse"),
            "because it is not better: It is worse.",
        ),
        ("layernorm", contestant("norm=rmsnorm"), "layernorm would change nothing of configs/tiny.py"),
    ],
)
def test_only_what_is_better_and_different_is_promoted(name, its, message):
    with pytest.raises(UserError, match=message):
        promote(result(layernorm=its), name)
    assert not FILE.exists()


def test_a_sweep_that_was_overtaken_promotes_nothing():
    head = lineage.head(TINY)
    promote(result(1, **LAYERNORM), "layernorm")
    with pytest.raises(UserError, match="The incumbent changed since this sweep began: .* has layernorm as prom"):
        promote(result(2, **MLA), "mla", expected_head=head)
    lineage.record_kept(result(3), config_path=TINY, sweep="x")  # changes no incumbent
    began = lineage.head(TINY)
    lineage.undo(TINY, "undo")
    with pytest.raises(UserError, match="has no promotion in force now. Nothing is promoted; run the sweep again"):
        promote(result(2, **MLA), "mla", expected_head=began)
    assert promote(result(2, **MLA), "mla", expected_head=head).parent is None  # what it was compared with is back


def test_what_a_killed_sweep_has_recorded_it_does_not_record_twice():
    found = result(7, **LAYERNORM)
    one = promote(found, "layernorm", expected_head="")
    assert promote(found, "layernorm", expected_head="") == one
    kept = lineage.record_kept(result(8), config_path=TINY, sweep="y")
    assert lineage.record_kept(result(8), config_path=FILE, sweep="y") == kept == 2
    assert len(lineage.records(TINY)) == 2


def test_a_torn_last_line_does_not_count_and_is_replaced():
    promote(result(1, **LAYERNORM), "layernorm")
    whole = FILE.read_bytes()
    for torn in (whole[:40], b"\xff\xfe", whole[:-30]):
        FILE.write_bytes(whole + torn)
        assert len(lineage.promotions(TINY)) == 1
    promote(result(2, **MLA), "mla")
    assert FILE.read_bytes().startswith(whole) and len(lineage.records(TINY)) == 2
    FILE.write_bytes(FILE.read_bytes().rstrip(b"\n"))  # as some editors leave it
    lineage.undo(TINY, "undo")
    assert len(lineage.records(TINY)) == 3


def reseal(line: bytes, **changed) -> bytes:
    """Returns a record with other values and the hash that goes with them, as somebody may write who means it."""
    record = json.loads(line) | changed
    return json.dumps(record | {"sha256": file_lib.digest(record)}).encode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a, b: [a.replace(b"layernorm", b"rmsnorm"), b], "line 1: it was edited"),
        (lambda a, b: [a, b.replace(b"0.001", b"0.002")], "line 2: it was edited"),
        (lambda a, b: [b], "line 1: it does not follow from the line above"),
        (lambda a, b: [a, a], "line 2: it does not follow from the line above"),
        (lambda a, b: [a, b"<<<<<<< HEAD", b], "line 2: it is no record"),
        (lambda a, b: [a, b"[]", b], "line 2: it is no record"),
        (lambda a, b: [a, reseal(b, kind="promotoin")], "line 2: it was edited"),
        (lambda a, b: [a, reseal(b, parent=None)], "line 2: its parent is None, but in force above it is 1"),
        (lambda a, b: [a, reseal(b, overrides="x")], "line 2: a promotion must have a name, an argument and overrides"),
        (lambda a, b: [a, reseal(b, overrides={"model.nrm": "x"})], "line 2: Unknown config key 'model.nrm'. Did you"),
        (lambda a, b: [a, reseal(b, overrides={"num_steps": "x"})], "line 2: num_steps='x' must be a whole number"),
    ],
)
def test_a_file_that_was_edited_into_conflict_is_refused_with_the_line(edit, message):
    promote(result(1, **LAYERNORM), "layernorm")
    promote(result(2, **MLA), "mla")
    before = FILE.read_bytes()
    edited = b"\n".join([*edit(*before.splitlines()), b""])
    FILE.write_bytes(edited)
    with pytest.raises(UserError, match=f"configs/tiny.lineage.jsonl, {message}") as caught:
        load(TINY)
    assert "\n" not in str(caught.value)
    if "config key" not in message and "num_steps" not in message:  # those can be undone
        with pytest.raises(UserError, match=message):
            lineage.undo(TINY, "undo")
    assert FILE.read_bytes()[: len(edited)] == edited  # nothing is lost


def test_a_child_inherits_and_has_a_lineage_of_its_own():
    pathlib.Path("configs/child.py").write_text(
        "import pathlib\nfrom foundry_jax import mutate\nfrom foundry_jax.config import load_dict\n\n\n"
        "def get_config(arg=''):\n"
        "    c = load_dict(str(pathlib.Path(__file__).with_name('tiny.py')))\n"
        "    return mutate.apply(c, arg, lineage=__file__)\n"
    )
    promote(result(1, **LAYERNORM), "layernorm")
    spec = "configs/child.py"
    promote(result(2, config=spec, **MLA), "mla", config_path=spec, expected_head="")
    assert (load(spec).model.norm, load(spec).model.attention) == ("layernorm", "mla")
    assert load(TINY).model.attention == "gqa"


def test_the_tree_has_below_a_promotion_what_was_made_of_it():
    promote(result(1, **LAYERNORM), "layernorm")
    lineage.record_kept(result(2), config_path=TINY, sweep="y")
    promote(result(3, **MLA), "mla")
    lineage.undo(TINY, "undo")
    promote(result(4, mqa=contestant("mqa")), "mqa")
    (root,) = lineage.tree(TINY)
    assert (root.record["name"], root.state) == ("layernorm", "in force")
    found = [(entry.record["id"], entry.state, entry.children) for entry in root.children]
    assert found == [(2, "kept", ()), (3, "undone", ()), (5, "in force", ())]


def test_sweeps_that_end_at_the_same_time_lose_nothing():
    def keep(started: int) -> None:
        lineage.record_kept(result(started), config_path=TINY, sweep="x")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # a lock belongs to who opened the file, not to the process
        list(pool.map(keep, range(8)))
    assert sorted(record["started"] for record in lineage.records(TINY)) == list(range(8))


def test_a_file_that_cannot_be_read_or_written_promotes_nothing(monkeypatch):
    FILE.mkdir()
    with pytest.raises(UserError, match="Cannot read configs/tiny.lineage.jsonl: Is a directory"):
        promote(result(**LAYERNORM), "layernorm", expected_head="")
    FILE.rmdir()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="Cannot write to configs/.*: No space"),
    ):
        patched.setattr(lineage.os, "fsync", full)
        promote(result(**LAYERNORM), "layernorm")
    with pytest.raises(UserError, match=r"No config file 'configs/none.py', whose lineage"):
        promote(result(**LAYERNORM), "layernorm", config_path="configs/none.py")


def sweep(name: str, found: dict) -> None:
    folder = pathlib.Path("runs/sweeps") / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(found))


def test_what_was_tried_is_found_in_lineages_and_sweeps_once():
    sixty_four = contestant("mla=64", "worse")
    one = result(1, **LAYERNORM, **MLA, **{"mla=64": sixty_four})
    promote(one, "mla")
    sweep("one", one)
    sweep("two", result(2, odd=contestant("forgotten=3,attention=mla", "inconclusive")))
    pathlib.Path("runs/sweeps/unfinished").mkdir()
    names = {query: [a.name for a in history.tried(query)] for query in ("mla", "attention=mla", "attention", "moe")}
    assert names["mla"] == names["attention=mla"] == names["attention"] == ["mla", "mla=64", "odd"]
    assert names["moe"] == ["moe", "moe"]
    assert [a.name for a in history.tried("lr=0.001,mla")] == ["mla"]
    assert history.tried("mqa") == history.tried("lr=0.002") == []
    (attempt,) = history.tried("norm=layernorm")
    assert (attempt.verdict, attempt.effect, attempt.interval, attempt.unit, attempt.seeds) == (
        "better", 0.0123456, (0.008, 0.016), "bits per byte", 3,
    )  # fmt: skip
    assert [a.status for a in history.tried("moe")] == ["failed"] * 2
    with pytest.raises(UserError, match="Unknown variant or mutation 'mlaa'. Did you mean 'mla'"):
        history.tried("mlaa")
    with pytest.raises(UserError, match="Unknown mutation 'atention'. Did you mean 'attention'"):
        history.tried("atention=mla")


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns what the command prints, in this process."""

    def run(*words, stdin: str = ""):
        monkeypatch.setattr(sys, "argv", ["lineage", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        command.main()
        return capsys.readouterr().out

    return run


def test_the_command_prints_the_tree_undoes_and_lists(run):
    assert run() == "No lineage yet: sweeps with --promote write one beside the config.\n"
    promote(result(1, **LAYERNORM), "layernorm")
    lineage.record_kept(result(2), config_path=TINY, sweep="runs/sweeps/y")
    lines = run().splitlines()
    assert lines[0] == "configs/tiny.py: 1 promotion in force"
    assert "layernorm: better, +0.01235 [0.008, 0.016] bits per byte, 3 seeds. runs/sweeps/x" in lines[1]
    assert "nothing promoted: Nobody is better. runs/sweeps/y" in lines[2]
    shown = json.loads(run("--json"))["configs"][TINY]
    assert shown["in_force"] == ["layernorm"] and shown["head"] == lineage.head(TINY)
    assert shown["tree"][0]["children"][0]["state"] == "kept"
    assert json.loads(run("-", "--json", stdin=json.dumps(result())))["configs"][TINY] == shown
    assert "layernorm   better, +0.01235" in run("tried", "layernorm")
    assert "failed: it diverged" in run("tried", "moe")
    assert run("tried", "norm=rmsnorm") == "No sweep here has tried norm=rmsnorm.\n"
    assert run("--undo") == "configs/tiny.py: promotion 1, layernorm, is undone. In force: none.\n"
    assert "layernorm (undone): better" in run(TINY)
    assert lineage.records(TINY)[-1]["command"] == "python -m foundry_jax.cli.lineage --undo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/tinny.py"], "No config file 'configs/tinny.py', and no lineage beside it"),
        (["--undo"], "--undo of which config\\? None has a promotion"),
        (["--undo", TINY], "has no promotion in force"),
        (["--undo", TINY, "configs/smoke.py"], "--undo takes the promotion of one config back"),
        (["tried"], "tried what\\? Name a mutation"),
        (["-"], "The standard input is not the result of a sweep"),
    ],
)
def test_a_mistake_is_one_line(words, message, run):
    with pytest.raises(UserError, match=message):
        run(*words)


def test_undo_asks_which_config_if_several_have_a_promotion(run):
    promote(result(1, **LAYERNORM), "layernorm")
    promote(result(2, config="configs/smoke.py", **MLA), "mla", config_path="configs/smoke.py", expected_head="")
    with pytest.raises(UserError, match="--undo of which config\\? Name one of configs/smoke.py, configs/tiny.py"):
        run("--undo")


def test_nothing_of_a_lineage_needs_jax():
    code = "import sys; from foundry_jax.search import children, history, lineage; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_values_that_json_has_no_number_for_come_back():
    odd = copy.deepcopy(result(**LAYERNORM))
    odd["contestants"]["layernorm"]["verdict"]["interval"] = [0.008, float("inf")]
    promote(odd, "layernorm")
    assert lineage.records(TINY)[0]["verdict"]["interval"][1] == float("inf")
    assert load_dict(TINY).model.norm == "layernorm" and os.path.getsize(FILE) > 0
