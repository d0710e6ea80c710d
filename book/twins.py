"""Turns chapters into output-free notebooks that read well where MyST is unknown, as on Colab.

Admonitions become quotes with a bold title, folded parts `<details>`, roles plain Markdown, references links. What has
no plain form is an error that names it, so nothing of MyST's syntax is left over. The same chapters give
the same bytes.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>:{3,}|`{3,}|~{3,}) *(?P<info>.*)$")
DIRECTIVE = re.compile(r"^\{(?P<name>[\w:+-]+)\} *(?P<argument>.*)$")
OPTION = re.compile(r"^:(?P<name>[\w-]+): *(?P<value>.*)$")
TARGET = re.compile(r"^\((?P<label>[^()\s]+)\)= *$")
HEADING = re.compile(r"^#{1,6} +(?P<text>.*?) *#* *$")
SPAN = re.compile(r"(?<![`\\])(?:\{(?P<role>[A-Za-z][\w:+-]*)\})?(?P<ticks>`+)(?P<text>.+?)(?<!`)(?P=ticks)(?!`)", re.S)
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\[\]]*)\]\((?P<to>[^()\s]+)(?P<title> +\"[^\"]*\")?\)")
NAMED = re.compile(r"^(?P<text>.+?)\s*<(?P<target>[^<>]+)>$", re.S)
LEFT_OVER = re.compile(r"^\s*(?:> *)*:{3,}|^\s*(?:> *)*[`~]{3,} *\{|\{[A-Za-z][\w:+-]*\}`", re.M)

ADMONITIONS = {
    name: name.capitalize()
    for name in ("attention", "caution", "danger", "error", "hint", "important", "note", "tip", "warning")
} | {"seealso": "See also", "exercise": "Exercise", "solution": "Solution", "todo": "To do"}
TITLED = ("admonition", "card", "margin", "sidebar", "topic")
DROPPED = ("bibliography", "contents", "tableofcontents", "index")
PLAIN = ("container", "div", "grid", "tab-set", "card-carousel")
NAMES = ("attr", "class", "data", "exc", "func", "meth", "mod", "obj", "const", "file", "code")


class TwinError(ValueError):
    """A piece of MyST that has no plain form here."""


@dataclass(frozen=True)
class Site:
    """Where the project lives, from _config.yml."""

    url: str
    branch: str

    @property
    def slug(self) -> str:
        return urlparse(self.url).path.strip("/")

    def colab(self, page: str) -> str:
        return f"https://colab.research.google.com/github/{self.slug}/blob/{self.branch}/book/notebooks/{page}.ipynb"

    def source(self, path: str) -> str:
        return f"{self.url}/blob/{self.branch}/book/{path}"

    def raw(self, path: str) -> str:
        return f"{self.url}/raw/{self.branch}/book/{path}"

    def badge(self, page: str, picture: str, words: str = "Open in Colab") -> str:
        """A picture that opens a page's twin on Colab, as Markdown."""
        return f"[![{words}]({picture})]({self.colab(page)})"


def read_site(top: Path) -> Site:
    where = yaml.safe_load((top / "_config.yml").read_text(encoding="utf8"))["repository"]
    return Site(where["url"].rstrip("/"), where.get("branch", "main"))


@dataclass
class References:
    """What chapters refer to, over the whole book."""

    site: Site
    chapters: set[str]
    titles: dict[str, str] = field(default_factory=dict)  # page -> title
    targets: dict[str, tuple[str, str]] = field(default_factory=dict)  # label -> (page, its text)
    citations: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # key -> (authors, year, address)
    complete: bool = False  # while False, what is not found yet is no error

    def page(self, path: str, text: str = "") -> str:
        name = re.sub(r"\.(md|ipynb)$", "", path.strip("/").removeprefix("./"))
        if name not in self.titles and self.complete:
            raise TwinError(f"no page {path!r}; there are: {', '.join(sorted(self.titles))}")
        address = self.site.colab(name) if name in self.chapters else self.site.source(f"{name}.md")
        return f"[{text or self.titles.get(name, name)}]({address})"

    def target(self, label: str, here: str, text: str = "") -> str:
        if label not in self.targets:
            if self.complete:
                raise TwinError(f"no label {label!r}")
            return label
        page, found = self.targets[label]
        return (text or found) if page == here else self.page(page, text or found)

    def citation(self, keys: str, in_text: bool) -> str:
        """Author-year links: "Saxe et al. (2014)" as part of a sentence, "(Saxe et al., 2014)" beside it."""
        links = []
        for key in (k.strip() for k in keys.split(",")):
            if key not in self.citations:
                raise TwinError(f"no entry {key!r} in references.bib")
            who, year, address = self.citations[key]
            text = f"{who} ({year})" if in_text else f"{who}, {year}"
            links.append(f"[{text}]({address})" if address else text)
        return "; ".join(links) if in_text else f"({'; '.join(links)})"


