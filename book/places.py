"""Where things are in the project, and which pages of the book are chapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

#: Pages that read the records written by the other chapters: they run last, and again whenever one of those has.
READERS = ("claims", "results")

#: The recipes whose runs with seed 0 a chapter shows, and those whose folds. Profile fast trains them in the chapter itself.
SHOWN = {
    "02-training": {"WRN 28-10": False, "SWRN 28-10-2": False},
    "03-similarity": {"SWRN 40-8-8": True, "SWRN 40-8-8 with penalty": True},
    "04-shortest-path": {"CNN": False, "SCNN": False},
}

#: The chapters that need the trained weights of these runs, too.
TRAINED = ("03-similarity", "04-shortest-path")


class Book:
    """The folders of a book. All follow from the project's top folder, so that tests can build a book of their own."""

    def __init__(self, top: Path, output: Path | None = None, in_fast: Collection[str] = ()) -> None:
        self.top = top.resolve()
        #: Where executed notebooks and their keys go.
        self.output = output.resolve() if output else self.build / "executed"
        #: Chapters that are run in profile fast whatever profile is asked for.
        self.in_fast = frozenset(in_fast)

    def parameters_of(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a chapter if these are asked for."""
        return {**asked, "PROFILE": "fast"} if name in self.in_fast else dict(asked)

    @property
    def folder(self) -> Path:
        return self.top / "book"

    @property
    def build(self) -> Path:
        return self.folder / "_build"

    @property
    def html(self) -> Path:
        return self.build / "html"

    @property
    def package(self) -> Path:
        return self.top / "softshare"

    @property
    def twins(self) -> Path:
        return self.folder / "notebooks"

    def chapters(self) -> list[str]:
        """Names of the notebook pages in alphabetical order, with those that read the others' records last."""
        names = sorted(path.stem for path in self.folder.glob("*.md") if "kernelspec" in front_matter(path))
        return [n for n in names if n not in READERS] + [n for n in names if n in READERS]


def front_matter(page: Path) -> dict[str, Any]:
    """The YAML between the two `---` lines that may open a page."""
    lines = page.read_text(encoding="utf8").split("\n")
    if lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    return yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])) or {}


def read_chapter(page: Path) -> Any:
    """The notebook that a chapter's MyST source describes."""
    import jupytext

    return jupytext.read(page, fmt="md:myst")
