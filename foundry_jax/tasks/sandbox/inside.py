"""What runs inside the sandbox, in one of two roles: the candidate has the program of a model, the judge the test.

A script for an interpreter with the standard library alone. Messages are lines of JSON. The judge asks

    {"arguments": [...], "keywords": {...}}

and the candidate answers

    {"value": ..., "arguments": [...]}        its result, and the arguments as the call left them
    {"error": "ValueError: ..."}              what was raised instead

with values as `pack` writes them. The candidate's answers are bytes from an enemy: nothing in them is ever run.
"""

import contextlib
import json
import os
import random
import resource
import sys
import types

ANSWER_BYTES = 1 << 24  # of one answer; a longer one fails the test
REASON_CHARACTERS = 300
PLAIN_BITS = 64  # longer integers are written in hexadecimal: Python limits the decimal digits that it reads


def main() -> None:
    """Plays the role of the command line: its name, limits in JSON, and numbers of open files."""
    {"candidate": candidate, "judge": judge}[sys.argv[1]]()


def candidate() -> None:
    """Runs a program and answers calls of its function until there are no more."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _enter()
    _send(answers, "ready")
    job = json.loads(calls.readline())
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(job["program"], "<candidate>", "exec"), module.__dict__)
        function = module.__dict__[job["entry_point"]]
    except BaseException as error:
        _send(answers, {"error": _described(error)})
        return
    for line in calls:
        _send(answers, _called(function, json.loads(line)))


def judge() -> None:
    """Runs a test, whose calls another process answers, and says whether it passed."""
    verdicts = os.fdopen(os.dup(1), "wb")
    answers, calls = os.fdopen(int(sys.argv[3]), "rb"), os.fdopen(int(sys.argv[4]), "wb")
    task = os.fdopen(os.dup(0), "rb")
    _enter()
    if json.loads(answers.readline() or "null") != "ready":
        return
    _send(verdicts, "ready")
    _send(verdicts, _verdict(json.loads(task.readline()), StandIn(calls, answers)))


class StandIn:
    """The candidate's function, as the test sees it."""

    def __init__(self, calls, answers):
        self._calls, self._answers = calls, answers

    def __call__(self, *arguments, **keywords):
        """Returns what the candidate answers, and leaves the arguments as it left them.

        Raises:
            Failure: the candidate raised something, ended, or answered what cannot be read.
        """
        question = {"arguments": pack(arguments), "keywords": {name: pack(x) for name, x in keywords.items()}}
        with contextlib.suppress(BrokenPipeError):  # it has ended, perhaps with a last word
            _send(self._calls, question)
        line = self._answers.readline(ANSWER_BYTES)
        if not line:
            raise Failure("the program ended before it had answered every call")
        if not line.endswith(b"\n"):
            raise Failure(f"an answer is longer than {ANSWER_BYTES} bytes, or breaks off")
        value, changed = _read(line)
        for mine, theirs in zip(arguments, changed, strict=False):
            _assign(mine, theirs)
        return value


class Failure(Exception):
    """The candidate gave no answer."""


class Foreign:
    """What is no plain value: it equals nothing but itself, and can be iterated over if the original could."""

    def __init__(self, kind, items):
        self.kind, self.items = kind, items

    def __iter__(self):
        if self.items is None:
            raise TypeError(f"{self.kind!r} object is not iterable")
        return iter(self.items)

    def __repr__(self):
        return f"<{self.kind}>"


