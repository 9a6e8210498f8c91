"""Sources of conversations: the shapes of a line, what becomes of it, and what is said of one that is none."""

import json

import pytest

from foundry_jax.data.document import Conversation
from foundry_jax.data.sources import chat, constitution, jsonl
from foundry_jax.data.sources.rows import Row
from foundry_jax.errors import UserError


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def parsed(row: dict) -> list[Conversation]:
    return chat.conversations(Row("x, line 1", 1, row))


OPENAI = {"messages": [user("Hello"), assistant("Hi!")]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}


def test_all_shapes_of_a_conversation_are_one_document():
    alpaca = {"instruction": "Hello", "input": "", "output": "Hi!"}
    seed = {"id": "seed_task_0", "instruction": "Hello", "instances": [{"input": "", "output": "Hi!"}]}
    found = [parsed(row) for row in (OPENAI, SHAREGPT, alpaca, {"instruction": "Hello", "output": "Hi!"}, seed)]
    assert found == [[Conversation([user("Hello"), assistant("Hi!")], None)]] * 5
    assert len({one.id for (one,) in found}) == 1


def test_an_input_stays_a_field_of_its_own_and_every_instance_is_a_conversation():
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert parsed(alpaca) == [Conversation([user("Add.", input="1 and 2"), assistant("3")])]
    seed = {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}, {"input": "", "output": "?"}]}
    assert [talk.messages[0] for talk in parsed(seed)] == [user("Add.", input="1, 2"), user("Add.")]


def test_the_text_of_a_document_is_what_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": ""}, {"messages": [user("a"), calls, assistant("b")]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [(one.text, one.id == one.conversation.id) for one in chat.find(str(path))] == [
        ("Add.\n\n1 and 2", True), ("a\n\nb", True)
    ]  # fmt: skip


def test_a_folder_is_its_jsonl_files(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(OPENAI))
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n\n" + json.dumps(SHAREGPT))
    (tmp_path / "README.md").write_text("not a conversation")
    source = chat.find(str(tmp_path))
    assert [one.text for one in source] == ["x\n\ny", "Hello\n\nHi!", "Hello\n\nHi!"]
    assert source.undecodable() == []
    before = source.fingerprint()
    (tmp_path / "b.jsonl").write_text(json.dumps(SHAREGPT))
    assert chat.find(str(tmp_path)).fingerprint() != before


