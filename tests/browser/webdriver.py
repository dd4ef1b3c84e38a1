"""A headless Chromium through chromedriver's plain WebDriver protocol: the few commands that are needed here."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

T = TypeVar("T")
PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
SECONDS = 30.0

FIND = """
const found = [];
const visit = (node) => {
    if (node.matches && node.matches(arguments[0])) found.push(node);
    if (node.shadowRoot) visit(node.shadowRoot);
    for (const child of node.children || []) visit(child);
};
visit(document.body);
"""
"""Every element that matches a CSS selector, in the order of the page, also inside shadow roots."""


class Browser:
    """One window."""

    def __init__(self, session: str):
        self.session = session

    def open(self, url: str) -> None:
        """Loads a page."""
        call(f"{self.session}/url", {"url": url})

    def each(self, selector: str, expression: str) -> list[Any]:
        """The value of a JavaScript expression for every `node` that matches."""
        script = f"{FIND} return found.map((node) => {expression});"
        found: list[Any] = call(f"{self.session}/execute/sync", {"script": script, "args": [selector]})
        return found

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of what is seen."""
        with urlopen(f"{self.session}/screenshot", timeout=SECONDS) as response:
            path.write_bytes(base64.b64decode(json.load(response)["value"]))

    def errors(self) -> list[str]:
        """What pages complained of since the last call: exceptions that nobody caught, requests that failed."""
        entries = call(f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


def call(url: str, body: dict[str, Any], method: str = "POST") -> Any:
    """The value that a WebDriver command gives. Raises RuntimeError with the driver's message where it fails."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method)
    try:
        with urlopen(request, timeout=SECONDS) as response:
            return json.load(response)["value"]
    except HTTPError as failure:
        raise RuntimeError(json.load(failure)["value"]["message"]) from failure


@contextmanager
def chromium(width: int, height: int) -> Iterator[Browser]:
    """A browser with an empty profile of its own, which ends with the with-block."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile, driver() as url:
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        chrome = {"binary": shutil.which("chromium"), "args": flags}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        session = f"{url}/session/" + call(f"{url}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(session)
        finally:
            call(session, {}, method="DELETE")


@contextmanager
def driver() -> Iterator[str]:
    """chromedriver on a free port; its address."""
    command = ["chromedriver", "--port=0"]
    with serving(command, r"started successfully on port (\d+)") as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(command: list[str], pattern: str) -> Iterator[str]:
    """A server for the length of a with-block; gives what the first group of `pattern` is in its output."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout
        said = ""
        try:
            for line in process.stdout:
                said += line
                if found := re.search(pattern, line):
                    yield found[1]
                    return
            raise RuntimeError(f"{command[0]} did not start: {said}")
        finally:
            process.terminate()


def settled(read: Callable[[], T], what: str) -> T:
    """What `read` gives, once it is something and has not changed for a second. Raises TimeoutError naming `what`."""
    begin = time.monotonic()
    before, changed = read(), time.monotonic()
    while not before or time.monotonic() < changed + 1:
        if time.monotonic() > begin + SECONDS:
            raise TimeoutError(f"{what}: not there, or not at rest, after {SECONDS:g} seconds: {before}")
        time.sleep(0.2)
        if (now := read()) != before:
            before, changed = now, time.monotonic()
    return before
