"""Converts MyST Markdown to the Markdown that every notebook can show.

markdown-it, the parser that MyST itself is built on, finds the blocks, roles and links. Only those that a notebook does
not know are replaced; everything else stays exactly as its author wrote it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from itertools import chain, pairwise
from textwrap import indent
from typing import Any
from urllib.parse import urlparse

import yaml
from markdown_it import MarkdownIt
from markdown_it.helpers import parseLinkLabel
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin
from references import References, TwinError

DIRECTIVE = re.compile(r"^\{(?P<name>[\w:+-]+)\} *(?P<argument>.*)$")
OPTION = re.compile(r"^:(?P<name>[\w-]+): *(?P<value>.*)$")
NAMED = re.compile(r"^(?P<text>.+?)\s*<(?P<target>[^<>]+)>$", re.S)
FOOTNOTE = re.compile(r"\[\^([^\]\s]+)\]:")

ADMONITIONS = {
    name: name.capitalize()
    for name in ("attention", "caution", "danger", "error", "hint", "important", "note", "tip", "warning")
} | {"seealso": "See also", "exercise": "Exercise", "solution": "Solution", "todo": "To do"}
NAMES = ("attr", "class", "data", "exc", "func", "meth", "mod", "obj", "const", "file", "code")


# The parser ----------------------------------------------------------------------------------------------------------

InlineRule = Callable[[StateInline, bool], bool]


def locating(rule: InlineRule) -> InlineRule:
    """A parser rule that also records where in the text its tokens were found."""

    def located(state: StateInline, silent: bool) -> bool:
        start, known = state.pos, len(state.tokens)
        found = rule(state, silent)
        if found and not silent:
            for token in state.tokens[known:]:
                token.meta.setdefault("place", (start, state.pos))
                if token.type == "link_open":
                    token.meta.setdefault("words", state.src[start + 1 : parseLinkLabel(state, start)])
        return found

    return located


def make_parser() -> MarkdownIt:
    """A parser that understands what MyST does with the extensions in _config.yml."""
    parser = MarkdownIt("commonmark").enable("table")
    parser.use(front_matter_plugin).use(myst_block_plugin).use(myst_role_plugin).use(colon_fence_plugin)
    parser.use(deflist_plugin).use(dollarmath_plugin, double_inline=True).use(amsmath_plugin)
    parser.use(footnote_plugin, inline=False, move_to_end=False, always_match_refs=True)
    ruler = parser.inline.ruler
    for name, rule in zip(ruler.get_active_rules(), ruler.getRules(""), strict=True):
        if name in ("link", "image", "myst_role", "footnote_ref"):
            ruler.at(name, locating(rule))
    return parser


PARSER = make_parser()
START = Token("", "", 0)  # comes before the first token of a text


class Converter:
    """Converts the MyST Markdown of one page to plain Markdown."""

    def __init__(self, page: str, references: References) -> None:
        self.page = page
        self.references = references
        self.env: dict[str, Any] = {}  # what the parser remembers from one part of the page to the next
        self.pending: list[str] = []  # labels waiting for the heading below them
        self.equations = 0
        self.figures = 0

    def convert(self, text: str) -> str:
        return "\n".join(self.blocks(text))

    def learn(self, text: str) -> None:
        """Note the title and the labelled headings of a page that is not converted."""
        for before, token in pairwise([START, *self.parse(text)]):
            self.note(before, token)

    def parse(self, text: str) -> list[Token]:
        return PARSER.parse(text + "\n", self.env)

    def note(self, before: Token, token: Token) -> None:
        """Keep a label, and its text if the next block is a heading."""
        if token.type == "myst_target":
            self.pending.append(token.content)
            # One in front of a code cell has no text of its own; those who refer to it give one.
            self.references.targets.setdefault(token.content, (self.page, ""))
        elif before.type == "heading_open":
            text = " ".join(self.spans(token).split())
            self.references.titles.setdefault(self.page, text)
            self.references.targets |= dict.fromkeys(self.pending, (self.page, text))
            self.pending.clear()
        elif token.type not in ("heading_open", "myst_line_comment", "myst_block_break"):
            self.pending.clear()

    # Blocks ----------------------------------------------------------------------------------------------------------

    def blocks(self, text: str) -> list[str]:
        """The plain form in pieces: single lines, and whole blocks where blank lines must stay."""
        pieces = [[line] for line in text.split("\n")]
        for before, token in pairwise([START, *self.parse(text)]):
            self.note(before, token)
            if token.map and not token.nesting:  # lists and quotes are handled by their blocks
                begin, end = token.map[0], max(token.map[1], token.map[0] + 1)  # a defined term's map is empty
                made = self.block(token, [*chain.from_iterable(pieces[begin:end])])
                pieces[begin:end] = [made, *([] for _ in range(begin + 1, end))]
        out: list[str] = []
        for piece in chain.from_iterable(pieces):
            if piece or (out and out[-1]):  # never two blank lines in a row
                out.append(piece)
        return out[:-1] if out and not out[-1] else out

    def block(self, token: Token, source: list[str]) -> list[str]:
        """The lines that replace a block's lines."""
        match token.type:
            case "inline":
                return self.running_text(token, source)
            case "fence" | "colon_fence":
                return self.fenced(token, source)
            case "math_block" | "math_block_label":
                before, made = source[0].partition("$$")[0], self.equation(token.content, token.info)
                return placed(before, one_line(made) if ">" in before else made)
            case "myst_target" | "myst_line_comment" | "myst_block_break":
                return []
        return ["\n".join(source)]

    def running_text(self, token: Token, source: list[str]) -> list[str]:
        """Convert a paragraph, a heading or a table cell, keeping what comes before and after it on its lines."""
        if not token.content:
            return source
        old, new = token.content.split("\n"), self.spans(token).split("\n")
        if old[0].strip() == "$$":
            raise TwinError("never closed: '$$'")
        if old[0] not in source[0]:  # a table cell, where bars must be escaped
            old, new = [[line.replace("|", r"\|") for line in lines] for lines in (old, new)]
        around = [line.partition(words.lstrip()) for line, words in zip(source, old, strict=True)]
        if len(new) > len(old) or not all(found for _, found, _ in around):
            raise TwinError(f"not found in its own source lines: {token.content!r}")
        marks = [FOOTNOTE.sub(r"<sup>\1</sup>", before) for before, _, _ in around]
        lines = [mark + words.lstrip() for mark, words in zip(marks, new, strict=False)]
        return [*lines[:-1], lines[-1] + around[-1][2]]

    def equation(self, body: str, label: str = "") -> list[str]:
        """A displayed equation; one with a label is numbered."""
        body = "\n".join(line.strip() for line in body.strip().split("\n"))
        if r"\\" in body and r"\begin{" not in body:
            body = "\\begin{aligned}\n" + body + "\n\\end{aligned}"
        if label:
            self.equations += 1
            self.references.targets[label] = (self.page, f"({self.equations})")
            body += f" \\tag{{{self.equations}}}"
        return [f"$$\n{body}\n$$"]

    def fenced(self, token: Token, source: list[str]) -> list[str]:
        """A directive in its plain form, or a block of code as it is."""
        opening = source[0].strip()
        if len(source) != token.content.count("\n") + 2:
            raise TwinError(f"never closed: {opening!r}")
        directive = DIRECTIVE.match(token.info.strip())
        if not directive and token.type == "fence" and not token.info.strip().startswith("{"):
            return ["\n".join(source)]
        before = source[0].partition(token.markup)[0]
        if not directive or ">" in before:
            raise TwinError(f"left over: {opening!r}")
        options, body = split_options(token.content.split("\n")[:-1])
        made = self.directive(directive["name"], directive["argument"].strip(), options, "\n".join(body))
        return placed(before, made) if before.strip() else ["", *placed(before, made), ""]

    def directive(self, name: str, argument: str, options: dict[str, str], text: str) -> list[str]:
        """What a directive becomes; `argument` is the rest of its first line, `text` the lines below its options."""
        match name:
            case "bibliography" | "contents" | "tableofcontents" | "index":
                return []
            case "math":
                return self.equation(f"{argument}\n{text}", options.get("label", options.get("name", "")))
            case "code-block" | "code" | "sourcecode":
                marks = "```"
                while marks in text:
                    marks += "`"
                return [f"{marks}{argument}\n{text}\n{marks}"]
            case "figure" | "image":
                return self.figure(name, argument, options, text)
            case "raw" if argument == "html":
                return [text]
            case "list-table":
                return self.titled(argument, self.list_table(text))
            case "table" | "tab-item":
                return self.titled(argument, self.blocks(text))
            case "container" | "div" | "grid" | "grid-item" | "grid-item-card" | "tab-set" | "card-carousel":
                return self.blocks(text)
            case "epigraph" | "pull-quote" | "highlights":
                return quote(self.blocks(text))
            case "dropdown":
                return folded(self.inline(argument) or "More", self.blocks(text))
            case "admonition" | "card" | "margin" | "sidebar" | "topic":
                return self.admonition(self.inline(argument), options, text)
            case _ if name in ADMONITIONS:  # the text may start on the directive's own line
                return self.admonition(ADMONITIONS[name], options, f"{argument}\n{text}" if argument else text)
        raise TwinError(f"directive {{{name}}} has no plain form")

    def admonition(self, title: str, options: dict[str, str], text: str) -> list[str]:
        content = self.blocks(text)
        if "dropdown" in options.get("class", "").split():
            return folded(title, content)
        return quote([f"**{title}**", "", *content] if title else content)

    def titled(self, title: str, content: list[str]) -> list[str]:
        return [f"**{self.inline(title)}**", "", *content] if title else content

    def figure(self, name: str, path: str, options: dict[str, str], text: str) -> list[str]:
        picture = f"![{options.get('alt', '')}]({self.references.picture(path)})"
        if name == "image":
            return [picture]
        self.figures += 1
        if label := options.get("name"):
            self.references.targets[label] = (self.page, f"Figure {self.figures}")
        caption = "\n".join(self.blocks(text))
        return [picture, "", f"*Figure {self.figures}.* {caption}".rstrip()]

    def list_table(self, text: str) -> list[str]:
        """A list of lists as a table: an outer item is a row, an inner one a cell."""
        (rows,) = SyntaxTreeNode(self.parse(text)).children
        table = [[self.cell(cell) for cell in row.children[0].children] for row in rows.children]
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]

    def cell(self, item: SyntaxTreeNode) -> str:
        if any(part.type != "paragraph" for part in item.children):
            raise TwinError("a cell of a list-table holds more than running text")
        return " ".join(self.inline(part.children[0].content) for part in item.children).replace("\n", " ")

    # Running text ----------------------------------------------------------------------------------------------------

    def inline(self, text: str) -> str:
        """Text without blocks, with its roles, links, pictures and footnotes in plain form."""
        return "".join(self.spans(token) for token in PARSER.parseInline(text, self.env))

    def spans(self, token: Token) -> str:
        """The same for parsed text."""
        text, last, out = token.content, 0, []
        for child in token.children or ():
            start, end = child.meta.get("place", (0, 0))
            if last <= start < end and (plain := self.span(child, text[start:end])) is not None:
                out += [text[last:start], plain]
                last = end
        return "".join([*out, text[last:]])

    def span(self, token: Token, written: str) -> str | None:
        """The replacement for a role, a link, a picture or a footnote mark; None if it stays as written."""
        match token.type:
            case "myst_role":
                name = token.meta["name"]
                return self.role(name.removeprefix("py:"), written.removeprefix(f"{{{name}}}").strip("`"))
            case "footnote_ref":
                return f"<sup>{token.meta['label']}</sup>"
            case "image" if is_local(to := str(token.attrs["src"])):
                return f"![{token.content}]({self.references.picture(to)})"
            case "link_open" if is_local(to := str(token.attrs["href"])):
                return self.references.link(to, self.page, self.inline(token.meta["words"]))
        return None

    def role(self, role: str, text: str) -> str:
        """What {role}`text` becomes."""
        named = NAMED.match(text)
        words, target = (named["text"], named["target"]) if named else ("", text)
        match role:
            case "math":
                return f"${text}$"
            case "eq" | "ref":
                return self.references.target(target, self.page, words)
            case "numref":
                return self.references.target(target, self.page, words.replace("%s", "").strip())
            case "doc":
                return self.references.page(target, words)
            case "download":
                return self.references.file(target, words)
            case "sub" | "sup" | "kbd":
                return f"<{role}>{html.escape(text)}</{role}>"
            case "abbr":
                return re.sub(r"\s*\((.*)\)$", r" (\1)", text)
            case "term":
                return words or target
            case _ if role.partition(":")[0] == "cite":
                return self.references.citation(target, in_text=role in ("cite:t", "cite:ts", "cite:ct", "cite:cts"))
            case _ if role in NAMES:
                return f"`{words or (target.rsplit('.', 1)[-1] if target.startswith('~') else target)}`"
        raise TwinError(f"role {{{role}}} has no plain form")


def is_local(address: str) -> bool:
    """Whether a link stays inside the project."""
    parts = urlparse(address)
    return not (parts.scheme or parts.netloc)


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


def placed(before: str, pieces: list[str]) -> list[str]:
    """The pieces after `before`, the blanks or list mark of their first line; the other lines are indented to match."""
    margin = " " * len(before)
    first, *rest = [indent(piece, margin) for piece in pieces or [""]]
    return [before + first[len(margin) :], *rest]


def one_line(pieces: list[str]) -> list[str]:
    """Put each equation on one line: in a quote, its lines would begin with the quote's mark."""
    return [re.sub(r"\n\s*", " ", piece) if piece.lstrip().startswith("$$\n") else piece for piece in pieces]


def quote(pieces: list[str]) -> list[str]:
    return [f"> {line}".rstrip() for line in "\n".join(one_line(pieces)).split("\n")]


def folded(title: str, content: list[str]) -> list[str]:
    return ["<details>", f"<summary><b>{title}</b></summary>", "", *content, "", "</details>"]
