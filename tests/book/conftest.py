"""A book of one tiny chapter in a temporary folder, and the chain that builds it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "book"))  # where build.py stands: it is no part of the package

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
        self.write("_config.yml", (TOP / "_config.yml").read_text(encoding="utf8"))
        self.write("book/references.bib", (TOP / "book" / "references.bib").read_text(encoding="utf8"))
        self.write("book/docstrings.py", "def setup(app):\n    return {}\n")

    def write(self, path: str, text: str) -> Path:
        target = self.top / path
        target.write_text(text, encoding="utf8")
        return target


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyProject:
    monkeypatch.delenv("SOFTSHARE_DATA", raising=False)
    return TinyProject(tmp_path)


@pytest.fixture
def make_chapter():
    return chapter


@pytest.fixture(scope="session")
def top() -> Path:
    """The project's top folder."""
    return TOP
