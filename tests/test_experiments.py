"""Records: complete, found again, refused when changed; the tables that are made from them; the processor check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import softshare
from softshare import benchmark, experiments, images, models, processor, recipes, records, report
from softshare.tasks import Classification
from softshare.training import Settings


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    train, test = (images.load("digits", split).shrunk(4) for split in ("train", "test"))
    task = Classification(train.split(64)[0], test.split(32)[0])
    data = {"source": train.source, "fingerprint": train.fingerprint}
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = models.swrn(16, 1)
    settings = Settings(epochs=2, batch_size=32)
    return experiments.train(
        "SWRN 16-1*", model, task, settings, profile="fast", data=data, runs=folder, progress=False, device="cpu"
    ), model


def test_a_record_says_what_was_run(record):
    found, model = record
    assert found.path.name == f"swrn-16-1-dropout-fast-s0-{found.hash}.json"
    assert found.config["parameters"] == sum(p.numel() for p in model.parameters())
    assert found.config["banks"] == {"stage1": [2, 2], "stage2": [2, 2], "stage3": [2, 2]}
    assert found.config["settings"]["epochs"] == 2 and len(found.history) == 2
    assert found.metrics["held_out_accuracy"] == found.history[-1]["held_out_accuracy"]
    wanted = {"device", "hardware", "precision", "torch", "numpy", "python", "softshare", "revision", "dirty", "date"}
    assert wanted | {"seconds", "cores", "threads"} <= set(found.environment)
    assert found.environment["seconds"] > 0
    assert records.read_record(found.path) == found
    assert records.find_records(found.path.parent, "SWRN 16-1*", "fast") == [found]
    assert records.find_records(found.path.parent, "WRN 16-1") == []
    assert not list(found.path.parent.glob("*.part"))


def test_snapshots_of_another_run_are_refused(record, tmp_path):
    for suffix in (".json", ".npz"):
        shutil.copy(record[0].path.with_suffix(suffix), tmp_path / f"x{suffix}")
    found = records.read_record(tmp_path / "x.json")
    assert found.similarity().steps == [0, 1, 2]
    other = softshare.SimilarityRecorder()
    other.record(models.swrn(16, 1), 0)
    other.save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="its checksum is another"):
        found.similarity()


def test_a_record_says_whether_the_package_was_changed(tmp_path, monkeypatch):
    """A real checkout: records beside the package do not make it dirty, a changed module does."""
    (tmp_path / "softshare").mkdir()
    for name in ("pyproject.toml", "softshare/records.py", "softshare/__init__.py"):
        (tmp_path / name).write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "softshare" / "records.py"))
    (tmp_path / "record.json").write_text("{}")
    assert records.environment()["dirty"] is False and len(records.environment()["revision"]) == 40
    (tmp_path / "softshare" / "records.py").write_text("x = 1")
    assert records.environment()["dirty"] is True


def test_similarities_come_with_the_record(record):
    found, model = record
    last = found.similarity().matrices()["stage2"][-1]
    np.testing.assert_allclose(last, softshare.similarity_matrices(model)["stage2"].cpu(), atol=1e-6)
    assert found.similarity().steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["config"].update(epochs=3), "changed by hand"),
        (lambda fields: fields.update(seed=1), "changed by hand"),
        (lambda fields: fields.pop("metrics"), "'metrics' is missing"),
        (lambda fields: fields.update(history={}), "'history' is missing or no list"),
        (lambda fields: fields.update(format="other"), "not a record of format"),
        (lambda fields: fields["metrics"].update(held_out_accuracy=99.9), "changed by hand"),
        (lambda fields: fields["environment"].update(hardware="better"), "changed by hand"),
    ],
)
def test_a_changed_record_is_refused(record, tmp_path, change, message):
    fields = json.loads(record[0].path.read_text())
    change(fields)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        records.read_record(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="changed.json is not a record"):
        records.read_record(path)


def test_the_hash_is_of_what_decides_the_outcome():
    base = ("a", "fast", 0, {"x": 1, "y": 2}, {"fingerprint": "f"})
    same = records.run_hash("a", "fast", 0, {"y": 2, "x": 1}, {"fingerprint": "f"})
    assert records.run_hash(*base) == same
    for place, other in enumerate(("b", "gpu", 1, {"x": 2}, {"fingerprint": "g"})):
        changed = [*base[:place], other, *base[place + 1 :]]
        assert records.run_hash(*changed) != same  # type: ignore[arg-type]


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fast, gpu, paper"):
        records.write_record("x", profile="huge", seed=0, config={}, metrics={}, runs=tmp_path)


def test_tables_hold_the_posters_figures():
    cifar = {row["model"]: row for row in report.paper_table("cifar")}
    assert cifar["SWRN 28-10-2*"]["cifar10_error"] == "3.75" and cifar["SWRN 28-18*"]["cifar100_error"] == "17.43"
    assert len(cifar) == 11 and len(report.paper_table("imagenet")) == 4 and len(report.paper_table("search")) == 12
    assert all(row["source"].startswith("poster") for name in report.TABLES for row in report.paper_table(name))
    with pytest.raises(ValueError, match="cifar, imagenet, search"):
        report.paper_table("mnist")


def test_only_runs_at_the_papers_schedule_fill_a_cell(tmp_path):
    def run(profile, seed, error, source="CIFAR-10 (JPEG)", **change):
        config = recipes.plan("SWRN 28-10-2*", profile, seed).config() | change
        data = {"source": source}
        records.write_record(
            "SWRN 28-10-2*",
            profile=profile,
            seed=seed,
            config=config,
            data=data,
            metrics={"error": error},
            runs=tmp_path,
        )

    def cell():
        return report.measured(records.find_records(tmp_path), "SWRN 28-10-2*", "error", "CIFAR-10")

    run("fast", 0, 60.0)
    run("gpu", 0, 6.0)
    run("paper", 0, 17.0, "CIFAR-100")
    run("paper", 0, 9.0, cutout=16)  # not the recipe's
    assert cell() == "not run"
    run("paper", 0, 3.0)
    assert cell() == "3.00 (1 run, paper, CIFAR-10 (JPEG))"
    run("paper", 1, 4.0)
    assert cell() == "3.50 ± 0.71 (2 runs, paper, CIFAR-10 (JPEG))"
    found = next(iter(tmp_path.glob("*-paper-s1-*.json")))
    shutil.copy(found, tmp_path / "a-copy.json")  # counts once
    run("paper", 2, 5.0, "CIFAR-10")
    assert cell() == "5.00 (1 run, paper, CIFAR-10); 3.50 ± 0.71 (2 runs, paper, CIFAR-10 (JPEG))"


def test_html_is_escaped():
    assert "<b>" not in report.as_html([{"a<b>": "<b>x"}], "<b>") + report.finding("<b>")


def test_the_processor_check_keeps_a_given_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor.avoid_crashing_units(tmp_path) is False
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2" and not list(tmp_path.iterdir())


def test_bfloat16_products_survive_after_the_import():
    """The crash that the check is for kills the interpreter, so it is looked for in another one."""
    code = "import softshare, torch; torch.ones(128, 256).bfloat16() @ torch.ones(256, 256).bfloat16()"
    clean = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    assert subprocess.run([sys.executable, "-c", code], env=clean, timeout=120).returncode == 0


def test_the_core_needs_torch_numpy_and_matplotlib_alone():
    """Everything else is imported where it is used."""
    code = """
import sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tqdm", "pooch", "safetensors", "IPython", "ipywidgets", "sklearn"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import softshare, softshare.training, softshare.experiments, softshare.plotting, softshare.report, softshare.benchmark
import softshare.cli, softshare.gpu_list, softshare.streaming
softshare.images.load("digits", "train")
softshare.fold(softshare.models.swrn(16, 1), 0.5)
softshare.shortest_path.generate(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bad_input_is_found_before_the_training(record, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("trained"))
    task = Classification(images.load("digits", "train"), images.load("digits", "test"))
    good = {"profile": "fast", "data": {}, "runs": tmp_path}
    with pytest.raises(ValueError, match="fast, gpu, paper"):
        experiments.train("x", record[1], task, Settings(epochs=1), **(good | {"profile": "quick"}))
    with pytest.raises(TypeError, match="JSON"):
        experiments.train("x", record[1], task, Settings(epochs=1), **(good | {"config": {"x": np.float32(1)}}))
    with pytest.raises(ValueError, match="fast, gpu, paper"):
        records.find_records(tmp_path, profile="quick")


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs Linux")
def test_the_processor_check_works_without_a_place_to_remember(monkeypatch):
    outcomes = []
    for status in (-4, 0):  # killed by SIGILL; fine
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(processor.subprocess, "run", lambda *_, s=status, **__: subprocess.CompletedProcess([], s))
        monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(processor.Path, "read_text", lambda path, **_: _cpuinfo(path))
        outcomes.append(processor.avoid_crashing_units(processor.Path("/proc/nowhere")))
    assert outcomes == [True, False]


def _cpuinfo(path):
    if str(path) == "/proc/cpuinfo":
        return "flags : sse amx_bf16 amx_tile\n"
    if path.name == "boot_id":
        return "1234\n"
    raise FileNotFoundError(path)


@pytest.mark.long
def test_an_installed_package_brings_its_data(tmp_path):
    """What the chapters read travels in the wheel: no checkout is at hand on Colab."""
    top = Path(__file__).resolve().parents[1]
    source = tmp_path / "source"
    shutil.copytree(top, source, ignore=shutil.ignore_patterns(".*", "book", "tests", "cache", "fast", "*.egg-info"))
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(install, check=True, timeout=300)
    shutil.rmtree(source)
    code = """
import softshare, sys
from softshare import records, report
assert softshare.__file__.startswith(sys.argv[1]), softshare.__file__
assert len(report.paper_table("cifar")) == 11
assert len(softshare.images.load("digits", "test").labels) == 360
record = records.write_record("x", profile="fast", seed=0, config={}, metrics={})
assert record.environment["revision"] is None and record.path.parent.as_posix().endswith("runs/fast")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]){code}", str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_speeds_show_the_median_and_the_range():
    record = {"ratios": {"a / b": [1.0, 0.5, 1360.4]}, "generator": {"ratios": {"c / d": [3.0, 2.0, 4.0]}}}
    rows = report.speeds(record)
    assert rows[0] == {"ratio": "a / b", "median": "1", "range": "0.5 to 1360"}
    assert rows[1] == {"ratio": "c / d", "median": "3", "range": "2 to 4"}


def test_the_speeds_in_the_readme_are_those_of_the_record():
    top = Path(__file__).resolve().parents[1]
    text = " ".join((top / "README.md").read_text(encoding="utf-8").split())
    (path,) = re.findall(r"\[record\]\((data/benchmarks/[^)]+)\)", text)
    ratios = benchmark.load_benchmark(top / path)["ratios"]
    assert f"takes {ratios['ours / plain'][0]:.2f} times the plain network's" in text
    assert f"the authors' scheme {ratios['authors / ours'][0]:.2f} times ours" in text
