"""The poster's networks side by side: what is counted, what comes from a record, and what a twin is."""

from __future__ import annotations

import pytest

from softshare import models
from softshare.models import Network
from softshare.studies import comparison, tables
from softshare.studies.sources import SOURCES

RECORD = {
    "versions": {"hardware": "a machine"},
    "groups": {
        "CIFAR": {
            "seconds": {"WRN 28-10": [3.0, 1.0, 2.0], "SWRN 28-10-2": [2.5, 2.5, 2.5], "DARTS": [0.5, 0.25, 0.5]}
        },
        "ImageNet": {"seconds": {"ResNet-200": [12.345, 12.0, 13.0]}},
    },
}


def test_a_row_of_the_poster_is_the_network_without_what_changes_no_count():
    assert (
        comparison.network_of("WRN 28-10*") == comparison.network_of("WRN 28-10 cutout") == Network.parse("WRN 28-10")
    )
    for table in tables.TABLES:
        for row in tables.paper_table(table):
            assert not comparison.network_of(row["model"]).dropout
    with pytest.raises(ValueError, match="unknown model"):
        comparison.network_of("VGG")


def test_seconds_are_the_median_over_rounds():
    seconds = {name: comparison.seconds_in(RECORD, Network.parse(name)) for name in ("WRN 28-10", "ResNet-200", "SNAS")}
    assert seconds == {"WRN 28-10": 2.0, "ResNet-200": 12.345, "SNAS": None}


def test_each_row_of_the_poster_has_its_counts_and_seconds(monkeypatch):
    count = comparison.counts
    known = ("DARTS", "ResNet-200")  # counting all of them takes long
    monkeypatch.setattr(comparison, "counts", lambda network: count(network) if str(network) in known else (1, 2))
    rows = {row["network"]: row for row in comparison.side_by_side("search", [RECORD])}
    assert list(rows) == [row["model"] for row in tables.paper_table("search")]
    assert rows["DARTS"] == {
        "network": "DARTS",
        "parameters, poster (millions)": "3.4",
        "parameters (millions)": "3.35",
        "multiply-adds (billions)": "0.53",
        "seconds per step, a machine": "0.5",
        "C-10 error, poster (%)": "2.83",
        "GPU days, poster": "4",
    }
    assert rows["WRN 28-10 cutout"]["seconds per step, a machine"] == "2"
    assert rows["SNAS"]["seconds per step, a machine"] == "not measured"
    (resnet,) = (row for row in comparison.side_by_side("imagenet", [RECORD]) if row["network"] == "ResNet-200")
    assert resnet["seconds per step, a machine"] == "12.3" and resnet["multiply-adds (billions)"] == "15.01"
    assert comparison.side_by_side("imagenet", [])[0]["seconds per step"] == "not measured"
    with pytest.raises(ValueError, match="cifar, imagenet, search"):
        comparison.side_by_side("mnist", [])


def test_twins_have_equal_parameters_and_less_work():
    rows = comparison.beside_twins([RECORD])
    assert [row["network"] for row in rows[1::3]] == list(comparison.SHARED)
    assert [row["what it is"] for row in rows] == ["plain", "shared", "twin"] * len(comparison.SHARED)
    twins = dict(zip(comparison.SHARED, (row["network"] for row in rows[2::3]), strict=True))
    assert twins == {
        "SWRN 28-6-2": "WRN 16-6",
        "SWRN 28-10-4": "WRN 22-10",
        "SWRN 28-10-2": "WRN 16-10",
        "SWRN 28-14-2": "WRN 16-14",
        "SWRN 28-18-2": "WRN 16-18",
        "SWRN 40-8-8": "WRN 34-8",
    }
    for plain, shared, twin in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert {plain[f"{what}, share (%)"] for what in ("parameters", "multiply-adds")} == {"100"}
        assert (
            shared["multiply-adds, share (%)"] == "100"
            and shared["multiply-adds (billions)"] == plain["multiply-adds (billions)"]
        )
        assert (
            twin["parameters, share (%)"] == shared["parameters, share (%)"]
            and int(twin["multiply-adds, share (%)"]) < 90
        )
        assert abs(models.parameters(twin["network"]) / models.parameters(shared["network"]) - 1) < 2e-3
    assert rows[7]["parameters, share (%)"] == "47" and rows[7]["seconds per step, a machine"] == "2.5"


def test_the_reading_that_is_used_comes_first_and_is_the_one_that_is_built():
    rows = comparison.readings()
    seen = set()
    for reading, row in zip(comparison.READINGS, rows, strict=True):
        assert (row["used"] == "yes") == (reading.network not in seen) == (not reading.options)
        seen.add(reading.network)
    found = {(row["network"], row["reading"].split(",")[0]): row["parameters (millions)"] for row in rows}
    assert found["NASNet-A 27.6M", "seven"] == "32.59" and found["NASNet-A 27.6M", "six"] == "28.21"
    assert found["ENAS", "five"] == "3.89" and found["DARTS", "the cell released in June 2018"] == "3.17"
    for name in seen:
        rest = [
            abs(float(row["parameters (millions)"]) - float(row["parameters, poster (millions)"]))
            for row in rows
            if row["network"] == name
        ]
        assert rest[0] == min(rest)


def test_schedules_are_shown_with_what_their_sources_leave_open():
    rows = {row["network"]: row for row in comparison.schedules()}
    assert set(rows) == set(SOURCES)
    assert rows["ENAS"]["rate"] == "0.05, cosine, restarts after 10, 30, ..." and rows["ENAS"]["epochs"] == "630"
    assert rows["ResNeXt-29 16x64"]["rate"] == "0.1, / 10 at 49% and 74%" and rows["ResNeXt-29 16x64"]["with"] == "-"
    assert rows["DARTS"]["with"] == "gradient norm at most 5, drop-path 0.2, auxiliary head"
    assert "not published" in rows["AmoebaNet-B"]["source"] and "not stated" in rows["ResNet-200"]["source"]
