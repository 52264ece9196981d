"""A real browser for tests of pages: Debian's chromium without a window, spoken to in its own protocol over two pipes.

The protocol is the Chrome DevTools Protocol; with `--remote-debugging-pipe` messages are JSON that ends in a null byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_S = 60.0
_FLAGS = [
    "--headless=new",
    "--no-sandbox",  # tests may run as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Browser:
    """A running chromium."""

    def __init__(self, program: str, folder: Path) -> None:
        theirs_in, self._out = (_above_ten(fd) for fd in os.pipe())
        self._in, theirs_out = (_above_ten(fd) for fd in os.pipe())
        # The browser reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, "bash", program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._unread = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a request, and wait for its answer; what is told in between is kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                answer: dict[str, Any] = found["result"]
                return answer
            self.events.append(found)

    def wait_for(self, method: str, session: str) -> None:
        """Until an event of that name has come."""
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            some = os.read(self._in, 1 << 16)
            assert some, "the browser is gone"
            self._unread += some
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def close(self) -> None:
        """End it."""
        try:
            self.ask("Browser.close")
            self._process.wait(_PATIENCE_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)


class Tab:
    """One page in the browser, and what it complained of or asked the network for."""

    def __init__(self, browser: Browser, *, scripts: bool = True, width: int = 1160, height: int = 900) -> None:
        self._browser = browser
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.resize(width, height)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A request about this page."""
        return self._browser.ask(method, self._session, **parameters)

    def resize(self, width: int, height: int) -> None:
        """The window's inner size in CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self) -> None:
        """As for a reader who prefers a dark scheme."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def open(self, file: Path) -> None:
        """Load a file, to the end."""
        self.ask("Page.navigate", url=file.as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        """The words of the first element that a CSS selector finds, as they are shown."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def point_at(self, selector: str, across: float = 0.5, down: float = 0.5, *, click: bool = False) -> None:
        """Move the mouse to a place in an element, given as shares of its width and height; perhaps click."""
        box = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.left, b.top, b.width, b.height]; }})(document.querySelector({json.dumps(selector)}))"
        )
        place = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str, code: int) -> None:
        """Press a key; `code` is its Windows virtual key code, by which the browser's own actions go."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(picture["data"]))

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        return [params["request"]["url"] for params in self._told("Network.requestWillBeSent")]

    def complaints(self) -> list[Any]:
        """Errors and warnings: thrown, logged by scripts, or the browser's own, as of a refused load."""
        self.value("0")  # whatever came before is told before this is answered
        logged = [found for found in self._told("Runtime.consoleAPICalled") if found["type"] in ("error", "warning")]
        return [*self._told("Runtime.exceptionThrown"), *logged, *self._told("Log.entryAdded")]

    def _told(self, method: str) -> list[dict[str, Any]]:
        events = self._browser.events
        return [e["params"] for e in events if e.get("method") == method and e.get("sessionId") == self._session]


def _above_ten(fd: int) -> int:
    """The same descriptor under a number that is in nobody's way."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all of a session's pages. Skipped only where BPTOOL_NO_BROWSER=1 asks for it."""
    if os.environ.get("BPTOOL_NO_BROWSER") == "1":
        pytest.skip("BPTOOL_NO_BROWSER=1")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.fail(f"no browser: none of {', '.join(_NAMES)} is on PATH; install chromium, or set BPTOOL_NO_BROWSER=1")
    running = Browser(program, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()
