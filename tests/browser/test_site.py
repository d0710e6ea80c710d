"""The rendered book as a reader sees it: every page in Chromium, light and dark, on a desktop and on a phone."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import torch
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, BrowserContext, ElementHandle, Page, expect

from softshare import pictures

pytestmark = pytest.mark.long

TOP = Path(__file__).resolve().parents[2]
SHOTS = TOP / "book" / "_build" / "shots"
SCHEMES = ("light", "dark")
WIDTHS = (390, 1400)
MOVING = {"01-templates": 1, "03-similarity": 2, "04-shortest-path": 1}
# Contrast, by far the slowest rule, depends on the scheme and not on the width; for the rest it is the other way round.
CONTRAST = {"runOnly": ["color-contrast", "link-in-text-block"]}
STRUCTURE = {"rules": {"color-contrast": {"enabled": False}, "link-in-text-block": {"enabled": False}}}
CHAPTERS = ("01-templates", "02-training", "03-similarity", "04-shortest-path", "compared", "claims", "results")
MEGABYTE = 2**20

# Done when mathematics is typeset, the charts are drawn and the fonts are there.
SETTLE = """async () => {
  await window.MathJax?.startup?.promise;
  await window.softshareVega;
  const drawn = () => [...document.querySelectorAll("figure.moving")].every((f) => f.querySelector(".vega-embed svg"));
  for (let n = 0; n < 100 && !drawn(); n++) await new Promise((done) => setTimeout(done, 50));
  await document.fonts.ready;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""

FACTS = r"""() => {
  const all = (css, root = document) => [...root.querySelectorAll(css)];
  const name = (node) => `${node.tagName.toLowerCase()} ${node.id || node.className} ${node.textContent.slice(0, 40)}`;
  const words = document.querySelector("article, main").cloneNode(true);
  all("pre, code, script, style, mjx-container, .vega-embed", words).forEach((node) => node.remove());
  // Width over height, as shown and as it is in the file; a card's margin is no part of the picture.
  const stretched = (node) => {
    const style = getComputedStyle(node);
    const across = node.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const down = node.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    return across / down / (node.naturalWidth / node.naturalHeight);
  };
  return {
    ids: all("[id]").map((node) => node.id).concat(all("a[name]").map((node) => node.name)),
    links: all("a[href]").map((node) => node.href),
    formulas: all(".math").length,
    unset: all(".math").filter((node) => !node.querySelector("mjx-container")?.clientWidth).map(name),
    failed: all("mjx-merror, [data-mjx-error]").map(name),
    raw: words.textContent.match(/\\[([]|\\begin\{|\$\$/g) ?? [],
    numbered: all("div.math[id^=equation] .eqno").map((node) => node.textContent.match(/\([\d.]+\)/)?.[0] ?? ""),
    images: all("article img").map((node) => ({
      source: node.src, alt: node.alt, loaded: node.complete && node.naturalWidth > 0,
      natural: node.naturalWidth, shown: node.getBoundingClientRect().width,
      stretched: stretched(node),
      background: getComputedStyle(node).backgroundColor, filter: getComputedStyle(node).filter,
    })),
    figures: all("figure.moving").length,
    drawn: all("figure.moving .vega-embed svg").length,
    theme: document.documentElement.dataset.theme,
  };
}"""

# Elements that extend beyond the window, unless something around them scrolls or clips them.
BEYOND = """() => {
  const beyond = [];
  if (document.documentElement.scrollWidth > innerWidth)
    beyond.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const node of document.querySelectorAll("body *")) {
    const box = node.getBoundingClientRect();
    if (!box.width || !box.height || (box.right <= innerWidth + 1 && box.left >= -1)) continue;
    let around = node;
    while (around && getComputedStyle(around).overflowX === "visible" && getComputedStyle(around).position !== "fixed")
      around = around.parentElement;
    if (!around && getComputedStyle(node).clip === "auto")
      beyond.push(`${node.tagName} ${node.id || node.className}: ${box.left} to ${box.right}`);
  }
  return beyond.slice(0, 5);
}"""

AXE = """async (rules) => (await axe.run({resultTypes: ["violations"], preload: false, ...rules})).violations
  .filter((found) => ["serious", "critical"].includes(found.impact))
  .map((found) => `${found.id}, ${found.nodes.length} times: ${found.nodes[0].target}: ${found.nodes[0].failureSummary}`)
"""


@dataclass
class Visit:
    """What happened while one page was visited in one scheme; lists of faults should be empty."""

    page: str
    scheme: str
    messages: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    narrow: list[dict[str, Any]] = field(default_factory=list)
    beyond: dict[int, list[str]] = field(default_factory=dict)
    axe: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}, {self.scheme}"

    def listen(self, page: Page) -> None:
        page.on("console", lambda said: self.messages.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.failures.append(f"{request.url}: {request.failure}"))
        page.on(
            "response",
            lambda answer: self.failures.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None,
        )


