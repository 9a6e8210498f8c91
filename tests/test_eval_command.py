"""The eval command: what it prints and keeps, what it refuses, and that a killed one goes on to the same numbers."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from foundry_jax import eval as program
from foundry_jax.errors import UserError
from foundry_jax.tasks import TASKS, results, running
from tests import checkpoints, processes
from tests.conftest import ROOT

CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama."""
    return checkpoints.write(tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A folder with a few short items of every task."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {
        "gsm8k/test": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)],
        "mmlu/test": [
            {"question": f"{i}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": i % 4}
            for subject in ("anatomy", "sociology")
            for i in range(12)
        ],
        "mmlu/dev": [
            {"question": "x?", "subject": subject, "choices": ["p", "q", "r", "s"], "answer": 2}
            for subject in ("anatomy", "sociology")
        ],
        "preferences/pairs": [{"prompt": f"{i}:", "chosen": " the end", "rejected": " mother"} for i in range(9)],
    }.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(monkeypatch, capsys, *arguments) -> str:
    """Returns what the command prints, run in this process."""
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    program.main()
    return capsys.readouterr().out


def scores(monkeypatch, capsys, *arguments) -> dict:
    """Returns the results by task, from --json."""
    found = json.loads(run(monkeypatch, capsys, *arguments, "--json"))
    assert not found["failed"]
    return found["results"]


