"""Draws scores of several models on several tasks, with their standard errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from supra_jax.core.colours import CURVES, GREY
from supra_jax.evaluation.paper import score


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
    points = [(row, score(results, task, "acc_norm") or score(results, task, "acc")) for row, task in enumerate(tasks)]
    known = [(row, found[0], found[1] or 0.0) for row, found in points if found is not None]
    axes.errorbar(
      [100 * value for _, value, _ in known],
      [row + shift for row, _, _ in known],
      xerr=[100 * error for _, _, error in known],
      fmt="o",
      color=CURVES[number % len(CURVES)],
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
