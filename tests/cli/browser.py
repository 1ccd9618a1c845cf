"""A real browser, driven by what it speaks itself: Chromium's protocol over a pipe.

It opens a page at a size, clicks where a mouse would, types what a keyboard would, and
takes pictures. No package is needed, and no port is opened.
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
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
_FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars"
_SECONDS = 60.0


def _above(least: int, descriptor: int) -> int:
    """The same descriptor under a number that is at least so large."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(descriptor)
    return moved


class Browser:
    """One browser process; its profile lies in ``folder``."""

    def __init__(self, folder: Path):
        ends = (*os.pipe(), *os.pipe())
        # The protocol is spoken on descriptors 3 and 4: one of these ends that had such
        # a number would be overwritten by the other.
        there, self._out, self._in, back = (_above(10, end) for end in ends)
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{back}', str(BINARY)]
        flags = [
            *_FLAGS.split(),
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
        ]
        self._process = subprocess.Popen(
            [*shell, *flags, "about:blank"],
            pass_fds=(there, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._read, self._count = b"", 0

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """One call of the protocol; its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            assert select.select([self._in], [], [], _SECONDS)[0], "it does not answer"
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser ended"
            self._read += piece
        first, _, self._read = self._read.partition(b"\0")
        return json.loads(first)

    def open(self, url: str, width: int, height: int = 900) -> Page:
        """A page that has loaded, in a window of that size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, session["sessionId"])
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        page.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        page.call("Page.navigate", url=url)
        end = time.monotonic() + _SECONDS
        while page.see("location.href + document.readyState") != f"{url}complete":
            assert time.monotonic() < end, "it does not load"
            time.sleep(0.02)
        return page

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(_SECONDS)
        os.close(self._out)
        os.close(self._in)


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        """One call of the protocol, to this page."""
        return self._browser.call(method, self._session, **parameters)

    def see(self, expression: str) -> Any:
        """What JavaScript makes of an expression; the page's own policy is kept."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Scrolls to an element and clicks on its middle, whatever lies there."""
        x, y = self.see(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses a key, such as ``ArrowDown``."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, file: Path) -> None:
        """Writes what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