def test_parts_of_text_are_joined_and_what_else_a_message_has_is_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    tool = {"role": "tool", "content": "4", "tool_call_id": "1"}
    row = {"messages": [{"role": "user", "content": parts}, calls, tool, assistant("c")], "tools": [{"name": "f"}]}
    assert parsed(row) == [([user("ab"), calls, tool, assistant("c")], [{"name": "f"}])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: list instead of an object"),
        (b'{"text": "x"}', "line 2: neither messages nor conversations nor instances nor instruction; a line is"),
        (b'{"messages": []}', "line 2: messages must be a list of one or more"),
        (b'{"messages": {"role": "user"}}', "line 2: messages must be a list of one or more"),
        (b'{"messages": ["x"]}', r"line 2: messages\[0\] must be an object with role and content"),
        (b'{"messages": [{"content": "x"}]}', r"line 2: messages\[0\] has no role"),
        (b'{"messages": [{"role": "asistant", "content": "x"}]}', "Unknown role 'asistant'. Did you mean 'assistant'"),
        (b'{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]: content must be text"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content has parts that are no text"),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "line 2: the conversation ends with 'user', but the assi",
        ),
        (b'{"conversations": [{"from": "bot", "value": "x"}]}', "Unknown from 'bot'"),
        (b'{"conversations": [{"value": "x"}]}', r"conversations\[0\] has no from"),
        (b'{"conversations": [{"from": "gpt"}]}', r"conversations\[0\]: value must be text"),
        (b'{"conversations": [{"from": "human", "value": "x"}]}', "the conversation ends with 'user'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "line 2: tools must be a list"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "one half of a surrogate pair"),
        (b'{"messages": "\xff"}', "line 2: not UTF-8: byte 0xff at offset 14 of the line"),
        (b'{"instruction": " ", "output": "x"}', "line 2: instruction must be text, and not empty"),
        (b'{"instruction": "x"}', "line 2: output must be text"),
        (b'{"instruction": "x", "input": 3, "output": "y"}', "line 2: input must be text"),
        (b'{"instruction": "x", "instances": []}', "line 2: instances must be a list of one or more"),
        (
            b'{"instruction": "x", "instances": ["y"]}',
            r"line 2: instances\[0\] must be an object with input and output",
        ),
        (b'{"instances": [{"output": "y"}]}', r"line 2: instances\[0\]: instruction must be text, and not empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(OPENAI).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        list(chat.find(str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_real_seed_tasks_are_conversations(shared_data):
    found = list(chat.find(str(shared_data / "instructions" / "seed_tasks.jsonl")))
    assert len(found) >= 175 and all(one.conversation.messages[-1]["content"] for one in found)
    assert any("input" in one.conversation.messages[0] for one in found)


# ------------------------------------------------------------------------------------------------ principles


HH = "\n\nHuman: Which pens?\n\nAssistant: Two.\n\nThe red one.\n\nHuman: And\n\nthen?\n\nAssistant:"
TURNS = [user("Which pens?"), assistant("Two.\n\nThe red one."), user("And\n\nthen?")]


def pair(**fields) -> constitution.Pair:
    return constitution.pair(Row("x, line 1", 1, {"prompt": "Hi", "chosen": "Yes", "rejected": "No"} | fields))


def test_a_principle_is_the_systems_message_and_the_preferred_answer_is_learned(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"principle": "Be polite.", "prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
            {"prompt": HH, "chosen": " Then write.", "rejected": " No."}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = constitution.find(str(path))
    assert first.conversation.messages == [
        {"role": "system", "content": "Be polite."}, user("Hi"), assistant("Hello!")
    ]  # fmt: skip
    assert first.text == "Be polite.\n\nHi\n\nHello!" and first.id == "Hi"  # where its pair is held out
    assert second.conversation.messages == [*TURNS, assistant("Then write.")]


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi",
        "",
        " \n",
        "Human: Hi",
        "\n\nHuman: Hi",
        "Assistant:",
        "\n\nHuman: Hi\n\nAssistant: x",
        "a\n\nHuman: b\n\nAssistant:",
    ],
)
def test_a_prompt_in_another_form_is_one_message_as_it_is(prompt):
    assert constitution.turns(prompt) == [user(prompt)]


def test_turns_are_those_of_hh_rlhf():
    assert constitution.turns(HH) == constitution.turns(HH.strip()) == TURNS
    assert constitution.turns("\n\nHuman: a\n\nHuman: b\n\nAssistant: ") == [user("a"), user("b")]


def test_prompts_and_answers_may_be_lists_of_messages():
    found = pair(prompt=[user("Hi")], chosen=[assistant("a")], rejected=[assistant("b"), user("c"), assistant("d")])
    assert found == ([user("Hi")], [assistant("a")], [assistant("b"), user("c"), assistant("d")])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "No"}, "line 1: chosen and rejected are the same, which prefers nothing; leave it out"),
        ({"chosen": " No"}, "chosen and rejected are the same"),
        ({"chosen": " "}, "line 1: chosen is empty"),
        ({"chosen": None}, "line 1: chosen must be a list of one or more"),
        ({"rejected": [user("x")]}, "line 1: rejected ends with 'user'; its last message must be the assistant's"),
        (
            {"prompt": [user("x"), assistant("y")]},
            "line 1: the prompt ends with the assistant, but must ask it something",
        ),
        ({"prompt": [{"role": "usr", "content": "x"}]}, r"line 1: prompt\[0\]: Unknown role 'usr'"),
        ({"principle": 3}, "line 1: principle must be text"),
    ],
)
def test_a_pair_that_is_none_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        pair(**fields)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="line 1: no field 'rejected'; a line is {\"principle\""):
        constitution.pair(Row("x, line 1", 1, {"prompt": "x", "chosen": "y"}))


def test_real_pairs_are_conversations(shared_data):
    path = shared_data / "preferences" / "harmless.jsonl"
    pairs = [constitution.pair(row) for row in jsonl.rows(path, "")]
    assert len(pairs) == 1200
    said = [message["content"] for one in pairs for message in one.prompt]
    assert all(said) and not any("\n\nHuman:" in text or "\n\nAssistant:" in text for text in said)
    assert {one.prompt[-1]["role"] for one in pairs} == {"user"} and max(len(one.prompt) for one in pairs) > 3
