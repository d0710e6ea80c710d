"""The output-free notebooks for Colab: in step with their chapters, plain Markdown, installing only what is missing."""

from __future__ import annotations

import builtins
import json
import re
import sys
import types

import pytest
from build import Book, main, read_chapter, write_twins
from twins import Converter, References, Site, TwinError, make_twins

SITE = Site("https://github.com/OWNER/softshare", "main")
COLAB = "https://colab.research.google.com/github/OWNER/softshare/blob/main/book/notebooks"


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


def test_twins_hold_no_myst_syntax(top):
    assert twins_of(top)
    raw = re.compile(
        r"^\s*(?:>\s*)*:{3,}|^\s*(?:>\s*)*(?:`{3,}|~{3,})\s*\{|\{[a-z][a-z:+-]*\}`[^`\n]+`|^\(\S+\)=$", re.M
    )
    for path in twins_of(top):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "markdown":
                assert not (found := raw.search("".join(cell["source"]))), f"{path.name}: {found[0]!r}"


def test_a_twin_out_of_step_is_named_and_mended(project, make_chapter, capsys):
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


def test_a_changed_cell_changes_no_other_cells_name(project, make_chapter):
    def ids(*cells):
        page = project.write("book/01-one.md", make_chapter(*cells))
        made = json.loads(make_twins(project.top, {"01-one": read_chapter(page)})["01-one"])["cells"]
        return [cell["id"] for cell in made]

    before, after = ids("a = 1", "b = 2", "b = 2"), ids("a = 1", "c = 3", "b = 2", "b = 2")
    assert len(set(after)) == len(after)
    assert [i for i in after if i in before] == before


@pytest.mark.parametrize(("installed", "expected"), [(True, []), (False, ["install"])])
def test_the_first_cell_installs_only_what_is_missing(top, monkeypatch, installed, expected):
    from IPython.core.inputtransformer2 import TransformerManager

    calls = []

    def run_line_magic(name, line, **_):
        assert name == "pip" and "git+https://" in line
        calls.append(line.split()[0])

    def fake_import(name, *rest):
        if name == "softshare":
            if not installed:
                raise ImportError(name)
            return types.ModuleType(name)
        return real_import(name, *rest)

    real_import = builtins.__import__
    monkeypatch.delitem(sys.modules, "softshare", raising=False)
    shell = types.SimpleNamespace(run_line_magic=run_line_magic)
    for path in twins_of(top):
        calls.clear()
        cell = json.loads(path.read_text(encoding="utf8"))["cells"][0]
        assert cell["cell_type"] == "code"
        code = TransformerManager().transform_cell("".join(cell["source"]))
        scope = {"__builtins__": {**vars(builtins), "__import__": fake_import}, "get_ipython": lambda: shell}
        exec(compile(code, path.name, "exec"), scope)
        assert calls == expected


def test_the_address_comes_from_the_configuration(project, make_chapter):
    config = (project.top / "_config.yml").read_text(encoding="utf8")
    project.write("_config.yml", config.replace("github.com/OWNER/", "github.com/somebody/"))
    project.write("book/01-one.md", make_chapter("1"))
    project.write("book/02-two.md", make_chapter("2").replace("# A chapter", "# A chapter\n\nSee {doc}`01-one`."))
    text = make_twins(project.top, {n: read_chapter(project.top / f"book/{n}.md") for n in project.book.chapters()})
    assert "git+https://github.com/somebody/softshare@main" in text["01-one"]
    assert "github/somebody/softshare/blob/main/book/notebooks/01-one.ipynb" in text["02-two"]
    assert "OWNER" not in "".join(text.values())


def test_only_the_configuration_names_the_address(top):
    book = Book(top)
    pages = [top / "pyproject.toml", top / "Makefile", *top.glob("softshare/**/*.py"), *book.folder.glob("*.md")]
    assert not [p.name for p in pages if "OWNER/" in p.read_text(encoding="utf8")]


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
        ("{doc}`api`", "[API](https://github.com/OWNER/softshare/blob/main/book/api.md)"),
        ("[next](02-two.md) [out](https://example.org)", f"[next]({COLAB}/02-two.ipynb) [out](https://example.org)"),
        ("{ref}`far` {ref}`near` {ref}`here <near>`", f"[Far away]({COLAB}/02-two.ipynb) Nearby here"),
        ("(label)=\n## Head\n\nSee {ref}`label`.", "## Head\n\nSee Head."),
        ("{func}`~softshare.fold` {class}`torch.Tensor`", "`fold` `torch.Tensor`"),
        ("`{role}` and ``a `{b}` c``", "`{role}` and ``a `{b}` c``"),
        ("% hidden\nshown[^1]\n\n[^1]: why", "shown<sup>1</sup>\n\n<sup>1</sup> why"),
        (
            "```{figure} pictures/a.svg\n:alt: A\nCaption.\n```",
            "![A](https://github.com/OWNER/softshare/raw/main/book/pictures/a.svg)\n\n*Figure 1.* Caption.",
        ),
        ("```{list-table}\n* - a\n  - b\n* - 1\n  - 2\n```", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("```python\nx = {1: '{role}`y`'}\n```", "```python\nx = {1: '{role}`y`'}\n```"),
        ("- item\n\n  :::{tip}\n  In.\n  :::", "- item\n\n  > **Tip**\n  >\n  > In."),
    ],
)
def test_what_becomes_of_myst(convert, myst, plain):
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
        ("> :::{note}\n> In.\n> :::", "left over"),
    ],
)
def test_what_has_no_plain_form_is_an_error_that_names_it(convert, myst, message):
    with pytest.raises(TwinError, match=re.escape(message)):
        convert(myst)