@pytest.fixture(scope="module")
def contexts(chromium: Browser) -> Iterator[dict[str, BrowserContext]]:
    size = {"width": WIDTHS[0], "height": 900}
    made = {scheme: chromium.new_context(viewport=size, color_scheme=scheme) for scheme in SCHEMES}
    yield made
    for context in made.values():
        context.close()


@pytest.fixture(scope="module")
def visits(contexts, site) -> list[Visit]:
    """Every page, visited once in each scheme: all that the tests below check, and a screenshot at each width."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    made = []
    for scheme, context in contexts.items():
        for name in site.pages():
            visit = Visit(name, scheme)
            page = context.new_page()
            visit.listen(page)
            page.goto(f"{site.url}{name}.html")
            page.add_style_tag(content="* {transition: none !important}")  # sidebars slide when the width changes
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                page.evaluate(SETTLE)
                visit.beyond[width] = page.evaluate(BEYOND)
                shoot(page, SHOTS / f"{name}-{scheme}-{width}.jpg")
                page.evaluate(AXE_SCRIPT)
                if scheme == "light":
                    visit.axe += page.evaluate(AXE, STRUCTURE)
            visit.axe += page.evaluate(AXE, CONTRAST)
            visit.facts = page.evaluate(FACTS)
            page.set_viewport_size({"width": WIDTHS[0], "height": 900})
            visit.narrow = page.evaluate(FACTS)["images"]
            page.close()
            made.append(visit)
    return made


def shoot(page: Page, path: Path) -> None:
    """Take a screenshot of the whole page, or of as much as the browser can draw in one piece."""
    height = min(page.evaluate("document.documentElement.scrollHeight"), 16_000)
    clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
    page.screenshot(path=path, full_page=True, clip=clip, type="jpeg", quality=80)


def test_every_page_loads_without_errors_or_outside_requests(visits, site):
    assert {visit.page for visit in visits} >= {*CHAPTERS, "intro", "api", "bibliography", "genindex", "search"}
    faults = {}
    for visit in visits:
        foreign = [url for url in visit.requests if not url.startswith((site.url, "data:", "blob:"))]
        if visit.messages or visit.failures or foreign:
            faults[str(visit)] = (visit.messages, visit.failures, foreign)
    assert not faults
    assert all(visit.facts["theme"] == visit.scheme for visit in visits)


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_open_as_files(contexts, site, name):
    """Without a server, as README describes."""
    visit = Visit(name, "light")
    page = contexts["light"].new_page()
    visit.listen(page)
    page.goto((site.folder / f"{name}.html").as_uri())
    page.evaluate(SETTLE)
    facts = page.evaluate(FACTS)
    page.close()
    assert not visit.messages and not visit.failures
    assert all(url.startswith(("file:", "data:", "blob:")) for url in visit.requests)
    assert not facts["unset"] and all(image["loaded"] for image in facts["images"])
    assert facts["drawn"] == facts["figures"]


def test_mathematics_is_typeset_and_numbered(visits):
    with_formulas = {visit.page for visit in visits if visit.facts["formulas"]}
    assert with_formulas >= {"intro", "01-templates", "02-training", "03-similarity", "04-shortest-path"}
    kinds = ("unset", "failed", "raw")
    faults = {f"{visit}, {kind}": visit.facts[kind] for visit in visits for kind in kinds if visit.facts[kind]}
    assert not faults
    numbers = [number for visit in visits for number in visit.facts["numbered"]]
    assert numbers and all(re.fullmatch(r"\([\d.]+\)", number) for number in numbers), numbers


def test_nothing_is_wider_than_the_window(visits):
    faults = {f"{visit}, {width}": found for visit in visits for width, found in visit.beyond.items() if found}
    assert not faults


def test_axe_finds_nothing_serious(visits):
    faults = {str(visit): visit.axe for visit in visits if visit.axe}
    assert not faults


def test_links_inside_the_book_work(visits, site):
    ids = {f"{visit.page}.html": set(visit.facts["ids"]) for visit in visits}
    faults = set()
    for visit in visits:
        for link in visit.facts["links"]:
            if not link.startswith(site.url):
                continue
            address, fragment = urldefrag(link)
            path = unquote(urlparse(address).path).lstrip("/")
            there = (site.folder / path).is_file()
            if not there or (fragment and path in ids and unquote(fragment) not in ids[path]):
                faults.add(f"{visit.page}: {link.removeprefix(site.url)}")
    assert not faults


def test_pictures_load_are_sharp_and_have_alt_texts(visits):
    faults = []
    for visit in visits:
        for image in visit.facts["images"]:
            where = f"{visit}: {image['source']}"
            if not image["loaded"]:
                faults.append(f"{where}: not loaded")
            if not image["alt"].strip() or Path(image["source"]).name in image["alt"]:
                faults.append(f"{where}: no alt text")
            if (
                "_images/" in image["source"]
                and not image["source"].endswith(".svg")
                and image["natural"] < 1.5 * image["shown"]
            ):
                faults.append(f"{where}: {image['natural']} pixels shown {image['shown']} wide")
        for image in visit.facts["images"] + visit.narrow:
            if image["loaded"] and abs(image["stretched"] - 1) > 0.05:
                faults.append(f"{visit}: {image['source']}: stretched by {image['stretched']:.2f}")
    assert not faults


def test_pictures_keep_a_white_background_in_the_dark_scheme(visits):
    """They are drawn for a white background; a filter would change colours that the text mentions."""
    pictures = [
        (visit.page, image["background"], image["filter"])
        for visit in visits
        for image in visit.facts["images"]
        if visit.scheme == "dark" and "_images/" in image["source"] and image["source"].endswith(".png")
    ]
    assert pictures
    assert {(background, done) for _, background, done in pictures} == {("rgb(255, 255, 255)", "none")}, pictures


def test_no_page_names_a_folder_of_this_machine(site):
    assert not [name for name in site.pages() if str(TOP) in (site.folder / f"{name}.html").read_text("utf8")]


def test_no_page_is_heavy(visits, site):
    """The size of a page and all that it loads, with text compressed as web servers send it."""
    weights = {}
    for visit in visits:
        paths = {unquote(urlparse(url).path).lstrip("/") for url in visit.requests if url.startswith(site.url)}
        files = filter(Path.is_file, (site.folder / path for path in paths))
        weights[visit.page] = sum(map(weight, files)) / MEGABYTE
    print(*(f"{page:20} {megabytes:5.2f} MB" for page, megabytes in weights.items()), sep="\n")
    assert max(weights.values()) < 3, weights


def weight(path: Path) -> int:
    content = path.read_bytes()
    return len(gzip.compress(content)) if path.suffix in (".html", ".css", ".js", ".svg") else len(content)


def test_moving_pictures_are_where_they_should_be(visits):
    found = {(visit.page, visit.scheme): (visit.facts["figures"], visit.facts["drawn"]) for visit in visits}
    wanted = {key: (MOVING.get(key[0], 0),) * 2 for key in found}
    assert found == wanted
    # The script is large: it is loaded once per page, and only where something moves.
    scripts = {str(visit): sum(url.endswith("_static/vega.js") for url in visit.requests) for visit in visits}
    assert scripts == {str(visit): int(visit.page in MOVING) for visit in visits}


@pytest.mark.parametrize("name", MOVING)
def test_each_control_moves_its_picture(contexts, site, name):
    """Using only the keyboard."""
    page = contexts["light"].new_page()
    page.set_viewport_size({"width": WIDTHS[1], "height": 900})
    page.goto(f"{site.url}{name}.html")
    page.evaluate(SETTLE)
    figures = page.query_selector_all("figure.moving")
    assert len(figures) == MOVING[name]
    for figure in figures:
        controls = figure.query_selector_all("form.vega-bindings :is(input, select)")
        assert controls
        for control in controls:
            named = control.evaluate("node => node.ariaLabel || [...node.labels].map((l) => l.textContent).join(' ')")
            assert re.search(r"[A-Za-z]", named), f"a control of {name} has no name"
            slider = control.get_attribute("type") == "range"
            before, value = picture(figure), shown(control)
            at_end = "node => node.options ? node.selectedIndex === node.length - 1 : node.value === node.max"
            back = control.evaluate(at_end)
            control.focus()
            # One step must change the number. The picture may stay the same for a few, as a network's answer may.
            for step in range(20 if slider else 1):
                page.keyboard.press({True: ("ArrowRight", "ArrowLeft"), False: ("ArrowDown", "ArrowUp")}[slider][back])
                page.evaluate(SETTLE)
                assert step or shown(control) != value, named
                if picture(figure) != before:
                    break
            assert picture(figure) != before, f"{name}: {named} moves nothing"
    page.close()


def picture(figure: ElementHandle) -> str:
    return figure.eval_on_selector(".vega-embed svg", "node => node.outerHTML")


def shown(control: ElementHandle) -> str:
    """What a reader sees of a control's value: the number beside a slider, the option in a list."""
    text = "node => node.selectedOptions?.[0].text ?? node.closest('.vega-bind').innerText"
    return control.evaluate(text)


