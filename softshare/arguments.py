"""Small helpers for arguments and text, shared by several modules."""

from __future__ import annotations

import numbers
import re
from typing import Any


def count(name: str, value: Any) -> int:
    """Return `value` if it is a positive whole number, else raise TypeError or ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's integers are fine too
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    value = int(value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def without_addresses(text: str) -> str:
    """Return a text without the memory addresses of objects, as in ``<function f at 0x7f...>``.

    Addresses change from process to process, so nothing that must be found again may contain them.
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
