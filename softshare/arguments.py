"""Checks of arguments that several modules share."""

from __future__ import annotations

import numbers
from typing import Any


def count(name: str, value: Any) -> int:
    """Return `value` if it is a positive whole number, else raise TypeError or ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's whole numbers count
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    value = int(value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
