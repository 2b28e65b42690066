"""Draws pictures of runs: the losses of one run against tokens, or the held-out losses of several runs together."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from supra_jax.core.colours import CURVES, GREY, HELDOUT, INK, TRAIN
from supra_jax.training.metrics import Record, read_metrics, short_number

_DOTS: dict[str, Any] = {
  "linestyle": "none",
  "marker": "o",
  "markersize": 5,
  "markeredgecolor": "white",
  "markeredgewidth": 0.8,
  "clip_on": False,
  "zorder": 4,
}


def plot_losses(
  metrics_path: str | os.PathLike[str],
  output_png: str | os.PathLike[str],
  *,
  teacher_nll: float | None = None,
  title: str = "",
) -> None:
  """Draws the training loss and the held-out loss of a run against tokens, into a PNG file.

  Args:
    metrics_path: a file that `MetricsWriter` wrote.
    output_png: the file to write.
    teacher_nll: loss, in nats per token, of the transformer that the student came from, on the same held-out text;
      drawn as a horizontal line. None: no line.
    title: one line above the picture; empty: none.

  Raises:
    FileNotFoundError: the metrics do not exist.
    ValueError: the metrics hold no loss, or a line of them is not a record.
  """
  records = read_metrics(metrics_path)
  train, heldout = _points(records, "loss"), _points(records, "heldout_nll")
  if not len(train) and not len(heldout):
    raise ValueError(f"{metrics_path}: no loss to draw.")
  figure, axes = _frame(title)
  ends: list[tuple[float, str, str]] = []
  if len(train):
    smooth = _smooth(train[:, 1])
    axes.plot(train[:, 0], train[:, 1], color=TRAIN, alpha=0.25, linewidth=0.7)
    axes.plot(train[:, 0], smooth, color=TRAIN, linewidth=1.8)
    ends.append((smooth[-1], "training", TRAIN))
  if len(heldout):
    axes.plot(heldout[:, 0], heldout[:, 1], color=HELDOUT, **_DOTS)
    ends.append((heldout[-1, 1], "held out", HELDOUT))
  if teacher_nll is not None:
    axes.axhline(teacher_nll, color=INK, linewidth=1, dashes=(5, 3))
    ends.append((teacher_nll, "teacher", INK))
  axes.set_xlim(0, max(points[:, 0].max() for points in (train, heldout) if len(points)) or 1)
  _label_ends(axes, ends)
  figure.savefig(output_png)


def plot_curves(
  curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
  output_png: str | os.PathLike[str],
  *,
  teacher_nll: float,
  x: str = "tokens",
  tenth_of: str = "",
  title: str = "",
) -> None:
  """Draws the held-out losses of several runs as curves in one PNG file.

  Args:
    curves: name of a curve -> its runs, which differ in their seed alone. A run is a list of points (x, loss in nats
      per token); all runs of a curve have the same number of points. The curve is the mean over the runs, with a band
      from the lowest to the highest. Six colours are used in turn.
    output_png: the file to write.
    teacher_nll: loss of the transformer on the same text, in nats per token; drawn as a horizontal line.
    x: label of the x axis.
    tenth_of: name of a curve to draw a second time, dashed, with x divided by 10; the x axis is then logarithmic, and
      points with x = 0 are left out. Empty: none.
    title: one line above the picture; empty: none.
  """
  figure, axes = _frame(title)
  axes.set_xlabel(x, color=INK, fontsize=10.5)
  axes.set_title("held-out loss, nats per token, logarithmic", loc="left", color=INK, fontsize=10.5)
  ends: list[tuple[float, str, str]] = [(teacher_nll, "teacher", INK)]
  places = [point[0] for runs in curves.values() for run in runs for point in run]
  if tenth_of:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    places = [place for place in places if place > 0]
  for (name, runs), colour in zip(curves.items(), itertools.cycle(CURVES), strict=False):
    points = np.array(runs, float)  # [runs, points, 2]
    if tenth_of:
      points = points[:, points[0, :, 0] > 0]
    at, losses = points[:, :, 0].mean(0), points[:, :, 1]
    axes.fill_between(at, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.plot(at, losses.mean(0), color=colour, linewidth=1.8)
    axes.plot(at, losses.mean(0), color=colour, **_DOTS)
    ends.append((losses.mean(0)[-1], name, colour))
    if name == tenth_of:
      axes.plot(at / 10, losses.mean(0), color=colour, linewidth=1.2, dashes=(3, 2))
      axes.annotate(
        f"{name} in a tenth of its {x}",
        (at[-1] / 10, losses.mean(0)[-1]),
        (0, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=colour,
        fontsize=9,
      )
  axes.axhline(teacher_nll, color=INK, linewidth=1, dashes=(5, 3))
  axes.set_xlim(min(places) / 2 if tenth_of else 0, max(places))
  _label_ends(axes, ends)
  figure.savefig(output_png)


def _frame(title: str) -> tuple[Figure, Axes]:
  # Not pyplot, which would keep the figure in global state.
  figure = Figure(figsize=(7.2, 4.0), dpi=200, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  _draw_frame(axes, title)
  return figure, axes


def _points(records: Sequence[Record], name: str) -> np.ndarray:
  """Returns float [n, 2]: (tokens, value under `name`) of each record that has a value there."""
  pairs = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
  return np.array(pairs, dtype=float).reshape(-1, 2)


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns the moving average of n values over up to sqrt(n) neighbours on either side."""
  sums, number = np.concatenate([[0.0], np.cumsum(values)]), len(values)
  at = np.arange(number)
  # At the start the window is symmetric: the curve falls so fast that a one-sided mean would lie far below it.
  back = np.minimum(at, math.isqrt(number))
  forward = np.minimum(back, number - 1 - at)
  return (sums[at + forward + 1] - sums[at - back]) / (back + forward + 1)


def draw_axes(axes: Axes, labelsize: float = 10) -> None:
  """Draws two of the four spines, ticks and horizontal lines, in the colours of all pictures."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(GREY)
  axes.tick_params(colors=GREY, labelcolor=INK, labelsize=labelsize, length=3)
  axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
  axes.set_axisbelow(True)


def _draw_frame(axes: Axes, title: str) -> None:
  draw_axes(axes)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
  axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  axes.set_xlabel("tokens", color=INK, fontsize=10.5)
  # A loss starts far above the range of most of its curve; a logarithmic axis leaves room for that range.
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_locator(NullLocator())
  axes.set_title("loss, nats per token, logarithmic", loc="left", color=INK, fontsize=10.5)
  if title:
    axes.figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12.5, fontweight="bold")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
  """Writes (last value, name, colour) of each curve at its right end; labels that would overlap are moved up."""
  to_axes = axes.transData + axes.transAxes.inverted()
  at = -math.inf
  for value, name, colour in sorted(ends):
    at = max(to_axes.transform((1, value))[1], at + 0.075)
    axes.annotate(
      f"{name} {value:.2f}",
      xy=(1, at),
      xycoords="axes fraction",
      xytext=(10, 0),
      textcoords="offset points",
      va="center",
      color=colour,
      fontsize=10.5,
    )
