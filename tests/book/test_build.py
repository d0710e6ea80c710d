"""The executor and the renderer, on books of one tiny chapter."""

from __future__ import annotations

import ast
import json
import os
import re

import nbformat
import pytest
from build import BuildError, execute, is_current, main, parse_parameters, read_chapter, render, run_chapter

FAST = {"PROFILE": "fast"}
COUNT = "from pathlib import Path\nlog = Path('log.txt')\nlog.open('a').write('x')"


def times_run(project):
    return len((project.top / "book" / "log.txt").read_text())


def test_an_unchanged_chapter_is_skipped_and_a_changed_package_reruns_it(project, make_chapter):
    project.write("book/01-one.md", make_chapter(COUNT))
    assert execute(project.book, FAST) == ["01-one"]
    assert execute(project.book, FAST) == []
    assert times_run(project) == 1, "run in the folder book/, once"
    project.write("softshare/__init__.py", "value = 2\n")
    assert not is_current(project.book, "01-one", FAST)
    assert execute(project.book, FAST) == ["01-one"]
    assert times_run(project) == 2


def test_everything_that_a_result_depends_on_is_in_its_key(project, make_chapter, tmp_path_factory, monkeypatch):
    from build import chapter_key

    project.write("book/01-one.md", make_chapter("1 + 1"))
    (project.top / "data" / "runs").mkdir(parents=True)
    (project.top / "softshare" / "models").mkdir()
    (project.top / "data" / "cache").mkdir()
    images = tmp_path_factory.mktemp("images")
    keys = [chapter_key(project.book, "01-one", FAST)]

    def changed(**parameters):
        keys.append(chapter_key(project.book, "01-one", FAST | parameters))

    changed(SEED=1)
    project.write("book/01-one.md", make_chapter("1 + 2"))
    changed()
    project.write("softshare/models/wide.py", "")
    changed()
    project.write("softshare/digits.npz", "data")
    changed()
    project.write("constraints.txt", "torch==2.12.0\n")
    changed()
    project.write("data/runs/recipe-paper-s0-abc.json", "{}")
    changed()
    monkeypatch.setenv("SOFTSHARE_DATA", str(images))
    changed()
    (images / "cifar.tar").write_text("one")
    changed()
    os.utime(images / "cifar.tar", (1, 1))
    changed()
    (images / "train" / "cat").mkdir(parents=True)  # an image folder
    (images / "train" / "cat" / "0.png").write_text("one")
    changed()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (images / "test").symlink_to(elsewhere)
    (elsewhere / "0.png").write_text("one")
    changed()
    (elsewhere / "back").symlink_to(images)  # no end to it
    project.write("data/cache/cifar-10-binary.tar.gz", "a copy that softshare finds by itself")
    changed()
    monkeypatch.setattr("freshness.version", lambda name: "99.0")  # another package was installed
    changed()
    assert len(set(keys)) == len(keys)
    project.write("data/cache/images-0123-train.npz", "a decoded copy")
    project.write("data/cache/amx-0123.txt", "works")
    (project.top / "softshare" / "__pycache__").mkdir()
    project.write("softshare/__pycache__/wide.pyc", "")
    project.write("data/runs/recipe-fast-s0-abc.json", "{}")
    changed()
    assert keys[-1] == keys[-2], "compiled files, decoded copies and the chapters' own records change nothing"


def test_an_empty_data_folder_variable_means_unset(project, make_chapter, monkeypatch):
    from build import chapter_key

    project.write("book/01-one.md", make_chapter("1 + 1"))
    unset = chapter_key(project.book, "01-one", FAST)
    monkeypatch.setenv("SOFTSHARE_DATA", "")
    assert chapter_key(project.book, "01-one", FAST) == unset


