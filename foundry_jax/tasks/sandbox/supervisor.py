"""A small process without JAX that starts sandboxes, some at a time, and kills them when their time is up.

A script for an interpreter with the standard library alone: a process with JAX in it has threads, and must not fork.
Its input is lines of JSON, first the settings and then the jobs:

    {"bwrap": ["bwrap", ...], "python": ["python3", ...], "seccomp": "<base64>", "limits": {"CPU": 4, ...},
     "timeout": 3.0, "workers": 2}
    {"index": 0, "prompt": ..., "completion": ..., "test": ..., "entry_point": ...}

and its output one line a job, in the order in which they end:

    {"index": 0, "passed": false, "reason": "AssertionError"}
    {"index": 0, "error": "bwrap: ..."}       the sandbox or the test failed, not the program

When its input ends, so do it and all that it started.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

START_SECONDS = 60.0  # for two interpreters to start on a busy machine
LINE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all sandboxes have in common; see above."""

    bwrap: list[str]
    python: list[str]
    seccomp: str
    limits: dict[str, int]
    timeout: float
    workers: int


class Failed(Exception):
    """There is no verdict, and why."""


class Sandbox:
    """One process in namespaces of its own, in a role of inside.py."""

    def __init__(self, settings: Settings, role: str, *, stdin: int, stdout: int, pass_fds: tuple[int, ...] = ()):
        rules, rules_end = os.pipe()
        os.write(rules_end, base64.b64decode(settings.seccomp))
        os.close(rules_end)
        info, info_end = os.pipe()
        options = ["--seccomp", str(rules), "--info-fd", str(info_end), "--"]
        arguments = [role, json.dumps(settings.limits), *map(str, pass_fds)]
        self._process = subprocess.Popen(
            [*settings.bwrap, *options, *settings.python, *arguments],
            stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, pass_fds=(rules, info_end, *pass_fds), env={},
        )  # fmt: skip
        os.close(rules)
        os.close(info_end)
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self._init = _init_of(info)

    def kill(self) -> str:
        """Ends every process of the namespace and returns when none is left, with what bwrap had to say."""
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            select.select([self._init], [], [])  # the first process of a namespace ends after all others
            os.close(self._init)
        else:
            self._process.kill()
        _, complaint = self._process.communicate()
        return complaint.decode(errors="replace").strip()


def _init_of(info: int) -> int | None:
    """Returns a handle of the first process of a sandbox, which bwrap describes on a pipe; None if it did not start."""
    with os.fdopen(info, "rb") as pipe:
        text = pipe.read()
    try:
        return os.pidfd_open(json.loads(text)["child-pid"])
    except (ValueError, ProcessLookupError):
        return None


def run(settings: Settings, job: dict) -> dict:
    """Returns {"passed", "reason"} of one program, or {"error"}."""
    calls, calls_end = os.pipe()
    answers, answers_end = os.pipe()
    candidate = Sandbox(settings, "candidate", stdin=calls, stdout=answers_end)
    judge = Sandbox(settings, "judge", stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(answers, calls_end))
    for end in (calls, answers, answers_end):
        os.close(end)
    try:
        result = _conversation(settings.timeout, job, candidate_in=calls_end, judge=judge)
    except (Failed, OSError) as problem:
        result = {"error": str(problem)}
    complaints = [sandbox.kill() for sandbox in (judge, candidate)]
    if "error" in result:
        result["error"] = "; ".join(filter(None, [result["error"], *complaints]))
    return result


def _conversation(timeout: float, job: dict, *, candidate_in: int, judge: Sandbox) -> dict:
    """Hands out the program and the test when both are ready, and waits for the verdict."""
    with os.fdopen(candidate_in, "wb") as pipe:
        if _line(judge.stdout, START_SECONDS, "the sandbox did not start") != "ready":
            raise Failed("the sandbox did not start")
        deadline = time.monotonic() + timeout
        program = {"program": job["prompt"] + job["completion"], "entry_point": job["entry_point"]}
        pipe.write(json.dumps(program).encode() + b"\n")
    test = {name: job[name] for name in ("prompt", "test", "entry_point")}
    judge.stdin.write(json.dumps(test).encode() + b"\n")
    judge.stdin.flush()
    try:
        return _line(judge.stdout, deadline - time.monotonic(), "the judge stopped without a verdict")
    except TimeoutError:
        return {"passed": False, "reason": f"timed out after {timeout:g} s"}


def _line(pipe, seconds: float, otherwise: str):
    """Returns the next message of a pipe.

    Raises:
        TimeoutError: it did not come in time.
        Failed: the pipe ended.
    """
    text, deadline = b"", time.monotonic() + seconds
    while not text.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(otherwise)
        part = os.read(pipe.fileno(), LINE_BYTES)
        if not part:
            raise Failed(otherwise)
        text += part
    return json.loads(text)


def main() -> None:
    """Runs the jobs of standard input until it ends."""
    settings = Settings(**json.loads(sys.stdin.buffer.readline()))
    lock = threading.Lock()

    def work(job: dict) -> None:
        try:
            result = run(settings, job)
        except Exception as problem:  # no job may go without an answer
            result = {"error": f"{type(problem).__name__}: {problem}"}
        with lock:
            sys.stdout.write(json.dumps({"index": job["index"]} | result) + "\n")
            sys.stdout.flush()

    pool = concurrent.futures.ThreadPoolExecutor(settings.workers)
    for line in sys.stdin.buffer:
        pool.submit(work, json.loads(line))
    os._exit(0)  # whoever asked is gone, or has all answers: bwrap kills what still runs
