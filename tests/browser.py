"""A headless browser of this machine, and pages that are watched while a test clicks."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A container has no user namespace for the sandbox; the rest keeps the browser off the network.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_browser() -> str:
    """CHROMIUM of the environment, else the first of `NAMES` on the PATH; without one, skip."""
    given = os.environ.get("CHROMIUM")
    if given:
        assert Path(given).is_file(), f"CHROMIUM names {given}, which is no file"
        return given
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: set CHROMIUM, or put one of {', '.join(NAMES)} on the PATH")
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright, which downloads nothing when it is given one."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = find_browser()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


class Watched:
    """A page of a site on the disk, with what it asked for and what it complained about.

    That the file named `missing` is not there is no reason to complain.
    """

    def __init__(self, browser: Any, folder: Path, missing: str = "", **options: Any) -> None:
        self.folder, self.missing = folder, missing
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        if message.location["url"].rpartition("/")[2] != self.missing:
            self.complaints.append(message.text)

    def open(self, name: str, ready: str) -> Any:
        """Go to a page of the site and wait until its scripts say that it is there."""
        self.page.goto(f"{self.folder.as_uri()}/{name}")
        return self.ready(ready)

    def ready(self, what: str) -> Any:
        """Wait until the scripts have shown `what`: "index", or the hash of a latent or class."""
        self.page.wait_for_function(
            "what => document.documentElement.dataset.ready === what", arg=what
        )
        return self.page

    def check(self) -> None:
        """Nothing was complained about, and nothing was asked for outside the folder."""
        assert self.complaints == []
        outside = [url for url in self.requests if not url.startswith(self.folder.as_uri())]
        assert outside == []
