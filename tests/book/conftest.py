"""A book of one tiny chapter in a temporary folder, and the chain that builds it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "book"))  # for build.py, which is not part of the package
sys.path.insert(0, str(Path(__file__).parent))  # for what tests share

FORK = "somebody/fork"

HEAD = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""

PARAMETERS = """```{code-cell} ipython3
:tags: [parameters]

PROFILE = "fast"
SEED = 0
RUNS = ""
```

"""


def with_fork_url(config: str) -> str:
    """The text of _config.yml with its one line `url:` changed, as in a fork."""
    changed, lines = re.subn(r"^  url: .*$", f"  url: https://github.com/{FORK}", config, flags=re.M)
    assert lines == 1
    return changed


def copy_tree(target: Path) -> Path:
    """Copy what a commit of everything would hold: files that git tracks or would add, as in the working tree."""
    listed = subprocess.run(
        ["git", "-C", str(TOP), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (TOP / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TOP / name, target / name)
    return target


def chapter(*cells: str, title: str = "A chapter", parameters: str = PARAMETERS) -> str:
    """The source of a chapter whose code cells are `cells`."""
    code = "\n".join(f"```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)
    return f"{HEAD}# {title}\n\n{parameters}{code}"


class TinyProject:
    """The top folder of a project with package, configuration and the chapters written into it."""

    def __init__(self, top: Path) -> None:
        from build import Book

        self.top = top
        self.book = Book(top)
        (top / "book").mkdir()
        (top / "softshare").mkdir()
        self.write("softshare/__init__.py", "value = 1\n")
        self.write("constraints.txt", "torch==2.13.0\n")
        self.write("_config.yml", with_fork_url((TOP / "_config.yml").read_text(encoding="utf8")))
        self.write("book/references.bib", (TOP / "book" / "references.bib").read_text(encoding="utf8"))
        for extension in ("docstrings", "theme"):
            self.write(f"book/{extension}.py", "def setup(app):\n    return {}\n")
        (top / "book" / "_static").mkdir()
        shutil.copyfile(TOP / "book" / "_static" / "colab.svg", top / "book" / "_static" / "colab.svg")

    def write(self, path: str, text: str) -> Path:
        target = self.top / path
        target.write_text(text, encoding="utf8")
        return target


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyProject:
    monkeypatch.delenv("SOFTSHARE_DATA", raising=False)
    return TinyProject(tmp_path)


@pytest.fixture(scope="session")
def copy_project():
    return copy_tree


@pytest.fixture(scope="session")
def move():
    return with_fork_url


@pytest.fixture(scope="session")
def fork() -> str:
    """The GitHub repository of the tiny projects, as owner/name."""
    return FORK


@pytest.fixture
def make_chapter():
    return chapter


@pytest.fixture(scope="session")
def top() -> Path:
    """The project's top folder."""
    return TOP
