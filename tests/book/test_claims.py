"""The map from the poster's claims to the cells that show them."""

from __future__ import annotations

import re

from build import Book, read_chapter

from softshare.studies.verdicts import read_claims

ELSEWHERE = ("motives, not results", "an argument, not a result", "`softshare list` names the recipe")
"""What may stand in the place of a link."""


def rows(top):
    text = (top / "book" / "claims.md").read_text(encoding="utf8")
    table = [line for line in text.split("\n") if line.startswith("| ") and not line.startswith("| the poster says")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]


def test_the_page_shows_every_verdict_once(top):
    text = (top / "book" / "claims.md").read_text(encoding="utf8")
    shown = re.findall(r'at\("([^"]+)"\)', text) + re.findall(r'claim\.place == "([^"]+)"', text)
    assert sorted(shown) == sorted({claim.place for claim in read_claims()})


def test_every_claim_leads_to_a_cell_or_says_why_not(top):
    places = {}  # label -> kind of the cell that follows it
    for name in Book(top).chapters():
        cells = read_chapter(top / "book" / f"{name}.md").cells
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            for label in re.findall(r"^\((show-[\w-]+)\)=\s*\Z", cell.source, re.M):
                places[label] = after and after.cell_type
    used = set()
    claims = rows(top)
    assert len(claims) >= 30
    for claim, where in claims:
        labels = re.findall(r"\{ref\}`[^`<]*<([\w-]+)>`", where)
        used |= set(labels)
        assert labels or where in ELSEWHERE, claim
        assert all(places.get(label) == "code" for label in labels), (claim, labels)
    assert used == set(places), f"cells that no claim leads to, or the reverse: {used ^ set(places)}"
