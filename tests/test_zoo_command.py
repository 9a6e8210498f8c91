"""The zoo's command line and the comparison of two models: what is written, said, refused, and left behind."""

import dataclasses
import functools
import io
import json
import logging
import os
import pty
import select
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from foundry_jax import zoo
from foundry_jax.data.chat import Chat
from foundry_jax.errors import UserError
from foundry_jax.generate import Sampling
from foundry_jax.zoo import __main__ as program
from foundry_jax.zoo.conversation import Conversation
from foundry_jax.zoo.verify import PROMPTS, verify
from tests import checkpoints, processes
from tests.conftest import ROOT

CONTEXT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer that has a chat template."""
    return checkpoints.write(tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=CONTEXT)


@functools.cache
def loaded(folder):
    return zoo.load_pretrained(folder)


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "foundry_jax.zoo", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def run(monkeypatch, capsys, *arguments, said: bytes = b"") -> str:
    """Returns what the command prints, run in this process."""
    monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    program.main()
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the comparison


def changed(path, tmp_path, name: str, **keys):
    """Returns a copy of the model with one tensor scaled."""
    tensors = checkpoints.tensors()
    tensors[name] = (tensors[name] * 1.25).astype(tensors[name].dtype)
    return checkpoints.write(tmp_path / "changed", tensors, max_position_embeddings=CONTEXT, **keys)


def test_a_model_equals_itself(folder):
    found = verify(folder, folder)
    assert (found.max_difference, found.mean_kl, found.top1_agreement, found.prompts) == (0, 0, 1, "text")
    tokenizer = loaded(folder).tokenizer
    assert found.tokens == sum(min(len(tokenizer.encode(text)), CONTEXT) for text in PROMPTS) > 300


def test_the_figures_are_those_of_the_logits(folder, tmp_path):
    other = changed(folder, tmp_path, "model.layers.1.mlp.up_proj.weight")
    found = verify(folder, other)
    differences, divergences, agreements, count = [], [], [], 0
    for text in PROMPTS:
        ids = loaded(folder).tokenizer.encode(text)[:CONTEXT]
        tokens = jnp.zeros((1, CONTEXT), int).at[0, : len(ids)].set(jnp.asarray(ids))
        p, q = (np.float64(model.logits(tokens)[0, : len(ids)]) for model in (loaded(folder), loaded(other)))
        differences.append(np.abs(p - q).max())
        p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (p, q))
        divergences.append(np.sum(p * np.log(p / q)))
        agreements.append(np.sum(p.argmax(axis=-1) == q.argmax(axis=-1)))
        count += len(ids)
    assert count == found.tokens
    np.testing.assert_allclose(found.max_difference, max(differences), rtol=1e-4)
    np.testing.assert_allclose(found.mean_kl, sum(divergences) / count, rtol=1e-4)
    assert found.top1_agreement == sum(agreements) / count < 1


def test_models_without_tokenizers_are_compared_on_random_ids(tmp_path):
    folder = checkpoints.write(tmp_path / "bare", tokenizer=False)
    found = verify(folder, folder)
    assert (found.prompts, found.tokens, found.max_difference) == ("random ids", 256, 0)


def test_models_that_read_different_ids_cannot_be_compared(folder, tmp_path):
    tensors = checkpoints.tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:290]
    smaller = checkpoints.write(tmp_path / "smaller", tensors, tokenizer=False, vocab_size=290)
    with pytest.raises(UserError, match="a vocabulary of 300, .*smaller one of 290: they cannot be compared"):
        verify(folder, smaller)
    other = checkpoints.write(tmp_path / "other", max_position_embeddings=CONTEXT)
    checkpoints.write_tokenizer(other, vocab_size=270)
    with pytest.raises(UserError, match="give other ids for the same text"):
        verify(folder, other)


# ------------------------------------------------------------------------------------------------ the commands


def test_the_list_has_every_name(monkeypatch, capsys):
    rows = {row["name"]: row for row in json.loads(run(monkeypatch, capsys, "list", "--json"))}
    assert rows.keys() == zoo.ZOO.keys()
    assert rows["smollm2-135m"]["parameters"] == 134_515_008
    assert rows["llama3-8b"]["gated"] and not rows["qwen2-7b"]["gated"]
    table = run(monkeypatch, capsys, "list")
    assert "134,515,008" in table and "HuggingFaceTB/SmolLM2-135M-Instruct" in table


@pytest.mark.slow
def test_convert_writes_what_verify_finds_equal(folder, tmp_path):
    done = command("convert", folder, tmp_path / "out", "--shard-size", "20KB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert report["wrote"] == "LlamaForCausalLM" and report["bytes"] == sum(sizes)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 25_000 for path in shards)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    same = command("verify", folder, tmp_path / "out")
    assert same.returncode == 0, same.stderr
    assert "largest difference of logits 0, " in same.stdout and "100.00% of positions" in same.stdout


@pytest.mark.slow
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(folder, tmp_path):
    broken = checkpoints.write(tmp_path / "broken", files=2)
    whole = (broken / "model-00002-of-00002.safetensors").read_bytes()
    (broken / "model-00002-of-00002.safetensors").write_bytes(whole[:-10])
    done = command("convert", broken, tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "model-00002-of-00002.safetensors" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see python -m foundry_jax.zoo --help"),
        (["convert", "x"], "required: DST; see python -m foundry_jax.zoo convert --help"),
        (["convert", "x", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "x", "y", "--shard-size", "much"], "'much' must be a size such as 5GB"),
        (["convert", "x", "y", "--shard-size", "0"], "'0' must be a size such as 5GB"),
        (["export", "x", "y", "--step", "newest"], "'newest' must be best, latest or a number"),
        (["export", "x", "y", "--ema", "--raw"], "not allowed with argument"),
        (["export", "nowhere", "y"], "nowhere is no run folder"),
        (["convert", "smollm", "y"], "Unknown model 'smollm'. Did you mean 'smollm2-135m"),
        (["verify", "nowhere/at/all", "y"], "Unknown model 'nowhere/at/all'"),
        (["chat", "smollm2-135m", "--max-tokens", "0"], "--max-tokens=0 must be 1 or more"),
        (["chat", "smollm2-135m", "--temperature=-1"], "temperature=-1.0 must be a finite number at least 0"),
        (["talk"], "invalid choice: 'talk'"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(UserError) as caught:
        run(monkeypatch, capsys, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_destination_that_exists_is_left_alone(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already; delete it, or name another folder"):
        run(monkeypatch, capsys, "convert", folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5K", 1500), ("7", 7)])
def test_sizes_are_read(text, size):
    assert program._size(text) == size


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO), program.progress_of("Writing x", 3 * 10**9) as progress:
        progress(10**9)
        assert not caplog.records
        monkeypatch.setattr(program, "LINE_SECONDS", -1.0)
        progress(10**9)
    assert [record.getMessage() for record in caplog.records] == ["Writing x: 2.0 of 3.0 GB."]


@pytest.mark.slow
def test_a_run_is_exported_at_the_step_and_in_the_form_that_is_asked_for(monkeypatch, capsys, folder, tmp_path):
    options = ("num_steps=10", "model.context_length=16", "checkpoint.keep_latest=3")
    processes.finish(tmp_path / "run", [*processes.SMALL_TEXT, *options])
    for name, flags in {"raw": [], "ema": ["--ema"], "early": ["--step=5"]}.items():
        run(monkeypatch, capsys, "export", tmp_path / "run", tmp_path / name, "--dtype=float32", *flags)
    assert verify(tmp_path / "run", tmp_path / "raw").max_difference == 0
    others = [verify(tmp_path / "raw", tmp_path / name).max_difference for name in ("ema", "early")]
    assert min(others) > 0
    with pytest.raises(UserError, match="No checkpoint 7 in"):
        run(monkeypatch, capsys, "export", tmp_path / "run", tmp_path / "no", "--step=7")
    with pytest.raises(UserError, match="trained all parameters .* leave out --adapter"):
        run(monkeypatch, capsys, "export", tmp_path / "run", tmp_path / "no", "--adapter")
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------ chat


def answers(folder, said: list[str], *, max_tokens: int, system: str | None = None, **sampling) -> list[str]:
    """Returns the answers to messages, each with all before it."""
    model, sampling = loaded(folder), Sampling(**sampling)
    messages = [{"role": "system", "content": system}] if system else []
    for text in said:
        messages.append({"role": "user", "content": text})
        ids = Chat.of(model.tokenizer, "x").encode(messages, add_generation_prompt=True)
        (new,) = model.generate_ids([ids], max_tokens=max_tokens, sampling=sampling)
        sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
        messages.append({"role": "assistant", "content": model.tokenizer.decode(new)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_a_line_is_a_message_and_is_answered_with_all_before_it(monkeypatch, capsys, folder):
    said, options = ["the other é", "mother <|im_end|>"], {"max_tokens": 9, "temperature": 0.9, "top_p": 0.95}
    expected = answers(folder, said, system="the end", seed=3, **options)
    found = run(
        monkeypatch, capsys, "chat", folder, "--system=the end", "--temperature=0.9", "--max-tokens=9", "--seed=3",
        said="\n\n".join(said).encode(),
    )  # fmt: skip
    assert found == "".join(f"{answer}\n" for answer in expected)
    assert expected[1] != answers(folder, said[1:], system="the end", seed=4, **options)[0]


def test_draws_differ_by_seed_and_bad_bytes_are_read(monkeypatch, capsys, folder):
    found = [
        run(monkeypatch, capsys, "chat", folder, f"--seed={seed}", "--max-tokens=9", said=b"the \xff\n")
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.exhaustive
def test_what_no_longer_fits_is_forgotten_from_the_beginning(monkeypatch, capsys, caplog, folder):
    lines = ["the other one and the end of them " * 2 + str(i) for i in range(4)]
    with caplog.at_level(logging.WARNING):
        run(monkeypatch, capsys, "chat", folder, "--max-tokens=20", "--system=s", said="\n".join(lines).encode())
    assert "its beginning is forgotten" in caplog.text
    conversation = Conversation(loaded(folder), system="s")
    talk, greedy = Chat.of(loaded(folder).tokenizer, "x"), Sampling()
    for line in lines:
        answer = "".join(conversation.answer(line, max_tokens=20, sampling=greedy))
        assert len(talk.encode(conversation.messages[:-1], add_generation_prompt=True)) <= CONTEXT - 20
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)] and 3 <= len(roles) < 9
    assert [message["content"] for message in conversation.messages[-2:]] == [lines[-1], answer]
    with pytest.raises(UserError, match="The message has .* with the system message, but there is room for 180 beside"):
        next(conversation.answer("the other " * 200, max_tokens=20, sampling=greedy))
    assert conversation.messages[-1]["content"] == answer  # as if it had not been said


def test_an_answer_that_is_cut_short_counts_as_far_as_it_went(folder):
    conversation = Conversation(loaded(folder))
    answer = conversation.answer("the other", max_tokens=9, sampling=Sampling(temperature=1.0))
    shown = next(answer) + next(answer)
    answer.close()
    assert conversation.messages[1:] == [{"role": "assistant", "content": shown}]


def test_a_base_model_does_not_chat(monkeypatch, capsys, tmp_path):
    folder = checkpoints.write(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template: it is a base model"):
        run(monkeypatch, capsys, "chat", folder)


@pytest.mark.slow
def test_on_a_terminal_it_asks_answers_and_ends_with_the_input(folder):
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "foundry_jax.zoo", "chat", str(folder), "--temperature=0", "--max-tokens=9"]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = read_until(ours, "> ")
        os.write(ours, b"the other\n")
        shown = read_until(ours, "\n> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(60) == 0
    (answer,) = answers(folder, ["the other"], max_tokens=9)
    assert program.UNPRINTABLE.sub("\ufffd", answer).strip() in shown.replace("\r\n", "\n")
    assert "\x12" in answer and "\x12" not in shown  # no model writes commands to a terminal


def read_until(terminal: int, end: str, seconds: float = 120.0) -> str:
    """Returns what a terminal shows, once it ends with a text."""
    shown, deadline = b"", time.monotonic() + seconds
    while not shown.replace(b"\r\n", b"\n").endswith(end.encode()):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"still waiting for {end!r}: {shown!r}"
        shown += os.read(terminal, 4096)
    return shown.decode("utf-8", errors="replace")
