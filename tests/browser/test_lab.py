"""JupyterLab as `make lab` starts it: what a reader opens, edits and saves there, and what is left on the disk."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import matplotlib
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

pytestmark = pytest.mark.long

TOP = Path(__file__).resolve().parents[2]
PAGES = sorted(path.name for path in (TOP / "book").glob("*.md"))
SENTENCE = " This was typed in the lab."

#: A notebook that needs only the package: it shows where it runs, a training, a bar, and a picture with a slider.
SCRATCH = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

```{code-cell} ipython3
import sys

print("run by", sys.executable)
```

```{code-cell} ipython3
from torch import nn

from softshare import images, training

train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
digits = training.Classification(train, test, images.Augmentation(*train.statistics(), flip=False, pad=0))
history = training.fit(
    nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10)), digits, training.Settings(epochs=2), title="digits"
)
```

```{code-cell} ipython3
import time

from tqdm import tqdm

for _ in tqdm(range(40), "files"):
    time.sleep(0.05)
```

```{code-cell} ipython3
import torch

from softshare import pictures

pictures.mixing(torch.eye(9).view(9, 3, 3)[:2], start=((0.5, 0), (0, 1)))
```
"""

#: Collects every text that any output has shown.
KEEP_WHAT_SHOWED = """() => {
  window.showed = new Set();
  const look = () => document.querySelectorAll(".jp-OutputArea-output pre").forEach(it => showed.add(it.textContent));
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Lab(NamedTuple):
    """A copy of the project, and the server that `make lab` runs in it."""

    top: Path
    home: Path
    url: str
    token: str

    @property
    def book(self) -> Path:
        return self.top / "book"

    def git(self, *arguments: str) -> str:
        me = ("-c", "user.name=reader", "-c", "user.email=reader@example.org")
        done = subprocess.run(["git", *me, *arguments], cwd=self.top, capture_output=True, text=True, check=True)
        return done.stdout

    def twins(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "book/build.py", "twins", *arguments]
        return subprocess.run(command, cwd=self.top, capture_output=True, text=True, check=False)

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        request = Request(f"{self.url}/{path}", json.dumps(body).encode() if body else None, method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urlopen(request, timeout=30) as reply:
            return json.loads(reply.read() or "null")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    top, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("home")
    for path in TOP.iterdir():
        if path.is_file():
            shutil.copy(path, top)
    made = shutil.ignore_patterns("_build", "runs", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(TOP / "book", top / "book", ignore=made)
    (top / ".venv").symlink_to(sys.prefix)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(top, home, f"http://127.0.0.1:{port}", secrets.token_hex())
    lab.twins()
    lab.git("init", "--quiet")
    (top / ".git" / "info" / "exclude").write_text("/.venv\n/book/scratch.md\n")
    lab.git("add", "--all")
    lab.git("commit", "--quiet", "--message", "the project as it is")

    # What a reader may have configured must not matter here: another kernel of that name, notebooks kept in pairs.
    (home / "data" / "kernels" / "python3").mkdir(parents=True)
    other = {"argv": ["false"], "display_name": "Another", "language": "python"}
    (home / "data" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(other))
    (home / ".config").mkdir()
    (home / ".config" / "jupytext.toml").write_text('formats = "ipynb,md:myst"\n')
    # Only the font cache is the user's own; it saves a few seconds.
    places = {"HOME": home, "JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data"}
    places |= {"JUPYTER_RUNTIME_DIR": home / "run", "MPLCONFIGDIR": matplotlib.get_cachedir()}
    theirs = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "XDG_", "MAKE"))}
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={lab.token}", *(["--allow-root"] if os.geteuid() == 0 else [])]
    # --old-file: use the installed packages as they are.
    command = ["make", "--old-file=.venv/.has-book", "lab", f"LAB_ARGS={' '.join(options)}"]
    log = home / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            cwd=top,
            env={**theirs, **{name: str(place) for name, place in places.items()}},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until(lambda: answers(lab) or server.poll() is not None, 60)
            assert server.poll() is None and answers(lab), log.read_text()
            yield lab
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)  # make, the server and, through it, the kernels
            server.wait(20)


def answers(lab: Lab) -> bool:
    try:
        return bool(lab.ask("api/status"))
    except (URLError, ConnectionError):
        return False


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait up to a time limit; the next line of the test checks what should have happened."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


@pytest.fixture
def window(lab: Lab, chromium: Browser) -> Iterator[Page]:
    """A tab with the lab as it looks when started for the first time."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    outside: list[str] = []
    page.on("request", lambda it: None if it.url.startswith((lab.url, "data:", "blob:")) else outside.append(it.url))
    yield page
    context.close()
    for session in lab.ask("api/sessions"):
        lab.ask(f"api/sessions/{session['id']}", "DELETE")
    shutil.rmtree(lab.home / "config" / "lab" / "workspaces", ignore_errors=True)
    assert not outside, "requested from the network"


