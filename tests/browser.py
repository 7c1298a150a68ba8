"""A real Chromium without a window, spoken to in its own DevTools protocol over two pipes: no driver, no package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-dev-shm-usage",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
)


def find_chromium():
    """The browser's path, or None; CACO_CHROMIUM names another one."""
    return os.environ.get("CACO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Use as a context. ``open`` a file, then ask the page by ``evaluate``; ``errors``: what its console said."""

    def __init__(self, program):
        self._folder = tempfile.TemporaryDirectory()
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4; a shell puts the pipes there.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        words = [
            program,
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={self._folder.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", *words],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session, self._events = b"", 0, None, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._to)  # which ends it
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        self._folder.cleanup()

    def call(self, method, **parameters):
        """One command of the protocol -> its result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width, height=900, dark=False):
        """Show a file in a window of that many CSS pixels, below 500 as a phone does, and wait until it is loaded."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 500 else 1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events = []
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def move_to(self, x, y):
        """Move the pointer to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key, text="", commands=()):
        """Press a key and let it go; ``commands``: what the editor does then, such as ``paste``."""
        codes = {"Enter": 13, "Tab": 9, "v": 86}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "commands": list(commands)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def pasted(self):
        """What the clipboard holds, as a text field of the page gets it."""
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.evaluate(
            "(() => { const t = document.createElement('textarea'); t.id = 'paste'; document.body.append(t);"
            " t.focus(); })()"
        )
        self.press("v", commands=["paste"])
        return self.evaluate(
            "(() => { const t = document.querySelector('#paste'); t.remove(); return t.value; })()"
        )

    def print_media(self, width):
        """Show the page as paper of that many CSS pixels shows it, for a reader whose screen is dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False
        )
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        self.call("Emulation.setEmulatedMedia", media="print", features=[dark])
        self.evaluate("dispatchEvent(new Event('beforeprint'))")

    def pdf(self):
        """The page printed, as bytes."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    @property
    def errors(self):
        """Exceptions, console errors and warnings, and log entries of the page."""
        return [
            event["params"]
            for event in self._events
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
            or (
                event.get("method") == "Runtime.consoleAPICalled"
                and event["params"]["type"] in ("error", "warning")
            )
        ]

    @property
    def requests(self):
        """The addresses that the page asked for."""
        sent = [event for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path, full=True):
        """A PNG of the page, the whole of it or what the window shows."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full, **self._clip(full))["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def _clip(self, full):
        if not full:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
