"""What chapters can refer to: the pages and labels of the book, the literature, the project's address."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import yaml


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
    """Everything in the book that can be referred to, and how a stand-alone notebook links to it."""

    site: Site
    chapters: set[str]
    titles: dict[str, str] = field(default_factory=dict)  # page -> title
    targets: dict[str, tuple[str, str]] = field(default_factory=dict)  # label -> (page, its text)
    citations: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # key -> (authors, year, address)
    complete: bool = False  # while False, a target that has not been found yet is not an error

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
        if self.complete and not (text or found):
            raise TwinError(f"label {label!r} stands before no heading; refer to it as `text <{label}>`")
        return (text or found) if page == here else self.page(page, text or found)

    def link(self, to: str, here: str, words: str) -> str:
        """The words as a link to a page, to a file of the book or to a label; on the page `here`, the words alone."""
        path, _, label = to.partition("#")
        if path:
            return self.page(path, words) if path.endswith((".md", ".ipynb")) else self.file(path, words)
        return self.target(label, here, words) if label in self.targets else words or label

    def picture(self, path: str) -> str:
        return path if "://" in path else self.site.raw(path.removeprefix("./").lstrip("/"))

    def file(self, path: str, words: str = "") -> str:
        return f"[{words or path}]({self.site.source(path)})"

    def citation(self, keys: str, in_text: bool) -> str:
        """Author-year links: "Saxe et al. (2014)" as part of a sentence, otherwise "(Saxe et al., 2014)"."""
        links = []
        for key in (k.strip() for k in keys.split(",")):
            if key not in self.citations:
                raise TwinError(f"no entry {key!r} in references.bib")
            who, year, address = self.citations[key]
            text = f"{who} ({year})" if in_text else f"{who}, {year}"
            links.append(f"[{text}]({address})" if address else text)
        return "; ".join(links) if in_text else f"({'; '.join(links)})"


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