def opened(lab: Lab, page: Page, name: str) -> Locator:
    """What a double click on the file shows, once its kernel is ready."""
    page.goto(f"{lab.url}/lab?token={lab.token}")
    page.locator(".jp-DirListing-item").filter(has_text=name).dblclick()
    expect(page.locator(".lm-TabBar-tab.jp-mod-current").filter(has_text=name)).to_be_visible()
    notebook = page.locator(".jp-NotebookPanel:visible")
    expect(notebook.locator(".jp-Cell").first).to_be_visible()
    expect(notebook.locator(".jp-Toolbar-kernelName")).to_have_text("Python 3 (ipykernel)")
    expect(notebook.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()
    return notebook


def test_a_chapter_opens_as_a_notebook_and_a_save_changes_only_what_was_typed(lab: Lab, window: Page):
    chapter = lab.book / "01-templates.md"
    before = chapter.read_text(encoding="utf8")
    notebook = opened(lab, window, chapter.name)
    expect(notebook.locator(".jp-CodeCell").first.locator(".cm-content")).to_contain_text('PROFILE = "fast"')
    first = notebook.locator(".jp-MarkdownCell").first
    expect(first.locator("h1")).to_be_visible()
    first.locator("p").first.dblclick()
    editor = first.locator(".cm-content")
    editor.click()
    expect(editor).to_be_focused()
    window.keyboard.press("Control+End")
    window.keyboard.type(SENTENCE)
    window.keyboard.press("Control+s")
    until(lambda: SENTENCE in chapter.read_text(encoding="utf8"))
    after = chapter.read_text(encoding="utf8")
    assert after.count(SENTENCE) == 1 and after.replace(SENTENCE, "") == before
    # git ignores .ipynb_checkpoints, and there is no other file, neither an .ipynb nor a twin.
    assert lab.git("status", "--porcelain") == " M book/01-templates.md\n"
    assert lab.git("diff", "--numstat") == "1\t1\tbook/01-templates.md\n"
    assert lab.twins("--check").returncode == 1, "the sentence should have reached the twin"

    for _ in SENTENCE:
        window.keyboard.press("Backspace")
    window.keyboard.press("Control+s")
    until(lambda: chapter.read_text(encoding="utf8") == before)
    assert chapter.read_text(encoding="utf8") == before
    assert lab.git("status", "--porcelain") == ""
    check = lab.twins("--check")
    assert check.returncode == 0, check.stderr

    # MyST: formulas are typeset and boxes are rendered. JupyterLab creates cells as they scroll into view.
    box, formula = notebook.locator("aside.myst-admonition"), notebook.locator(".katex")
    notebook.hover()
    until(lambda: window.mouse.wheel(0, 500) or (box.count() and formula.count()))
    expect(box.first).to_be_attached()
    expect(formula.first).to_be_attached()
    for mark in (":::", "$$"):  # the sources are there too, but hidden
        expect(notebook.locator(".jp-MarkdownCell").get_by_text(mark).locator("visible=true")).to_have_count(0)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_saved_unchanged_keeps_every_byte(lab: Lab, name: str):
    """Including all that JupyterLab and a kernel add to a notebook in memory; without the browser, which is slow."""
    before = (lab.book / name).read_bytes()
    model = lab.ask(f"api/contents/{name}?type=notebook&content=1")
    assert model["type"] == "notebook"
    content = model["content"]
    content["metadata"]["language_info"] = {"name": "python", "version": "3.11", "pygments_lexer": "ipython3"}
    content["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    assert content["metadata"].get("kernelspec") == kernel, "JupyterLab would replace any other kernelspec by this one"
    for cell in content["cells"]:
        cell["metadata"] |= {"editable": True, "slideshow": {"slide_type": ""}, "jupyter": {"source_hidden": True}}
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "something"}]
            cell["execution_count"] = 1
    lab.ask(f"api/contents/{name}", "PUT", {"type": "notebook", "format": "json", "content": content})
    # If this fails after an edit by hand: cd book; ../.venv/bin/jupytext --to md:myst NAME.md writes it as a save does.
    assert (lab.book / name).read_bytes() == before, lab.git("diff", f"book/{name}")


