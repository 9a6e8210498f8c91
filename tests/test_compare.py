"""What runs are worth in a metric, what two of them differ by, and the command that says which is better."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from foundry_jax.cli import compare as command
from foundry_jax.errors import UserError
from foundry_jax.runfolder import write_json_atomic
from foundry_jax.search import measuring
from foundry_jax.search.comparing import compare
from foundry_jax.search.measuring import MOST_GROUPS, evidence, measure, metric_of
from foundry_jax.tasks import results
from foundry_jax.tasks.base import Row, mean
from tests.conftest import ROOT

BLOCKS, LENGTH, BYTES = 70, 8, 1000


def make_run(
    folder, seed=0, gain=0.0, *, length=LENGTH, tokens=BLOCKS * LENGTH, text="t" * 64, num_bytes=BYTES, **config
):
    """Writes a finished run whose nats a token are 2 and a little noise, less by `gain`."""
    folder.mkdir(parents=True)
    # The noise of a token belongs to the text, not to how it is cut into sequences.
    nats = 2 - gain + 0.1 * np.random.default_rng(1).normal(size=tokens) + 0.01 * np.random.default_rng(seed).normal()
    parts = [nats[i : i + length] for i in range(0, tokens, length)]
    total = math.fsum(nats)
    validation = {"loss": total / tokens, "ema_loss": total / tokens + 0.1}
    if num_bytes:
        validation |= {name: total / math.log(2) / num_bytes for name in ("bits_per_byte", "ema_bits_per_byte")}
    write_json_atomic(folder / "config.json", {"name": "x", "seed": seed, "model.norm": "rmsnorm", **config})
    blocks = {"nats": [part.sum() for part in parts], "targets": [len(part) for part in parts], "bytes": num_bytes}
    write_json_atomic(folder / "validation_blocks.json", blocks)
    write_json_atomic(folder / "result.json", {"step": 10, "validation": validation, "validation_hash": text})
    return folder


def make_seeds(folder, seeds=(0, 1, 2), gain=0.0, **options):
    """Writes a folder of runs, whose gains differ a little."""
    return {seed: make_run(folder / f"seed-{seed}", seed, gain + gain * 0.01 * seed, **options) for seed in seeds}


def add_task(run, scores, prompt="p", task="mmlu"):
    """Adds the result of a task to a run: one score an item."""
    values = {"accuracy": scores, "bits_per_byte": [1 - 0.1 * x for x in scores]}
    rows = [
        Row(f"item/{i}", "g", i, prompt, "A", "B", {name: x[i] for name, x in values.items()}, {}, 0, {})
        for i in range(len(scores))
    ]
    metrics = [*(mean(name, x) for name, x in values.items()), mean("accuracy/stem", scores[:2])]
    settings = {"task": task, "shots": 0}
    results.save(results.Result(task, task, metrics, rows, settings), run / "evals" / "step-10" / task)


# ------------------------------------------------------------------------------------------------ measuring


def test_importing_what_only_looks_at_runs_leaves_jax_alone():
    code = "import foundry_jax.search.comparing, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_names_of_metrics():
    assert not metric_of("bits_per_byte").higher_is_better
    mmlu, bits, ema = metric_of("mmlu"), metric_of("mmlu/bits_per_byte"), metric_of("mmlu_ema/accuracy")
    assert (mmlu.task, mmlu.score, mmlu.sign, mmlu.default_min_effect) == ("mmlu", "", 1, 0.01)
    assert (bits.sign, bits.unit, bits.default_min_effect) == (-1, "bits per byte", 0.005)
    assert (ema.task, ema.score, ema.sign) == ("mmlu_ema", "accuracy", 1)


@pytest.mark.parametrize("name", ["bits_per_bite", "mlmu/accuracy", "mmlu/"])
def test_an_unknown_metric_is_refused_with_the_nearest(name):
    with pytest.raises(UserError, match=r"Unknown metric .* Did you mean '(bits_per_byte|mmlu)'\?.*Or TASK/SCORE"):
        metric_of(name)


@pytest.mark.parametrize("name", ["bits_per_byte", "loss", "mmlu", "mmlu/bits_per_byte"])
def test_the_units_of_a_run_add_up_to_its_value(tmp_path, name):
    run = make_run(tmp_path / "run")
    add_task(run, [1.0, 0.0, 1.0])
    found = measure(run, metric_of(name))
    assert found.units.sum() == pytest.approx(found.value, rel=1e-12)
    assert len(found.units) == len(found.ends) == (3 if "mmlu" in name else BLOCKS)


def test_units_differ_by_the_effect_on_average_and_neighbours_are_one_group(tmp_path):
    before, after = make_seeds(tmp_path / "a"), make_seeds(tmp_path / "b", gain=0.05)
    for name, effect in (("loss", 0.0505), ("bits_per_byte", 0.0505 * BLOCKS * LENGTH / math.log(2) / BYTES)):
        found = evidence(before, after, metric_of(name))
        assert np.mean(list(found.seeds.values())) == pytest.approx(effect)
        assert found.units.mean() == pytest.approx(effect)
        assert len(found.units) == math.ceil(BLOCKS / math.ceil(BLOCKS / MOST_GROUPS))
        assert found.units[:-1] == pytest.approx(found.units[0])


def test_runs_with_another_context_length_are_compared_where_their_sequences_end_together(tmp_path):
    before = {0: make_run(tmp_path / "a", tokens=121, length=6)}
    after = {0: make_run(tmp_path / "b", tokens=121, length=10, gain=0.1)}
    found = evidence(before, after, metric_of("loss"))
    assert len(found.units) == 5  # after 30, 60, 90, 120 and 121 tokens
    assert found.units.mean() == pytest.approx(0.1)
    assert found.units / 5 * 121 == pytest.approx(np.array([30, 30, 30, 30, 1]) * 0.1)


def test_averaged_weights_and_other_tokenizers_have_seeds_only(tmp_path):
    before, after = make_seeds(tmp_path / "a"), make_seeds(tmp_path / "b", tokens=500)
    assert evidence(before, after, metric_of("bits_per_byte")).units is None
    with pytest.raises(UserError, match="different tokens, so a difference in nats per token says nothing: use"):
        evidence(before, after, metric_of("loss"))
    assert evidence(before, before, metric_of("ema_bits_per_byte")).units is None


def test_a_task_is_compared_item_by_item(tmp_path):
    before, after = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_task(before, [0.0, 1.0, 0.0, 0.0])
    add_task(after, [1.0, 1.0, 0.0, 0.0])
    found = evidence({0: before}, {0: after}, metric_of("mmlu"))
    assert found.seeds == {0: 0.25}
    assert found.units.tolist() == [1, 0, 0, 0]
    assert evidence({0: before}, {0: after}, metric_of("mmlu/bits_per_byte")).seeds[0] == pytest.approx(0.025)
    part = evidence({0: before}, {0: after}, metric_of("mmlu/accuracy/stem"))
    assert (part.seeds, part.units) == ({0: 0.5}, None)


def test_the_metrics_of_a_result_and_their_names():
    score = {"value": 0.5, "stderr": 0.1, "n": 4}
    tasks = {"mmlu": {"metrics": {"accuracy": score, "accuracy/stem": score}}, "gsm8k": {"error": "no data"}}
    found = measuring.metrics_of({"validation": {"loss": 2.0, "bits_per_byte": 1.0}, "tasks": tasks})
    assert found == {"loss": 2.0, "bits_per_byte": 1.0, "mmlu/accuracy": 0.5}
    assert measuring.full_name(metric_of("mmlu"), found) == "mmlu/accuracy"
    assert measuring.full_name(metric_of("loss"), found) == "loss"


def test_what_cannot_be_measured_or_compared_is_refused(tmp_path):
    run = make_run(tmp_path / "run", num_bytes=None)
    bits, loss, mmlu = map(metric_of, ("bits_per_byte", "loss", "mmlu"))
    with pytest.raises(UserError, match="has no result: it is no run, or not finished"):
        measure(tmp_path, loss)
    with pytest.raises(UserError, match="has no bits_per_byte: the size in bytes .* Use --metric loss"):
        measure(run, bits)
    with pytest.raises(UserError, match="has no result of mmlu: eval.tasks does not name it"):
        measure(run, mmlu)
    with pytest.raises(UserError, match="loss=nan: a run that failed has no value"):
        measure(make_run(tmp_path / "nan", gain=math.nan), loss)
    with pytest.raises(UserError, match="different validation text \\(tttttttttttt and uuuuuuuuuuuu\\)"):
        evidence({0: run}, {0: make_run(tmp_path / "other", text="u" * 64)}, loss)
    with pytest.raises(UserError, match="no seed of which both have a finished run: seeds 0 and seeds 1, 2"):
        evidence({0: run}, {1: run, 2: run}, loss)
    other = make_run(tmp_path / "asked")
    add_task(run, [0.0, 1.0])
    add_task(other, [0.0, 1.0], prompt="q")
    with pytest.raises(UserError, match="different items or prompts of mmlu"):
        evidence({0: run}, {0: other}, mmlu)
    with pytest.raises(UserError, match=r"Unknown score of mmlu 'acuracy'. Did you mean 'accuracy'"):
        measure(run, metric_of("mmlu/acuracy"))


# ------------------------------------------------------------------------------------------------ comparing


def test_two_folders_of_seeds(tmp_path):
    make_seeds(tmp_path / "a", (0, 1, 2, 3))
    make_seeds(tmp_path / "b", (1, 2, 3, 4), gain=0.05, **{"model.norm": "layernorm", "log.every": 3})
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (found.verdict.verdict, found.verdict.over_seeds.n) == ("better", 3)
    assert found.changes == {"model.norm": ("rmsnorm", "layernorm")}
    assert list(found.values) == [1, 2, 3]
    assert compare(str(tmp_path / "b"), str(tmp_path / "a")).verdict.verdict == "worse"
    assert compare(str(tmp_path / "a"), str(tmp_path / "b"), min_effect=0.5).verdict.verdict == "equivalent"


def test_two_single_runs_show_the_interval_over_the_text_and_decide_nothing(tmp_path):
    a, b = make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b", seed=7, gain=0.1)
    found = compare(str(a), str(b))
    assert found.verdict.verdict == "inconclusive"
    assert "one seed proves nothing" in found.verdict.why
    assert found.verdict.over_units.interval[0] > 0
    assert found.changes == {"seed": (0, 7)}


def test_contestants_of_finished_sweeps(tmp_path):
    for name, gain in (("incumbent", 0), ("mla", 0.05)):
        make_seeds(tmp_path / "sweep" / "runs" / name, gain=gain)
    runs = lambda name: [{"seed": seed, "folder": f"runs/{name}/seed-{seed}", "status": "done"} for seed in (0, 1, 2)]  # noqa: E731
    contestants = {name: {"status": "trained", "reason": None, "runs": runs(name)} for name in ("incumbent", "mla")}
    contestants["moe"] = {"status": "refused", "reason": "it sees the future", "runs": []}
    write_json_atomic(tmp_path / "sweep" / "result.json", {"contestants": contestants})
    sweep = f"{tmp_path}/sweep"
    assert compare(f"{sweep}:incumbent", f"{sweep}:mla").verdict.verdict == "better"
    with pytest.raises(UserError, match="moe was refused: it sees the future"):
        compare(f"{sweep}:incumbent", f"{sweep}:moe")
    with pytest.raises(UserError, match="Unknown contestant of .* Did you mean 'mla'"):
        compare(f"{sweep}:incumbent", f"{sweep}:mal")


def test_what_is_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    write_json_atomic(tmp_path / "begun" / "config.json", {"seed": 0})
    for text, message in {
        "nothing": "There is no .*nothing: name a run folder",
        "empty": "is no run and holds none",
        "begun": "No run in .*begun is finished",
        "runs": "both have seed 0",
        "empty:mla": "is no finished sweep",
    }.items():
        with pytest.raises(UserError, match=message):
            compare(str(run), f"{tmp_path}/{text}")
    with pytest.raises(UserError, match="have a run in common"):
        compare(str(run), str(run))


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_verdict_or_json(tmp_path, monkeypatch, capsys):
    make_seeds(tmp_path / "a")
    make_seeds(tmp_path / "b", gain=0.05, **{"model.norm": "layernorm"})
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--metric=loss", "--alpha=0.1"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    shown = capsys.readouterr().out
    assert 'model.norm: "rmsnorm" in A, "layernorm" in B' in shown
    assert "B is better: 0.0505 nats per token better; 90 % interval" in shown
    assert "over 24 groups of validation text: +0.05050" in shown
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    command.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"]["name"], found["alpha"], found["verdict"]["verdict"]) == ("loss", 0.1, "better")
    assert found["values"]["0"][0] > found["values"]["0"][1]
