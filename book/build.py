"""Runs the chapters and renders the book.

    python book/build.py execute [-p PROFILE=gpu] [NAME ...]   chapters -> executed notebooks
    python book/build.py render                                executed notebooks -> book/_build/html
    python book/build.py all                                   both
    python book/build.py twins [--check]                       chapters -> output-free book/notebooks/*.ipynb, badges

A chapter is a book/*.md with a kernelspec in its front matter. jupytext turns it into a notebook, papermill runs it in
the folder book/, and Jupyter Book shows the result without executing anything. A chapter is not run again as long as
its source, the package, the pinned versions, the parameters and the data are those of its last successful run,
according to the key next to its notebook.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from freshness import (
    chapter_key,
    data_folder,
    digest_of,
    file_digest,
    installed,
    is_current,
    last_time,
    remember,
    tree_digest,
)
from places import READERS, Book, read_chapter

#: Seconds that one cell may take, by profile; --timeout overrides it.
TIMEOUTS = {"fast": 300, "gpu": 4 * 3600, "short": 24 * 3600, "paper": 14 * 24 * 3600}


class BuildError(Exception):
    """A problem that the user can fix; shown without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Execute


def check_parameters(source: Path, name: str, parameters: Mapping[str, Any]) -> None:
    """Raise BuildError for parameters that a chapter does not have; papermill only warns about them."""
    import papermill

    known = papermill.inspect_notebook(str(source))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        has = ", ".join(known) or "none (no cell is tagged `parameters`)"
        raise BuildError(f"{name} has no parameter {', '.join(unknown)}; it has: {has}")


def run_chapter(
    book: Book, name: str, parameters: Mapping[str, Any], timeout: float | None = None, output: Path | None = None
) -> Path:
    """Run one chapter from its source, whatever was run before, and return the path of the executed notebook.

    A failed run keeps an earlier result, but without its key, and saves its own notebook as NAME.failed.ipynb.
    """
    import nbformat
    import papermill

    if not (book.folder / f"{name}.md").is_file():
        raise BuildError(f"no chapter {name} in {book.folder}; there are: {', '.join(book.chapters())}")
    output = output or book.output
    output.mkdir(parents=True, exist_ok=True)
    final, failed, stamp = (output / f"{name}{end}" for end in (".ipynb", ".failed.ipynb", ".key"))
    source, partial = output / f".{name}.source.ipynb", output / f".{name}.partial.ipynb"
    nbformat.write(read_chapter(book.folder / f"{name}.md"), source)
    try:
        check_parameters(source, name, parameters)
        stamp.unlink(missing_ok=True)
        failed.unlink(missing_ok=True)
        papermill.execute_notebook(
            source,
            partial,
            parameters=dict(parameters),
            cwd=book.folder,
            kernel_name="python3",
            progress_bar=False,
            start_timeout=120,
            extra_arguments=["--log-level=ERROR"],
            execution_timeout=timeout or TIMEOUTS.get(str(parameters.get("PROFILE", "fast")), TIMEOUTS["fast"]),
        )
        os.replace(partial, final)
    except BuildError:
        raise
    except Exception as error:
        where = ""
        if partial.is_file():
            os.replace(partial, failed)
            where = f"\n  the notebook up to that point: {failed}"
        raise BuildError(f"{name} failed: {explain(error)}{where}") from error
    finally:
        source.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return final


def explain(error: Exception) -> str:
    """Which cell failed, and with what error."""
    if hasattr(error, "ename"):  # papermill's PapermillExecutionError
        lines = "\n".join(f"    {line}" for line in error.source.strip().split("\n")[:12])  # type: ignore[attr-defined]
        return f"cell [{error.exec_count}] raised {error.ename}: {error.evalue}\n{lines}"  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {str(error).strip()}"


def execute(
    book: Book, parameters: Mapping[str, Any], names: Sequence[str] = (), timeout: float | None = None, jobs: int = 1
) -> list[str]:
    """Run the chapters that have no current result, so many at a time, and return their names.

    All are tried before a failure is raised; those that read what the others write come last.
    """
    chapters = [n for n in book.chapters() if not names or n in names]
    unknown = sorted(set(names) - set(chapters))
    if unknown or not chapters:
        there = ", ".join(book.chapters()) or "none"
        raise BuildError(f"no chapter {', '.join(unknown)} in {book.folder}; there are: {there}")
    prepare_kernels(str(parameters.get("PROFILE", "fast")))
    ran: list[str] = []
    failures: list[str] = []
    begin = time.monotonic()

    def bring_up_to_date(name: str) -> None:
        label = f"[{chapters.index(name) + 1}/{len(chapters)}] {name}"
        if is_current(book, name, parameters):
            say(f"{label}: unchanged")
            return
        if failures and name in READERS:
            say(f"{label}: not run, since it reads what the failed chapters should have written")
            return
        due = [other for other in chapters[chapters.index(name) :] if not is_current(book, other, parameters)]
        left = sum(last_time(book, other) for other in due) / jobs
        say(f"{label}: running ..." + (f" (about {left:.0f} s left in all)" if last_time(book, name) else ""))
        start = time.monotonic()
        key = chapter_key(book, name, parameters)  # computed before the run, so that an edit during it is noticed
        try:
            run_chapter(book, name, book.parameters_of(name, parameters), timeout)
        except BuildError as error:
            failures.append(str(error))
            say(f"{label}: FAILED after {time.monotonic() - start:.1f} s")
            return
        remember(book, name, key, time.monotonic() - start)
        ran.append(name)
        say(f"{label}: {time.monotonic() - start:.1f} s")

    for some in ([n for n in chapters if n not in READERS], [n for n in chapters if n in READERS]):
        if jobs == 1:
            for name in some:
                bring_up_to_date(name)
        else:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(bring_up_to_date, some))
    say(f"chapters: {len(ran)} run, {time.monotonic() - begin:.1f} s, in {book.output}")
    if failures:
        raise BuildError("\n".join(failures))
    return ran


