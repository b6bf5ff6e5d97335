"""Pages as a person sees them: a headless Chromium, spoken to in its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
#: Seconds after which an answer is not expected any more.
_PATIENCE = 60.0


def browser() -> str:
    """Path of the browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"needs a Chromium, found none of {', '.join(_NAMES)}; on Debian: apt install {_NAMES[0]}")
    return found


class Page:
    """One open page."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._unread = b""
        self._session: str | None = None
        #: Uncaught exceptions of the page's scripts and what it could not load, as far as heard of.
        self.errors: list[str] = []

    def open(self, url: str, width: int, height: int, scale: float) -> None:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")
        failed = self._call("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.wait_for("document.readyState == 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, of a promise what it resolves to."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {_exception(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Until a JavaScript expression is true; gives its value."""
        return self.evaluate(
            "new Promise((done, fail) => { const look = () => { try { const value = (" + condition + ");"
            " value ? done(value) : setTimeout(look, 20) } catch (error) { fail(error) } }; look() })"
        )

    def dom(self) -> str:
        """The document as it is now, as HTML."""
        return self.evaluate("document.documentElement.outerHTML")

    def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and take what comes until its answer is there."""
        number = next(self._numbers)
        session = {} if self._session is None else {"sessionId": self._session}
        message = json.dumps({"id": number, "method": method, "params": params, **session})
        self._process.stdin.write(message.encode() + b"\0")
        self._process.stdin.flush()
        deadline = time.monotonic() + _PATIENCE
        while True:
            heard = self._hear(deadline, f"{method} {params}")
            if heard.get("id") == number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return heard["result"]
            if heard.get("method") == "Runtime.exceptionThrown":
                self.errors.append(_exception(heard["params"]["exceptionDetails"]))
            if heard.get("method") == "Log.entryAdded" and heard["params"]["entry"]["level"] == "error":
                entry = heard["params"]["entry"]
                self.errors.append(f"{entry['text']} {entry.get('url', '')}".strip())

    def _hear(self, deadline: float, asked: str) -> dict[str, Any]:
        out = self._process.stdout.fileno()
        while b"\0" not in self._unread:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer in {_PATIENCE:g} s to {asked}; errors of the page: {self.errors}"
            chunk = os.read(out, 1 << 16)
            assert chunk, f"the browser ended before it answered {asked}"
            self._unread += chunk
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def opened(url: str, width: int = 1280, height: int = 800, scale: float = 1.0) -> Iterator[Page]:
    """A page at `url` (http or file), loaded, in a window of that many CSS pixels at `scale` device pixels each.

    The browser reaches this machine alone, and is gone, with its files, when the block is left.
    """
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            # The browser listens on descriptor 3 and answers on 4.
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', browser(), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            page = Page(process)
            page.open(url, width, height, scale)
            yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _exception(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]
