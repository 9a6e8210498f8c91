"""Conversations as token ids, spelled the way a model was trained on: by its own chat template.

A message is {"role": "user", "content": "Hello"}. A template is a Jinja program that comes with the model:

    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}

It runs in a sandbox, with what transformers' apply_chat_template gives it. Control tokens become ids only where the
template wrote them: a message that spells "<|im_end|>" stays the plain text it is, and cannot end its own turn.

To tell them apart, text is rendered as *marked* text, in which a control token stands between two noncharacters. It is
encoded by a twin of the tokenizer, whose control tokens are spelled like that: so the whole conversation is encoded at
once, as the original tokenizer would. Two more noncharacters mark what a template writes between {% generation %} and
{% endgeneration %}, for those who train on it (conversation.py).
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import tokenizers

from foundry_jax.data.tokenize import SEPARATOR, BPETokenizer, CharTokenizer, Tokenizer
from foundry_jax.errors import UserError
from foundry_jax.schema import require

# Unicode's noncharacters, which no text that is meant for others may hold: around a control token, around an answer.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
BEGIN, END = "\ufdd2", "\ufdd3"
RESERVED = re.compile(f"[{OPEN}{CLOSE}{BEGIN}{END}]")
MARKED = re.compile(f"{OPEN}[^{CLOSE}]*{CLOSE}")
REPLACEMENT = "\ufffd"  # what stands for bytes that are no character, or not yet

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer and a template for it."""

    tokenizer: Tokenizer
    template: str
    special_tokens: Mapping[str, str]  # as templates name them: {"bos_token": "<s>"}

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, name: str) -> "Chat":
        """Returns the chat of a tokenizer with its own template; `name` is the model in errors.

        Raises:
            UserError: there is no tokenizer, or it has no template.
        """
        require(tokenizer is not None, f"{name} has no tokenizer.json, which a chat needs.")
        require(
            tokenizer.chat_template is not None,
            f"{name} has no chat template: it is a base model, which continues text but was not taught to answer; "
            f"use generate, or an instruct model.",
        )
        return cls(tokenizer, tokenizer.chat_template, tokenizer.special_tokens)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation.

        Args:
            add_generation_prompt: end with the beginning of the assistant's next message.
            tools: what the assistant may call, if the template knows how to say it.
            now: what the template takes for the time; None: the time.

        Raises:
            UserError: the template refuses the conversation or fails, or a text holds one of U+FDD0 to U+FDD3.
        """
        text = self.marked(messages, add_generation_prompt=add_generation_prompt, tools=tools, now=now)
        return self.encode_batch([text])[0].tolist()

    def marked(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> str:
        """Returns the conversation as marked text; arguments as in `encode`."""
        require(len(messages) > 0, "A conversation must have at least one message.")
        options = {"add_generation_prompt": add_generation_prompt, "tools": self.hidden(tools), "now": now}
        return self.spell(self.hidden(messages), **options)

    def spell(self, messages: Sequence[Message], *, mark_generation: bool = False, **options) -> str:
        """Returns hidden messages as marked text; BEGIN and END stand around {% generation %} blocks if asked for.

        The options are those of `render`; tools must be hidden too.
        """
        known = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered = render(
            self.template, known, special_tokens=self.special_tokens, mark_generation=mark_generation, **options
        )
        return self._patterns[1].sub(_swapped, rendered)

    def hidden(self, value: Any) -> Any:
        """Returns what the template may see of a user's value: plain data, the control tokens in it marked.

        Raises:
            UserError: it holds something else, or a noncharacter that is used here.
        """
        if isinstance(value, str):
            require(
                RESERVED.search(value) is None,
                "A message holds one of U+FDD0 to U+FDD3, noncharacters that no text should have; remove it.",
            )
            return self._patterns[0].sub(rf"{OPEN}\g<0>{CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.hidden(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hidden(item) for item in value]
        require(
            value is None or isinstance(value, (bool, int, float)),
            f"A message holds a {type(value).__name__}, but must be JSON: texts, numbers, lists and objects.",
        )
        return value

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of marked texts."""
        if self._twin is None:
            return [ids for ids, _ in self.encode_aligned(texts)]
        encodings = self._twin.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_aligned(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids [n], their characters [n, 2]) of marked texts: token i is in text[begin:end], a part or all."""
        if self._twin is None:
            return [self._aligned(text) for text in texts]
        encodings = self._twin.encode_batch(texts, add_special_tokens=False)
        return [(np.array(x.ids, np.uint32), np.array(x.offsets, np.int64).reshape(-1, 2)) for x in encodings]

    def _aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what encode_aligned does, for a tokenizer of characters or bytes."""
        found, position = [], 0
        for part in re.split(f"({MARKED.pattern})", text):
            if MARKED.fullmatch(part):
                ids, begins, ends = [self.control_ids[part[1:-1]]], [position], [position + len(part)]
            else:
                ids = self.tokenizer.encode(part)
                wide = [1 if isinstance(self.tokenizer, CharTokenizer) else len(x.encode()) for x in part]
                begins = np.repeat(np.arange(position, position + len(part)), wide)
                ends = begins + 1
            found.append((np.array(ids, np.uint32), np.stack([begins, ends], axis=1).astype(np.int64)))
            position += len(part)
        ids, offsets = zip(*found, strict=True)
        return np.concatenate(ids), np.concatenate(offsets)

    @functools.cached_property
    def control_ids(self) -> dict[str, int]:
        """The ids that only the template may write, by their spelling."""
        return control_ids_of(self.tokenizer)

    @functools.cached_property
    def _patterns(self) -> tuple[re.Pattern, re.Pattern]:
        """(a control token, a control token of a message or of the template or a mark that has lost its other half)."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        control = "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing
        return re.compile(control), re.compile(f"{OPEN}(?P<said>{control}){CLOSE}|(?P<put>{control})|[{OPEN}{CLOSE}]")

    @functools.cached_property
    def _twin(self) -> tokenizers.Tokenizer | None:
        if not isinstance(self.tokenizer, BPETokenizer):
            return None
        return _twin_of(json.loads(self.tokenizer.tokenizer_json()), self.control_ids)


def control_ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of a tokenizer's control tokens by their spelling; of one of bytes, that of its separator."""
    separator = tokenizer.separator_id
    return tokenizer.control_ids or ({} if separator is None else {SEPARATOR: separator})


