"""Chapter 1's interactive picture: a reader mixes the filters of two layers from the same templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..similarity import layer_similarity
from .charts import RED_TO_BLUE, data, sentence, squares
from .moving import Choice, Moving, Slider

_LAYERS = ("a", "b")


def mixing(templates: Tensor, start: Sequence[Sequence[float]] | None = None) -> Moving:
    """Two layers mix their filters from k templates; a sentence below gives the similarity of the layers.

    Args:
        templates: (k, H, W), of any scale.
        start: the initial coefficients of both layers, (2, k), from -1 to 1.

    Raises:
        ValueError: another shape, templates that are not finite, or coefficients outside -1 to 1.
    """
    if templates.dim() != 3 or not templates.numel() or not bool(templates.isfinite().all()):
        raise ValueError(f"templates must be (k, H, W), finite and not empty, got {tuple(templates.shape)}")
    k = len(templates)
    if start is None:
        start = [[*row, *[0.0] * k][:k] for row in ((1.0, 0.6), (0.8, -0.8))]
    if [len(row) for row in start] != [k, k] or not all(-1 <= value <= 1 for row in start for value in row):
        raise ValueError(f"start must hold 2 rows of {k} coefficients from -1 to 1, got {start}")
    values = templates.detach().float().cpu().numpy()  # (k, H, W)
    values = (values / (np.abs(values).max() or 1.0)).round(4)  # from -1 to 1
    picture = _Mixing(values, {layer: [f"{layer}{j + 1}" for j in range(k)] for layer in _LAYERS})
    return Moving(
        picture.sliders(start), picture.chart(), picture.draw,
        f"{k} templates, and the filters that two layers, A and B, mix from them with {k} coefficients each; below, the "
        "similarity of the two rows of coefficients. Sliders set the coefficients.",
    )  # fmt: skip


@dataclass(frozen=True)
class _Mixing:
    """Templates, and for each of the two layers the names of its coefficients, for sliders and in expressions."""

    templates: np.ndarray  # (k, H, W), from -1 to 1
    names: dict[str, list[str]]

    def sliders(self, start: Sequence[Sequence[float]]) -> dict[str, Slider | Choice]:
        return {
            self.names[layer][j]: Slider(f"{layer.upper()}: template {j + 1}", -1.0, 1.0, 0.1, start[number][j])
            for j in range(len(self.templates))
            for number, layer in enumerate(_LAYERS)
        }

    def chart(self) -> Any:
        """The templates above, the two mixed filters below them, and the sentence on their similarity."""
        import altair as alt

        k, high, wide = self.templates.shape
        pixels = data(
            {"x": x, "y": y} | {f"t{j + 1}": float(self.templates[j, y, x]) for j in range(k)}
            for y in range(high)
            for x in range(wide)
        )
        shape = high / wide
        shown = [
            squares(pixels, f"datum.t{j + 1}", f"template {j + 1}", 100, (-1, 1), RED_TO_BLUE, shape) for j in range(k)
        ]
        mixed = [
            squares(pixels, self._mixture(layer), f"layer {layer.upper()}", 150, (-1.5, 1.5), RED_TO_BLUE, shape)
            for layer in _LAYERS
        ]
        rows = alt.hconcat(*shown, spacing=14), alt.hconcat(*mixed, spacing=20), sentence(self._similarity())
        return alt.vconcat(*rows, spacing=12).resolve_scale(color="independent")

    def _mixture(self, layer: str) -> str:
        """A pixel of a layer's filter, as an expression."""
        return " + ".join(f"{name} * datum.t{j + 1}" for j, name in enumerate(self.names[layer]))

    def _similarity(self) -> str:
        """The sentence on how similar the layers are, as an expression; a row of zeros has similarity 0."""
        dot = " + ".join(f"{one} * {other}" for one, other in zip(*self.names.values(), strict=True))
        a, b = (" + ".join(f"{name} * {name}" for name in names) for names in self.names.values())
        length = f"sqrt(({a}) * ({b}))"
        cosine = f"{length} > 0 ? abs({dot}) / {length} : 0"
        return f"'similarity of the layers, |cos(A, B)| = ' + format({cosine}, '.2f')"

    def draw(self, **given: float) -> Figure:
        """The same picture with matplotlib, from the coefficients by name."""
        coefficients = torch.tensor(
            [[given[name] for name in self.names[layer]] for layer in _LAYERS], dtype=torch.float32
        )  # (2, k)
        filters = torch.einsum("lk,khw->lhw", coefficients, torch.from_numpy(self.templates)).numpy()
        k = len(self.templates)
        figure, axes = plt.subplots(1, k + 2, figsize=(1.6 * (k + 2), 2.2))
        for j, template in enumerate(self.templates):
            axes[j].imshow(template, cmap="RdBu", vmin=-1.0, vmax=1.0)
            axes[j].set(title=f"template {j + 1}", xticks=[], yticks=[])
        for one, layer, mixed in zip(axes[k:], _LAYERS, filters, strict=True):
            one.imshow(mixed, cmap="RdBu", vmin=-1.5, vmax=1.5)
            one.set(title=f"layer {layer.upper()}", xticks=[], yticks=[])
        figure.suptitle(f"|cos(A, B)| = {float(layer_similarity(coefficients)[0, 1]):.2f}", fontsize=11)
        return figure
