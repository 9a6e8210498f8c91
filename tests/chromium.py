"""Opens a file in headless Chromium and says what went wrong: the DevTools protocol over a pipe, and no more of it."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # to start and load on a busy machine; it takes 1 to 2
SETTLE = 0.3  # seconds after the load event, for what a page starts then
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")

# What Chromium reads is descriptor 3, what it writes 4.
AS_IT_EXPECTS_THEM = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null'


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a page did. requests: all URLs it asked for but its own; overflows: whether it is wider than its window."""

    errors: list[str]
    requests: list[str]
    overflows: bool


def open_page(path: pathlib.Path, *, width: int = 1280) -> Opened:
    """Returns what happens when a file is opened in a window of that width; skips the test without a Chromium."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    with _started(program) as browser:
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            browser.ask(f"{domain}.enable")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", **metrics)
        browser.ask("Page.navigate", url=path.absolute().as_uri())
        browser.wait_for("Page.loadEventFired")
        browser.listen(SETTLE)
        wider = "document.documentElement.scrollWidth > window.innerWidth"
        overflows = browser.ask("Runtime.evaluate", expression=wider)["result"]["value"]
        return Opened(_errors(browser.events), _requests(browser.events, path), overflows)


def _errors(events: list[dict[str, Any]]) -> list[str]:
    """Returns exceptions, errors on the console, and what the browser itself complains about."""
    found = []
    for event in events:
        values = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            found.append(values["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            found.append(" ".join(str(argument.get("value")) for argument in values["args"]))
        elif event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            found.append(values["entry"]["text"])
    return found


def _requests(events: list[dict[str, Any]], path: pathlib.Path) -> list[str]:
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if url != path.absolute().as_uri() and not url.startswith("data:")]


class _Browser:
    """One browser at the other end of two pipes; messages are JSON, each followed by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int):
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        self._to, self._from, self._unread, self._ids = to_browser, from_browser, b"", itertools.count(1)

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Returns the answer to a command; events that come before it are kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": values}
        os.write(self._to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._next(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def wait_for(self, event: str) -> None:
        """Waits until such an event has come."""
        deadline = time.monotonic() + SECONDS
        while not any(one["method"] == event for one in self.events):
            self._next(deadline)

    def listen(self, seconds: float) -> None:
        """Takes in events for so long."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while True:
                self._next(deadline)

    def _next(self, deadline: float) -> dict[str, Any]:
        """Returns the next message; events are also kept."""
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium says nothing")
            more = os.read(self._from, 1 << 16)
            assert more, "Chromium ended"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        values = json.loads(message)
        if "method" in values:
            self.events.append(values)
        return values


@contextlib.contextmanager
def _started(program: str) -> Iterator[_Browser]:
    """Gives a browser with an empty profile; it and all its processes are gone after the block."""
    (its_input, our_output), (our_input, its_output) = os.pipe(), os.pipe()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["sh", "-c", AS_IT_EXPECTS_THEM, program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=its_input, stdout=its_output, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        os.close(its_input), os.close(its_output)
        try:
            yield _Browser(our_output, our_input)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(our_output), os.close(our_input)