def test_the_lab_starts_at_the_intro_rendered(lab: Lab, window: Page):
    window.goto(f"{lab.url}/?token={lab.token}")
    expect(window.locator(".lm-TabBar-tab.jp-mod-current").filter(has_text="intro.md")).to_be_visible()
    page = window.locator(".jp-NotebookPanel:visible")
    expect(page.locator(".jp-MarkdownCell h1").first).to_be_visible()
    expect(page.locator(".katex").first).to_be_visible()
    expect(page.locator(".jp-Toolbar-kernelName")).to_have_text("Python 3 (ipykernel)")
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()
    expect(window.locator(".jp-Dialog, .Toastify__toast"), "no questions").to_have_count(0)


def test_progress_and_widgets(lab: Lab, window: Page):
    scratch = lab.book / "scratch.md"
    scratch.write_text(SCRATCH, encoding="utf8")
    notebook = opened(lab, window, scratch.name)
    window.evaluate(KEEP_WHAT_SHOWED)
    notebook.locator(".jp-Cell").first.locator(".jp-InputPrompt").click()
    for _ in range(4):
        window.keyboard.press("Shift+Enter")
    where, training, bar, moving = (
        notebook.locator(".jp-CodeCell").nth(i).locator(".jp-Cell-outputArea") for i in range(4)
    )

    expect(where).to_have_text(f"run by {sys.executable}")

    # A training prints a line per epoch; a bar stays one line that grows.
    expect(training).to_contain_text("digits epoch 2/2: loss")
    lines = (training.text_content() or "").strip().splitlines()
    assert lines and all(re.match(r"digits\b", line) for line in lines), lines
    expect(bar).to_contain_text("40/40")
    text = (bar.text_content() or "").strip()
    assert re.fullmatch(r"files: 100%\|█+\| 40/40 [^\r\n\x1b]*", text), text
    grew = {text for text in window.evaluate("[...showed]") if text.startswith("files: ")}
    assert len(grew) >= 3 and all(text.count("files: ") == 1 for text in grew), grew

    # Of the two forms of a picture with sliders, the live one is shown, and the keyboard moves it.
    slider, picture = moving.get_by_role("slider").first, moving.locator("img")
    expect(picture).to_be_visible()
    expect(moving.locator("figure.moving")).to_have_count(0)
    expect(moving.locator(".widget-readout").first).to_have_text("0.50")
    before = picture.get_attribute("src")
    slider.focus()
    for _ in range(5):
        window.keyboard.press("ArrowLeft")
    expect(moving.locator(".widget-readout").first).to_have_text("0.00")
    expect(picture).not_to_have_attribute("src", before or "")
