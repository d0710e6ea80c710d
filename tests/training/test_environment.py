"""What a record says of where a run took place: hardware, versions, revision, earlier processes."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import warnings

import pytest
import torch

import softshare
from softshare import files
from softshare.training import Settings, environment
from softshare.training.environment import REVISION, Execution


def test_what_an_environment_holds():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    wanted = {
        "device",
        "hardware",
        "cores",
        "threads",
        "python",
        "torch",
        "numpy",
        "softshare",
        "revision",
        "dirty",
        "date",
    }
    assert set(found) == wanted
    assert found["device"] == "cpu" and found["hardware"] and found["softshare"] == softshare.__version__
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(found["date"])
    assert abs(age.total_seconds()) < 60


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A real checkout with a package of the name in it; yields its folder and a function that calls git there."""
    top = tmp_path / "top"
    (top / "softshare").mkdir(parents=True)
    (top / "pyproject.toml").write_text('[project]\nname = "softshare"\n')
    (top / "data" / "paper").mkdir(parents=True)
    (top / "softshare" / "__init__.py").write_text("")
    monkeypatch.setattr(files, "_PACKAGE", top / "softshare")
    monkeypatch.delenv(REVISION, raising=False)

    def git(*command, at=top):
        run = ["git", "-C", str(at), "-c", "user.name=a", "-c", "user.email=a@b", *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    return top, git


def test_a_record_says_whether_the_package_was_changed(checkout):
    """Records next to the package do not make it dirty, but a changed module does."""
    top, git = checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    (top / "record.json").write_text("{}")
    found = environment()
    assert found["dirty"] is False and found["revision"] == git("rev-parse", "HEAD") and len(found["revision"]) == 40
    (top / "softshare" / "__init__.py").write_text("x = 1")
    assert environment()["dirty"] is True
    git("commit", "-qam", "y")
    (top / "softshare" / "new.py").write_text("")
    assert environment()["dirty"] is True and environment()["revision"] != found["revision"]


@pytest.mark.parametrize(
    ("given", "revision", "dirty"),
    [
        (None, None, None),
        ("", None, None),
        ("abc123", "abc123", False),
        (" abc123\n", "abc123", False),
        ("abc123+changes", "abc123", True),
    ],
)
def test_without_git_the_environment_names_the_revision(checkout, monkeypatch, given, revision, dirty):
    if given is not None:
        monkeypatch.setenv(REVISION, given)
    found = environment()
    assert found["revision"] == revision and found["dirty"] is dirty


@pytest.mark.parametrize("given", ["v1.0", "abc", "abc123-dirty", "+changes"])
def test_a_revision_that_is_not_a_commit_is_refused_before_a_run(checkout, monkeypatch, given):
    monkeypatch.setenv(REVISION, given)
    with pytest.raises(ValueError, match=f"SOFTSHARE_REVISION must be a commit, .* got '{re.escape(given)}'"):
        environment()


def test_git_takes_precedence_over_the_environment(checkout, monkeypatch):
    _, git = checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    monkeypatch.setenv(REVISION, "abc123+changes")
    assert environment()["revision"] == git("rev-parse", "HEAD") and environment()["dirty"] is False
    monkeypatch.setenv("PATH", "")  # no git on this machine
    assert environment()["revision"] == "abc123" and environment()["dirty"] is True


def test_for_a_copy_unknown_to_git_the_environment_takes_precedence(checkout, monkeypatch):
    """If files are updated by other means than git, its commit is outdated and everything looks changed."""
    top, git = checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    (top / "softshare" / "__init__.py").write_text("x = 1")
    monkeypatch.setenv(REVISION, "abc123")
    assert environment()["revision"] == "abc123" and environment()["dirty"] is False


def test_the_commit_of_another_repository_is_not_ours(checkout):
    top, git = checkout
    git("init", "-q", at=top.parent)
    git("add", ".", at=top.parent)
    git("commit", "-qm", "theirs", at=top.parent)
    assert environment()["revision"] is None and environment()["dirty"] is None


def test_an_installed_package_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.delenv(REVISION, raising=False)
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "site-packages" / "softshare")
    assert environment()["revision"] is None and environment()["dirty"] is None


# ---------------------------------------------------------------------------------------------- one process after another


def execution(precision):
    return Execution(torch.device("cpu"), Settings(epochs=1, precision=precision))


def test_a_single_process_is_recorded_as_it_is():
    found = execution("bfloat16")
    assert found.record() == found.now == found.states()[0] and len(found.states()) == 1
    assert {**environment(), "date": found.now["date"]}.items() <= found.now.items()
    assert (found.now["precision"], found.now["tf32"], found.now["processes"]) == ("bfloat16", False, 1)
    assert json.loads(json.dumps(found.record())) == found.record()


def test_earlier_processes_are_recorded_in_their_order():
    first = execution("float32")
    second = execution("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.follow(first.states())
    third = execution("float32")
    third.follow(json.loads(json.dumps(second.states())))  # through a checkpoint
    assert third.record() == {**third.now, "earlier": [first.now, second.now]}
    assert third.states() == [first.now, second.now, third.now]


@pytest.mark.parametrize("precisions", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_precision_than_in_the_last_process_warns(precisions):
    first, second = map(execution, precisions)
    said = f"the checkpoint was written in {precisions[0]}, and training resumes in {precisions[1]}"
    with pytest.warns(UserWarning, match=said):
        second.follow(first.states())
    third = execution(precisions[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the last process had the same precision
        third.follow(second.states())
    assert [each["precision"] for each in third.states()] == [precisions[0], precisions[1], precisions[1]]


def test_a_process_that_only_measured_is_recorded_next_to_those_that_trained():
    first, second = execution("float32"), execution("bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is resumed
        second.finished(json.loads(json.dumps(first.states())))
    assert second.record() == {**first.now, "measured by": second.after} and second.after["precision"] == "bfloat16"


def test_the_outcome_of_compiling_is_recorded_for_all_processes(monkeypatch):
    monkeypatch.setattr("softshare.training.distributed.gathered", lambda own: [dict(own), dict(own)])
    found = execution("float32")
    found.note(compiled="failed", captured=True)
    assert [each["compiled"] for each in (found.now, *found.now["others"])] == ["failed", "failed"]


def test_a_repository_that_the_environment_names_is_not_ours(checkout, monkeypatch, tmp_path):
    """As inside a hook of another repository."""
    _, git = checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another" / ".git"))
    found = environment()["revision"]
    monkeypatch.delenv("GIT_DIR")
    assert found == git("rev-parse", "HEAD")
