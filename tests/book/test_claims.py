"""The map from the poster's claims to the cells that show them."""

from __future__ import annotations

import re

from build import Book, read_chapter

VERDICTS = ("exact", "small", "not seen", "not run", "not tested")


def rows(top):
    text = (top / "book" / "claims.md").read_text(encoding="utf8")
    table = [line for line in text.split("\n") if line.startswith("| ") and not line.startswith("| the poster says")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]


def test_every_claim_leads_to_a_cell_or_says_that_nothing_was_run(top):
    places = {}  # label -> kind of the cell that follows it
    for name in Book(top).chapters():
        cells = read_chapter(top / "book" / f"{name}.md").cells
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            for label in re.findall(r"^\((show-[\w-]+)\)=\s*\Z", cell.source, re.M):
                places[label] = after and after.cell_type
    used = set()
    claims = rows(top)
    assert len(claims) >= 30
    for claim, where, verdict in claims:
        labels = re.findall(r"\{ref\}`[^`<]*<([\w-]+)>`", where)
        used |= set(labels)
        assert any(word in verdict for word in VERDICTS), claim
        assert labels or any(word in verdict for word in ("not run", "not tested")), claim
        assert all(places.get(label) == "code" for label in labels), (claim, labels)
    assert used == set(places), f"cells that no claim leads to, or the reverse: {used ^ set(places)}"
