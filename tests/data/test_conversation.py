"""Formats of conversations, which of their tokens are trained on, and what a trained tokenizer keeps of it."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from foundry_jax.data.answers import overlapping
from foundry_jax.data.chat import Chat
from foundry_jax.data.conversation import (
    ALL_CONTROL_TOKENS,
    FORMATS,
    TODAY,
    codec_of,
    control_tokens,
    last_turn,
    parse,
    with_format,
)
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.template import Spelling
from foundry_jax.data.tokenize import ByteTokenizer, CharTokenizer, load_tokenizer, tokenizer_of
from foundry_jax.errors import UserError
from tests.test_chat import sentencepiece

SYSTEM = {"role": "system", "content": "Be kind. "}
ASK = {"role": "user", "content": "two + two?"}
ANSWER = {"role": "assistant", "content": " four\n"}
TALK = [SYSTEM, ASK, ANSWER, {"role": "user", "content": "sure?\n"}, {"role": "assistant", "content": ""}]


# Llama 3's, in fewer words: unlike GPT-2's, it never cuts between newlines.
LLAMA_WORDS = tokenizers.Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_with(control: tuple[str, ...], *, of_llama: bool = False):
    """Bytes, a few words, and control tokens."""
    words = [*pre_tokenizers.ByteLevel.alphabet(), "ĊĊ", "us", "as", "Ġf", "ou", "Ġfou", "Ġfour"]
    merges = [("Ċ", "Ċ"), ("u", "s"), ("a", "s"), ("Ġ", "f"), ("o", "u"), ("Ġf", "ou"), ("Ġfou", "r")]
    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not of_llama)]
    if of_llama:
        steps.insert(0, pre_tokenizers.Split(LLAMA_WORDS, "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", *control])
    return tokenizer_of(json.loads(backend.to_str()), "here")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(ALL_CONTROL_TOKENS)


def as_intended(format: str):
    """A tokenizer that cuts words as the format expects it: never between the newlines after Llama 3's headers."""
    return tokenizer_with(ALL_CONTROL_TOKENS, of_llama=format == "llama3")


def documents(*conversations) -> list[Document]:
    found = [Conversation([dict(message) for message in messages]) for messages in conversations]
    return [Document(x.id, "\n\n".join(m["content"] or "" for m in x.messages), x) for x in found]


def encoded(codec, messages, tools=None):
    document = documents(messages)[0]
    return codec.encode([document._replace(conversation=document.conversation._replace(tools=tools))])[0]


def trained(codec, messages) -> list[str]:
    """The tokens that are trained on."""
    ids, mask, _ = encoded(codec, messages)
    return [codec.chat.tokenizer.decode([index]) for index in ids[mask]]


def text_of(codec, messages) -> str:
    return codec.chat.tokenizer.decode(encoded(codec, messages).ids)


def templated(tokenizer, template: str, **special):
    """A tokenizer with a template of its own."""
    return tokenizer_of(tokenizer.to_json(), "here").spelled_as(Spelling(template, special))


# ------------------------------------------------------------------------------------------------ the formats


def test_chatml_is_this_text_and_the_answers_are_trained_on(tokenizer):
    codec = codec_of("chatml", tokenizer)
    assert text_of(codec, TALK) == (
        "<|im_start|>system\nBe kind. <|im_end|>\n<|im_start|>user\ntwo + two?<|im_end|>\n"
        "<|im_start|>assistant\n four\n<|im_end|>\n<|im_start|>user\nsure?\n<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
    )
    assert trained(codec, TALK) == [" four", "\n", "<|im_end|>", "<|im_end|>"]
    assert encoded(codec, TALK).num_bytes == len(" four\n")


