"""Draws figure 1 of the paper: accuracy against training tokens on both sides, bytes and seconds in the centre."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from supra_jax.core.colours import CURVES, GREY, HELDOUT, INK, TRAIN
from supra_jax.training.pictures import draw_axes

Kind = Literal["transformer", "rnn", "supra", "here"]
_KINDS: Mapping[Kind, tuple[str, str, str]] = {
  "transformer": (GREY, "o", "transformers"),
  "rnn": (TRAIN, "s", "RNNs trained from scratch"),
  "supra": (HELDOUT, "D", "SUPRA, tokens of uptraining"),
  "here": (INK, "*", "measured here"),
}
_FONT = 7.5  # size of the models' names
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """A point of the left or right panel.

  Attributes:
    name: the model's name.
    tokens: billions of tokens that it was trained on; None: not known.
    percent: its accuracy.
    kind: what kind of model it is, or `here` for one that was measured here.
  """

  name: str
  tokens: float | None
  percent: float
  kind: Kind


def plot_figure_1(
  left: tuple[str, Sequence[Accuracy]],
  rows: Sequence[Mapping[str, Any]],
  right: tuple[str, Sequence[Accuracy]],
  output_png: str | os.PathLike[str],
) -> None:
  """Draws the figure into a PNG file.

  Args:
    left, right: name of a column of table 1, and its points. One without tokens is a dashed line.
    rows: what `figure_1.measure` returned.
    output_png: the file to write.
  """
  # Not pyplot, which would keep the figure in global state.
  figure = Figure(figsize=(14.5, 5.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  places = figure.subplot_mosaic([["left", "bytes", "right"], ["left", "seconds", "right"]], width_ratios=[1, 1, 1])
  for side, (column, points) in (("left", left), ("right", right)):
    _draw_accuracies(places[side], column, points)
  _draw_cost(places["bytes"], rows, "state_bytes", "memory of one text, bytes", _bytes)
  _draw_cost(places["seconds"], rows, "seconds", "milliseconds a token", lambda x: f"{1e3 * x:g}")
  places["seconds"].set_xlabel("tokens read", color=INK)
  if rows:
    places["bytes"].legend(frameon=False, fontsize=8.5)
  handles, labels = places["left"].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
  figure.draw_without_rendering()  # from here on the panels have their places
  figure.set_layout_engine("none")
  _label(places["left"], left[1])
  _label(places["right"], right[1])
  figure.savefig(output_png)


def _draw_accuracies(axes: Axes, column: str, points: Sequence[Accuracy]) -> None:
  _frame(axes, f"{column}, percent")
  axes.set_xscale("log")
  axes.set_xlabel("training tokens, billions", color=INK)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  axes.xaxis.set_minor_locator(NullLocator())
  known = [(point.tokens, point.percent, point) for point in points if point.tokens is not None]
  for kind, (colour, marker, label) in _KINDS.items():
    of_kind = [(x, y) for x, y, point in known if point.kind == kind]
    if of_kind:
      size = 10 if marker == "*" else 5.5
      axes.plot(*zip(*of_kind, strict=True), marker, color=colour, label=label, markersize=size, zorder=3)
  # What one model came to with more tokens is joined.
  for name in dict.fromkeys(point.name for _, _, point in known if point.kind == "supra"):
    line = sorted((x, y) for x, y, point in known if point.name == name and point.kind == "supra")
    axes.plot(*zip(*line, strict=True), color=HELDOUT, linewidth=1.2)
  axes.margins(x=0.25, y=0.08)
  for point in points:
    if point.tokens is None:
      axes.axhline(point.percent, color=INK, linewidth=1, dashes=(5, 3))
      where: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
      axes.annotate(point.name, (0.01, point.percent), (0, 2), fontsize=_FONT, color=INK, **where)


def _label(axes: Axes, points: Sequence[Accuracy]) -> None:
  """Writes the names of the points that have tokens, each beside its point where nothing else is, if there is room."""
  pixels = axes.figure.dpi / 72  # of a point of the font
  height, inside = 1.25 * _FONT * pixels, axes.get_window_extent()
  known = [point for point in points if point.tokens is not None]
  centres = [axes.transData.transform((point.tokens or 0.0, point.percent)) for point in known]
  taken = [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in centres]
  for point, (x, y) in zip(known, centres, strict=True):
    width, gap = 0.62 * _FONT * pixels * len(point.name), 7 * pixels
    places = []
    for lift in (0, -height, height, -2 * height, 2 * height):
      for left in (x + gap, x - gap - width, x - width / 2):
        if lift or left != x - width / 2:
          places.append((left, y + lift - height / 2, left + width, y + lift + height / 2))
    own = [place for place in places if inside.x0 <= place[0] and place[2] <= inside.x1]
    free = [place for place in own if not any(_overlap(place, other) for other in taken)]
    place = (free or own or places)[0]
    taken.append(place)
    align: Literal["left", "center", "right"] = "left" if place[0] > x else "right" if place[2] < x else "center"
    anchor = {"left": place[0], "center": x, "right": place[2]}[align]
    at_x, at_y = axes.transData.inverted().transform((anchor, (place[1] + place[3]) / 2))
    axes.text(at_x, at_y, point.name, ha=align, va="center", fontsize=_FONT, color=_KINDS[point.kind][0])


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
  return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _draw_cost(axes: Axes, rows: Sequence[Mapping[str, Any]], field: str, title: str, shown: Any) -> None:
  """Draws a curve of a field for each model, on logarithmic axes; lengths that were skipped have no point."""
  _frame(axes, title)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  grows = {row["model"]: row["grows"] for row in rows}
  colours = {True: itertools.cycle((GREY, INK)), False: itertools.cycle(CURVES)}
  for name in grows:
    colour = next(colours[grows[name]])
    points = sorted((row["tokens"], row[field]) for row in rows if row["model"] == name and field in row)
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=name, markersize=4.5)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: shown(y)))
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_minor_locator(NullLocator())


def _bytes(value: float) -> str:
  return next((f"{value / unit:g} {name}" for unit, name in _BYTES if value >= unit), f"{value:g}")


def _frame(axes: Axes, title: str) -> None:
  draw_axes(axes, labelsize=9)
  axes.set_title(title, loc="left", color=INK, fontsize=10.5)
