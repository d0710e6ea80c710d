"""Sphinx extension: removes what no page needs, and sets what the theme leaves unset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def tidy(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    # Light or dark like the reader's system, until they choose; if this is unset, the theme's script complains.
    context["default_mode"] = "auto"
    context["favicon_url"] = context["pathto"]("_static/favicon.svg", 1)
    # Thebe runs cells on other people's servers. No button here starts it, and its script declares constants twice, which
    # is an error. Vega is large; pages with an interactive picture load it themselves.
    unwanted = re.compile(r"thebe|vega\.js", re.I)
    context["script_files"] = [one for one in context["script_files"] if not unwanted.search(str(vars(one)))]


def lighten(app: Any, error: Exception | None) -> None:
    """Leave out 1.5 MB of script that draws the icons a second time: the theme's style already has them as fonts."""
    script = Path(app.outdir) / "_static" / "scripts" / "fontawesome.js"
    if error is None and script.is_file():
        script.write_text("// The icons are drawn by the fonts in ../vendor/fontawesome.\n", encoding="utf8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", tidy)
    app.connect("build-finished", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
