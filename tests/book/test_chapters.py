"""Every chapter, run from its source in profile fast, by what it wrote and not by what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from build import Book, prepare_kernels, run_chapter

pytestmark = pytest.mark.long


def run(top: Path, name: str, folder: Path) -> list[dict[str, Any]]:
    """Run a chapter with its records going to `folder`; returns them."""
    prepare_kernels()
    runs = folder / "runs"
    runs.mkdir()
    run_chapter(Book(top), name, {"PROFILE": "fast", "RUNS": str(runs)}, output=folder)
    records = [json.loads(path.read_text(encoding="utf8")) for path in sorted(runs.rglob("*.json"))]
    assert records, f"{name} wrote no record"
    return records


def test_templates(top, tmp_path):
    run(top, "01-templates", tmp_path)


def test_training(top, tmp_path):
    run(top, "02-training", tmp_path)


def test_similarity(top, tmp_path):
    run(top, "03-similarity", tmp_path)


def test_shortest_path(top, tmp_path):
    run(top, "04-shortest-path", tmp_path)
