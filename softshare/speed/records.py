"""What the records of all benchmarks have in common: their place, how they are rounded and read, the machine's state."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files


def default_output(hardware: str) -> Path:
    """Where the record of a machine goes: data/benchmarks in a checkout, ./benchmarks elsewhere."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", hardware.lower())).strip("-")
    return files.data_folder("benchmarks") / f"{slug}.json"


def load() -> float:
    """The number of processes that wanted to run over the last minute; NaN where that is not known, as on Windows."""
    return float(getattr(os, "getloadavg", lambda: [math.nan])()[0])


def in_six_digits(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON gives it back, its numbers rounded to six significant digits, which are enough."""
    rounded: dict[str, Any] = json.loads(json.dumps(record), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return rounded


def read_fields(path: str | Path, form: str, parts: Mapping[str, type]) -> dict[str, Any]:
    """The fields of a record of that format, with all `parts` of their types.

    Raises a ValueError that says what is wrong with it, FileNotFoundError if there is none.
    """
    try:
        record = json.loads(files.user_path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != form:
        raise ValueError(f'{path} lacks "format": "{form}"')
    for part, kind in parts.items():
        if not isinstance(record.get(part), kind):
            raise ValueError(f"{path}: {part!r} is missing or not of type {kind.__name__}")
    return record


def check_seconds(path: str | Path, record: Mapping[str, Any], seconds: object, where: str) -> None:
    """Check that `seconds` are lists by name, of one positive number per round. Raises ValueError."""
    if not isinstance(seconds, dict) or not seconds:
        raise ValueError(f"{path}: {where!r} has no lists of seconds")
    for name, each in seconds.items():
        good = isinstance(each, list) and all(isinstance(value, float) and 0 < value < math.inf for value in each)
        if not good or len(each) != record["rounds"]:
            raise ValueError(f"{path}: seconds of {name!r} in {where!r} are not one positive number per round")


def check_content(path: str | Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError for a record that does not match its own checksum."""
    if record["content"] != files.content_checksum(record):
        raise ValueError(f"{path}: its content does not match the checksum in it; it was changed by hand")
