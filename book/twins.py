"""Turns chapters into output-free notebooks that read well where MyST is unknown, as on Colab.

Admonitions become quotes with a bold title, folded parts `<details>`, roles plain Markdown, references links. Anything
without a plain form raises an error that names it, so that no MyST syntax is left over. The same chapters always give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plain_markdown import Converter
from references import References, Site, TwinError, read_citations, read_site


def install_cell(site: Site) -> str:
    return "\n".join(
        [
            "# Installs softshare if it is missing, as on Colab; an existing installation is used as it is.",
            "from importlib.util import find_spec",
            "",
            'if not find_spec("softshare"):',
            f'    %pip install -q "softshare[moving] @ git+{site.url}@{site.branch}"',
            'if not find_spec("softshare"):',
            '    raise RuntimeError("softshare was not installed: see the pip output above. Is the address here correct?")',
        ]
    )


# Badges --------------------------------------------------------------------------------------------------------------

BADGE = "_static/colab.svg"  # in book/; a picture of our own, so that the site needs no network
TITLE = re.compile(r"^# .+$", re.M)
README_BADGES = re.compile(r"(?<=^<!-- badges -->\n).*?(?=^<!-- /badges -->$)", re.M | re.S)


def under_title(text: str, line: str) -> str:
    """Markdown with one more paragraph below its title, or unchanged if it has no title."""
    return TITLE.sub(lambda title: f"{title[0]}\n\n{line}", text, count=1)


def with_badges(readme: str, site: Site, chapters: Mapping[str, str]) -> str:
    """The README's text with a table of the chapters between its two marks; `chapters` maps names to sources."""
    lines = ["| the chapters | |\n", "|---|---|\n"]
    for name, source in chapters.items():
        title = TITLE.search(source)
        words = title[0].removeprefix("# ") if title else name
        badge = site.badge(name, f"book/{BADGE}", f"Open in Colab: {words}")
        lines.append(f"| [{words}](book/{name}.md) | {badge} |\n")
    made, found = README_BADGES.subn(lambda _: "".join(lines), readme)
    if found != 1:
        raise TwinError("README.md needs a line `<!-- badges -->` and below it a line `<!-- /badges -->`, once each")
    return made


# The twins themselves ------------------------------------------------------------------------------------------------


def make_twins(top: Path, notebooks: Mapping[str, Any]) -> dict[str, str]:
    """The text of every twin; `notebooks` holds the chapters as jupytext reads them."""
    references = References(read_site(top), set(notebooks))
    bibliography = top / "book" / "references.bib"
    references.citations = read_citations(bibliography) if bibliography.is_file() else {}
    for path in sorted((top / "book").glob("*.md")):
        if path.stem not in notebooks:
            Converter(path.stem, references).learn(path.read_text(encoding="utf8"))
    for name, notebook in notebooks.items():  # a first pass, to learn what can be referred to
        twin(name, notebook, references)
    references.complete = True
    return {name: twin(name, notebook, references) for name, notebook in notebooks.items()}


def twin(name: str, notebook: Any, references: References) -> str:
    """One notebook as text, always the same for the same chapter: no outputs or counts, cells named by content."""
    converter = Converter(name, references)
    site = references.site
    cells: list[dict[str, Any]] = [{"cell_type": "code", "source": install_cell(site), "metadata": {}}]
    badge = site.badge(name, site.raw(BADGE))
    for number, cell in enumerate(notebook.cells, start=1):
        source = cell.source
        if cell.cell_type == "markdown":
            try:
                source = converter.convert(source)
            except TwinError as error:
                raise TwinError(f"{name}, cell {number}: {error}") from error
            if not source:
                continue
            if badge and TITLE.search(source):
                source, badge = under_title(source, badge), ""
        tags = sorted(cell.metadata.get("tags", []))
        cells.append({"cell_type": cell.cell_type, "source": source, "metadata": {"tags": tags} if tags else {}})
    seen: dict[str, int] = {}
    for made in cells:
        digest = hashlib.sha256(f"{made['cell_type']}\n{made['source']}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        made["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        made["source"] = made["source"].splitlines(keepends=True)
        if made["cell_type"] == "code":
            made |= {"execution_count": None, "outputs": []}
    whole = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
