"""Conversations as training data: how data.format spells them, and which of their tokens are trained on.

    codec = codec_of("chatml", tokenizer)
    encoded = codec.encode(documents)        # of each: ids, trained, num_bytes

A format is a template (see chat.py) in which {% generation %} and {% endgeneration %} stand around what the assistant
says and the token that ends it. That is trained on, and nothing else: no header, no white space of the template's, no
word of anybody else's. A conversation is encoded whole, since words are cut otherwise at the seams of a piece; a token
is trained on if any of its characters is between the tags, as transformers' return_assistant_tokens_mask has it.

To add a format, write such a class and give it a line in FORMATS.
"""

import abc
import copy
import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from foundry_jax.data.answers import Spelled, answers, num_bytes, overlapping
from foundry_jax.data.chat import Chat, control_ids_of
from foundry_jax.data.document import Conversation, Document
from foundry_jax.data.hashing import sha256_json
from foundry_jax.data.template import Spelling
from foundry_jax.data.tokenize import Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.schema import require, variant

# What a template takes for today: tokens must not depend on the day they were made. It is the date that Llama 3.1's
# template writes when it is given none.
TODAY = datetime.datetime(2024, 7, 26)
TRAIN = ("assistant", "all")
SHOWN = 60  # characters of a conversation in an error: enough to search for


class Format(abc.ABC):
    """How to spell a conversation; each is a frozen dataclass of what data.format may say about it.

    train: "assistant", or "all": every token is trained on, also the separators.
    control_tokens: those that the tokenizer must have.
    takes_input: whether the template has a place for the input of a message; elsewhere it follows the content.
    takes_tools: whether the template may know how to spell tools and calls of them.
    """

    train: str
    control_tokens: ClassVar[tuple[str, ...]] = ()
    takes_input: ClassVar[bool] = False
    takes_tools: ClassVar[bool] = False

    def __post_init__(self):
        require(self.train in TRAIN, f"data.format: train={self.train!r} must be one of {', '.join(TRAIN)}.")

    @abc.abstractmethod
    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        """Returns the template, and what it calls some control tokens of a tokenizer that has those it needs.

        Raises:
            UserError: there is no template, or the tokenizer has no token that the template needs.
        """


@dataclasses.dataclass(frozen=True)
class Own(Format):
    """The tokenizer's own template, that of the model it belongs to."""

    train: str = "assistant"
    takes_tools: ClassVar[bool] = True

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        require(
            tokenizer.chat_template is not None,
            "data.format=own is the tokenizer's chat template, and this tokenizer has none; use data.format=chatml, "
            "or init.source or data.tokenizer of a chat model.",
        )
        return Spelling(tokenizer.chat_template, dict(tokenizer.special_tokens))


@dataclasses.dataclass(frozen=True)
class ChatML(Format):
    """OpenAI's ChatML without a system message of its own; content is not trimmed.

    The newline after <|im_end|> is the template's: nobody waits for the model to write it.
    """

    train: str = "assistant"
    control_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        return Spelling(CHATML, {**tokenizer.special_tokens, "eos_token": "<|im_end|>"})


@dataclasses.dataclass(frozen=True)
class Llama3(Format):
    """Meta's Llama 3 (3.0): content is trimmed, and there is no system message of its own, nor the dates of 3.1."""

    train: str = "assistant"
    control_tokens: ClassVar[tuple[str, ...]] = (
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )  # fmt: skip

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        return Spelling(
            LLAMA3, {**tokenizer.special_tokens, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        )


@dataclasses.dataclass(frozen=True)
class Alpaca(Format):
    """One instruction, perhaps with an input, and its answer, as stanford_alpaca/train.py has it.

    Like there, no newline follows "### Response:", and the tokenizer's end token the answer; some others add a newline.
    """

    train: str = "assistant"
    takes_input: ClassVar[bool] = True

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        end = _end_token(tokenizer)
        require(
            end is not None,
            "data.format=alpaca ends an answer with the token that separates documents, and this tokenizer has none; "
            "use data.tokenizer=bpe or byte.",
        )
        return Spelling(ALPACA, {**tokenizer.special_tokens, "eos_token": end})


@dataclasses.dataclass(frozen=True)
class TemplateFile(Format):
    """A template in a file, for the special tokens that the tokenizer names."""

    path: str = ""
    train: str = "assistant"
    takes_tools: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.path), "data.format=template needs the path of a Jinja file: template(path='chat.jinja').")

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        try:
            text = Path(self.path).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"Cannot read the template of data.format, {self.path}: {why}.") from None
        return Spelling(text, dict(tokenizer.special_tokens))