def pack(x):
    """Returns a value as JSON: itself where JSON has it, otherwise [tag, ...].

    An instance of a subclass becomes one of the plain class: a Counter a dict, an IntEnum an integer.
    """
    if x is None or isinstance(x, (bool, float, str)):
        return x
    if isinstance(x, int):
        return x if x.bit_length() < PLAIN_BITS else ["int", hex(x)]
    if isinstance(x, dict):
        return ["dict", *([pack(key), pack(value)] for key, value in x.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return [kind.__name__, *map(pack, x)]
    if isinstance(x, (bytes, bytearray)):
        return [type(x).__name__, bytes(x).hex()]
    if isinstance(x, complex):
        return ["complex", x.real, x.imag]
    if type(x).__module__ in ("decimal", "fractions"):
        return [type(x).__name__, str(x)]
    if type(x).__module__ == "numpy" and getattr(x, "shape", None) == ():
        return pack(x.item())
    return ["foreign", type(x).__name__, [pack(item) for item in x] if hasattr(type(x), "__iter__") else None]


def unpack(x):
    """Returns the value that `pack` wrote."""
    if not isinstance(x, list):
        return x
    tag, *rest = x
    return READERS[tag](rest)


def _exact(module, name):
    """Returns what reads a number of a class that is imported when it is needed."""
    return lambda rest: getattr(__import__(module), name)(rest[0])


READERS = {
    "int": lambda rest: int(rest[0], 16),
    "list": lambda rest: list(map(unpack, rest)),
    "tuple": lambda rest: tuple(map(unpack, rest)),
    "set": lambda rest: set(map(unpack, rest)),
    "frozenset": lambda rest: frozenset(map(unpack, rest)),
    "dict": lambda rest: {unpack(key): unpack(value) for key, value in rest},
    "bytes": lambda rest: bytes.fromhex(rest[0]),
    "bytearray": lambda rest: bytearray.fromhex(rest[0]),
    "complex": lambda rest: complex(*rest),
    "Decimal": _exact("decimal", "Decimal"),
    "Fraction": _exact("fractions", "Fraction"),
    "foreign": lambda rest: Foreign(rest[0], None if rest[1] is None else list(map(unpack, rest[1]))),
}


def _called(function, question) -> dict:
    try:
        arguments = unpack(question["arguments"])
        value = function(*arguments, **{name: unpack(x) for name, x in question["keywords"].items()})
        return {"value": pack(value), "arguments": [pack(x) for x in arguments]}
    except BaseException as error:
        return {"error": _described(error)}


def _read(line: bytes) -> tuple:
    """Returns (value, arguments) of an answer."""
    try:
        answer = json.loads(line)
        if "error" not in answer:
            return unpack(answer["value"]), [unpack(x) for x in answer["arguments"]]
        error = str(answer["error"])[:REASON_CHARACTERS]
    except Exception as wrong:
        raise Failure(f"an answer cannot be read: {_described(wrong)}") from None
    raise Failure(error)


def _assign(mine, theirs) -> None:
    """Makes a mutable argument what the candidate made of its copy."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, (list, bytearray)):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)):
        mine.clear()
        mine.update(theirs)


def _verdict(task: dict, stand_in: StandIn) -> dict:
    """Returns {"passed", "reason"}, or {"error"} where the test itself is wrong.

    The prompt is run here as well: tests use its imports and helpers. It was not written by the model.
    """
    space: dict = {"__name__": "test"}
    try:
        exec(compile(task["prompt"], "<prompt>", "exec"), space)
        test = compile(task["test"], "<test>", "exec")
    except BaseException as error:
        return {"error": _described(error)}
    space[task["entry_point"]] = stand_in
    try:
        exec(test, space)
        if "check" not in space:
            return {"error": "the test defines no function check"}
        space["check"](stand_in)
    except BaseException as error:
        return {"passed": False, "reason": _described(error)}
    return {"passed": True, "reason": ""}


def _enter() -> None:
    """Puts limits on this process, and nothing in place of its standard streams."""
    for name, value in json.loads(sys.argv[2]).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    random.seed(0)  # the same verdict each time


def _send(pipe, message) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def _described(error: BaseException) -> str:
    name, text = type(error).__name__, str(error)
    described = text if isinstance(error, Failure) else f"{name}: {text}" if text else name
    return described[:REASON_CHARACTERS]
