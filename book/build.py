"""Runs the chapters and renders the book.

    python book/build.py execute [-p PROFILE=gpu] [NAME ...]   chapters -> executed notebooks
    python book/build.py render                                executed notebooks -> book/_build/html
    python book/build.py all                                   both
    python book/build.py twins [--check]                       chapters -> output-free book/notebooks/*.ipynb, badges

A chapter is a book/*.md with a kernelspec in its head; jupytext turns it into a notebook, papermill runs it in the
folder book/, Jupyter Book shows what came out and executes nothing. A chapter whose source, package, pinned versions,
parameters and data are those of its last successful run is not run again: the key beside its notebook says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

#: Seconds that one cell may take, by profile; --timeout overrides it.
TIMEOUTS = {"fast": 300, "gpu": 4 * 3600, "paper": 14 * 24 * 3600}

#: Pages that read the records which the other chapters write: run last, and again whenever one of those ran again.
READERS = ("results",)


class BuildError(Exception):
    """Something that the person at the keyboard can mend; shown without a traceback."""


class Book:
    """Where things are. Everything hangs on the project's top folder, so tests can build a book of their own."""

    def __init__(self, top: Path, output: Path | None = None) -> None:
        self.top = top.resolve()
        #: Where executed notebooks and their keys go.
        self.output = output.resolve() if output else self.build / "executed"

    @property
    def folder(self) -> Path:
        return self.top / "book"

    @property
    def build(self) -> Path:
        return self.folder / "_build"

    @property
    def html(self) -> Path:
        return self.build / "html"

    @property
    def package(self) -> Path:
        return self.top / "softshare"

    @property
    def twins(self) -> Path:
        return self.folder / "notebooks"

    def chapters(self) -> list[str]:
        """Names of the notebook pages, by name, those that read the others' records last."""
        names = sorted(path.stem for path in self.folder.glob("*.md") if "kernelspec" in front_matter(path))
        return [n for n in names if n not in READERS] + [n for n in names if n in READERS]


def front_matter(page: Path) -> dict[str, Any]:
    """The YAML between the two `---` lines that may open a page."""
    lines = page.read_text(encoding="utf8").split("\n")
    if lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    return yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])) or {}


def read_chapter(page: Path) -> Any:
    """The notebook that a chapter's MyST source stands for."""
    import jupytext

    return jupytext.read(page, fmt="md:myst")


# ---------------------------------------------------------------------------------------------------------------------
# When is a result still good?


def data_folder() -> Path | None:
    """$SOFTSHARE_DATA as an absolute path; empty means unset."""
    given = os.environ.get("SOFTSHARE_DATA", "")
    return Path(given).expanduser().resolve() if given else None


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def tree_digest(folder: Path) -> list[list[str]]:
    """Path and content of every file in a folder, compiled files aside."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [[p.relative_to(folder).as_posix(), file_digest(p)] for p in files]


def record_digest(book: Book) -> list[list[str]]:
    """The published figures, timings and committed records. Those of profile fast are made by the chapters themselves."""
    data = book.top / "data"
    runs = (path for path in (data / "runs").glob("*") if "-fast-" not in path.name)
    files = [*(data / "paper").glob("*"), *(data / "benchmarks").glob("*"), *runs]
    return [[p.relative_to(book.top).as_posix(), file_digest(p)] for p in sorted(files) if p.is_file()]


def data_listing() -> list[Any]:
    """What lies directly in $SOFTSHARE_DATA: names, sizes, times. The files are too large to read for this."""
    folder = data_folder()
    if folder is None or not folder.is_dir():
        return [str(folder or "")]
    entries = sorted(folder.iterdir())
    return [str(folder), *([e.name, e.stat().st_size, e.stat().st_mtime_ns] for e in entries if e.is_file())]


def chapter_key(book: Book, name: str, parameters: Mapping[str, Any]) -> str:
    """Everything that a chapter's result depends on, as one hash."""
    parts: dict[str, Any] = {
        "chapter": file_digest(book.folder / f"{name}.md"),
        "package": tree_digest(book.package),
        "constraints": file_digest(book.top / "constraints.txt"),
        "parameters": dict(parameters),
        "python": sys.version,
        "torch": installed("torch"),
        "data": data_listing(),
        "records": record_digest(book),
    }
    if name in READERS:
        parts["others"] = {n: chapter_key(book, n, parameters) for n in book.chapters() if n not in READERS}
    return digest_of(parts)


