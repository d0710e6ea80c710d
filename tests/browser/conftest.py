"""The rendered book behind a web server of its own, and a browser that reaches nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, sync_playwright

TOP = Path(__file__).resolve().parents[2]

#: The switches are those of a machine without a screen; the rules close the network but for this machine.
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


class Site(NamedTuple):
    """The folder of the rendered book, and where it is served, with a slash at the end."""

    folder: Path
    url: str

    def pages(self) -> list[str]:
        """Names of the pages without .html; index.html only leads on to the first of them."""
        return sorted(path.stem for path in self.folder.glob("*.html") if path.stem != "index")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """The book as the working tree has it, built where it is not current; or the built one in $SOFTSHARE_SITE."""
    given = os.environ.get("SOFTSHARE_SITE")
    folder = Path(given).resolve() if given else TOP / "book" / "_build" / "html"
    if not given:
        subprocess.run([sys.executable, str(TOP / "book" / "build.py"), "all"], check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    thread.join()
    server.server_close()


# For one module, not for the session: while it lives an event loop runs in this thread, which others may want.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing = f"no browser: none of {', '.join(names)} is installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=SWITCHES)
        yield browser
        browser.close()
