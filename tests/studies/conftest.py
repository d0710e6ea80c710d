"""Records and data of studies without training and without images."""

from __future__ import annotations

import pytest

from softshare.studies import STUDIES, make_plan, study_of, write_record


@pytest.fixture
def images(monkeypatch):
    """As if both CIFAR data sets were available."""
    monkeypatch.setattr(STUDIES["cifar"], "fingerprint", lambda plan, data=None, download=False: f"{data}")


@pytest.fixture
def write_done():
    """A function that writes an empty record of a job's run."""

    def write(job, runs):
        plan = make_plan(job.recipe, job.profile, job.seed)
        if not job.folds:
            data = {"fingerprint": study_of(plan).fingerprint(plan, job.data)}
            write_record(study_of(plan).identity(plan, data["fingerprint"]), {}, data=data, runs=runs)

    return write
