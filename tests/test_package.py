"""The package as a whole: what it imports, what it includes when installed, and how its files are laid out."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
PACKAGE = TOP / "softshare"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a module imports from its own folder and from those listed before it.
FLOORS = ("", "models", "images", "training", "speed", "studies", "pictures")
METHOD = ("bank", "sharing", "similarity", "folding", "folded", "shortest_path")
METHOD_MODELS = ("blocks", "wide_resnet", "grid")


def module_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports_of(path: Path) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every import of our own in a file, wherever it is: the module's parts within the package, and the names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = module_of(path)[: -node.level]
            names = tuple(alias.name for alias in node.names)
            base = here + tuple((node.module or "").split(".") if node.module else ())
            found.append((base, names))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "softshare" not in ast.unparse(node).split("import")[0], f"{path}: imports are relative"
    return found


def targets_of(path: Path) -> set[tuple[str, ...]]:
    """The files of the package that a file imports from."""
    found = set()
    for base, names in imports_of(path):
        for name in names:
            for parts in ((*base, name), base, (*base, "__init__")):
                if PACKAGE.joinpath(*parts).with_suffix(".py").is_file():
                    found.add(parts)
                    break
    return found


def test_no_file_imports_from_a_folder_above_its_own():
    for path in FILES:
        here = module_of(path)
        if here[0] in ("cli", "__init__", "__main__"):
            continue
        floor = FLOORS.index(here[0] if len(here) > 1 else "")
        for target in targets_of(path):
            below = target[0] if len(target) > 1 else ""
            # The blocks that a plan's loops are made of count as method.
            assert FLOORS.index(below) <= floor or target == ("models", "blocks"), f"{path} imports {target}"


def test_there_are_no_import_cycles():
    edges = {module_of(path): targets_of(path) - {("__init__",)} for path in FILES}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> None:
        assert module not in above, f"an import cycle: {[*above, module]}"
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_no_private_name_of_another_module_is_used():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        taken = [
            name for _, names in imports_of(path) for name in names if name.startswith("_") and name != "__version__"
        ]
        assert not taken, f"{path} uses {taken}"
        modules = {name for base, names in imports_of(path) for name in names if (*base, name) in map(module_of, FILES)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not node.attr.startswith("_"), f"{path}: {node.value.id}.{node.attr}"


def length_without_docstring(node: ast.AST) -> int:
    doc = node.body[0] if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant) else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


@pytest.mark.parametrize("path", [*FILES, *sorted((TOP / "book").glob("*.py"))], ids=lambda path: path.name)
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the first line says what the file is for"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert length_without_docstring(node) <= 60, node.name
        if isinstance(node, ast.ClassDef):
            assert length_without_docstring(node) <= 250, node.name


def test_the_method_is_read_in_an_evening():
    paths = [PACKAGE / f"{name}.py" for name in METHOD] + [PACKAGE / "models" / f"{name}.py" for name in METHOD_MODELS]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= 2_150


def test_every_module_has_its_tests():
    """Tests mirror the package; a file without its own test file is tested with its neighbour, as listed here."""
    elsewhere = {
        ("arguments",): "test_bank.py",
        ("models", "blocks"): "test_folded.py",
        ("images", "sets"): "images/test_loading.py",
        ("pictures", "charts"): "pictures/test_mixing_chart.py",
        ("speed", "records"): "speed/test_benchmark.py",
        ("speed", "steps"): "speed/test_benchmark.py",
    }
    for path in FILES:
        parts = module_of(path)
        if parts[-1].startswith("__"):
            continue
        name = elsewhere.get(parts) or str(Path(*parts[:-1]) / f"test_{parts[-1]}.py")
        assert (TOP / "tests" / name).is_file(), f"no tests of {path}"


def test_the_api_page_has_every_module():
    page = (TOP / "book" / "api.md").read_text(encoding="utf-8")
    modules = {".".join(("softshare", *module_of(path))) for path in FILES if not module_of(path)[-1].startswith("__")}
    shown = {line.split(" ")[-1] for line in page.splitlines() if line.startswith(".. automodule::")}
    assert shown == modules - {"softshare.cli"}


def test_the_core_needs_only_torch_numpy_pillow_and_matplotlib():
    """Everything else is imported where it is used."""
    code = """
import sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tqdm", "pooch", "safetensors", "IPython", "ipywidgets", "altair", "sklearn", "scipy"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import softshare, softshare.training.streaming, softshare.studies, softshare.pictures, softshare.speed.benchmark
import softshare.cli, softshare.studies.gpu_list, softshare.studies.tables
softshare.images.load("digits", "train")
softshare.fold(softshare.models.swrn(16, 1), 0.5)
softshare.shortest_path.generate(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_an_installed_package_includes_its_data(tmp_path):
    """The wheel includes what the chapters read, as there is no checkout on Colab."""
    source = tmp_path / "source"
    shutil.copytree(TOP, source, ignore=shutil.ignore_patterns(".*", "book", "tests", "cache", "fast", "*.egg-info"))
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(install, check=True, timeout=300)
    shutil.rmtree(source)
    code = """
import softshare, sys
from softshare import pictures
from softshare.studies import Identity, tables, write_record
assert softshare.__file__.startswith(sys.argv[1]), softshare.__file__
assert len(tables.paper_table("cifar")) == 11 and tables.benchmarks()
assert len(softshare.images.load("digits", "test").labels) == 360
pictures.use_style()
record = write_record(Identity("book", 1, "x", "fast", 0), {})
assert record.execution["revision"] is None and record.path.parent.as_posix().endswith("runs/fast")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]){code}", str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
