"""A headless Chromium that a test types into and looks at, over its own protocol and no library.

    with Browser(width=390) as browser:
        browser.open("http://127.0.0.1:8000")
        browser.run("document.title")

Commands and answers are JSON with a zero byte at the end, on file descriptors 3 and 4 of the
browser (--remote-debugging-pipe; https://chromedevtools.github.io/devtools-protocol).
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The first of these programs that is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a browser. requests: addresses it asked for; errors: what its scripts raised."""

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.loaded = 0
        self.number = 0
        self.waiting = b""
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1,
                     "mobile": width < 600}

    def __enter__(self) -> "Browser":
        commands, self.write_to = os.pipe()
        self.read_from, answers = os.pipe()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # bash puts the pipes where the browser looks for them, whatever their numbers here.
        script = f'exec 3<&{commands} 4>&{answers}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", find_browser(),
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.session = None
        pages = self.send("Target.getTargets")["targetInfos"]
        page = next(page["targetId"] for page in pages if page["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", **self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        self.profile.cleanup()

    def open(self, address: str) -> None:
        """Goes to a page and waits until it's loaded."""
        before = self.loaded
        self.send("Page.navigate", url=address)
        while self.loaded == before:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """Saves what the whole page looks like, as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Does a command of the protocol and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise AssertionError(answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message; events that tests ask about are kept."""
        while b"\0" not in self.waiting:
            part = os.read(self.read_from, 2**16)
            if not part:
                raise AssertionError("the browser has gone")
            self.waiting += part
        line, self.waiting = self.waiting.split(b"\0", 1)
        message = json.loads(line)
        event, content = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self.loaded += 1
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(content["exceptionDetails"]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        return message
