"""Draws scores of several models on several tasks, with their standard errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#c1442e", "#4f86c0", "#3f8f5f", "#8a5fa8", "#b8860b", "#5f6f7f")
GREY = "#8a8a8a"


def plot_scores(models: Mapping[str, Mapping[str, Any]], output_png: str | os.PathLike[str]) -> None:
  """Draws a line for each task, and on it a dot for each model: accuracy in percent, with its standard error.

  Args:
    models: name -> results of `tasks.evaluate_tasks`; of each task `acc_norm`, or else `acc`, is drawn.
    output_png: the file to write.
  """
  tasks = list(next(iter(models.values()))["results"])
  figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(tasks)), layout="constrained")
  axes = figure.subplots()
  for number, (name, results) in enumerate(models.items()):
    shift = (number - (len(models) - 1) / 2) * 0.5 / max(len(models), 1)
    points = [(row, _score(results["results"].get(task, {}))) for row, task in enumerate(tasks)]
    known = [(row, *score) for row, score in points if score is not None]
    axes.errorbar(
      [100 * value for _, value, _ in known],
      [row + shift for row, _, _ in known],
      xerr=[100 * error for _, _, error in known],
      fmt="o",
      color=COLOURS[number % len(COLOURS)],
      label=name,
      markersize=5,
      elinewidth=1.2,
    )
  axes.set_yticks(range(len(tasks)), tasks)
  axes.invert_yaxis()
  axes.set_xlabel("percent right, with standard error")
  axes.grid(axis="x", color=GREY, alpha=0.25)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False)
  FigureCanvasAgg(figure).print_png(output_png)


def _score(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
  for metric in ("acc_norm", "acc"):
    value, error = metrics.get(f"{metric},none"), metrics.get(f"{metric}_stderr,none")
    if isinstance(value, float | int):
      return value, error if isinstance(error, float | int) else 0.0
  return None
