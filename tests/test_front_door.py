"""The commands in README and CONTRIBUTING do what these pages say; the workflow files are well formed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

TOP = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str, section: str = "") -> list[str]:
    text = (TOP / page).read_text(encoding="utf8")
    if section:
        text = re.search(rf"^## {re.escape(section)}$.*?(?=^## |\Z)", text, re.M | re.S)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_readmes_lines_work_on_a_users_own_model(capsys):
    (code,) = blocks("README.md", "python")
    assert len(code.strip().split("\n")) <= 10
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)]
    scope = {"model": nn.Sequential(*layers), "torch": torch}
    exec(code, scope)
    said = capsys.readouterr().out
    assert "1 -> 2" in said and "tensor(" in said
    x = torch.randn(2, 8, 5, 5)
    assert torch.allclose(scope["plain"](x), scope["smaller"](x), atol=1e-6)
    held = [sum(p.numel() for p in scope[name].parameters()) for name in ("model", "plain")]
    assert held[0] < held[1], "the shared model is the smaller one"


def test_every_file_that_the_front_pages_link_to_exists():
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (TOP / page).read_text(encoding="utf8")
        links = re.findall(r"\]\(([^)#][^)]*)\)", text) + re.findall(r'src="([^"]+)"', text)
        missing = [link for link in links if "://" not in link and not (TOP / link.split("#")[0]).exists()]
        assert links or page != "README.md"
        assert not missing


def test_commands_of_the_front_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(encoding="utf8"), re.M))
    for page in ("README.md", "CONTRIBUTING.md", ".github/workflows/publish.yml", ".ci/run"):
        text = (TOP / page).read_text(encoding="utf8")
        for line in re.findall(r"(?:^|`|run: )make ([a-z][a-z -]*)|^for target in ([a-z -]+);", text, re.M):
            line = "".join(line)
            assert set(line.split()) <= targets, (page, line)


def test_workflows_parse_as_intended():
    found = sorted((TOP / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in found] == ["publish", "test"]
    for path in found:
        flow = yaml.safe_load(path.read_text(encoding="utf8"))
        assert flow["permissions"]["contents"] == "read"
        for name, job in flow["jobs"].items():
            assert job["timeout-minutes"] <= 90, name
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), step


@pytest.fixture
def checkout(tmp_path):
    """A copy of the working tree as a checkout, with this environment as its .venv."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=TOP, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, files.split("\0")):
        if (TOP / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize(
    ("section", "made"),
    [
        ("Add a chapter", ["book/notebooks/05-mine.ipynb", "book/_build/executed/05-mine.ipynb"]),
        ("Add a model", ["softshare/models/mine.py", "tests/models/test_mine.py"]),
        ("Add a recipe", ["data/runs/fast"]),
    ],
)
def test_the_five_lines_of_each_recipe_for_contributors_run(checkout, section, made):
    (script,) = blocks("CONTRIBUTING.md", "bash", section)
    assert len(script.strip().split("\n")) == 5
    # The package of the copy comes before the installed one.
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("SOFTSHARE_DATA", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert all((checkout / path).exists() for path in made), done.stdout
    if section == "Add a chapter":
        assert "  - file: 05-mine\n" in (checkout / "book/_toc.yml").read_text()
        assert "05-mine.ipynb" in (checkout / "README.md").read_text(), "the table of chapters follows"
    if section == "Add a model":
        assert "1 passed" in done.stdout
    if section == "Add a recipe":
        assert len(list((checkout / "data/runs/fast").glob("wrn-16-4-fast-*.json"))) == 1
        told = re.findall(r"WRN 16-4, profile fast, seed 0, digits: trained in (.*)", done.stdout)
        assert len(told) == 2 and told[0] == told[1], "the second run only finds what the first one wrote"