def digest_of(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def is_current(book: Book, name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the executed notebook is what a run with these parameters would give now."""
    stamp, notebook = book.output / f"{name}.key", book.output / f"{name}.ipynb"
    if not (stamp.is_file() and notebook.is_file()):
        return False
    said = json.loads(stamp.read_text(encoding="utf8"))
    return said["key"] == chapter_key(book, name, parameters) and said["notebook"] == file_digest(notebook)


def last_time(book: Book, name: str) -> float:
    """Seconds that the chapter took when it last ran here; 0 if it never did."""
    kept = book.output / f"{name}.seconds"
    return float(kept.read_text(encoding="utf8")) if kept.is_file() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Execute


def check_parameters(source: Path, name: str, parameters: Mapping[str, Any]) -> None:
    """papermill only warns of a parameter that a chapter does not have; here it is an error."""
    import papermill

    known = papermill.inspect_notebook(str(source))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        has = ", ".join(known) or "none (no cell is tagged `parameters`)"
        raise BuildError(f"{name} has no parameter {', '.join(unknown)}; it has: {has}")


def run_chapter(
    book: Book, name: str, parameters: Mapping[str, Any], timeout: float | None = None, output: Path | None = None
) -> Path:
    """Run one chapter from its source, whatever was run before; returns the executed notebook.

    A run that fails leaves an earlier result as it was, without a key, and its own notebook as NAME.failed.ipynb.
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
            where = f"\n  the notebook up to there: {failed}"
        raise BuildError(f"{name} failed: {explain(error)}{where}") from error
    finally:
        source.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return final


def explain(error: Exception) -> str:
    """Which cell, and what it said."""
    if hasattr(error, "ename"):  # papermill's PapermillExecutionError
        lines = "\n".join(f"    {line}" for line in error.source.strip().split("\n")[:12])  # type: ignore[attr-defined]
        return f"cell [{error.exec_count}] raised {error.ename}: {error.evalue}\n{lines}"  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {str(error).strip()}"


def execute(
    book: Book, parameters: Mapping[str, Any], names: Sequence[str] = (), timeout: float | None = None
) -> list[str]:
    """Run the chapters that have no current result; returns their names. All are tried before a failure is raised."""
    chapters = [n for n in book.chapters() if not names or n in names]
    unknown = sorted(set(names) - set(chapters))
    if unknown or not chapters:
        there = ", ".join(book.chapters()) or "none"
        raise BuildError(f"no chapter {', '.join(unknown)} in {book.folder}; there are: {there}")
    prepare_kernels(str(parameters.get("PROFILE", "fast")))
    ran: list[str] = []
    failures: list[str] = []
    begin = time.monotonic()
    for number, name in enumerate(chapters, start=1):
        label = f"[{number}/{len(chapters)}] {name}"
        if is_current(book, name, parameters):
            say(f"{label}: unchanged")
            continue
        if failures and name in READERS:
            say(f"{label}: not run, it reads what the failed ones should have written")
            continue
        due = [other for other in chapters[number - 1 :] if not is_current(book, other, parameters)]
        left = sum(last_time(book, other) for other in due)
        say(f"{label}: running ..." + (f" (about {left:.0f} s left in all)" if last_time(book, name) else ""))
        start = time.monotonic()
        # Taken before the run: what is edited meanwhile must make the chapter run again.
        key = chapter_key(book, name, parameters)
        try:
            final = run_chapter(book, name, parameters, timeout)
        except BuildError as error:
            failures.append(str(error))
            say(f"{label}: FAILED after {time.monotonic() - start:.1f} s")
            continue
        stamp = json.dumps({"key": key, "notebook": file_digest(final)})
        (book.output / f"{name}.key").write_text(stamp, encoding="utf8")
        (book.output / f"{name}.seconds").write_text(f"{time.monotonic() - start:.1f}", encoding="utf8")
        ran.append(name)
        say(f"{label}: {time.monotonic() - start:.1f} s")
    say(f"chapters: {len(ran)} run, {time.monotonic() - begin:.1f} s, in {book.output}")
    if failures:
        raise BuildError("\n".join(failures))
    return ran


@cache
def prepare_kernels(profile: str = "fast") -> None:
    """What every kernel shall find: this environment first, an absolute data folder, a ready font cache, few threads."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # The networks of profile fast are so small that a second thread costs more than it gives, above all where other
    # programs want the processor too and threads spin while they wait for each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if profile == "fast":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if data_folder() is not None:
        os.environ["SOFTSHARE_DATA"] = str(data_folder())
    # matplotlib's first import may say that it builds its font cache: not in somebody's chapter.
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], capture_output=True, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# Render


def assemble(book: Book, parameters: Mapping[str, Any]) -> Path:
    """The folder that Jupyter Book reads: plain pages and pictures as they are, chapters as executed notebooks.

    Links between chapters, written NAME.md in the sources, become NAME.ipynb, the file that lies here. Below the title of
    each chapter stands a badge that opens its twin.
    """
    import nbformat
    import vl_convert
    from twins import BADGE, read_site, under_title

    stale = [n for n in book.chapters() if not is_current(book, n, parameters)]
    if stale:
        raise BuildError(f"no current result of {', '.join(stale)}: run `python book/build.py execute` first")
    site, source = read_site(book.top), book.build / "source"
    shutil.rmtree(source, ignore_errors=True)
    chapters = {f"{name}.md" for name in book.chapters()}

    def unwanted(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != book.folder:
            return {"__pycache__", ".ipynb_checkpoints"}
        made = {book.build.name, book.twins.name, "__pycache__", ".ipynb_checkpoints"}
        return made | chapters | {n for n in names if n.endswith(".py")}

    shutil.copytree(book.folder, source, ignore=unwanted)
    link = re.compile(r"(\]\((?:\./)?(?:" + "|".join(map(re.escape, book.chapters())) + r"))\.md(?=[#)])")
    for page in source.glob("*.md"):
        page.write_text(link.sub(r"\1.ipynb", page.read_text(encoding="utf8")), encoding="utf8")
    (source / "_static").mkdir(exist_ok=True)
    # Draws the charts that move; a page that has one fetches it. In a scope of its own, lest its names meet the theme's.
    vega = "(() => {" + vl_convert.javascript_bundle() + "})();\n"  # type: ignore[call-arg]
    (source / "_static" / "vega.js").write_text(vega, encoding="utf8")
    for name in book.chapters():
        notebook = nbformat.read(book.output / f"{name}.ipynb", as_version=4)
        first = next((cell for cell in notebook.cells if cell.cell_type == "markdown"), None)
        if first is not None:
            first.source = under_title(first.source, site.badge(name, BADGE))
        notebook.metadata.pop("papermill", None)  # holds paths of this machine; the site offers the notebook
        notebook.metadata.pop("widgets", None)  # a page has no kernel: it shows the chart that comes with each widget
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None)
            for output in cell.get("outputs", ()):
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if cell.cell_type == "markdown":
                cell.source = link.sub(r"\1.ipynb", cell.source)
        nbformat.write(notebook, source / f"{name}.ipynb")
    return source


def render(book: Book, parameters: Mapping[str, Any]) -> Path:
    """Build the site, every warning an error; an unchanged one is not built again."""
    source = assemble(book, parameters)
    config = book.top / "_config.yml"
    pins = file_digest(book.top / "constraints.txt")
    tools = [installed(n) for n in ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "vl-convert-python")]
    scripts = [file_digest(path) for path in sorted(book.folder.glob("*.py"))]  # the builder and Sphinx's extensions
    key = digest_of([tree_digest(source), tree_digest(book.package), file_digest(config), pins, scripts, tools])
    stamp = book.build / "html.key"
    if stamp.is_file() and stamp.read_text(encoding="utf8") == key and (book.html / "index.html").is_file():
        say(f"book: unchanged, {book.html / 'index.html'}")
        return book.html
    say("book: rendering ...")
    start = time.monotonic()
    # Always from nothing: a second, incremental build would not repeat the warnings that failed the first.
    stamp.unlink(missing_ok=True)
    place = book.build / "render"
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
        told = [line for line in done.stdout.split("\n") if any(w in line for w in ("WARNING", "ERROR", "Error"))]
        raise BuildError(
            "\n".join(["rendering failed:", *(told or done.stdout.split("\n")[-20:]), f"whole log: {log}"])
        )
    shutil.rmtree(book.html, ignore_errors=True)
    os.replace(place / "_build" / "html", book.html)
    shutil.rmtree(place)
    stamp.write_text(key, encoding="utf8")
    say(f"book: {time.monotonic() - start:.1f} s, {book.html / 'index.html'}")
    return book.html


# ---------------------------------------------------------------------------------------------------------------------
# Twins


def write_twins(book: Book, check: bool = False) -> list[str]:
    """Write the twins and README's table of chapters; with check, only return the names of those out of step."""
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
            raise BuildError(f"a parameter is given as NAME=VALUE, got {text!r}")
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
            command.add_argument("--timeout", type=float, help=f"seconds a cell may take (default: {TIMEOUTS})")
        if name == "execute":
            command.add_argument("names", nargs="*", metavar="NAME", help="chapters to run (default: all)")
    twins = commands.add_parser("twins")
    twins.add_argument("--check", action="store_true", help="write nothing; fail if one is out of step")
    options = parser.parse_args(arguments)
    try:
        if options.command == "twins":
            names = write_twins(Book(options.top), options.check)
            if options.check and names:
                raise BuildError(f"out of step with chapters or address: {', '.join(names)}; run `make twins`")
            say(f"twins: {', '.join(names) or 'in step'}")
            return 0
        book, parameters = Book(options.top, options.output), parse_parameters(options.parameters)
        if options.command in ("execute", "all"):
            execute(book, parameters, getattr(options, "names", ()), options.timeout)
        if options.command in ("render", "all"):
            render(book, parameters)
        return 0
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
