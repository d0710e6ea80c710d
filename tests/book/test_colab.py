"""The twins as Colab runs them: alone in an empty folder, without a checkout, in an environment that lacks softshare.

The environment is fresh and has what Colab provides, including ipywidgets 7.7.1. Git redirects the project's address to a
local repository of the working tree, so the first cells install from it unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from twins import read_site

from softshare import SimilarityRecorder, models
from softshare.pictures.moving import WIDGET
from softshare.speed.networks import PATTERN
from softshare.studies import Record, find_records, make_plan, study_of, write_record

TOP = Path(__file__).resolve().parents[2]
TWINS = sorted(path.stem for path in (TOP / "book" / "notebooks").glob("*.ipynb"))
#: Pictures with sliders, by chapter.
MOVING = {"01-templates": 1, "03-similarity": 2, "04-shortest-path": 1}
WIDGETS = "7.7.1"
PREINSTALLED = ["torch", "numpy", "matplotlib", f"ipywidgets=={WIDGETS}", "ipykernel", "papermill"]
# Prefixes of the environment variables that must not reach the test environment.
FOREIGN = tuple("PYTHON VIRTUAL_ENV SOFTSHARE JUPYTER IPYTHON MPL XDG_ GIT_DIR GIT_WORK GIT_INDEX".split())


@dataclass
class Colab:
    """A Python with what Colab provides, and the environment variables of its processes."""

    python: Path
    env: dict[str, str]
    committed: Record

    def ask(self, code: str, folder: Path) -> str:
        done = subprocess.run([self.python, "-c", code], cwd=folder, env=self.env, text=True, stdout=subprocess.PIPE)
        assert done.returncode == 0, code
        return done.stdout.strip()

    def versions(self, folder: Path) -> dict[str, str]:
        code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        return json.loads(self.ask(code, folder))

    def place(self, folder: Path) -> str:
        """Where softshare would be imported from; "" if it is not there."""
        code = "import importlib.util as u; s = u.find_spec('softshare'); print(s.origin if s else '')"
        return self.ask(code, folder)

    def run(self, twin: Path, output: Path, **env: str) -> subprocess.CompletedProcess[str]:
        options = ["-k", "python3", "--no-progress-bar", "--log-level", "ERROR", "--execution-timeout", "600"]
        command = [self.python, "-m", "papermill", *options, twin.name, output]
        return subprocess.run(command, cwd=twin.parent, env=self.env | env, text=True, capture_output=True)


def address(repository: Path) -> dict[str, str]:
    """Environment variables that make git use a local repository in place of the project's address."""
    key = f"url.{repository.as_uri()}.insteadOf"
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": key, "GIT_CONFIG_VALUE_0": read_site(TOP).url}


def commit_record(folder: Path) -> Record:
    """Write a record of the paper's schedule, and one of profile fast, which must not be shipped with the package."""
    similarity = SimilarityRecorder()
    similarity.record(models.build("SWRN 16-1-2"), 0)
    for profile in ("fast", "paper"):
        plan = make_plan("SWRN 28-6-2 cutout", profile)
        identity, data = study_of(plan).identity(plan, "f"), {"source": "CIFAR-10 (JPEG)", "fingerprint": "f"}
        sizes = {"sizes": {"train": 50_000, "test": 10_000}}
        made = write_record(identity, {"error": 3.25}, data=data, config=sizes, similarity=similarity, runs=folder)
    return made


@pytest.fixture(scope="module")
def colab(tmp_path_factory, copy_project):
    place = tmp_path_factory.mktemp("colab")
    tree = copy_project(place / "softshare")
    committed = commit_record(tree / "data" / "runs")
    author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
    for command in (
        ["init", "-q", "-b", read_site(TOP).branch],
        ["add", "-A", "-f"],
        [*author, "commit", "-q", "-m", "now"],
    ):
        subprocess.run(["git", *command], cwd=tree, check=True)

    home = place / "home"
    home.mkdir()
    if (config := Path.home() / ".config" / "pip").is_dir():  # the machine decides where packages come from
        shutil.copytree(config, home / ".config" / "pip")
    pins = (TOP / "constraints.txt").read_text(encoding="utf8").splitlines()
    ours = ("ipywidgets==", "widgetsnbextension==", "jupyterlab_widgets==")
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith(ours)), encoding="utf8")

    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    env |= {"HOME": str(home), "PIP_CONSTRAINT": str(constraints), "OMP_NUM_THREADS": "1", **address(tree)}
    base = Path(getattr(sys, "_base_executable", sys.executable))
    subprocess.run([base, "-m", "venv", place / "venv"], env=env, check=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PREINSTALLED], env=env, check=True)
    made = Colab(python, env | {"PATH": f"{python.parent}{os.pathsep}{env['PATH']}"}, committed)
    there = made.versions(home)
    assert there["ipywidgets"] == WIDGETS and not {"softshare", "altair"} & set(there)
    return made


