"""The output-free notebooks for Colab: in step with their chapters, plain Markdown, installing only what is missing."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import types

import jupytext
import pytest
from build import Book, main, read_chapter, write_twins
from twins import Converter, References, Site, TwinError, make_twins, read_site

SITE = Site("https://github.com/someone/book", "main")
COLAB = "https://colab.research.google.com/github/someone/book/blob/main/book/notebooks"


@pytest.fixture
def convert():
    references = References(SITE, {"01-one", "02-two"}, complete=True)
    references.titles |= {"01-one": "One", "02-two": "Two", "api": "API"}
    references.targets |= {"far": ("02-two", "Far away"), "near": ("01-one", "Nearby")}
    references.citations |= {
        "saxe": ("Saxe et al.", "2014", "https://example.org/saxe"),
        "alex": ("Krizhevsky", "2009", ""),
    }
    return lambda text: Converter("01-one", references).convert(text)


def twins_of(top):
    return sorted((top / "book" / "notebooks").glob("*.ipynb"))


def test_twins_are_in_step_with_their_chapters(top, capsys):
    assert main(["--top", str(top), "twins", "--check"]) == 0, capsys.readouterr().err


def test_pages_are_as_jupytext_writes_them(top):
    # A page saved unchanged in JupyterLab does not change; jupytext's own version is in the header.
    for name in Book(top).chapters():
        page = top / "book" / f"{name}.md"
        saved = jupytext.writes(read_chapter(page), fmt="md:myst")
        advice = f"jupytext --to md:myst book/{name}.md"
        assert page.read_text(encoding="utf8") == saved, advice


def test_twins_hold_no_myst_syntax(top):
    assert twins_of(top)
    raw = re.compile(
        r"^\s*(?:>\s*)*:{3,}|^\s*(?:>\s*)*(?:`{3,}|~{3,})\s*\{|\{[a-z][a-z:+-]*\}`[^`\n]+`|^\(\S+\)=$", re.M
    )
    for path in twins_of(top):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "markdown":
                assert not (found := raw.search("".join(cell["source"]))), f"{path.name}: {found[0]!r}"


def test_an_outdated_twin_is_named_and_updated(project, make_chapter, capsys):
    project.write("book/01-one.md", make_chapter("1 + 1"))
    project.write("book/02-two.md", make_chapter("2 + 2"))
    command = ["--top", str(project.top), "twins"]
    assert main([*command, "--check"]) == 1
    assert main(command) == 0 and main([*command, "--check"]) == 0
    before = {p.name: p.read_bytes() for p in twins_of(project.top)}
    assert main(command) == 0 and {p.name: p.read_bytes() for p in twins_of(project.top)} == before
    capsys.readouterr()

    project.write("book/02-two.md", make_chapter("2 + 3"))
    (project.book.twins / "03-gone.ipynb").write_text("{}")
    assert main([*command, "--check"]) == 1
    said = capsys.readouterr().err
    assert "02-two, 03-gone" in said and "01-one" not in said and "make twins" in said
    assert set(write_twins(project.book)) == {"02-two", "03-gone"}
    assert main([*command, "--check"]) == 0


def test_a_changed_cell_does_not_change_the_ids_of_others(project, make_chapter):
    def ids(*cells):
        page = project.write("book/01-one.md", make_chapter(*cells))
        made = json.loads(make_twins(project.top, {"01-one": read_chapter(page)})["01-one"])["cells"]
        return [cell["id"] for cell in made]

    before, after = ids("a = 1", "b = 2", "b = 2"), ids("a = 1", "c = 3", "b = 2", "b = 2")
    assert len(set(after)) == len(after)
    assert [i for i in after if i in before] == before


@pytest.mark.parametrize("state", ["installed", "missing", "missing, and pip fails"])
def test_the_first_cell_installs_only_what_is_missing_and_reports_failure(top, monkeypatch, state):
    from IPython.core.inputtransformer2 import TransformerManager

    there, calls = False, []

    def run_line_magic(name, line, **_):
        nonlocal there
        assert name == "pip" and "softshare[moving] @ git+https://" in line
        calls.append(line.split()[0])
        there = state == "missing"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: there or None)
    shell = types.SimpleNamespace(run_line_magic=run_line_magic)
    for path in twins_of(top):
        there, calls = state == "installed", []
        cell = json.loads(path.read_text(encoding="utf8"))["cells"][0]
        assert cell["cell_type"] == "code"
        code = compile(TransformerManager().transform_cell("".join(cell["source"])), path.name, "exec")
        fails = pytest.raises(RuntimeError, match="softshare was not installed: see the pip output above")
        with fails if state.endswith("fails") else contextlib.nullcontext():
            exec(code, {"get_ipython": lambda: shell})
        assert calls == ([] if state == "installed" else ["install"])


def test_one_line_and_one_command_move_a_fork(tmp_path, copy_project, move, fork):
    """In a copy of everything that is committed, with the address changed in _config.yml only."""
    tree = copy_project(tmp_path / "tree")
    config = tree / "_config.yml"
    old = read_site(tree).slug
    assert old != fork
    config.write_text(move(config.read_text(encoding="utf8")), encoding="utf8")
    subprocess.run([sys.executable, "book/build.py", "twins"], cwd=tree, check=True)
    files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert not [name for name, text in files.items() if old.encode() in text]

    twins = [name for name in files if name.startswith("book/notebooks/")]
    for name in twins:
        install, title = (json.loads(files[name])["cells"][i]["source"] for i in (0, 1))
        picture = f"https://github.com/{fork}/raw/main/book/_static/colab.svg"
        assert f"git+https://github.com/{fork}@main" in "".join(install)
        assert title[0].startswith("# ") and title[2].strip() == f"[![Open in Colab]({picture})]({colab(fork, name)})"
    badges = re.findall(r"\(book/_static/colab\.svg\)\]\((.*)\) \|$", files["README.md"].decode(), flags=re.M)
    assert twins and sorted(badges) == sorted(colab(fork, name) for name in twins)


def colab(slug, notebook):
    return f"https://colab.research.google.com/github/{slug}/blob/main/{notebook}"


def test_badges_of_the_readme_are_kept_in_step(project, make_chapter, fork, capsys):
    project.write("book/02-two-words.md", make_chapter("1"))
    readme = project.write("README.md", "# Title\n\n<!-- badges -->\nold\n<!-- /badges -->\n\nrest\n")
    command = ["--top", str(project.top), "twins"]
    assert main(command) == 0 and main([*command, "--check"]) == 0
    address = colab(fork, "book/notebooks/02-two-words.ipynb")
    badge = f"[![Open in Colab: A chapter](book/_static/colab.svg)]({address})"
    table = f"| the chapters | |\n|---|---|\n| [A chapter](book/02-two-words.md) | {badge} |"
    assert readme.read_text() == f"# Title\n\n<!-- badges -->\n{table}\n<!-- /badges -->\n\nrest\n"

    readme.write_text(readme.read_text().replace("02-two", "03-two"))
    assert main([*command, "--check"]) == 1 and "README" in capsys.readouterr().err
    readme.write_text("# Title\n\n<!-- badges -->\n")
    assert main(command) == 1 and "<!-- /badges -->" in capsys.readouterr().err


def test_links_between_twins_follow_the_configuration(project, make_chapter, fork):
    project.write("book/01-one.md", make_chapter("1"))
    project.write("book/02-two.md", make_chapter("2").replace("# A chapter", "# A chapter\n\nSee {doc}`01-one`."))
    text = make_twins(project.top, {n: read_chapter(project.top / f"book/{n}.md") for n in project.book.chapters()})
    assert colab(fork, "book/notebooks/01-one.ipynb") in text["02-two"]


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        (":::{note}\nMind.\n:::", "> **Note**\n>\n> Mind."),
        ("```{admonition} What *you* see\n:class: tip\nA.\n\nB.\n```", "> **What *you* see**\n>\n> A.\n>\n> B."),
        (
            ":::{admonition} Answer\n:class: dropdown\nYes.\n:::",
            "<details>\n<summary><b>Answer</b></summary>\n\nYes.\n\n</details>",
        ),
        (
            "::::{dropdown} More\n:::{tip}\nIn.\n:::\n::::",
            "<details>\n<summary><b>More</b></summary>\n\n> **Tip**\n>\n> In.\n\n</details>",
        ),
        (":::{note}\n$$\nx\n= 1\n$$\n:::", "> **Note**\n>\n> $$ x = 1 $$"),
        ("```{math}\n:label: e\nx\n```\n\nSee {eq}`e`.", "$$\nx \\tag{1}\n$$\n\nSee (1)."),
        ("$$ x $$ (e)\n\nSee {eq}`e`.", "$$\nx \\tag{1}\n$$\n\nSee (1)."),
        ("$$\na &= b \\\\\nc &= d\n$$", "$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$"),
        ("{math}`x_{i}` and $y_{i}$", "$x_{i}$ and $y_{i}$"),
        ("{cite:t}`saxe`", "[Saxe et al. (2014)](https://example.org/saxe)"),
        ("{cite}`saxe, alex`", "([Saxe et al., 2014](https://example.org/saxe); Krizhevsky, 2009)"),
        ("{doc}`02-two`", f"[Two]({COLAB}/02-two.ipynb)"),
        ("{doc}`the\nnext <02-two>`", f"[the\nnext]({COLAB}/02-two.ipynb)"),
        ("{doc}`api`", "[API](https://github.com/someone/book/blob/main/book/api.md)"),
        ("[next](02-two.md) [out](https://example.org)", f"[next]({COLAB}/02-two.ipynb) [out](https://example.org)"),
        ("{ref}`far` {ref}`near` {ref}`here <near>`", f"[Far away]({COLAB}/02-two.ipynb) Nearby here"),
        ("(label)=\n## Head\n\nSee {ref}`label`.", "## Head\n\nSee Head."),
        ("{func}`~softshare.fold` {class}`torch.Tensor`", "`fold` `torch.Tensor`"),
        ("`{role}` and ``a `{b}` c``", "`{role}` and ``a `{b}` c``"),
        ("% hidden\nshown[^1]\n\n[^1]: why", "shown<sup>1</sup>\n\n<sup>1</sup> why"),
        (
            "```{figure} pictures/a.svg\n:alt: A\nCaption.\n```",
            "![A](https://github.com/someone/book/raw/main/book/pictures/a.svg)\n\n*Figure 1.* Caption.",
        ),
        ("```{list-table}\n* - a\n  - b\n* - 1\n  - 2\n```", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("```python\nx = {1: '{role}`y`'}\n```", "```python\nx = {1: '{role}`y`'}\n```"),
        ("- item\n\n  :::{tip}\n  In.\n  :::", "- item\n\n  > **Tip**\n  >\n  > In."),
        ("- :::{tip}\n  In.\n  :::\n- {ref}`near`", "- > **Tip**\n  >\n  > In.\n- Nearby"),
        ("1. a\n\n   $$\n   x\n   $$ (e)\n\n   {eq}`e`", "1. a\n\n   $$\n   x \\tag{1}\n   $$\n\n   (1)"),
        ("> a {ref}`near`,\n> {doc}`the\n> next <02-two>`", f"> a Nearby,\n> [the\n> next]({COLAB}/02-two.ipynb)"),
        ("> $$\n> x\n> = 1\n> $$", "> $$ x = 1 $$"),
        (
            "| a | b |\n|---|---|\n| {ref}`near` | `a\\|b` {ref}`near` |",
            "| a | b |\n|---|---|\n| Nearby | `a\\|b` Nearby |",
        ),
        (
            "term {ref}`near`\n: 1\n\n    ```{tip}\n    In.\n    ```",
            "term Nearby\n: 1\n\n    > **Tip**\n    >\n    > In.",
        ),
        ("[`code`, {math}`x`][two]\n\n[two]: 02-two.md", f"[`code`, $x$]({COLAB}/02-two.ipynb)\n\n[two]: 02-two.md"),
        ("[![a](a.svg)](https://a.org)", "[![a](https://github.com/someone/book/raw/main/book/a.svg)](https://a.org)"),
        ("$a_[b](c)$, `[b](c)`, \\[b](c), \\* and &amp;", "$a_[b](c)$, `[b](c)`, \\[b](c), \\* and &amp;"),
        ("\\begin{align}\na [x](y.md)\n\\end{align}", "\\begin{align}\na [x](y.md)\n\\end{align}"),
        (":::{tip}\n```python\na\n\n\nb\n```\n:::", "> **Tip**\n>\n> ```python\n> a\n>\n>\n> b\n> ```"),
        ("````{code-block} md\n```\nx\n```\n````", "````md\n```\nx\n```\n````"),
        ("    {ref}`near`\n\n\\{ref}`near`", "    {ref}`near`\n\n\\{ref}`near`"),
        ("Text.\n\n(spot)=\n\nText, {ref}`its words <spot>`.", "Text.\n\nText, its words."),
    ],
)
def test_myst_becomes_plain_markdown(convert, myst, plain):
    assert convert(myst) == plain


@pytest.mark.parametrize(
    ("myst", "message"),
    [
        ("```{mermaid}\na --> b\n```", "directive {mermaid}"),
        ("{glue:text}`x`", "role {glue:text}"),
        (":::{note}\nopen", "never closed"),
        ("$$\nopen", "never closed"),
        ("{cite}`nobody`", "no entry 'nobody'"),
        ("{doc}`nowhere`", "no page 'nowhere'"),
        ("{ref}`nowhere`", "no label 'nowhere'"),
        ("Text.\n\n(spot)=\n\nText, {ref}`spot`.", "'spot' stands before no heading"),
        ("> :::{note}\n> In.\n> :::", "left over"),
        ("- a\n\n  :::{note}\n  open\n\nb", "never closed"),
        ("```{.python}\n1\n```", "left over"),
        ("```{list-table}\n* - a\n\n    ```\n    b\n    ```\n```", "a cell of a list-table"),
    ],
)
def test_syntax_without_a_plain_form_is_an_error_that_names_it(convert, myst, message):
    with pytest.raises(TwinError, match=re.escape(message)):
        convert(myst)