def test_a_task_is_shown_as_a_table_and_kept(monkeypatch, capsys, model, items, tmp_path):
    shown = run(monkeypatch, capsys, "--task=mmlu", "--shots=1", f"--path={model}", f"--data={items}",
                f"--workdir={tmp_path}")  # fmt: skip
    result = results.read(tmp_path / "mmlu")
    heading, first, *rest = (line.split() for line in shown.splitlines())
    assert heading == ["task", "metric", "n", "score", "standard", "error", "truncated"]
    accuracy = result.metrics[0]
    assert first[0] == "mmlu" and first[-5:] == [
        "accuracy",
        "24",
        f"{accuracy.value:.4f}",
        f"{accuracy.stderr:.4f}",
        "0",
    ]
    assert [line[0] for line in rest] == ["gold_probability", "gold_share", "bits_per_byte", "accuracy/stem",
                                          "accuracy/social_sciences"]  # fmt: skip
    saved = json.loads((tmp_path / "mmlu" / "result.json").read_text())
    assert saved["n"] == 24 and saved["settings"]["shots"] == 1 and saved["settings"]["model"] == str(model)
    assert saved["environment"]["versions"]["jax"] and saved["seconds"] > 0
    rows = [json.loads(line) for line in (tmp_path / "mmlu" / "items.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["log_probs"].keys() == set("ABCD") for row in rows)


def test_several_tasks_run_and_batches_change_no_score(monkeypatch, capsys, model, items, tmp_path):
    found = []
    for size in ("auto", 1, 5):
        arguments = ["--task=gsm8k,mmlu,constitution", "--shots=0", f"--path={model}", f"--data={items}"]
        found.append(
            scores(monkeypatch, capsys, *arguments, f"--batch-size={size}", f"--workdir={tmp_path / str(size)}")
        )
    assert found[0].keys() == {"gsm8k", "mmlu", "constitution"} and found[0] == found[1] == found[2]
    files = [
        sorted((tmp_path / name / "gsm8k" / "items.jsonl").read_text().splitlines()) for name in ("auto", "1", "5")
    ]
    assert files[0] == files[1] == files[2] and len(files[0]) == 6
    for name, result in found[0].items():
        assert result["metrics"]["bits_per_byte"]["stderr"] > 0 and result["task"] == name


def test_a_second_call_asks_nothing_again(monkeypatch, capsys, model, items, tmp_path):
    arguments = ["--task=mmlu", "--shots=0", f"--path={model}", f"--data={items}", f"--workdir={tmp_path}"]
    few = scores(monkeypatch, capsys, *arguments, "--limit=6")
    assert few["mmlu"]["n"] == 6
    whole = scores(monkeypatch, capsys, *arguments)
    monkeypatch.setattr(running, "_ask", lambda *_: pytest.fail("an item is asked about again"))
    assert scores(monkeypatch, capsys, *arguments) == whole
    assert scores(monkeypatch, capsys, *arguments, "--limit=6") == few
    with pytest.raises(
        UserError,
        match="1 of 1 tasks failed. mmlu: .*another config: shots: was 0, now 1; examples: .*Use another --workdir",
    ):
        run(monkeypatch, capsys, *arguments[:1], "--shots=1", *arguments[2:])
    with pytest.raises(UserError, match='dtype: was "float32", now "bfloat16"'):
        run(monkeypatch, capsys, *arguments, "--dtype=bfloat16")


def test_prompts_that_are_too_long_lose_their_beginning_and_are_counted(monkeypatch, capsys, model, items, tmp_path):
    arguments = ["--task=mmlu", "--shots=0", f"--path={model}", f"--data={items}"]
    found = scores(monkeypatch, capsys, *arguments, "--max-length=32", f"--workdir={tmp_path / 'short'}")
    assert found["mmlu"]["truncated"] == 4 * 24
    shown = run(monkeypatch, capsys, *arguments, "--max-length=32", f"--workdir={tmp_path / 'short'}")
    assert shown.splitlines()[1].split()[-1] == "96"
    assert scores(monkeypatch, capsys, *arguments, f"--workdir={tmp_path / 'long'}")["mmlu"]["truncated"] == 0


def test_results_lie_where_the_same_command_finds_them_again(monkeypatch, capsys, model, items, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, capsys, "--task=constitution", f"--path={model}", f"--data={items}", "--limit=2")
    [folder] = (tmp_path / "evals").iterdir()
    assert folder.name.rpartition("-")[0].endswith("llama") and (folder / "constitution" / "result.json").exists()
    assert program.default_workdir("runs/x", "abcdefghijk").name == "runs-x-abcdefgh"
    assert program.default_workdir("runs/x", "bcdefghijkl") != program.default_workdir("runs/x", "abcdefghijk")


def test_a_task_that_fails_is_an_error_and_stops_no_other(monkeypatch, capsys, caplog, model, items, tmp_path):
    arguments = ["--task=mmlu,constitution", "--shots=0", f"--path={model}", f"--data={items}", f"--workdir={tmp_path}"]

    def summarise(self, rows):
        raise UserError("the judge has left.")

    monkeypatch.setattr(TASKS["mmlu"], "summarise", summarise)
    with caplog.at_level(logging.ERROR), pytest.raises(UserError) as caught:
        run(monkeypatch, capsys, *arguments)
    assert str(caught.value) == "1 of 2 tasks failed. mmlu: the judge has left."
    shown = capsys.readouterr().out
    assert "constitution" in shown and "mmlu" not in shown
    assert not (tmp_path / "mmlu" / "result.json").exists() and (tmp_path / "constitution" / "result.json").exists()
    with pytest.raises(UserError):
        run(monkeypatch, capsys, *arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"mmlu": "the judge has left."} and found["results"].keys() == {"constitution"}


MISTAKES = [
    (
        "--task=mmul",
        "Unknown task 'mmul'. Did you mean 'mmlu'? Choose from: constitution, gsm8k, humaneval, mmlu. Or all",
    ),
    ("--task=,", "--task=',' names no task; choose from gsm8k, mmlu, humaneval, constitution or all."),
    ("--task=all", "humaneval runs programs that a model wrote, in a sandbox: add --allow-code-execution"),
    ("--task=mmlu --samples=3", "--samples means nothing to mmlu: leave it out."),
    ("--task=constitution,mmlu --pass-at=1", "--pass-at means nothing to constitution, mmlu"),
    ("--task=constitution --shots=2", "--shots means nothing to constitution"),
    ("--task=gsm8k --allow-code-execution", "--allow-code-execution means nothing to gsm8k"),
    (
        "--task=gsm8k --limit=0",
        "argument --limit: '0' must be a whole number, 1 or more; see python -m foundry_jax.eval",
    ),
    ("--task=gsm8k --shots=-1", "'-1' must be a whole number, 0 or more"),
    ("--task=gsm8k --shots=99", "shots=99, but there are 0 examples"),
    ("--task=gsm8k --batch-size=all", "'all' must be auto or a whole number, 1 or more"),
    ("--task=gsm8k --shots=0 --max-length=9999", "max_length=9999 must be between 1 and the 512 tokens"),
    ("--task=gsm8k --step=5", "--step and --ema choose among the weights of a run: give --checkpoint"),
    ("--task=gsm8k --model=x", "argument --path: not allowed with argument --model"),
    ("--task=gsm8k --data=nowhere", "gsm8k: there is no nowhere; give --data=FILE or FOLDER with gsm8k/test.jsonl and"),
    ("--limit=5", "the following arguments are required: --task"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_asked(
    monkeypatch, capsys, model, items, tmp_path, arguments, message
):
    monkeypatch.setattr(running, "_ask", lambda *_: pytest.fail("it was asked all the same"))
    data = [] if "--data" in arguments else [f"--data={items}"]
    with pytest.raises(UserError) as caught:
        run(monkeypatch, capsys, *arguments.split(), f"--path={model}", *data, f"--workdir={tmp_path}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere is no run folder"),
        (["--path=nowhere"], "--path='nowhere' is not there: give a folder or a GGUF file, or a name with --model"),
        (["--model=smollm"], "Unknown model 'smollm'. Did you mean 'smollm2-135m"),
        ([], "one of the arguments --checkpoint --model --path is required"),
    ],
)
def test_what_is_no_model_is_refused(monkeypatch, capsys, items, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, "--task=constitution", f"--data={items}", *arguments)


def test_a_model_without_a_tokenizer_is_refused(monkeypatch, capsys, items, tmp_path):
    folder = checkpoints.write(tmp_path / "mute", tokenizer=False)
    with pytest.raises(UserError, match="mute has no tokenizer and cannot read the tasks"):
        run(monkeypatch, capsys, "--task=constitution", f"--data={items}", f"--path={folder}")


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit) as caught:
        program.parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and ", ".join(TASKS) in shown and "lm_eval:NAME" in shown


@pytest.mark.oracle
def test_a_task_of_lm_eval_goes_through_its_adapter(monkeypatch, capsys, model, items, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: make oracle")
    files = {"data_files": {"test": str(items / "mmlu" / "test.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "letters", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "answer",
            "doc_to_choice": ["a", "b", "c", "d"]}  # fmt: skip
    (tmp_path / "letters.yaml").write_text(json.dumps(task))  # JSON is YAML
    name = f"lm_eval:{tmp_path / 'letters.yaml'}"
    found = scores(monkeypatch, capsys, f"--task={name},constitution", f"--path={model}", f"--data={items}",
                   "--limit=8", f"--workdir={tmp_path / 'out'}")  # fmt: skip
    assert found.keys() == {name, "constitution"}
    accuracy = found[name]["metrics"]["acc"]
    assert accuracy["n"] == found[name]["n"] == 8 and 0 <= accuracy["value"] <= 1 and accuracy["stderr"] >= 0
    [folder] = [path for path in (tmp_path / "out").iterdir() if path.name != "constitution"]
    assert json.loads((folder / "result.json").read_text())["metrics"]["acc"] == accuracy
    for arguments, message in {
        ("--task=lm_eval:helaswag",): "lm-eval has no task 'helaswag'",
        (f"--task={name}", "--samples=3"): "--samples means nothing to lm_eval:",
        (f"--task={name}", f"--data={items}"): "--data means nothing to lm_eval:",
    }.items():
        with pytest.raises(UserError, match=message):
            run(monkeypatch, capsys, *arguments, f"--path={model}", f"--workdir={tmp_path / 'no'}")
    assert not (tmp_path / "no").exists()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, caplog):
    with caplog.at_level(logging.INFO), program.progress_of("mmlu") as progress:
        progress(1, 4000)
        assert not caplog.records
        monkeypatch.setattr(program, "LINE_SECONDS", -1.0)
        progress(1000, 4000)
    assert [record.getMessage() for record in caplog.records] == ["mmlu: 1,000 of 4,000 requests."]


# ------------------------------------------------------------------------------------------------ processes


def start(*arguments, cwd=ROOT, **environment) -> subprocess.Popen:
    """Returns the command as a process."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "foundry_jax.eval", *map(str, arguments)],
        cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def many(tmp_path):
    """Enough items for a process to be killed among them."""
    path = tmp_path / "many.jsonl"
    rows = [{"prompt": f"{i}: the theme of", "chosen": f" the end {i}", "rejected": " mother"} for i in range(1000)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_is_killed_goes_on_where_it_was(model, many, tmp_path):
    arguments = ["--task=constitution", f"--path={model}", f"--data={many}", "--json"]
    kept = tmp_path / "killed" / "constitution" / "items.jsonl"
    counts = []
    for enough in (1, 100):
        child = start(*arguments, f"--workdir={tmp_path / 'killed'}")
        deadline = time.monotonic() + 120
        while not kept.exists() or kept.read_bytes().count(b"\n") < sum(counts) + enough:
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        counts.append(kept.read_bytes().count(b"\n") - sum(counts))
        assert not (kept.parent / "result.json").exists()
    before = kept.read_bytes()
    assert 0 < before.count(b"\n") < 1000
    done, whole = (start(*arguments, f"--workdir={tmp_path / name}") for name in ("killed", "whole"))
    (found, _), (expected, _) = done.communicate(timeout=300), whole.communicate(timeout=300)
    assert done.returncode == whole.returncode == 0
    assert json.loads(found)["results"] == json.loads(expected)["results"]
    after = kept.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1]) and after.count(b"\n") == 1000  # none was done again
    other = (tmp_path / "whole" / "constitution" / "items.jsonl").read_bytes()
    assert sorted(after.splitlines()) == sorted(other.splitlines())


@pytest.mark.slow
def test_a_process_that_fails_says_so_in_its_exit_code(model, items, tmp_path):
    child = start("--task=gsm8k", "--shots=3", f"--path={model}", f"--data={items}", f"--workdir={tmp_path / 'x'}")
    shown, said = child.communicate(timeout=120)
    assert child.returncode == 1 and shown == ""
    assert said.startswith("error: shots=3, but there are 0 examples") and said.count("\n") == 1


@pytest.mark.slow
def test_without_an_answer_of_the_hub_the_command_says_so_within_5_seconds(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"HF_ENDPOINT": address, "FOUNDRY_EVAL_DATA": "", "HF_HOME": str(tmp_path)}
        seconds = []
        for _ in range(3):  # the machine may be busy with other tests
            began = time.monotonic()
            child = start("--task=gsm8k", f"--path={model}", **environment)
            shown, said = child.communicate(timeout=120)
            seconds.append(time.monotonic() - began)
            assert child.returncode == 1 and shown == "" and said.count("\n") == 1
            assert said.startswith("error: gsm8k was given no data") and ".jsonl, .jsonl.gz, .json, .parquet" in said
            if seconds[-1] < 5:
                return
    pytest.fail(f"it took {min(seconds):.1f} s")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_is_evaluated_at_the_step_and_with_the_weights_that_are_asked_for(monkeypatch, capsys, items, tmp_path):
    options = ("num_steps=10", "model.context_length=128", "checkpoint.keep_latest=3")
    processes.finish(tmp_path / "run", [*processes.SMALL_TEXT, *options])
    found = {}
    for name, flags in {"raw": [], "ema": ["--ema"], "early": ["--step=5"]}.items():
        arguments = ["--task=constitution", f"--checkpoint={tmp_path / 'run'}", f"--data={items}", *flags]
        found[name] = scores(monkeypatch, capsys, *arguments, f"--workdir={tmp_path / name}")["constitution"]
    assert len({result["metrics"]["bits_per_byte"]["value"] for result in found.values()}) == 3
    assert len({result["settings"]["weights"] for result in found.values()}) == 3
    with pytest.raises(UserError, match="No checkpoint 7 in"):
        run(
            monkeypatch,
            capsys,
            "--task=constitution",
            f"--checkpoint={tmp_path / 'run'}",
            f"--data={items}",
            "--step=7",
        )