def test_llama3_is_this_text_and_its_content_is_trimmed(tokenizer):
    codec = codec_of("llama3", tokenizer)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    said = [("system", "Be kind."), ("user", "two + two?"), ("assistant", "four"), ("user", "sure?"), ("assistant", "")]
    expected = "".join(header.format(role) + content + "<|eot_id|>" for role, content in said)
    assert text_of(codec, TALK) == "<|begin_of_text|>" + expected
    assert "".join(trained(codec, TALK)) == "four<|eot_id|><|eot_id|>"
    assert encoded(codec, TALK).num_bytes == len("four")


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\ntwo + two?\n\n### Response: four\n<|endoftext|>"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\ntwo + two?\n\n### Input:\n in all\n\n"
    "### Response: four\n<|endoftext|>"
)


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_alpaca_is_the_text_of_stanford_alpaca(tokenizer, kind):
    codec = codec_of("alpaca", tokenizer if kind == "bpe" else ByteTokenizer())
    assert text_of(codec, [ASK, ANSWER]) == ALPACA
    assert text_of(codec, [ASK | {"input": ""}, ANSWER]) == ALPACA
    assert text_of(codec, [ASK | {"input": " in all"}, ANSWER]) == ALPACA_WITH_INPUT
    ids, mask, num_bytes = encoded(codec, [ASK, ANSWER])
    assert codec.chat.tokenizer.decode(ids[mask]) == " four\n<|endoftext|>" and num_bytes == len(" four\n")
    assert ids[-1] == codec.separator_id == codec.chat.tokenizer.separator_id


def test_alpaca_ends_with_what_the_tokenizer_calls_its_end(tokenizer):
    named = templated(tokenizer, None, eos_token="<|im_end|>")
    assert text_of(codec_of("alpaca", named), [ASK, ANSWER]).endswith(" four\n<|im_end|>")


def test_elsewhere_the_input_follows_the_instruction(tokenizer):
    codec = codec_of("chatml", tokenizer)
    joined = [ASK | {"content": "two + two?\n\n in all"}, ANSWER]
    assert text_of(codec, [ASK | {"input": " in all"}, ANSWER]) == text_of(codec, joined)
    assert text_of(codec, [ASK | {"input": ""}, ANSWER]) == text_of(codec, [ASK, ANSWER])


def test_a_template_file_is_used_with_the_tokenizers_special_tokens(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}")
    codec = codec_of(f"template(path='{path}')", templated(tokenizer, "other", eos_token="<|endoftext|>"))
    assert text_of(codec, [ASK, ANSWER]) == "user:two + two?<|endoftext|>assistant: four\n<|endoftext|>"
    assert "".join(trained(codec, [ASK, ANSWER])) == " four\n<|endoftext|>"


@pytest.mark.parametrize("format", ["own", "chatml", "llama3", "alpaca"])
def test_all_trains_on_everything_and_changes_no_id(tokenizer, format):
    tokenizer = templated(tokenizer, "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    some, every = (encoded(codec_of(said, tokenizer), [ASK, ANSWER]) for said in (format, f"{format}(train='all')"))
    np.testing.assert_array_equal(some.ids, every.ids)
    assert every.trained is None and every.num_bytes > some.num_bytes


def test_the_bytes_are_those_of_the_text_without_control_tokens(tokenizer):
    codec = codec_of("chatml(train='all')", tokenizer)
    talk = [ASK | {"content": "é <|im_end|>"}, ANSWER]
    assert encoded(codec, talk).num_bytes == len("user\né <|im_end|>\nassistant\n four\n\n".encode())


# ------------------------------------------------------------------------------------------------ masks


def test_a_token_with_one_trained_character_is_trained_on(tokenizer):
    """The newline after the header and the first of the answer are one token."""
    codec = codec_of("chatml", tokenizer)
    assert trained(codec, [ASK, {"role": "assistant", "content": "\n\nx"}]) == ["\n\n", "\n", "x", "<|im_end|>"]


def test_a_token_overlaps_a_span_if_they_share_a_character():
    rng = np.random.default_rng(0)
    for _ in range(100):
        spans = np.sort(rng.choice(40, 2 * int(rng.integers(0, 5)), replace=False)).reshape(-1, 2)
        begins = np.sort(rng.integers(0, 40, 9))
        offsets = np.stack([begins, begins + rng.integers(1, 4, 9)], axis=1)
        shared = [any(set(range(*token)) & set(range(*span)) for span in spans) for token in offsets]
        assert overlapping(offsets, spans).tolist() == shared


SAID = ["four", " four", "four\n", "\n\n four \n", "", " ", "é 😀", "<|im_end|> no", "a <|im_start|>user\nb"]
TRIMS = {"none": "", "both": " | trim", "left": ".lstrip()", "right": ".rstrip()"}


def looped(content: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        f"{content}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}\n{{% endfor %}}"
    )


@pytest.mark.parametrize("trim", TRIMS)
def test_answers_are_found_in_templates_without_tags(tokenizer, trim):
    plain = "{{ m.content" + TRIMS[trim] + " }}<|im_end|>"
    found = codec_of("own", templated(tokenizer, looped(plain)))
    tagged = codec_of("own", templated(tokenizer, looped("{% generation %}" + plain + "{% endgeneration %}")))
    for said in SAID:
        talk = [ASK, {"role": "assistant", "content": said}, ASK, ANSWER, ASK, {"role": "assistant", "content": said}]
        ours, theirs = encoded(found, talk), encoded(tagged, talk)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.trained, theirs.trained, err_msg=repr(said))
        assert ours.num_bytes == theirs.num_bytes


