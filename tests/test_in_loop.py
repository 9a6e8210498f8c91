"""Tasks that a run evaluates while it trains: when, on which weights, and that the run does not notice."""

import itertools
import json
import logging
import math

import pytest

from foundry_jax import config, train
from foundry_jax.errors import Preempted, UserError
from foundry_jax.preemption import Preemption
from foundry_jax.runfolder import read_metrics, read_result, read_validation_blocks
from foundry_jax.tasks import TASKS, in_loop, results, run
from foundry_jax.tasks.requests import Generation
from foundry_jax.tasks.scoring import Scorer
from foundry_jax.zoo import load_pretrained, open_source
from foundry_jax.zoo.pretrained import pretrained
from foundry_jax.zoo.run import open_run
from tests import processes

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with pairs, questions and sums."""
    folder = tmp_path_factory.mktemp("data")
    choices = {"subject": "anatomy", "choices": ["a", "b", "c", "d"]}
    for name, rows in {
        "preferences/pairs": [{"prompt": f"{i}:", "chosen": " the end", "rejected": " mother"} for i in range(9)],
        "mmlu/test": [{"question": f"{i}?", "answer": i % 4, **choices} for i in range(12)],
        "gsm8k/test": [{"question": "1 + 1?", "answer": "#### 2"}],
    }.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def settings(tasks: str, *more: str) -> config.Config:
    overrides = [*processes.SMALL_TEXT, f"num_steps={STEPS}", "model.context_length=128", "eval.batch_size=8"]
    overrides.append("sharding.strategy=none")
    return config.load("configs/smoke.py", [*overrides, f"eval.tasks={tasks}", *more])


def task_rows(folder) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl", "task")


def train_rows(folder) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] != "task"]


@pytest.fixture(scope="module")
def tasks(data):
    where = f"data='{data}'"
    return f"constitution(every=4, {where}), constitution(every=0, ema=True, {where}), mmlu(shots=0, limit=6, {where})"


@pytest.fixture(scope="module")
def done(tmp_path_factory, tasks):
    """A run with three tasks: its folder and its result."""
    folder = tmp_path_factory.mktemp("done") / "run"
    return folder, train.run(settings(tasks), folder, quiet=True)


def test_tasks_are_asked_every_so_many_steps_and_at_the_end(done):
    folder, result = done
    names = [sorted({name.partition("/")[0] for name in row if "/" in name}) for row in task_rows(folder)]
    found = [(row["step"], *labels) for row, labels in zip(task_rows(folder), names, strict=True)]
    assert found == [(4, "constitution"), (8, "constitution"), (8, "constitution_ema"), (8, "mmlu")]
    first, *_, last = task_rows(folder)
    assert first["constitution/n"] == 9 and last["mmlu/n"] == 6 and last["mmlu/accuracy_stderr"] >= 0
    assert not any(name.startswith("mmlu/accuracy/stem/") for name in last)  # single subjects are in result.json
    values = {row["constitution/bits_per_byte"] for row in task_rows(folder)[:2]}
    assert len(values) == 2  # the parameters have moved
    assert result["tasks"].keys() == {"constitution", "constitution_ema", "mmlu"}
    assert result["tasks"]["mmlu"]["metrics"]["accuracy"]["value"] == last["mmlu/accuracy"]
    assert read_result(folder)["tasks"] == result["tasks"]
    blocks = read_validation_blocks(folder)
    assert len(blocks["nats"]) == len(blocks["targets"]) > 1
    assert sum(blocks["nats"]) / sum(blocks["targets"]) == pytest.approx(result["validation"]["loss"], rel=1e-12)
    bits = sum(blocks["nats"]) / math.log(2) / blocks["bytes"]
    assert bits == pytest.approx(result["validation"]["bits_per_byte"], rel=1e-12)


def test_what_is_kept_is_what_the_command_finds_in_the_checkpoint(done, data):
    folder, _ = done
    for label, ema in (("constitution", False), ("constitution_ema", True)):
        kept = results.read(folder / "evals" / f"step-{STEPS}" / label)
        assert kept.settings["step"] == STEPS and kept.settings["ema"] is ema
        again = run(TASKS["constitution"](data), Scorer(pretrained(open_run(folder, open_source, ema=ema))))
        for mine, theirs in zip(kept.rows, again.rows, strict=True):
            assert mine.id == theirs.id and mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
    difference = results.paired_difference(
        folder / "evals" / "step-8" / "constitution", folder / "evals" / "step-4" / "constitution", "margin"
    )
    assert difference.n == 9 and difference.difference != 0


def test_the_run_does_not_notice(done, tmp_path):
    folder, _ = done
    train.run(settings(""), tmp_path / "run", quiet=True)
    assert train_rows(tmp_path / "run") == train_rows(folder)
    assert "tasks" not in read_result(tmp_path / "run")


def test_a_run_that_is_stopped_among_its_tasks_asks_them_when_it_goes_on(done, tasks, tmp_path, monkeypatch):
    asked = itertools.count()
    with monkeypatch.context() as patched:
        evaluate = in_loop.Scheduled.evaluate

        def then_stop(*arguments):
            patched.setattr(Preemption, "requested", lambda *_: next(asked) >= 2)
            return evaluate(*arguments)

        patched.setattr(in_loop.Scheduled, "evaluate", then_stop)
        with pytest.raises(Preempted, match="step 4 of 8 is saved"):
            train.run(settings(tasks), tmp_path / "run", quiet=True)
    assert task_rows(tmp_path / "run") == []
    train.run(settings(tasks), tmp_path / "run", quiet=True)
    folder, _ = done
    assert task_rows(tmp_path / "run") == task_rows(folder)
    assert not processes.compare(tmp_path / "run", folder).mismatches


def test_tasks_may_change_when_a_run_goes_on(tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "requested", lambda _, step: step == 3)
        with pytest.raises(Preempted):
            train.run(settings(""), tmp_path / "run", quiet=True)
    train.run(settings(tasks), tmp_path / "run", quiet=True)
    assert len(task_rows(tmp_path / "run")) == 4


def test_a_task_that_fails_says_why_and_ends_no_run(data, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise UserError("the sandbox is gone.")

    monkeypatch.setattr(in_loop.Scheduled, "evaluate", fail)
    with caplog.at_level(logging.WARNING):
        result = train.run(settings(f"constitution(data='{data}')"), tmp_path / "run", quiet=True)
    assert "constitution at step 8 failed: the sandbox is gone." in caplog.text
    assert result["tasks"] == {"constitution": {"error": "the sandbox is gone."}} and result["status"] == "done"
    assert task_rows(tmp_path / "run") == []


@pytest.mark.exhaustive
def test_adapters_are_asked_on_their_base(data, tmp_path):
    processes.finish(tmp_path / "base", [*processes.SMALL_TEXT, "num_steps=5", "model.context_length=128"])
    more = [f"init.source={tmp_path / 'base'}", "lora.rank=2", "optimizer.learning_rate=0.1"]
    folder = tmp_path / "run"
    train.run(settings(f"constitution(data='{data}', every=4)", *more), folder, quiet=True)
    rows = [row["constitution/bits_per_byte"] for row in task_rows(folder)]
    assert len(set(rows)) == 2
    [bits] = [
        metric.value
        for metric in run(TASKS["constitution"](data), Scorer(load_pretrained(folder))).metrics
        if metric.name == "bits_per_byte"
    ]
    assert rows[-1] == pytest.approx(bits, rel=1e-5)


MISTAKES = {
    "mmul": "Unknown task 'mmul'. Did you mean 'mmlu'",
    "mmlu(shot=3)": "Unknown option of eval.tasks=mmlu 'shot'. Did you mean 'shots'",
    "mmlu(3)": r"eval.tasks='mmlu\(3\)' must be names",
    "mmlu(": r"eval.tasks='mmlu\(' must be names",
    "mmlu(shots=0), mmlu(shots=0, ema=False)": "eval.tasks has mmlu twice",
    "mmlu(every=-1)": "every=-1 must be 0 or more steps",
    "mmlu(limit=0)": "limit=0 must be 1 or more items",
    "mmlu(every='often')": "eval.tasks=mmlu: every='often' must be a",
    "constitution(data='nowhere.jsonl')": "there is no nowhere.jsonl",
    "humaneval": "add --allow-code-execution",
    "humaneval(allow_code_execution=True, samples=2, pass_at=3)": "pass@3 needs at least 3 samples",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_named_before_anything_is_read(text, message, data, tmp_path, monkeypatch):
    monkeypatch.setenv("FOUNDRY_EVAL_DATA", str(data))
    with pytest.raises(UserError, match=message):
        train.run(settings(text), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()


def test_requests_that_do_not_fit_are_refused_before_the_first_step(data, tmp_path):
    with pytest.raises(UserError, match="max_tokens=256 leaves no room for a context in the 128 tokens"):
        train.run(settings(f"gsm8k(shots=0, data='{data}')"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.exhaustive
def test_eight_devices_come_to_the_same(done, tasks, tmp_path):
    folder, _ = done
    train.run(settings(tasks, "sharding.strategy=fsdp"), tmp_path / "eight", quiet=True)
    for one, eight in zip(task_rows(folder), task_rows(tmp_path / "eight"), strict=True):
        assert one == {name: x if isinstance(x, str) else pytest.approx(x, abs=1e-4) for name, x in eight.items()}


def test_options_reach_the_task(data):
    [one] = in_loop.scheduled(f"gsm8k(shots=0, every=10, limit=1, ema=True, data='{data}')")
    assert (one.label, one.every, one.limit, one.ema) == ("gsm8k_ema", 10, 1, True)
    assert one.task.settings["shots"] == 0
    assert [one.is_due(step, 25) for step in (5, 10, 20, 25)] == [False, True, True, True]
    assert any(isinstance(request, Generation) for request in one.task.requests(one.task.items()[0]))
