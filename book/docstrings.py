"""Sphinx extension: docstrings written for people become valid reStructuredText, and short names find their target.

Docstrings are plain text with `code` in single backticks, which `default_role` in _config.yml shows as code. Everything
else that reStructuredText would take for markup, such as the stars of (L, *shape) or the bars of |cos|, is escaped here.
A reference to `softshare.TemplateBank` leads to where the class is documented, under the module that defines it.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

MARKUP = re.compile(
    r"""
      (?P<meant> ``.+?``(?!`) | :[\w:+-]+:`[^`]+`                                        # code and references
      | (?<![\w*])(?P<stars>\*{1,2})(?=[^\s*])[^*`\n]*?(?<=[^\s*])(?P=stars)(?![\w*]) )  # emphasis
    | (?P<code> `[^`]+` )
    | \*(?=\S) | \|(?=\S) | (?<=\w)_(?!\w)                                               # accidental markup
    """,
    re.S | re.X,
)
PARAMETER = re.compile(r"^\s*\*{1,2}\w+.*:")


def escape(text: str) -> str:
    """Escape accidental markup in running text; in code by the default role, escape only backslashes."""

    def escaped(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0].replace("\\", r"\\")
        return found[0] if found["meant"] else "\\" + found[0]

    return MARKUP.sub(escaped, text)


def prose(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText; literal blocks, directives, examples, tables stay as they are."""
    out: list[str] = []
    waiting: list[str] = []
    verbatim: int | None = None  # the indentation of the line above a literal block, or of a directive

    def flush() -> None:
        if waiting:
            out.extend(escape("\n".join(waiting)).split("\n"))
            waiting.clear()

    for line in lines:
        indent = len(line) - len(line.lstrip())
        if verbatim is not None and line.strip() and indent <= verbatim:
            verbatim = None
        example = line.lstrip().startswith((">>>", "...", "..", "+-", "+=", "==="))
        if verbatim is not None or example or not line.strip() or PARAMETER.match(line):
            flush()
            out.append(line)
        else:
            waiting.append(line)
        if verbatim is None and line.strip() and (line.rstrip().endswith("::") or line.lstrip().startswith(".. ")):
            verbatim = indent
    flush()
    return out


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = prose(lines)


def find(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve softshare.NAME to the page of the module that defines it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("softshare."):
        return None
    thing: Any = importlib.import_module("softshare")
    for part in target.split(".")[1:]:
        thing = getattr(thing, part, None)
    home, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not home or not name or f"{home}.{name}" == target:
        return None
    builder, document = app.builder, node.get("refdoc", env.docname)
    return env.get_domain("py").resolve_xref(env, document, builder, node["reftype"], f"{home}.{name}", node, content)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon reads the sections
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
