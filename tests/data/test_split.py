"""The split: nanoGPT's cut to the character, documents that stay where they are."""

import pytest

from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.split import in_validation, require_both, split
from foundry_jax.errors import UserError

DOCUMENTS = [Document(f"folder/{number}.txt", f"text {number} ") for number in range(400)]


@pytest.mark.parametrize("fraction", [0.1, 0.05, 0.2, 0.25])
@pytest.mark.parametrize("length", [10, 999, 1234])
def test_tail_cuts_the_concatenation_where_nanogpt_does(fraction, length):
    text = "".join(chr(0x20 + i % 500) for i in range(length))
    documents = [Document("1", text[:7]), Document("2", ""), Document("3", text[7:8]), Document("4", text[8:])]
    if int(length * (1 - fraction)) == 0:
        return
    train, validation = split(documents, f"tail({fraction})")
    cut = int(length * (1 - fraction))
    assert "".join(one.text for one in train) == text[:cut]
    assert "".join(one.text for one in validation) == text[cut:]


def test_document_puts_whole_documents_on_one_side_each():
    train, validation = split(DOCUMENTS, "document(0.1)")
    assert sorted([*train, *validation]) == sorted(DOCUMENTS)
    assert 20 < len(list(validation)) < 60  # 40 expected, standard deviation 6


def test_a_document_keeps_its_side_when_others_come_and_go():
    _, validation = split(DOCUMENTS, "document(0.1)")
    _, of_half = split(DOCUMENTS[::2], "document(0.1)")
    assert set(of_half) == set(validation) & set(DOCUMENTS[::2])


def test_more_validation_only_adds_documents():
    small = {document.id for document in DOCUMENTS if in_validation(document.id, 0.1)}
    large = {document.id for document in DOCUMENTS if in_validation(document.id, 0.3)}
    assert small < large


def test_the_side_of_a_document_is_pinned():
    """A change here would silently move every user's validation set."""
    assert [number for number in range(40) if in_validation(f"folder/{number}.txt", 0.1)] == [7, 13, 26]


def test_texts_can_be_read_twice_and_skip_empty_ones():
    train, _ = split([*DOCUMENTS, Document("empty", "")], "document(0.1)")
    first = list(train)
    assert first == list(train) and all(one.text for one in first)


@pytest.mark.parametrize(
    ("documents", "validation", "message"),
    [
        ([Document("a", "x")], "document(0.1)", r"document\(0.1\) leaves no validation text; try data.validation=tail"),
        ([Document("a", "x")], "tail(0.1)", r"tail\(0.1\) leaves no training text; try more text"),
        ([], "tail", "holds no text"),
        ([Document("a", "")], "document", "holds no text"),
    ],
)
def test_an_empty_side_is_explained(documents, validation, message):
    with pytest.raises(UserError, match=message):
        require_both(tuple(map(bool, split(documents, validation))), validation)


def test_of_conversations_the_tail_is_whole_ones():
    said = [Conversation([{"role": "assistant", "content": str(number)}]) for number in range(10)]
    documents = [Document(one.id, one.messages[0]["content"], one) for one in said]
    train, validation = split(documents, "tail(0.2)")
    assert [one.text for one in validation] == ["8", "9"] and len(list(train)) == 8
