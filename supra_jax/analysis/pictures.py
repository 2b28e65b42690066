"""Draws the similarity of attention matrices as heat maps, a cell for each layer and head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from supra_jax.analysis.similarity import FORMS, ITSELF, MEASURES, Similarity
from supra_jax.core.colours import GREY, INK

_LABELS = {
  "cosine": "cosine similarity with the teacher's matrix",
  "singular": "relative distance of the singular values, logarithmic",
}
_SKIPPED = "#d9d9d9"


def plot_heads(
  similarity: Similarity,
  output_png: str | os.PathLike[str],
  *,
  measure: str = "cosine",
  form: str = "raw",
  names: Sequence[str] | None = None,
  title: str = "",
) -> None:
  """Draws a heat map of layers and heads for each model, side by side, into one PNG file.

  All maps share one colour scale. The scale of cosines goes from 0, or from the lowest cosine below 0, to 1. The scale
  of distances is logarithmic; the lowest and the highest 1 % of the distances have the colours of its ends. Layers that
  were skipped are grey.

  Args:
    similarity: what `compare` returned.
    output_png: the file to write.
    measure: "cosine" or "singular".
    form: "raw" or "row"; controls are the same in both.
    names: what to draw, names in `similarity.scores`, from left to right. None: all models, and then the teacher on
      another text if that was compared.
    title: one line above the picture; empty: none.

  Raises:
    ValueError: `measure` or `form` is unknown, or there is nothing to draw.
    KeyError: a name is not in `similarity.scores`.
  """
  if measure not in MEASURES or form not in FORMS:
    raise ValueError(f"measure={measure!r}, form={form!r}: wanted one of {MEASURES}, and one of {FORMS}.")
  shown = [name for name in similarity.scores if name != ITSELF] if names is None else list(names)
  maps = {}
  for name in shown:
    forms = similarity.scores[name]
    maps[name] = getattr(forms.get(form, forms["raw"]), measure)
  if not maps or np.isnan(list(maps.values())).all():
    raise ValueError(f"names={shown}: no scores to draw.")

  layers, heads = next(iter(maps.values())).shape
  width, height = (min(max(0.28 * cells, 2.2), 6.5) for cells in (heads, layers))
  # Not pyplot, which would keep the figure in global state.
  figure = Figure(figsize=(1.4 + (width + 0.4) * len(maps), height + 1.5), dpi=200, layout="constrained")
  FigureCanvasAgg(figure)
  together: dict[str, Any] = {"norm": _scale(np.concatenate(list(maps.values())), measure)}
  together["cmap"] = matplotlib.colormaps["viridis" if measure == "cosine" else "viridis_r"].with_extremes(bad=_SKIPPED)
  panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
  for axes, (name, values) in zip(panels, maps.items(), strict=True):
    # Cells are as wide as there is room for: models have many more layers than heads, or the other way round.
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **together)
    without = set(similarity.skipped.get(name, {}).values())
    note = f"\ngrey: {', '.join(sorted(without))}" if without else ""
    axes.set_title(name + note, loc="left", color=INK, fontsize=10.5)
    axes.set_xlabel("head", color=INK, fontsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9, length=3)
    axes.spines[:].set_visible(False)
  every = max(-(-layers // 16), 1)
  panels[0].set_yticks(range(0, layers, every), [str(layer) for layer in similarity.layers[::every]])
  panels[0].set_ylabel("layer", color=INK, fontsize=10.5)
  if measure == "cosine":
    ends: dict[str, Any] = {}
  else:
    ends = {"extend": "both", "ticks": LogLocator(subs=(1, 2, 5)), "format": FuncFormatter(lambda x, _: f"{x:g}")}
  bar = figure.colorbar(image, ax=list(panels), label=_LABELS[measure], fraction=0.05, pad=0.02, **ends)
  bar.outline.set_visible(False)
  bar.ax.tick_params(colors=GREY, labelcolor=INK, labelsize=9, length=3)
  if title:
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12.5, fontweight="bold")
  figure.savefig(output_png)


def _scale(values: np.ndarray, measure: str) -> Normalize:
  """Returns the colour scale of all values, of which some may be NaN."""
  if measure == "cosine":
    return Normalize(min(float(np.nanmin(values)), 0.0), 1.0)
  # A logarithm needs values above 0; the distance of a head that is as the teacher's is 0.
  positive = values[values > 0]
  if not positive.size:
    return LogNorm(0.1, 1.0, clip=True)
  # Without the ends: a single head may lie four decades above all others.
  low, high = (float(end) for end in np.quantile(positive, (0.01, 0.99)))
  return LogNorm(low, high if high > low else 2 * low, clip=True)