def test_the_results_page_runs_last_and_again_after_a_chapter_has_changed(project, make_chapter):
    from build import chapter_key

    project.write("book/results.md", make_chapter("1"))
    project.write("book/zebra.md", make_chapter("2"))
    project.write("book/plain.md", "# No notebook\n")
    assert project.book.chapters() == ["zebra", "results"]
    before = chapter_key(project.book, "results", FAST)
    project.write("book/zebra.md", make_chapter("3"))
    assert chapter_key(project.book, "results", FAST) != before


@pytest.mark.parametrize("folder", ["runs", "benchmarks", "paper"])
def test_a_new_record_makes_the_results_page_run_again(project, make_chapter, folder):
    from build import chapter_key

    project.write("book/results.md", make_chapter("1"))
    before = chapter_key(project.book, "results", FAST)
    (project.top / "data" / folder).mkdir(parents=True)
    assert chapter_key(project.book, "results", FAST) == before
    project.write(f"data/{folder}/wrn-28-10-paper-s0-0123456789ab.json", "{}")
    assert chapter_key(project.book, "results", FAST) != before


def test_a_failing_chapter_fails_the_build_and_its_old_result_does_not_count(project, make_chapter, capsys):
    project.write("book/01-one.md", make_chapter("print('first edition')"))
    project.write("book/02-two.md", make_chapter("print('fine')"))
    execute(project.book, {})
    old = (project.book.output / "01-one.ipynb").read_text()
    project.write("book/01-one.md", make_chapter("print('second edition')", "raise ValueError('the reason')"))
    project.write("book/02-two.md", make_chapter("print('still fine')"))
    assert main(["--top", str(project.top), "all"]) == 1
    said = capsys.readouterr().err
    failed = project.book.output / "01-one.failed.ipynb"
    assert "01-one failed" in said and "ValueError: the reason" in said and str(failed) in said
    assert "second edition" in failed.read_text(), "kept for inspection"
    assert (project.book.output / "01-one.ipynb").read_text() == old
    assert not is_current(project.book, "01-one", {})
    assert is_current(project.book, "02-two", {}), "the other chapters still run"
    assert not project.book.html.exists()
    with pytest.raises(BuildError, match="no current result of 01-one"):
        render(project.book, {})


def test_a_damaged_result_is_not_current(project, make_chapter):
    project.write("book/01-one.md", make_chapter("1 + 1"))
    execute(project.book, FAST)
    result = project.book.output / "01-one.ipynb"
    result.write_text(result.read_text().replace("1 + 1", "1 + 7"))
    assert not is_current(project.book, "01-one", FAST)


def test_chapters_run_side_by_side_and_those_that_read_come_last(project, make_chapter, capsys):
    """Two chapters that wait for each other end only if both are at work at once."""
    meet = "import time, pathlib as p\np.Path('{}.here').touch()\nwhile not p.Path('{}.here').exists(): time.sleep(0.1)"
    project.write("book/01-one.md", make_chapter(meet.format("one", "two")))
    project.write("book/02-two.md", make_chapter(meet.format("two", "one")))
    project.write("book/results.md", make_chapter("open('one.here'), open('two.here')"))
    assert sorted(execute(project.book, FAST, jobs=2)) == ["01-one", "02-two", "results"]
    assert execute(project.book, FAST, jobs=2) == []
    project.write("book/01-one.md", make_chapter("1 / 0"))
    with pytest.raises(BuildError, match="ZeroDivisionError"):
        execute(project.book, FAST, jobs=2)
    assert "results: not run, since it reads" in capsys.readouterr().out


def test_parameters_reach_the_chapter(project, make_chapter):
    project.write("book/01-one.md", make_chapter("print('seed is', SEED + 1)"))
    made = run_chapter(project.book, "01-one", {"SEED": 41})
    assert "seed is 42" in made.read_text()


def test_an_unknown_parameter_is_an_error(project, make_chapter):
    project.write("book/01-one.md", make_chapter("1 + 1"))
    with pytest.raises(BuildError, match="01-one has no parameter SEEED; it has: PROFILE, SEED, RUNS"):
        run_chapter(project.book, "01-one", {"SEEED": 1})
    project.write("book/01-one.md", make_chapter("1 + 1", parameters=""))
    with pytest.raises(BuildError, match="no cell is tagged"):
        run_chapter(project.book, "01-one", {"SEED": 1})