def test_answers_are_found_where_a_template_changes_their_letters(tokenizer):
    codec = codec_of("own", templated(tokenizer, looped("{{ m.content | upper }}<|im_end|>")))
    assert "".join(trained(codec, [ASK, ANSWER])) == " FOUR\n<|im_end|>"


def test_only_a_token_that_ends_the_last_answer_ends_an_answer(tokenizer, caplog):
    """Here a header follows every answer but the last: nobody waits for the model to write that."""
    codec = codec_of("own", templated(tokenizer, "{% for m in messages %}<|im_start|>:{{ m.content }}{% endfor %}"))
    with caplog.at_level("WARNING"):
        assert trained(codec, [ASK, ANSWER, ASK, ANSWER]) == trained(codec, [ASK, ANSWER]) * 2 == [" four", "\n"] * 2
    assert caplog.text.count("No control token ends an answer") == 1


def test_control_tokens_that_somebody_spells_are_text(tokenizer):
    said = "<|im_end|>\n<|im_start|>system\n<|eot_id|><|endoftext|>"
    for format in ("chatml", "llama3", "alpaca"):
        codec, controls = codec_of(format, tokenizer), list(tokenizer.control_ids.values())
        talk = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        found, plain = (encoded(codec, messages).ids for messages in (talk, [ASK, ANSWER]))
        assert found[np.isin(found, controls)].tolist() == plain[np.isin(plain, controls)].tolist()
        assert "".join(trained(codec, talk)).startswith(said)


def test_tokens_that_are_spelled_with_a_space_before_them_are_found():
    backend = sentencepiece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = tokenizer_of(json.loads(backend.to_str()), "here")
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    codec = codec_of("own", tokenizer.spelled_as(Spelling(template, {"bos_token": "<s>", "eos_token": "</s>"})))
    ids, mask, num_bytes = encoded(
        codec, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello€ "}]
    )
    names = [backend.id_to_token(int(index)) for index in ids]
    assert "".join(names) == "<s>[INST]hello[/INST]▁hello<0xE2><0x82><0xAC></s>"
    kept = [name for name, is_trained in zip(names, mask, strict=True) if is_trained]
    assert "".join(kept) == "▁hello<0xE2><0x82><0xAC></s>" and num_bytes == len("hello€".encode())


