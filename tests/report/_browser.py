"""A real browser for tests: headless Chromium over its DevTools protocol, spoken through a pipe."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
_LIMIT_S = 60.0
# The browser reads commands from file 3 and writes answers to file 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Page:
    """A tab, and what went wrong in it or left it since it was opened.

    Attributes:
      complaints: Texts of console messages, exceptions and violations of the page's policy.
      requests: Addresses that the page asked for, its own and those inside it left out.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session = ""
        self._loaded = 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light"):
        """Loads a file in a window of this size, for somebody who likes it light or dark."""
        self.complaints, self.requests = [], []
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        before = self._loaded
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._loaded == before:
            self._read(time.monotonic() + _LIMIT_S)
        # What the page began in its last script has come up by then.
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, code: str) -> Any:
        """The value of a piece of JavaScript in the page.

        Raises:
          AssertionError: The code threw something.
        """
        answer = self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def press(self, key: str) -> None:
        """A key goes down and up where the focus is."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else ""
            )

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer of the browser to one command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + _LIMIT_S
        while True:
            answer = self._read(limit)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(limit - time.monotonic(), 0))
            assert ready, "the browser did not answer in time"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser ended"
            self._unread += piece
        first, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(first)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded += 1
        elif event == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if told.get("type") != "Document" and not address.startswith("data:"):
                self.requests.append(address)
        elif event == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(told["args"]))


@contextlib.contextmanager
def browse() -> Iterator[Page]:
    """A tab of a browser of its own, which ends with the block."""
    assert BROWSER is not None
    pipes = [os.pipe(), os.pipe()]
    # High numbers, so that taking the places 3 and 4 does not overwrite them.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (pipes[0][0], pipes[1][1])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [BROWSER, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *map(str, theirs), *words],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for fd in (*theirs, pipes[0][0], pipes[1][1]):
                os.close(fd)
            yield Page(pipes[0][1], pipes[1][0])
        finally:
            os.close(pipes[0][1])  # The browser ends when nobody can command it any more.
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(pipes[1][0])
