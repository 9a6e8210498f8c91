"""Documents to ids in several processes: the same as in one, and what happens when one of them ends."""

import os
import signal

import numpy as np
import pytest

from foundry_jax.data import encoding
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.encoding import answer, codec_from, encode_all, recipe_of
from foundry_jax.data.tokenize import BPETokenizer, ByteTokenizer, CharTokenizer
from foundry_jax.errors import MachineError, UserError

TEXTS = [f"Text {number}: café 😀 <|endoftext|> " + "la " * (number % 7) for number in range(60)]
DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer("".join(TEXTS)),
    "bpe": BPETokenizer(300).fit(TEXTS),
}


def said(*contents, last="assistant"):
    roles = ["user", last] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    conversation = Conversation(messages)
    return Document(conversation.id, "\n\n".join(contents), conversation)


@pytest.fixture
def several(monkeypatch):
    """Makes ten documents enough to start two processes."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def assert_equal(found, expected):
    for (document, one), (other, two) in zip(found, expected, strict=True):
        assert document == other and one.num_bytes == two.num_bytes
        np.testing.assert_array_equal(one.ids, two.ids)
        assert (one.trained is None) == (two.trained is None)
        if one.trained is not None:
            np.testing.assert_array_equal(one.trained, two.trained)


def test_processes_give_what_one_gives_in_order(several, monkeypatch):
    found = list(encode_all(iter(DOCUMENTS), TOKENIZERS["bpe"], None))
    monkeypatch.setattr(encoding, "INLINE_BATCHES", 10**9)
    monkeypatch.setattr(encoding, "_Workers", lambda *_: pytest.fail("started processes"))
    assert_equal(found, encode_all(DOCUMENTS, TOKENIZERS["bpe"], None))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_recipe_makes_the_same_codec(kind):
    tokenizer = TOKENIZERS[kind]
    codec = codec_from(recipe_of(tokenizer, None))
    assert codec.fingerprint == tokenizer.hash
    header, (ids,) = answer(codec, [[one.id, one.text, None] for one in DOCUMENTS[:5]])
    assert header["sizes"] == [len(tokenizer.encode(text)) for text in TEXTS[:5]]
    assert ids.tolist() == [index for text in TEXTS[:5] for index in tokenizer.encode(text)]
    assert header["bytes"] == [len(text.encode()) for text in TEXTS[:5]] and not header["masked"]


def test_conversations_bring_their_masks(several):
    documents = [said(f"question {number}", "answer " * number) for number in range(1, 30)]
    found = list(encode_all(documents, ByteTokenizer(), "alpaca"))
    codec = encoding.text_or_chat(ByteTokenizer(), "alpaca")
    assert_equal(found, zip(documents, codec.encode(documents), strict=True))
    assert all(one.trained.any() and not one.trained.all() for _, one in found)


def test_a_mistake_in_a_document_is_told_by_the_process_that_finds_it(several):
    documents = [said("question", "answer") for _ in range(30)] + [said("a", "b", "c", "d")]
    with pytest.raises(UserError, match="Alpaca is one message of the user and one of the assistant"):
        list(encode_all(documents, ByteTokenizer(), "alpaca"))


def test_a_process_that_is_killed_is_no_mistake_of_the_user(several):
    with encoding._Workers(recipe_of(ByteTokenizer(), None), 2) as workers:
        for process in workers.processes:
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(MachineError, match=r"A process that encodes text ended with code -9; is there too little"):
            list(workers.encode([DOCUMENTS] * 9))
    assert [process.returncode for process in workers.processes] == [-9, -9]
