"""Small things about arguments and texts that several modules share."""

from __future__ import annotations

import numbers
import re
from typing import Any


def count(name: str, value: Any) -> int:
    """Return `value` if it is a positive whole number, else raise TypeError or ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's whole numbers count
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    value = int(value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def without_addresses(text: str) -> str:
    """A text without the memory addresses that Python gives to objects, as in ``<function f at 0x7f...>``.

    They change from process to process, so nothing that has to be found again may hold them.
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
