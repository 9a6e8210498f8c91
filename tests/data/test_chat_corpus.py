"""Conversations from a file to the streams of a corpus: data.source=chat with data.format."""

import dataclasses
import json

import numpy as np
import pytest

from foundry_jax.config import DataConfig
from foundry_jax.data import prepare
from foundry_jax.data.chat import encode_chat
from foundry_jax.data.conversation import ALL_CONTROL_TOKENS, codec_of
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.tokenize import load_tokenizer
from foundry_jax.errors import UserError
from tests.checkpoints import CHATML, write_tokenizer


def openai(said: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}


def sharegpt(said: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]}


ROWS = [(openai if i % 2 else sharegpt)(f"the number {i}?", "mother " * (1 + i % 3) + f"{i}") for i in range(40)]


def conversation_of(row: dict) -> Conversation:
    if "messages" in row:
        return Conversation(row["messages"])
    names = {"human": "user", "gpt": "assistant"}
    return Conversation([{"role": names[m["from"]], "content": m["value"]} for m in row["conversations"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def config(tmp_path, folder):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return DataConfig(
        source="chat", path=str(path), tokenizer=str(folder), vocab_size=300, validation="document(fraction=0.2)",
        filters="", format="own", packing="stream", curriculum="none", batch_size=2, preferences="",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def streams_of(corpus):
    """(training stream, validation stream) of one source."""
    ((part,), (held,)) = corpus.train, corpus.validation
    return part.stream, held.stream


def documents_of(stream) -> list[list[int]]:
    """The ids of each document, without the separator."""
    return [stream.tokens[a + 1 : b].tolist() for a, b in zip(stream.starts[:-1], stream.starts[1:], strict=True)]


def answers_of(stream, tokenizer) -> list[str]:
    """What is trained on of each document; never its separator."""
    assert not stream.trained[stream.starts[:-1]].any()
    spans = zip(stream.starts[:-1], stream.starts[1:], strict=True)
    return [tokenizer.decode(stream.tokens[a:b][np.asarray(stream.trained[a:b], bool)]) for a, b in spans]


@pytest.mark.parametrize("format", ["own", "chatml", "alpaca"])
def test_every_conversation_is_a_document_with_its_mask(config, tokenizer, format):
    corpus = prepare(dataclasses.replace(config, format=format))
    conversations = [conversation_of(row) for row in ROWS]
    encoded = codec_of(format, tokenizer).encode([Document(x.id, "", x) for x in conversations])
    train, validation = streams_of(corpus)
    assert sorted(documents_of(train) + documents_of(validation)) == sorted(one.ids.tolist() for one in encoded)
    end = "<|endoftext|>" if format == "alpaca" else "<|im_end|>"
    expected = [x.messages[-1]["content"] + end for x in conversations]
    held = answers_of(validation, tokenizer)
    assert sorted(answers_of(train, tokenizer) + held) == sorted(expected)
    assert 2 <= len(held) <= 16 and corpus.validation_bytes == sum(map(len, held)) - len(held) * len(end)


def test_own_is_the_template_of_the_tokenizer(config, tokenizer):
    train, validation = streams_of(prepare(config))
    expected = [encode_chat(CHATML, conversation_of(row).messages, tokenizer) for row in ROWS]
    assert sorted(documents_of(train) + documents_of(validation)) == sorted(expected)


def test_all_has_the_same_tokens_and_no_mask(config):
    some, every = (streams_of(prepare(dataclasses.replace(config, format=f))) for f in ("chatml", "chatml('all')"))
    for one, other in zip(some, every, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.trained is not None and other.trained is None


def test_a_fitted_tokenizer_has_the_control_tokens_of_every_format(config):
    """So that tokens, and whatever is compared, are the same but for the format."""
    corpora = [prepare(dataclasses.replace(config, tokenizer="bpe", format=f)) for f in ("chatml", "llama3")]
    assert corpora[0].tokenizer.hash == corpora[1].tokenizer.hash
    assert corpora[0].validation_hash == corpora[1].validation_hash
    assert set(ALL_CONTROL_TOKENS) < set(corpora[0].tokenizer.control_ids)
    first, second = (sorted(answers_of(streams_of(corpus)[1], corpus.tokenizer)) for corpus in corpora)
    assert [text.replace("<|im_end|>", "<|eot_id|>") for text in first] == second


def test_bytes_can_spell_alpaca_only(config):
    bytes_ = dataclasses.replace(config, tokenizer="byte", format="alpaca")
    held = answers_of(streams_of(prepare(bytes_))[1], prepare(bytes_).tokenizer)
    assert all(text.startswith("mother ") and text.endswith("<|endoftext|>") for text in held)
    with pytest.raises(UserError, match="data.format=chatml needs the control tokens"):
        prepare(dataclasses.replace(bytes_, format="chatml"))


def test_copies_of_a_conversation_stay_on_one_side(config, tmp_path):
    path = tmp_path / "copies.jsonl"
    again = [openai(*(message["content"] for message in conversation_of(row).messages)) for row in ROWS]
    path.write_text("\n".join(map(json.dumps, ROWS + again)))
    train, validation = streams_of(prepare(dataclasses.replace(config, path=str(path))))
    assert not set(map(tuple, documents_of(train))) & set(map(tuple, documents_of(validation)))


def test_the_tail_is_the_last_conversations_whole(config, tokenizer):
    train, validation = streams_of(prepare(dataclasses.replace(config, validation="tail(fraction=0.1)")))
    expected = [encode_chat(CHATML, conversation_of(row).messages, tokenizer) for row in ROWS]
    assert documents_of(validation) == expected[-4:] and documents_of(train) == expected[:-4]


def test_another_template_is_another_corpus(config, folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    trimming = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(trimming)
    one, two = (streams_of(prepare(dataclasses.replace(config, tokenizer=str(x))))[0] for x in (folder, tmp_path))
    assert len(two.tokens) < len(one.tokens)


def test_the_models_own_tokenizer_is_used_where_the_config_names_none(config, tokenizer):
    named = streams_of(prepare(config))[0]
    given = streams_of(prepare(dataclasses.replace(config, tokenizer="bpe"), tokenizer))[0]
    np.testing.assert_array_equal(named.tokens, given.tokens)
    np.testing.assert_array_equal(named.trained, given.trained)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no') if messages[0].content[-2:] == '3?' }}{{ messages[1].content }}",
            "refuses the conversation: no",
        ),
        ("{{ messages[1].content | length }}", "changes what the assistant says"),
    ],
)
def test_a_conversation_that_cannot_be_spelled_is_named(config, tmp_path, template, message):
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    changed = dataclasses.replace(config, format=f"template(path='{path}')")
    with pytest.raises(UserError, match=f"The conversation that begins with 'the number .*{message}") as caught:
        prepare(changed)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/tokens/*/tokens.bin"))


def test_a_tokenizer_without_a_template_needs_a_format(config, folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    bare = dataclasses.replace(config, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="this tokenizer has none; use data.format=chatml"):
        prepare(bare)
    assert prepare(dataclasses.replace(bare, format="chatml")).validation_bytes > 0