class Converter:
    """MyST Markdown of one page to plain Markdown."""

    def __init__(self, page: str, references: References) -> None:
        self.page = page
        self.references = references
        self.pending: list[str] = []  # labels that wait for the heading below them
        self.equations = 0
        self.figures = 0

    def convert(self, text: str) -> str:
        plain = "\n".join(self.blocks(text.split("\n"))).strip("\n")
        plain = re.sub(r"\n{3,}", "\n\n", plain)
        visible = re.sub(r"^( *)(`{3,}|~{3,})(?! *\{).*?^\1\2 *$", "", plain, flags=re.M | re.S)
        visible = SPAN.sub(lambda span: span[0] if span["role"] else "", visible)
        if left := LEFT_OVER.search(visible):
            raise TwinError(f"left over: {visible[left.start() :].strip().splitlines()[0]!r}")
        return plain

    # Blocks ----------------------------------------------------------------------------------------------------------

    def blocks(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        prose: list[str] = []

        def flush() -> None:
            out.extend(self.inline("\n".join(prose)).split("\n") if prose else [])
            prose.clear()

        i = 0
        while i < len(lines):
            line = lines[i]
            fence = FENCE.match(line)
            if fence and (fence["info"].startswith("{") or fence["marks"][0] != ":"):
                flush()
                end = closing(lines, i, fence["marks"])
                out.extend(self.fenced(fence, lines[i : end + 1]))
                i = end + 1
                continue
            if line.lstrip().startswith("$$"):
                flush()
                end = closing_dollars(lines, i)
                out.extend(self.dollars(lines[i : end + 1]))
                i = end + 1
                continue
            if target := TARGET.match(line):
                self.pending.append(target["label"])
            elif line.startswith("%") or line.rstrip() == "+++":
                pass
            else:
                if heading := HEADING.match(line):
                    self.heading(self.inline(heading["text"]))
                elif line.strip():
                    self.pending.clear()
                prose.append(line)
            i += 1
        flush()
        return out

    def heading(self, text: str) -> None:
        self.references.titles.setdefault(self.page, text)
        for label in self.pending:
            self.references.targets[label] = (self.page, text)
        self.pending.clear()

    def dollars(self, lines: list[str]) -> list[str]:
        indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
        text = "\n".join(lines).strip()
        label = re.search(r"\$\$ *\((?P<label>[^()\s]+)\)$", text)
        body = text[2 : label.start() if label else -2]
        return [indent + line.strip() for line in self.equation(body, label["label"] if label else "")]

    def equation(self, body: str, label: str = "") -> list[str]:
        body = body.strip()
        if r"\\" in body and r"\begin{" not in body:
            body = "\\begin{aligned}\n" + body + "\n\\end{aligned}"
        if label:
            self.equations += 1
            self.references.targets[label] = (self.page, f"({self.equations})")
            body += f" \\tag{{{self.equations}}}"
        return ["$$", *body.split("\n"), "$$"]

    def fenced(self, fence: re.Match[str], lines: list[str]) -> list[str]:
        directive = DIRECTIVE.match(fence["info"])
        if not directive:
            return lines
        margin = len(fence["indent"])
        body = [line[min(margin, len(line) - len(line.lstrip())) :] for line in lines[1:-1]]
        options, body = split_options(body)
        made = self.directive(directive["name"], directive["argument"].strip(), options, body)
        return ["", *(" " * margin + line if line else "" for line in made), ""]

    def directive(self, name: str, argument: str, options: dict[str, str], body: list[str]) -> list[str]:
        if name in DROPPED:
            return []
        if name == "math":
            return self.equation("\n".join([argument, *body]), options.get("label", options.get("name", "")))
        if name in ("code-block", "code", "sourcecode"):
            return [f"```{argument}", *body, "```"]
        if name in ("figure", "image"):
            return self.figure(name, argument, options, body)
        if name == "raw" and argument == "html":
            return body
        if name == "table":
            return [f"**{self.inline(argument)}**", "", *self.blocks(body)] if argument else self.blocks(body)
        if name == "list-table":
            return self.list_table(argument, body)
        if name in PLAIN or name.startswith("grid"):
            return self.blocks(body)
        if name == "tab-item":
            return [f"**{self.inline(argument)}**", "", *self.blocks(body)]
        if name in ("epigraph", "pull-quote", "highlights"):
            return quote(self.blocks(body))
        if name == "dropdown":
            return folded(self.inline(argument) or "More", self.blocks(body))
        if name in ADMONITIONS or name in TITLED:
            title = ADMONITIONS.get(name, "")
            if name in TITLED:
                title = self.inline(argument)
            elif argument:  # text that starts on the directive's own line
                body = [argument, *body]
            content = self.blocks(body)
            if "dropdown" in options.get("class", "").split():
                return folded(title, content)
            return quote([f"**{title}**", "", *content] if title else content)
        raise TwinError(f"directive {{{name}}} has no plain form")

    def figure(self, name: str, path: str, options: dict[str, str], body: list[str]) -> list[str]:
        address = path if "://" in path else self.references.site.raw(path.removeprefix("./").lstrip("/"))
        picture = f"![{options.get('alt', '')}]({address})"
        if name == "image":
            return [picture]
        self.figures += 1
        if label := options.get("name"):
            self.references.targets[label] = (self.page, f"Figure {self.figures}")
        caption = "\n".join(self.blocks(body)).strip()
        return [picture, "", *(f"*Figure {self.figures}.* {caption}".rstrip()).split("\n")]

    def list_table(self, caption: str, body: list[str]) -> list[str]:
        rows: list[list[str]] = []
        for line in body:
            if line.startswith("* - "):
                rows.append([line[4:]])
            elif line.startswith("  - ") or line.rstrip() == "  -":
                rows[-1].append(line[4:])
            elif line.strip():
                rows[-1][-1] += " " + line.strip()
        cells = [[self.inline(c.strip()).replace("\n", " ") for c in row] for row in rows]
        table = ["| " + " | ".join(row) + " |" for row in cells]
        table.insert(1, "|" + "---|" * len(cells[0]))
        return [f"**{self.inline(caption)}**", "", *table] if caption else table

    # Inline ----------------------------------------------------------------------------------------------------------

    def inline(self, text: str) -> str:
        """Roles, links and footnotes of running text; code spans stay as they are."""
        out, last = [], 0
        for span in SPAN.finditer(text):
            out.append(self.links(text[last : span.start()]))
            out.append(self.role(span["role"], span["text"]) if span["role"] else span[0])
            last = span.end()
        out.append(self.links(text[last:]))
        return re.sub(r"\[\^([\w-]+)\](:?)", r"<sup>\1</sup>", "".join(out))

    def links(self, text: str) -> str:
        def relink(link: re.Match[str]) -> str:
            to, words = link["to"], link["text"]
            if "://" in to or to.startswith("mailto:"):
                return link[0]
            if link["bang"]:
                return f"![{words}]({self.references.site.raw(to.removeprefix('./'))})"
            path, _, label = to.partition("#")
            if path:
                if re.search(r"\.(md|ipynb)$", path):
                    return self.references.page(path, words)
                return f"[{words}]({self.references.site.source(path)})"
            if label in self.references.targets:
                return self.references.target(label, self.page, words)
            return words or label

        return LINK.sub(relink, text)

    def role(self, role: str, text: str) -> str:
        role = role.removeprefix("py:")
        named = NAMED.match(text)
        words, target = (named["text"], named["target"]) if named else ("", text)
        simple: dict[str, Callable[[], str]] = {
            "math": lambda: f"${text}$",
            "eq": lambda: self.references.target(target, self.page, words),
            "ref": lambda: self.references.target(target, self.page, words),
            "numref": lambda: self.references.target(target, self.page, words.replace("%s", "").strip()),
            "doc": lambda: self.references.page(target, words),
            "download": lambda: f"[{words or target}]({self.references.site.source(target)})",
            "sub": lambda: f"<sub>{html.escape(text)}</sub>",
            "sup": lambda: f"<sup>{html.escape(text)}</sup>",
            "kbd": lambda: f"<kbd>{html.escape(text)}</kbd>",
            "abbr": lambda: re.sub(r"\s*\((.*)\)$", r" (\1)", text),
            "term": lambda: words or target,
        }
        if role in simple:
            return simple[role]()
        if role == "cite" or role.startswith("cite:"):
            return self.references.citation(target, in_text=role in ("cite:t", "cite:ts", "cite:ct", "cite:cts"))
        if role in NAMES:
            return f"`{words or (target.rsplit('.', 1)[-1] if target.startswith('~') else target)}`"
        raise TwinError(f"role {{{role}}} has no plain form")


def closing(lines: list[str], start: int, marks: str) -> int:
    """Index of the line that closes the fence opened at start."""
    for i in range(start + 1, len(lines)):
        stripped = lines[i].strip()
        if len(stripped) >= len(marks) and set(stripped) == {marks[0]}:
            return i
    raise TwinError(f"never closed: {lines[start].strip()!r}")


def closing_dollars(lines: list[str], start: int) -> int:
    if "$$" in lines[start].lstrip()[2:]:
        return start
    for i in range(start + 1, len(lines)):
        if "$$" in lines[i]:
            return i
    raise TwinError("never closed: '$$'")


def split_options(body: list[str]) -> tuple[dict[str, str], list[str]]:
    """A directive's options, written as `:name: value` lines or between two `---`, and the rest."""
    options: dict[str, str] = {}
    if body and body[0].strip() == "---" and "---" in [line.strip() for line in body[1:]]:
        end = [line.strip() for line in body[1:]].index("---") + 1
        return {k: str(v) for k, v in (yaml.safe_load("\n".join(body[1:end])) or {}).items()}, body[end + 1 :]
    for i, line in enumerate(body):
        if not (option := OPTION.match(line)):
            return options, body[i:]
        options[option["name"]] = option["value"].strip()
    return options, []


def quote(lines: list[str]) -> list[str]:
    """A block quote. An equation inside becomes one line, lest its lines begin with the quote's mark."""
    out: list[str] = []
    equation: list[str] | None = None
    for line in "\n".join(lines).strip("\n").split("\n"):
        if line.strip() == "$$":
            if equation is None:
                equation = []
            else:
                out.append(f"> $$ {' '.join(equation)} $$")
                equation = None
        elif equation is not None:
            equation.append(line.strip())
        else:
            out.append(f"> {line}".rstrip())
    return out


def folded(title: str, content: list[str]) -> list[str]:
    return ["<details>", f"<summary><b>{title}</b></summary>", "", *content, "", "</details>"]


# Notebooks -----------------------------------------------------------------------------------------------------------


def read_citations(bibliography: Path) -> dict[str, tuple[str, str, str]]:
    """Key -> authors, year and address, from a BibTeX file."""
    from pybtex.database import parse_file

    found = {}
    for key, entry in parse_file(str(bibliography)).entries.items():
        names = [" ".join([*person.prelast_names, *person.last_names]) for person in entry.persons["author"]]
        who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
        address = entry.fields.get("url", "")
        if not address and "doi" in entry.fields:
            address = f"https://doi.org/{entry.fields['doi']}"
        found[key] = (re.sub("[{}]", "", who), entry.fields["year"], address)
    return found


def install_cell(site: Site) -> str:
    return "\n".join(
        [
            "# Installs softshare where it is missing, as on Colab; what is installed is used as it is.",
            "from importlib.util import find_spec",
            "",
            'if not find_spec("softshare"):',
            f'    %pip install -q "softshare[moving] @ git+{site.url}@{site.branch}"',
            'if not find_spec("softshare"):',
            '    raise RuntimeError("softshare was not installed: pip says above why. Is the address in this cell right?")',
        ]
    )


# Badges --------------------------------------------------------------------------------------------------------------

BADGE = "_static/colab.svg"  # in book/; a picture of our own, so that the site needs no network
TITLE = re.compile(r"^# .+$", re.M)
README_BADGES = re.compile(r"(?<=^<!-- badges -->\n).*?(?=^<!-- /badges -->$)", re.M | re.S)


def under_title(text: str, line: str) -> str:
    """Markdown with one more paragraph below its title, or as it was if it has none."""
    return TITLE.sub(lambda title: f"{title[0]}\n\n{line}", text, count=1)


def with_badges(readme: str, site: Site, chapters: Mapping[str, str]) -> str:
    """README's text with a table of the chapters, names to sources, between its two marks."""
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
            plain_page(path, references)
    for name, notebook in notebooks.items():  # first to learn what can be referred to, then to refer to it
        twin(name, notebook, references)
    references.complete = True
    return {name: twin(name, notebook, references) for name, notebook in notebooks.items()}


def plain_page(path: Path, references: References) -> None:
    """Learn title and labelled headings of a page that has no twin."""
    page = Converter(path.stem, references)
    code = False
    for line in path.read_text(encoding="utf8").split("\n"):
        code ^= bool(re.match(r" *(```|~~~)", line))
        if not code and (target := TARGET.match(line)):
            page.pending.append(target["label"])
        elif not code and (heading := HEADING.match(line)):
            page.heading(heading["text"])


def twin(name: str, notebook: Any, references: References) -> str:
    """One notebook as text, the same for the same chapter: no outputs, no counts, cells named by their content."""
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
