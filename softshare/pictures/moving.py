"""Interactive pictures: charts where nothing runs, widgets where a kernel does.

Each picture is declared once, by its controls. A page of the book, which has no kernel, shows an Altair chart whose
sliders are bound to its parameters. A live notebook shows ipywidgets that draw with matplotlib, and there the same
sliders may compute what no chart could hold. Both come in one output, and each front end shows the one that it can. (A
notebook that was saved with its outputs and is opened without a kernel may show neither: run it, or read the page.)
"""

from __future__ import annotations

import hashlib
import html
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import altair as alt

WIDGET = "application/vnd.jupyter.widget-view+json"
"""The media type of live widgets in a notebook's output."""


@dataclass(frozen=True)
class Slider:
    """Numbers from `least` to `most` in steps of `step`, initially `start`.

    `fine` is a smaller step for use with a kernel, which can draw what no chart holds. Raises ValueError unless
    `least` < `most`, `step` > 0 and `start` lies between the two.
    """

    label: str
    least: float
    most: float
    step: float
    start: float
    fine: float | None = None

    def __post_init__(self) -> None:
        if not (self.least < self.most and 0 < self.step and self.least <= self.start <= self.most):
            raise ValueError(f"a slider needs least < most, step > 0 and a start between them, got {self}")


@dataclass(frozen=True)
class Choice:
    """One of several texts, initially the first. Raises ValueError if there are none."""

    label: str
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"the choice {self.label!r} has no options")


class Moving:
    """A picture with controls, to be the value of a notebook cell.

    Args:
        controls: what a reader moves, by the name used for it in the chart's expressions and in `draw`.
        chart: an Altair chart that uses those names as parameters.
        draw: the same picture for a kernel: takes a value for each control, by name, and returns a matplotlib figure.
        description: the picture in words, for readers who cannot see it.
    """

    def __init__(
        self,
        controls: Mapping[str, Slider | Choice],
        chart: alt.TopLevelMixin,
        draw: Callable[..., Figure],
        description: str,
    ) -> None:
        self.controls, self.draw, self.description = dict(controls), draw, description
        self._box: Any = None  # made once, however often it is shown
        self.chart = chart.add_params(*(_parameter(name, one) for name, one in self.controls.items()))  # type: ignore[attr-defined]

    def spec(self) -> dict[str, Any]:
        """The chart as a Vega-Lite specification."""
        chart = self.chart.properties(description=self.description, background="white", padding=8)
        # Screen readers skip the individual marks: there are hundreds, and the description says what they show.
        chart = chart.configure(mark={"aria": False}, font="sans-serif").configure_view(stroke=None)
        chart = chart.configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", aria=False)
        chart = chart.configure_title(fontSize=13, fontWeight="normal").configure_legend(aria=False, labelFontSize=12)
        return chart.to_dict()  # type: ignore[no-any-return]

    def to_html(self) -> str:
        """The chart as a piece of HTML. The book's own pages come with Vega; other pages load it from a CDN, once."""
        import altair as alt

        spec = json.dumps(self.spec(), separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")
        name = "moving-" + hashlib.sha256(spec.encode()).hexdigest()[:12]
        host = "https://cdn.jsdelivr.net/npm/"
        versions = {"vega": alt.VEGA_VERSION, "vega-lite": alt.VEGALITE_VERSION, "vega-embed": alt.VEGAEMBED_VERSION}
        scripts = [f"{host}{package}@{version}" for package, version in versions.items()]
        return _PAGE % {
            "name": name,
            "spec": spec,
            "scripts": json.dumps(scripts),
            "label": html.escape(self.description),
        }

    def live(self) -> Any:
        """The controls, and the picture that follows them, as one ipywidgets box; every call returns the same box.

        Works with ipywidgets 7.7 and 8. Raises ImportError if ipywidgets is not installed.
        """
        import ipywidgets

        if self._box is not None:
            return self._box
        inputs = {name: _widget(one) for name, one in self.controls.items()}
        picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", object_fit="contain"))

        def redraw(_: Any = None) -> None:
            picture.value = _png(self.draw(**{name: widget.value for name, widget in inputs.items()}))

        for widget in inputs.values():
            widget.observe(redraw, names="value")
        redraw()
        self._box = ipywidgets.VBox([*inputs.values(), picture])
        return self._box

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.description, "text/html": self.to_html()}
        try:
            box = self.live()
        except ImportError:  # no ipywidgets: the chart will do
            return bundle
        return bundle | {WIDGET: {"version_major": 2, "version_minor": 0, "model_id": box.model_id}}


_PAGE = """<figure class="moving" role="group" aria-label="%(label)s">
<style>
.moving {margin: 1rem 0; width: 100%%}
.moving .vega-embed {display: block; width: 100%%}
.moving svg {width: min(100%%, 32rem); height: auto; border-radius: 4px}
.moving .vega-bindings {display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .3rem 1.5rem}
.moving .vega-bind label {display: flex; align-items: center; gap: .6rem}
.moving .vega-bind-name {flex: 0 0 9.5rem}
.moving .vega-bind input[type=range] {flex: 1 1 6rem; min-width: 0; height: 1.6rem}
</style>
<div class="%(name)s"><noscript>This picture needs JavaScript.</noscript></div>
<script>
(() => {
  const root = document.documentElement.dataset.content_root;  // set on pages of the book
  const sources = root === undefined ? %(scripts)s : [root + "_static/vega.js"];
  const load = (source) => new Promise((done, failed) => {
    const amd = window.define?.amd;
    if (amd) window.define.amd = false;  // with RequireJS, the scripts would register only there
    const script = document.createElement("script");
    const end = (then) => () => { if (amd) window.define.amd = amd; then(); };
    script.onload = end(done);
    script.onerror = end(() => {
      window.softshareVega = undefined;  // the next picture may try again
      failed(new Error(`This picture needs ${source}, which did not load. No network? With a kernel it works without.`));
    });
    script.src = source;
    document.head.append(script);
  });
  window.softshareVega ??= sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
  const near = document.currentScript?.previousElementSibling;  // two pictures may have the same name
  const place = near?.classList.contains("%(name)s") ? near : document.querySelector(".%(name)s");
  window.softshareVega
    .then(() => vegaEmbed(place, %(spec)s, {actions: false, renderer: "svg"}))
    .catch((error) => { place.textContent = error.message; });
})();
</script>
</figure>"""


def _parameter(name: str, control: Slider | Choice) -> Any:
    import altair as alt

    if isinstance(control, Choice):
        return alt.param(
            name, value=control.options[0], bind=alt.binding_select(options=list(control.options), name=control.label)
        )
    bind = alt.binding_range(min=control.least, max=control.most, step=control.step, name=control.label)
    return alt.param(name, value=control.start, bind=bind)


def _widget(control: Slider | Choice) -> Any:
    import ipywidgets

    # Redraw only when a slider comes to rest: some pictures take a second to compute.
    style = {"style": {"description_width": "initial"}, "description": control.label, "continuous_update": False}
    if isinstance(control, Choice):
        style.pop("continuous_update")
        return ipywidgets.Dropdown(options=list(control.options), **style)
    step = control.fine or control.step
    whole = all(float(value).is_integer() for value in (control.least, control.most, step, control.start))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    number = int if whole else float
    return kind(
        min=number(control.least), max=number(control.most), step=number(step), value=number(control.start), **style
    )  # fmt: skip


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()
