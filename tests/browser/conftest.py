"""The rendered book on its own web server, and a browser that can reach nothing else."""

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

#: For a machine without a screen; the resolver rules block every host but this machine.
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
    """The folder of the rendered book, and the address that serves it, with a trailing slash."""

    folder: Path
    url: str

    def pages(self) -> list[str]:
        """Names of the pages without .html; index.html only redirects to the first of them."""
        return sorted(path.stem for path in self.folder.glob("*.html") if path.stem != "index")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """The book of the working tree, rebuilt if it is out of date; or the built one in $SOFTSHARE_SITE."""
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


# Per module, not per session: while it is open, an event loop runs in this thread, which other tests may need.
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
