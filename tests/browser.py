"""A headless Chromium that logs in to a page, driven through a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Browser:
    """A browser with one page. `events` has all that the page reported."""

    def __init__(self, home: Path, authority: Path, user: str, password: str) -> None:
        self.login = {"response": "ProvideCredentials", "username": user, "password": password}
        self.events: list[Event] = []
        self._trust(home, authority)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Root has no sandbox; the pages are our own.
        words = [
            "chromium-headless-shell",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-proxy-server",
        ]
        words += ["--window-size=1280,800", "--disable-background-networking", f"--user-data-dir={home}/profile"]
        words = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", *words]
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                words, env={"PATH": os.environ["PATH"], "HOME": str(home)}, pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._calls, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Fetch.enable", handleAuthRequests=True)

    def _trust(self, home: Path, authority: Path) -> None:
        """Trust the authority for websites, as people are told to."""
        database = home / ".pki/nssdb"
        database.mkdir(parents=True)
        certutil = ["certutil", "-d", f"sql:{database}"]
        subprocess.run([*certutil, "-N", "--empty-password"], check=True)
        subprocess.run([*certutil, "-A", "-n", "gateway", "-t", "C,,", "-i", str(authority)], check=True)

    def call(self, method: str, seconds: float = 60, **values: Any) -> Any:
        """Call a method of the protocol; return its result."""
        number, end = self._send(method, values), time.monotonic() + seconds
        while True:
            found = self._read(end)
            if found.get("id") == number:
                assert "error" not in found, (method, found)
                return found["result"]

    def run(self, script: str) -> Any:
        """Run JavaScript in the page; return its value, awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 120) -> None:
        """Handle events until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s"
            with contextlib.suppress(TimeoutError):
                self._read(time.monotonic() + 0.5)

    def frames(self) -> Iterator[Any]:
        """What the page received over its websockets, as JSON."""
        for each in self.named("Network.webSocketFrameReceived"):
            if each["response"]["opcode"] == 1:
                yield json.loads(each["response"]["payloadData"])

    def responses(self) -> list[tuple[int, str]]:
        """The status and address of each response."""
        found = (each["response"] for each in self.named("Network.responseReceived"))
        return [(each["status"], each["url"]) for each in found]

    def named(self, method: str) -> list[Event]:
        return [each["params"] for each in self.events if each["method"] == method]

    def picture(self) -> bytes:
        """A PNG of the page."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # with all that it started
        self.process.wait(10)
        os.close(self._in)
        os.close(self._out)

    def _send(self, method: str, values: Event) -> int:
        self._calls += 1
        message: Event = {"id": self._calls, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._calls

    def _read(self, end: float) -> Event:
        """The next message. Requests go on, and a request for a login gets it. Raises TimeoutError."""
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError
            block = os.read(self._in, 1 << 20)
            assert block, "Chromium ended"
            self._buffer += block
        text, _, self._buffer = self._buffer.partition(b"\0")
        found: Event = json.loads(text)
        if found.get("method") == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": found["params"]["requestId"]})
        elif found.get("method") == "Fetch.authRequired":
            values = {"requestId": found["params"]["requestId"], "authChallengeResponse": self.login}
            self._send("Fetch.continueWithAuth", values)
        if "method" in found:
            self.events.append(found)
        return found