def encode_chat(
    template: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Returns the ids of a conversation by any template; see Chat, which is quicker for more than one."""
    spelled = tokenizer.special_tokens if special_tokens is None else special_tokens
    return Chat(tokenizer, template, spelled).encode(messages, add_generation_prompt=add_generation_prompt)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    now: datetime.datetime | None = None,
    mark_generation: bool = False,
) -> str:
    """Returns what a template makes of a conversation, as transformers renders it.

    mark_generation: put BEGIN and END around what {% generation %} and {% endgeneration %} stand around.

    Raises:
        UserError: the template is no Jinja, refuses the conversation, or fails.
    """
    program = _compiled(template, mark_generation)
    try:
        return program.render(
            **special_tokens,
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda pattern: (now or datetime.datetime.now()).strftime(pattern),
        )
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template refuses the conversation: {_one_line(error)}.") from None
    except Exception as error:  # whatever a program by someone else raises
        raise UserError(f"The chat template fails: {type(error).__name__}: {_one_line(error)}.") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str, mark_generation: bool) -> jinja2.Template:
    generation = _MarkedGeneration if mark_generation else _Generation
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"The chat template is no Jinja: line {error.lineno}: {_one_line(error)}.") from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} stands around what the assistant says; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it
    marks = ("", "")

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in self.marks)
        return jinja2.nodes.Scope([begin, *body, end]).set_lineno(line)


class _MarkedGeneration(_Generation):
    marks = (BEGIN, END)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _swapped(match: re.Match) -> str:
    """Returns a control token of the template marked, one of a message plain, and nothing for half a pair of marks."""
    if match["put"]:
        return f"{OPEN}{match['put']}{CLOSE}"
    return match["said"] or ""


def _twin_of(value: dict[str, Any], control_ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    """Returns a tokenizer that is told its control tokens by marks, with the same ids."""
    names = {spelled: f"{OPEN}{spelled}{CLOSE}" for spelled in control_ids}
    model = value["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:  # Unigram's: [[token, score], ...]
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    value["added_tokens"] = [
        token | {"content": names.get(token["content"], token["content"])} for token in value["added_tokens"]
    ]
    value["post_processor"] = None  # it names control tokens, and puts some before a text; the template does that
    twin = tokenizers.Tokenizer.from_str(json.dumps(value))
    twin.no_truncation()
    twin.no_padding()
    wrong = [spelled for spelled, index in control_ids.items() if twin.token_to_id(names[spelled]) != index]
    assert not wrong, f"control tokens with other ids: {wrong}"
    return twin


class TextStream:
    """Text from ids that come one by one, held back while its last character is not whole.

    Only the ids of the last piece are kept, as context: some decoders strip a space from whatever comes first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._known = 0  # how many of them have been returned

    def add(self, index: int) -> str:
        """Returns the text that one more id makes certain."""
        self._ids.append(index)
        return "" if self._decode(self._ids).endswith(REPLACEMENT) else self.end()

    def end(self) -> str:
        """Returns what was held back."""
        before, text = self._decode(self._ids[: self._known]), self._decode(self._ids)
        if len(text) <= len(before):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return text[len(before) :]


def streamed(ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yields the text of ids, piece by piece, as soon as each is certain."""
    stream = TextStream(decode)
    for index in ids:
        yield stream.add(index)
    yield stream.end()