def changed(page: Page, figure: ElementHandle, before: str) -> None:
    differs = "([figure, before]) => figure.querySelector('.vega-embed svg').outerHTML !== before"
    page.wait_for_function(differs, arg=[figure, before], timeout=3000)


@pytest.mark.parametrize("name", MOVING)
def test_moving_pictures_fit_a_phone_and_follow_a_finger(chromium, site, name):
    context = chromium.new_context(
        viewport={"width": WIDTHS[0], "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = context.new_page()
    page.goto(f"{site.url}{name}.html")
    page.evaluate(SETTLE)
    assert not page.evaluate(BEYOND)
    for figure in page.query_selector_all("figure.moving"):
        for part in figure.query_selector_all(".vega-embed svg, form.vega-bindings :is(input, select)"):
            box = part.bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= WIDTHS[0]
        # Drawn at no less than two thirds of its size, so its letters stay readable.
        svg = figure.query_selector(".vega-embed svg")
        assert svg.evaluate("node => node.getBoundingClientRect().width / node.viewBox.baseVal.width") > 2 / 3
        for slider in figure.query_selector_all("input[type=range]"):
            before = picture(figure)
            slider.scroll_into_view_if_needed()
            box = slider.bounding_box()
            assert box["height"] >= 24, "too thin for a finger"
            low = slider.evaluate("node => node.valueAsNumber - node.min < (node.max - node.min) / 2")
            page.touchscreen.tap(box["x"] + box["width"] * (0.8 if low else 0.2), box["y"] + box["height"] / 2)
            changed(page, figure, before)
    context.close()


@pytest.mark.parametrize("amd", [False, True])
def test_equal_pictures_work_side_by_side_and_with_requirejs(contexts, site, amd):
    figure = pictures.mixing(torch.eye(4).view(4, 2, 2)[:2]).to_html()
    require = "<script>window.define = () => { throw Error('asked'); }; window.define.amd = {};</script>" if amd else ""
    page = contexts["light"].new_page()
    page.goto(f"{site.url}search.html")
    page.set_content(
        f'<!doctype html><html data-content_root="{site.url}"><body>{require}{figure}{figure}</body></html>'
    )
    for place in range(2):
        expect(page.locator("figure.moving").nth(place).locator("svg")).to_have_count(1)
        expect(page.locator("figure.moving").nth(place).locator("input")).to_have_count(4)
    assert page.evaluate("document.querySelectorAll('script[src$=\"vega.js\"]').length") == 1
    assert not amd or page.evaluate("typeof define.amd") == "object", "RequireJS is left as it was"
    page.close()


def test_search_finds_a_word(contexts, site):
    page = contexts["light"].new_page()
    page.goto(f"{site.url}search.html")
    page.fill("main input[name=q]", "templates")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results a[href^='01-templates.html']")
    # From a page, through the dialog, to the result.
    page.set_viewport_size({"width": WIDTHS[1], "height": 900})
    page.goto(f"{site.url}02-training.html")
    page.click(".bd-sidebar-primary .search-button-field")
    page.wait_for_selector("#pst-search-dialog[open]")
    page.keyboard.type("templates")
    page.keyboard.press("Enter")
    page.click("#search-results a[href^='01-templates.html']")
    page.wait_for_selector("article h1:has-text('layers to share softly')")
    page.close()


def test_the_button_switches_light_and_dark(chromium, site):
    context = chromium.new_context(viewport={"width": WIDTHS[1], "height": 900}, color_scheme="light")
    page = context.new_page()
    page.goto(f"{site.url}01-templates.html")
    colours = {}
    for _ in range(3):
        page.click(".theme-switch-button:visible")
        mode = page.evaluate("document.documentElement.dataset.mode")
        page.reload()
        assert page.evaluate("document.documentElement.dataset.mode") == mode  # a choice is kept
        colours[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    context.close()
    assert set(colours) == {"light", "dark", "auto"}
    assert colours["light"] == colours["auto"] != colours["dark"]