@cache
def prepare_kernels(profile: str = "fast") -> None:
    """Give every kernel this environment first, an absolute data folder, a ready font cache, and few threads."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # The networks of profile fast are so small that a second thread costs more than it gains, especially while other
    # programs use the processor too, since threads spin while they wait for each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if profile == "fast":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if data_folder() is not None:
        os.environ["SOFTSHARE_DATA"] = str(data_folder())
    # On its first import, matplotlib may announce that it is building its font cache, which belongs on no page.
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], capture_output=True, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# Render


def assemble(book: Book, parameters: Mapping[str, Any]) -> Path:
    """Make the folder that Jupyter Book reads: plain pages and pictures as they are, chapters as executed notebooks.

    Links between chapters, written NAME.md in the sources, become NAME.ipynb, the file in this folder. A badge below
    the title of each chapter opens its twin.
    """
    import nbformat
    import vl_convert
    from twins import BADGE, read_site, under_title

    stale = [n for n in book.chapters() if not is_current(book, n, parameters)]
    if stale:
        raise BuildError(f"no current result of {', '.join(stale)}: run `python book/build.py execute` first")
    site, source = read_site(book.top), book.build / "source"
    copy_pages(book, source)
    (source / "_static").mkdir(exist_ok=True)
    # Draws the interactive charts; a page that has one loads it. It gets its own scope, so that no name clashes with
    # one of the theme's.
    vega = "(() => {" + vl_convert.javascript_bundle() + "})();\n"  # type: ignore[call-arg]
    (source / "_static" / "vega.js").write_text(vega, encoding="utf8")
    for name in book.chapters():
        notebook = nbformat.read(book.output / f"{name}.ipynb", as_version=4)
        strip_notebook(notebook)
        text = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        for cell in text[:1]:
            cell.source = under_title(cell.source, site.badge(name, BADGE))
        for cell in text:
            cell.source = link_notebooks(book, cell.source)
        nbformat.write(notebook, source / f"{name}.ipynb")
    return source


def copy_pages(book: Book, source: Path) -> None:
    """Copy everything in the book's folder except chapters, programs and what is made from them."""
    made = {book.build.name, book.twins.name, "__pycache__", ".ipynb_checkpoints"}
    chapters = {f"{name}.md" for name in book.chapters()}

    def unwanted(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != book.folder:
            return {"__pycache__", ".ipynb_checkpoints"}
        return made | chapters | {n for n in names if n.endswith(".py")}

    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(book.folder, source, ignore=unwanted)
    for page in source.glob("*.md"):
        page.write_text(link_notebooks(book, page.read_text(encoding="utf8")), encoding="utf8")


def link_notebooks(book: Book, text: str) -> str:
    """A page's Markdown with its links to chapters leading to the notebooks."""
    chapters = "|".join(map(re.escape, book.chapters()))
    return re.sub(rf"(\]\((?:\./)?(?:{chapters}))\.md(?=[#)])", r"\1.ipynb", text)


def strip_notebook(notebook: Any) -> None:
    """Remove what a page cannot use or should not reveal."""
    notebook.metadata.pop("papermill", None)  # holds local paths, and the site offers the notebook
    notebook.metadata.pop("widgets", None)  # a page has no kernel: it shows the chart that comes with each widget
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def render(book: Book, parameters: Mapping[str, Any]) -> Path:
    """Build the site, treating every warning as an error; an unchanged site is not built again."""
    source = assemble(book, parameters)
    key, stamp = site_key(book, source), book.build / "html.key"
    if stamp.is_file() and stamp.read_text(encoding="utf8") == key and (book.html / "index.html").is_file():
        say(f"book: unchanged, {book.html / 'index.html'}")
        return book.html
    say("book: rendering ...")
    start = time.monotonic()
    stamp.unlink(missing_ok=True)
    made = run_jupyter_book(book, source)
    shutil.rmtree(book.html, ignore_errors=True)
    os.replace(made, book.html)
    shutil.rmtree(book.build / "render")
    stamp.write_text(key, encoding="utf8")
    say(f"book: {time.monotonic() - start:.1f} s, {book.html / 'index.html'}")
    return book.html


def site_key(book: Book, source: Path) -> str:
    """Everything that the site depends on, as one hash."""
    tools = [installed(n) for n in ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "vl-convert-python")]
    scripts = [file_digest(path) for path in sorted(book.folder.glob("*.py"))]  # the builder and Sphinx's extensions
    settings = [file_digest(book.top / name) for name in ("_config.yml", "constraints.txt")]
    return digest_of([tree_digest(source), tree_digest(book.package), settings, scripts, tools])


