"""python -m foundry_jax.cli.data: what is shown of batches, and what is said of filters and packing."""

import json
import sys

import pytest

from foundry_jax.cli import data as command
from foundry_jax.errors import UserError


@pytest.fixture
def chats(tmp_path):
    rows = [{"instruction": f"Double {i}.", "input": "", "output": f"The double is {2 * (i % 20)}."} for i in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def call(*words):
        flags = [f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.validation=document(0.2)"]
        monkeypatch.setattr(sys, "argv", ["data", *words, *flags])
        command.main()
        return capsys.readouterr().out

    return call


def of_chats(path):
    return "--config=configs/smoke.py:alpaca,pad", "--config.data.source=chat", f"--config.data.path={path}"


def test_inspect_shows_what_is_trained_on(run, chats):
    shown = json.loads(run("inspect", *of_chats(chats), "--config.model.context_length=256", "--rows=3", "--json"))
    assert shown["shape"] == [8, 256] and len(shown["rows"]) == 3
    for row in shown["rows"]:
        (piece,) = row["pieces"]
        assert piece["num_tokens"] + row["padding"] == 256
        trained = "".join(text for text, is_trained in piece["runs"] if is_trained)
        assert trained.startswith("The double is ") and trained.endswith(".<|endoftext|>")
        assert "### Instruction:\nDouble " in "".join(text for text, is_trained in piece["runs"] if not is_trained)


def test_inspect_counts_the_pieces_of_a_sequence_for_people(run):
    shown = run("inspect", "--config=configs/smoke.py:first_fit", "--rows=1", "--step=3")
    assert "A batch is 8 x 32 tokens." in shown and "sequence 0: 32 tokens" in shown and "▌" in shown


def test_inspect_shows_both_completions_of_a_pair(run, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(30)]
    pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shown = json.loads(run("inspect", f"--config=configs/smoke.py:dpo={pairs}", "--rows=2", "--json"))
    said = ["".join(text for text, is_trained in row["pieces"][0]["runs"] if is_trained) for row in shown["rows"]]
    assert said == [" yes<|endoftext|>", " no<|endoftext|>"]


def test_report_says_what_filters_removed_and_how_full_sequences_are(run, chats):
    words = (*of_chats(chats), "--config.data.filters=exact, length(min=5)")
    report = json.loads(run("report", *words, "--json"))
    (part,), (filters,) = report["parts"], report["filters"]
    assert part["share"] == 1 and 0 < part["filled"] <= 1 and part["trained"] < part["tokens"]
    shown = run("report", *words)
    assert "exact" in shown and "held out:" in shown and f"{part['documents']}" in shown and filters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "--config=configs/smoke.py", "--step=-1"), "--step=-1 must be 0 or more"),
        (("show", "--config=configs/smoke.py"), "invalid choice: 'show'"),
        (("report", "--config=configs/smoke.py:dpo=pairs.jsonl"), "report is about documents"),
    ],
)
def test_mistakes_are_named(run, words, message):
    with pytest.raises(UserError, match=message):
        run(*words)