@pytest.fixture
def folder(colab, tmp_path):
    """An empty folder, with softshare not installed."""
    subprocess.run(
        [colab.python, "-m", "pip", "uninstall", "-q", "-y", "softshare"], env=colab.env, capture_output=True
    )
    (tmp_path / "alone").mkdir()
    assert not colab.place(tmp_path / "alone")
    return tmp_path / "alone"


@pytest.mark.long
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_on_its_own_installs_the_package_and_runs_to_the_end(colab, folder, name):
    twin = shutil.copy(TOP / "book" / "notebooks" / f"{name}.ipynb", folder)
    output = folder.parent / "executed.ipynb"
    before = colab.versions(folder)
    done = colab.run(Path(twin), output)
    assert done.returncode == 0, done.stderr[-4000:]

    package = Path(colab.place(folder)).parent
    assert package.parent.name == "site-packages" and package.is_relative_to(colab.python.parents[1])
    after = colab.versions(folder)
    assert {each: after.get(each) for each in before} == before, "no installed package is replaced"
    cells = [cell for cell in json.loads(output.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [each for cell in cells for each in cell["outputs"]]
    assert outputs and not [each for each in outputs if each["output_type"] == "error"]
    live = [each for each in outputs if WIDGET in each.get("data", {})]
    assert len(live) == MOVING.get(name, 0), "pictures with sliders come as widgets, under ipywidgets 7.7.1 too"
    assert all('<figure class="moving"' in "".join(each["data"]["text/html"]) for each in live)

    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    written = {path for path in files if path.parent == Path("runs", "fast")}
    assert files - written == {Path(f"{name}.ipynb")}, "only records are left next to it"
    assert any(path.suffix == ".json" for path in written)

    if name == "results":  # it shows what came with the package: published figures, timings, committed records
        shown = json.dumps(outputs, ensure_ascii=False)
        paths = (path for path in (TOP / "data" / "benchmarks").glob("*.json") if not path.match(PATTERN))
        timing = next(paths).read_text(encoding="utf8")
        assert json.loads(timing)["machine"]["processor"] in shown
        assert "3.25 (1 run, paper, CIFAR-10 (JPEG))" in shown
        stem = colab.committed.path.stem
        shipped = {path.name for path in (package / "runs").iterdir()} - {"README.md"}
        ours = {path.name for path in (TOP / "data" / "runs").iterdir() if path.suffix in (".json", ".npz")}
        assert shipped == {f"{stem}.json", f"{stem}.npz"} | ours


@pytest.mark.long
def test_a_failed_install_stops_the_notebook_with_the_reason(colab, folder, tmp_path):
    twin = shutil.copy(TOP / "book" / "notebooks" / f"{TWINS[0]}.ipynb", folder)
    output = tmp_path / "executed.ipynb"
    done = colab.run(Path(twin), output, **address(tmp_path / "nowhere"))
    assert done.returncode
    cells = [cell for cell in json.loads(output.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]
    ran = [cell for cell in cells if cell["execution_count"]]
    (error,) = (each for cell in ran for each in cell["outputs"] if each["output_type"] == "error")
    assert "softshare was not installed" in error["evalue"] and not colab.place(folder)


def test_without_a_checkout_the_bundled_records_are_found(tmp_path, monkeypatch):
    own = tmp_path / "runs"
    monkeypatch.setattr("softshare.files.bundled_folder", lambda name: tmp_path / "bundled")
    assert find_records(own, bundled=True) == []
    made = commit_record(tmp_path / "bundled")
    assert made in find_records(own, profile="paper", bundled=True)
    assert made.similarity().coefficients
    assert find_records(own) == [], "only the user's own records without bundled=True"
    mine = commit_record(own)
    assert find_records(own, profile="paper", bundled=True) == [mine], (
        "the user's own record comes before the bundled one"
    )
