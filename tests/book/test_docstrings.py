"""Docstrings written for people, as reStructuredText."""

from __future__ import annotations

import pytest
from docstrings import prose


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("(L, *shape) and *this*", r"(L, \*shape) and *this*"),
        ("the value |cos|", r"the value \|cos|"),
        ("by kaiming_normal_, in num_layers", r"by kaiming_normal\_, in num_layers"),
        ("`share_` or ``|x|``", "`share_` or ``|x|``"),
        ("`(L, *shape)` and *shape", r"`(L, *shape)` and \*shape"),
        (r"`\d` and ``\d``", r"`\\d` and ``\d``"),
        (":func:`softshare.fold`", ":func:`softshare.fold`"),
        (r":math:`\alpha * \beta`", r":math:`\alpha * \beta`"),
        ("**bold** 2 * 3", "**bold** 2 * 3"),
        ("    *args: what", "    *args: what"),
        (">>> a *b", ">>> a *b"),
    ],
)
def test_a_line(written, expected):
    assert prose([written])[0] == expected


def test_literal_blocks_stay_as_they_are():
    lines = ["Like this::", "", "    f(*args)", "", "and f(*args)"]
    assert prose(lines) == [*lines[:-1], r"and f(\*args)"]