def run_jupyter_book(book: Book, source: Path) -> Path:
    """Render the pages in a separate folder and return the folder with the result."""
    # Always from scratch: a second, incremental build would not repeat the warnings that failed the first.
    place, config = book.build / "render", book.top / "_config.yml"
    shutil.rmtree(place, ignore_errors=True)
    options = ["--path-output", place, "--config", config, "--toc", source / "_toc.yml", "-n", "-W", "--keep-going"]
    jupyter_book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    done = subprocess.run(
        [*jupyter_book, "build", str(source), *map(str, options)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"},
        check=False,
    )
    log = book.build / "render.log"
    log.write_text(done.stdout, encoding="utf8")
    if done.returncode:
        lines = done.stdout.split("\n")
        told = [line for line in lines if any(word in line for word in ("WARNING", "ERROR", "Error"))]
        raise BuildError("\n".join(["rendering failed:", *(told or lines[-20:]), f"full log: {log}"]))
    return place / "_build" / "html"


# ---------------------------------------------------------------------------------------------------------------------
# Twins


def write_twins(book: Book, check: bool = False) -> list[str]:
    """Write the twins and the README's table of chapters; with `check`, only return the names of outdated files."""
    from twins import TwinError, make_twins, read_site, with_badges

    readme = book.top / "README.md"
    try:
        made = make_twins(book.top, {name: read_chapter(book.folder / f"{name}.md") for name in book.chapters()})
        wanted = {book.twins / f"{name}.ipynb": text for name, text in made.items()}
        if readme.is_file():
            sources = {name: (book.folder / f"{name}.md").read_text(encoding="utf8") for name in made}
            wanted[readme] = with_badges(readme.read_text(encoding="utf8"), read_site(book.top), sources)
    except TwinError as error:
        raise BuildError(str(error)) from error
    stray = sorted(set(book.twins.glob("*.ipynb")) - set(wanted))
    differing = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf8") != text]
    if not check:
        book.twins.mkdir(exist_ok=True)
        for path in stray:
            path.unlink()
        for path in differing:
            path.write_text(wanted[path], encoding="utf8")
    return [path.stem for path in differing + stray]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def say(text: str) -> None:
    print(text, flush=True)


def parse_parameters(given: Iterable[str]) -> dict[str, Any]:
    """["SEED=1", "PROFILE=gpu"] -> {"SEED": 1, "PROFILE": "gpu"}; values are YAML scalars."""
    parameters = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise BuildError(f"a parameter must have the form NAME=VALUE, got {text!r}")
        parameters[name] = yaml.safe_load(value) if value else ""
    return parameters


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--top", type=Path, default=Path(__file__).resolve().parents[1], help="the project's top folder"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("execute", "render", "all"):
        command = commands.add_parser(name)
        command.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
        command.add_argument("--output", type=Path, help="where executed notebooks go")
        if name != "render":
            command.add_argument("--jobs", type=int, default=1, help="chapters to run at a time (default: 1)")
            command.add_argument("--timeout", type=float, help=f"seconds a cell may take (default: {TIMEOUTS})")
        what = "chapters to run in profile fast whatever -p says, separated by commas"
        command.add_argument("--in-fast", default="", metavar="NAMES", help=what)
        if name == "execute":
            command.add_argument("names", nargs="*", metavar="NAME", help="chapters to run (default: all)")
    twins = commands.add_parser("twins")
    twins.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    options = parser.parse_args(arguments)
    try:
        if options.command == "twins":
            names = write_twins(Book(options.top), options.check)
            if options.check and names:
                raise BuildError(f"out of date with the chapters or the address: {', '.join(names)}; run `make twins`")
            say(f"twins: {', '.join(names) or 'up to date'}")
            return 0
        in_fast = list(filter(None, options.in_fast.split(",")))
        book, parameters = Book(options.top, options.output, in_fast), parse_parameters(options.parameters)
        if options.command in ("execute", "all"):
            execute(book, parameters, getattr(options, "names", ()), options.timeout, max(1, options.jobs))
        if options.command in ("render", "all"):
            render(book, parameters)
        return 0
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
