"""A headless Chromium over its DevTools pipe: NUL-ended JSON on file descriptors 3 and 4."""

import base64
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import SAFETY

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-default-apps", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str | None:
    """Where the browser is; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    """One page, and what it told: console messages, exceptions, requests."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.buffer, self.count = b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as a page in front has it

    def send(self, method: str, **params: Any) -> Any:
        self.count += 1
        call: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, path: Path | str) -> None:
        """Open a file or an address, and wait until it has loaded."""
        self.errors, self.requests = [], []
        url = path if isinstance(path, str) else path.resolve().as_uri()
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + SAFETY
        while self.run("[location.href, document.readyState]") != [url, "complete"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} does not load")
            time.sleep(0.02)

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        result = self.send(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def size(self, width: int, height: int = 800, *, phone: bool = False, scale: float = 1) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=phone)  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def dark(self, wanted: bool) -> None:
        value = "dark" if wanted else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def click(self, query: str) -> None:
        x, y = self.middle(query)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, query: str) -> None:
        x, y = self.middle(query)
        self.run(
            "void (window.tapped = new Promise((done) =>"
            "addEventListener('click', () => setTimeout(done), {once: true})))"
        )
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.run("window.tapped")  # the click that a tap makes comes later

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"Tab": 9, "Escape": 27}[key])  # fmt: skip

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is in view, or the whole page."""
        more: dict[str, Any] = {}
        if whole:
            box = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
            more = {"clip": clip, "captureBeyondViewport": True}
        shot = self.send("Page.captureScreenshot", format="png", **more)
        path.write_bytes(base64.b64decode(shot["data"]))

    def middle(self, query: str) -> tuple[float, float]:
        result = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(query)});"
            "e.scrollIntoView({block: 'center', inline: 'center'});"
            "return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {"
            "const b = e.getBoundingClientRect(); done([b.x + b.width / 2, b.y + b.height / 2]);"
            "}))) })()"
        )
        return result[0], result[1]

    def _next(self, seconds: float = SAFETY) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.errors.append(str(params["args"]))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own profile, ended and swept up at the end."""
    path = chromium()
    if path is None:
        raise FileNotFoundError("no chromium")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        pid = os.posix_spawn(
            path, [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"], os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                # far away first: 3 and 4 may be the pipes' own numbers
                (os.POSIX_SPAWN_DUP2, theirs_in, 203), (os.POSIX_SPAWN_DUP2, theirs_out, 204),
                (os.POSIX_SPAWN_DUP2, 203, 3), (os.POSIX_SPAWN_DUP2, 204, 4),
                (os.POSIX_SPAWN_CLOSE, 203), (os.POSIX_SPAWN_CLOSE, 204),
            ],
            setpgroup=0,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_in, ours_out)
        finally:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ours_in)
            os.close(ours_out)