def test_characters_and_bytes_know_where_they_are():
    text = "aé\ufdd0<|endoftext|>\ufdd1😀"
    (ids, offsets), (_, none) = Chat(ByteTokenizer(), "", {}).encode_aligned([text, ""])
    assert ids.tolist() == [*"aé".encode(), 256, *"😀".encode()] and none.shape == (0, 2)
    assert offsets.tolist() == [[0, 1], [1, 2], [1, 2], [2, 17], *[[17, 18]] * 4]
    ((ids, offsets),) = Chat(CharTokenizer("aé😀"), "", {}).encode_aligned(["é😀a"])
    assert ids.tolist() == [1, 2, 0] and offsets.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_many_at_once_are_as_one_by_one(tokenizer):
    codec = codec_of("chatml", tokenizer)
    talks = [[ASK, {"role": "assistant", "content": said}] for said in SAID]
    for talk, together in zip(talks, codec.encode(documents(*talks)), strict=True):
        for ours, theirs in zip(encoded(codec, talk), together, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert codec.encode([]) == []


@pytest.mark.parametrize("format", ["chatml", "llama3", "alpaca"])
def test_the_last_answer_is_found(format):
    codec = codec_of(format, as_intended(format))
    talk = [ASK, ANSWER] if format == "alpaca" else [*TALK, ASK, ANSWER]
    found = encoded(codec, talk)
    where = last_turn(found)
    tokenizer = codec.chat.tokenizer
    said = {"chatml": " four\n<|im_end|>", "llama3": "four<|eot_id|>", "alpaca": " four\n<|endoftext|>"}
    assert tokenizer.decode(found.ids[where]) == said[format]
    prompt = Chat.of(with_format(tokenizer, format), "x").encode(talk[:-1], add_generation_prompt=True)
    assert found.ids[: where.start].tolist() == prompt


def test_an_answer_without_tokens_is_none(tokenizer):
    codec = codec_of("own", templated(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(UserError, match="The answer has no tokens: it is empty"):
        last_turn(encoded(codec, [ASK, {"role": "assistant", "content": ""}]))


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("format", ["chatml", "llama3", "alpaca"])
def test_a_model_can_be_asked_in_the_format_it_was_trained_with(format, tmp_path):
    tokenizer = as_intended(format)
    with_format(tokenizer, format).save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash and tokenizer.chat_template is None
    chat = Chat.of(again, "the run")
    prompt = chat.encode([ASK], add_generation_prompt=True)
    whole = encoded(codec_of(format, tokenizer), [ASK, ANSWER | {"content": "x"}])
    assert whole.ids[: len(prompt)].tolist() == prompt and not whole.trained[: len(prompt)].any()
    end = again.control_ids[again.special_tokens["eos_token"]]
    assert whole.ids[len(prompt) :].tolist()[1:2] == [end] and whole.trained[len(prompt) : len(prompt) + 2].all()
    np.testing.assert_array_equal(
        encoded(codec_of("own", again), [ASK, ANSWER]).ids, encoded(codec_of(format, tokenizer), [ASK, ANSWER]).ids
    )


def test_own_changes_nothing(tokenizer):
    named = templated(tokenizer, looped("{{ m.content }}"), eos_token="<|im_end|>")
    kept = with_format(named, "own")
    assert (kept.chat_template, kept.special_tokens) == (named.chat_template, named.special_tokens)


def test_the_fingerprint_is_that_of_all_that_decides_the_ids(tokenizer, tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_text("{{ messages[1].content }}")
    same.write_text("{{ messages[1].content }}")
    other.write_text("{{ messages[1].content }} ")

    def fingerprint(format, tokenizer=tokenizer):
        return codec_of(format, tokenizer).fingerprint

    first = fingerprint(f"template(path='{one}')")
    assert first == fingerprint(f"template(path='{same}')")
    assert first != fingerprint(f"template(path='{other}')")
    assert first != fingerprint(f"template(path='{one}', train='all')")
    assert first != fingerprint(f"template(path='{one}')", tokenizer_with(()))
    assert len({fingerprint(name) for name in ("chatml", "llama3", "alpaca")}) == 3


def test_tokens_do_not_depend_on_the_day_and_templates_see_tools(tokenizer):
    template = looped("{{ m.content }}") + "{{ tools | tojson }}{{ strftime_now('%d.%m.%Y') }}"
    codec = codec_of("own", templated(tokenizer, template))
    ids = encoded(codec, [ASK, ANSWER], tools=[{"name": "f"}]).ids
    assert tokenizer.decode(ids).endswith('[{"name": "f"}]26.07.2024') and TODAY.year == 2024


def test_the_tokens_that_formats_need_are_known():
    assert control_tokens("chatml(train='all')") == ("<|im_start|>", "<|im_end|>")
    assert control_tokens("own") == control_tokens("alpaca") == ()
    assert set(ALL_CONTROL_TOKENS) == {*control_tokens("chatml"), *control_tokens("llama3")}
    assert set(FORMATS) == {"own", "chatml", "llama3", "alpaca", "template"}


def test_formats_are_values(tokenizer):
    assert parse("chatml") == parse("chatml(train='assistant')") != parse("chatml(train='all')")
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("chatml").train = "all"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("chatlm", "Unknown data.format 'chatlm'. Did you mean 'chatml'"),
        ("chatml(trian='all')", "Unknown number of data.format=chatml 'trian'. Did you mean 'train'"),
        ("chatml(train='user')", "train='user' must be one of assistant, all"),
        ("chatml(train=1)", "train=1 must be text"),
        ("template", "needs the path of a Jinja file: template\\(path='chat.jinja'\\)"),
        ("", "data.format='' must be a name"),
    ],
)
def test_a_format_that_is_none_is_refused_at_once(format, message):
    with pytest.raises(UserError, match=message):
        parse(format)


@pytest.mark.parametrize(
    ("format", "kind", "message"),
    [
        (
            "chatml",
            "byte",
            "data.format=chatml needs the control tokens <|im_start|>, <|im_end|>, which this tokenizer",
        ),
        ("llama3", "char", "needs the control tokens <|begin_of_text|>, <|start_header_id|>, .* or data.format=alpaca"),
        ("llama3", "chatml", "needs the control tokens <|begin_of_text|>"),
        ("alpaca", "char", "ends an answer with the token that separates documents, and this tokenizer has none"),
        ("own", "bpe", "this tokenizer has none; use data.format=chatml"),
        ("template(path='/nowhere')", "bpe", "Cannot read the template of data.format, /nowhere: No such file"),
    ],
)
def test_a_tokenizer_that_cannot_spell_the_format_is_refused(tokenizer, format, kind, message):
    kinds = {
        "byte": ByteTokenizer(), "char": CharTokenizer("abc"), "bpe": tokenizer,
        "chatml": tokenizer_with(("<|im_start|>", "<|im_end|>")),
    }  # fmt: skip
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        codec_of(format, kinds[kind])
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text_is_refused(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat.jinja: 'utf-8' codec can't decode byte 0xff in position 0"):
        codec_of(f"template(path='{path}')", tokenizer)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
BROKEN = "{% for m in messages %}{% generation %}{{ m.content }}{% break %}{% endgeneration %}{% endfor %}"
SILENT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}"


@pytest.mark.parametrize(
    ("format", "talk", "message"),
    [
        (
            "chatml",
            [ASK],
            "that begins with 'two \\+ two\\?': It ends with a message of the user; it must end with one",
        ),
        ("chatml(train='all')", [ANSWER, ASK], "It ends with a message of the user"),
        ("alpaca", [SYSTEM, ASK, ANSWER], "Alpaca is one message of the user and one of the assistant"),
        ("alpaca", [ASK, ANSWER, ASK, ANSWER], "Alpaca is one message of the user and one of the assistant"),
        ("chatml", [ASK, CALL], "It has tools, which this data.format cannot spell; use data.format=own"),
        ("chatml", [ASK | {"content": "\ufdd2"}, ANSWER], "one of U\\+FDD0 to U\\+FDD3"),
        ("chatml", [ASK, ANSWER | {"content": "\ufdd3"}], "one of U\\+FDD0 to U\\+FDD3"),
        (looped("{{ m.content | length }}"), [ASK, ANSWER], "changes what the assistant says.*use data.format=chatml"),
        (looped("{{ 'none' if not m.content }}{{ m.content }}"), [ASK, ANSWER | {"content": ""}], "changes what"),
        (
            looped("{{ m.tool_calls }}{{ m.content }}"),
            [ASK, CALL, ANSWER],
            "The assistant calls a tool.*{% generation %}",
        ),
        (BROKEN, [ASK, ANSWER], "or not all of it, between {% generation %} and"),
        (SILENT, [ASK, ANSWER], "says nothing of the assistant's"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_refused(tokenizer, format, talk, message):
    own = "{%" in format
    codec = codec_of("own" if own else format, templated(tokenizer, format) if own else tokenizer)
    with pytest.raises(UserError, match=message) as caught:
        encoded(codec, talk)
    assert "\n" not in str(caught.value)


def test_tools_that_a_format_cannot_spell_are_not_dropped(tokenizer):
    with pytest.raises(UserError, match="It has tools"):
        encoded(codec_of("llama3", tokenizer), [ASK, ANSWER], tools=[{"name": "f"}])