def test_a_cell_that_takes_too_long_is_stopped(project, make_chapter):
    project.write("book/01-one.md", make_chapter("import time", "time.sleep(120)"))
    with pytest.raises(BuildError, match=r"01-one failed: CellTimeoutError: .*timed out"):
        run_chapter(project.book, "01-one", FAST, timeout=2)


def test_unknown_chapters_and_malformed_parameters_are_errors(project, make_chapter):
    project.write("book/01-one.md", make_chapter("1 + 1"))
    with pytest.raises(BuildError, match="no chapter 09-nine .* there are: 01-one"):
        execute(project.book, FAST, ["09-nine"])
    with pytest.raises(BuildError, match="NAME=VALUE"):
        parse_parameters(["SEED"])
    assert parse_parameters(["SEED=1", "PROFILE=gpu", "RUNS="]) == {"SEED": 1, "PROFILE": "gpu", "RUNS": ""}


@pytest.mark.long
def test_the_book_renders_and_a_warning_is_an_error(project, make_chapter, fork, capsys):
    project.write("book/_toc.yml", "format: jb-book\nroot: intro\nchapters:\n  - file: 01-one\n")
    project.write("book/intro.md", "# Welcome\n\nSee [the chapter](01-one.md).\n\n$$x^2$$\n")
    project.write("book/01-one.md", make_chapter("print('so it is')"))
    command = ["--top", str(project.top), "all"]
    assert main(command) == 0, capsys.readouterr().err
    page = (project.book.html / "01-one.html").read_text(encoding="utf8")
    assert "so it is" in page
    twin = f"https://colab.research.google.com/github/{fork}/blob/main/book/notebooks/01-one.ipynb"
    opens = re.findall(rf'<a [^>]*href="{twin}"[^>]*>(.*?)</a>', page, flags=re.S)
    assert len(opens) == 2, "the theme's launch button, and the badge below the title"
    assert sum('alt="Open in Colab"' in inside for inside in opens) == 1
    assert "unchanged" not in capsys.readouterr().out
    assert main(command) == 0
    assert "book: unchanged" in capsys.readouterr().out
    # Everything that a page loads is stored next to it, so it can be read without a network.
    for path in project.book.html.glob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe)[^>]*src=[^>]*>|<link[^>]*stylesheet[^>]*>", path.read_text("utf8"))
        assert not [tag for tag in tags if "//" in tag], path.name

    project.write("book/intro.md", "# Welcome\n\nSee {doc}`no-such-page`.\n")
    for _ in range(2):  # a second attempt must not pass because the first one cached the page
        assert main(command) == 1
        assert "no-such-page" in capsys.readouterr().err


def test_parameters_cells_hold_literals_only(top):
    from build import Book

    for name in Book(top).chapters():
        cells = read_chapter(top / "book" / f"{name}.md").cells
        tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1, f"{name} has {len(tagged)} cells tagged parameters"
        names = set()
        for statement in ast.parse(tagged[0]).body:
            assert isinstance(statement, ast.Assign), f"{name}: {ast.unparse(statement)}"
            ast.literal_eval(statement.value)
            names |= {ast.unparse(target) for target in statement.targets}
        assert names >= {"PROFILE", "SEED", "RUNS"}, name


def test_the_book_holds_no_outputs_and_no_page_twice(top):
    sources = {path.stem for path in (top / "book").glob("*.md")}
    assert not [p.name for p in (top / "book").glob("*.ipynb")], "a notebook next to its source"
    for path in (top / "book" / "notebooks").glob("*.ipynb"):
        assert path.stem in sources
        notebook = json.loads(path.read_text(encoding="utf8"))
        nbformat.validate(notebook)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None, path.name