CHATML = r"""{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = r"""{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

ALPACA = r"""{%- set asked = messages[0] %}
{%- if messages | map(attribute='role') | list not in [['user'], ['user', 'assistant']] %}
    {{- raise_exception('Alpaca is one message of the user and one of the assistant') }}
{%- endif %}
{{- 'Below is an instruction that describes a task' }}
{{- ', paired with an input that provides further context' if asked.input }}
{{- '. Write a response that appropriately completes the request.\n\n' }}
{{- '### Instruction:\n' + asked.content + '\n\n' }}
{{- '### Input:\n' + asked.input + '\n\n' if asked.input }}
{{- '### Response:' }}
{%- if messages | length == 2 %}
    {%- generation %}{{- messages[1].content + eos_token }}{%- endgeneration %}
{%- endif %}"""

FORMATS: dict[str, type[Format]] = {
    "own": Own,
    "chatml": ChatML,
    "llama3": Llama3,
    "alpaca": Alpaca,
    "template": TemplateFile,
}
ALL_CONTROL_TOKENS = tuple(token for kind in FORMATS.values() for token in kind.control_tokens)


def parse(text: str) -> Format:
    """Returns what data.format says.

    Raises:
        UserError: an unknown name or option.
    """
    return variant(text, FORMATS, "data.format")


def control_tokens(format: str) -> tuple[str, ...]:
    """Returns the control tokens that a tokenizer must have for a data.format."""
    return parse(format).control_tokens


def with_format(tokenizer: Tokenizer, format: str) -> Tokenizer:
    """Returns a tokenizer whose chat template is that of a data.format: of a model that was trained with it.

    Raises:
        UserError: as in codec_of.
    """
    wanted = parse(format)
    missing = [token for token in wanted.control_tokens if token not in tokenizer.control_ids]
    require(
        not missing,
        f"data.format={format} needs the control tokens {', '.join(missing)}, which this tokenizer does not have; use "
        f"one that has them (data.tokenizer=bpe, or that of a chat model), or data.format=alpaca, which needs none.",
    )
    return copy.copy(tokenizer).spelled_as(wanted.spelling(tokenizer))


class Encoded(NamedTuple):
    """A document as ids.

    ids: [n] integers.
    trained: [n] bool, whether a token counts as a target; None: all do.
    num_bytes: the UTF-8 bytes of the text that counts, control tokens not counted.
    """

    ids: np.ndarray
    trained: np.ndarray | None
    num_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class ChatCodec:
    """Turns conversations into ids."""

    chat: Chat
    format: Format

    @property
    def separator_id(self) -> int | None:
        """The tokenizer's."""
        return self.chat.tokenizer.separator_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of all that decides the ids."""
        chat, said = self.chat, self.format
        facts = [chat.template, dict(chat.special_tokens), said.train, said.takes_input]
        return sha256_json([chat.tokenizer.hash, *facts])

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Returns the ids of conversations, and which of them are trained on.

        Raises:
            UserError: a conversation does not end with the assistant, or cannot be spelled.
        """
        spelled = [self._spelled(document) for document in documents]
        texts = [text for text, _ in spelled]
        if self.format.train == "all":
            found = zip(self.chat.encode_batch(texts), texts, strict=True)
            return [Encoded(ids, None, num_bytes(text)) for ids, text in found]
        aligned = zip(self.chat.encode_aligned(texts), spelled, strict=True)
        return [Encoded(ids, overlapping(offsets, said.spans), said.num_bytes) for (ids, offsets), said in aligned]

    def spell(self, conversation: Conversation) -> Spelled:
        """Returns a conversation as marked text.

        Raises:
            UserError: as in encode.
        """
        self._check(conversation)
        messages = self.chat.hidden([self._message(message) for message in conversation.messages])
        options = {"tools": self.chat.hidden(conversation.tools), "now": TODAY}
        if self.format.train == "all":
            return Spelled(self.chat.spell(messages, **options), np.zeros((0, 2), np.int64))
        return answers(self.chat, messages, **options)

    def _spelled(self, document: Document) -> Spelled:
        assert document.conversation is not None, "a text is not for this codec"
        try:
            return self.spell(document.conversation)
        except UserError as error:
            raise UserError(f"The conversation that begins with {document.text[:SHOWN]!r}: {error}") from None

    def _check(self, conversation: Conversation) -> None:
        last = conversation.messages[-1]["role"]
        require(last == "assistant", f"It ends with a message of the {last}; it must end with one of the assistant.")
        calls = [message for message in conversation.messages if message.get("tool_calls")]
        require(
            self.format.takes_tools or not (calls or conversation.tools),
            "It has tools, which this data.format cannot spell; use data.format=own with a model whose template can.",
        )

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a message as the template wants it."""
        if self.format.takes_input or "input" not in message:
            return message
        rest = {key: value for key, value in message.items() if key != "input"}
        content = "\n\n".join(text for text in (message["content"], message["input"]) if text)
        return rest | {"content": content}


def codec_of(format: str, tokenizer: Tokenizer) -> ChatCodec:
    """Returns the codec of a data.format.

    Raises:
        UserError: an unknown format, no template, or no control tokens for it.
    """
    spelled = with_format(tokenizer, format)
    return ChatCodec(Chat.of(spelled, f"data.format={format}"), parse(format))


def last_turn(encoded: Encoded) -> slice:
    """Returns where the last answer is, with its end token: the last tokens without a gap that are trained on.

    Raises:
        UserError: there is no such token.
    """
    assert encoded.trained is not None, "train='all' marks no answers"
    changes = np.flatnonzero(np.diff(encoded.trained, prepend=False, append=False))
    require(len(changes) > 0, "The answer has no tokens: it is empty, and this data.format has none that ends it.")
    return slice(*map(int, changes[-2:]))


def _end_token(tokenizer: Tokenizer) -> str | None:
    """Returns the spelling of what ends a text: what the tokenizer calls eos_token, or else its separator."""
    ids = control_ids_of(tokenizer)
    named = tokenizer.special_tokens.get("eos_token")
    if named in ids:
        return named
    return next((token for token, index in ids.items() if index == tokenizer.separator_id), None)
