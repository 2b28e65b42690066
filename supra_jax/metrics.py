"""What a run says of itself: a file of JSON lines, progress on the terminal, a picture of the losses.

A record of training has step, tokens, loss, grad_norm, learning_rate and tokens_per_second; one of an evaluation has
step, tokens and heldout_nll.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from tqdm import tqdm

Record = Mapping[str, Any]

INK, GREY, TRAIN, HELDOUT = "#2b2b2b", "#8a8a8a", "#4f86c0", "#c1442e"

_DOTS: dict[str, Any] = {
  "linestyle": "none",
  "marker": "o",
  "markersize": 5,
  "markeredgecolor": "white",
  "markeredgewidth": 0.8,
  "clip_on": False,
  "zorder": 4,
}


class MetricsWriter:
  """Appends records to a file, one JSON object a line, each on disk when `write` returns."""

  def __init__(self, path: str | os.PathLike[str], restored_step: int | None = None):
    """Opens the file.

    Args:
      path: created with its directories if it does not exist.
      restored_step: the step of the checkpoint a run resumes from; records of later steps, which it will write again,
        are taken out. None is a run from the start: the file is emptied.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if restored_step is not None and path.exists():
      kept = [record for record in read_metrics(path) if record["step"] <= restored_step]
    # Another file renamed, so that a crash in between leaves the old one.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text("".join(_line(record) for record in kept))
    os.replace(partial, path)
    self._file = path.open("a")

  def write(self, record: Record) -> None:
    """Appends a record, which has a step; nan and infinities become null."""
    line = _line(record)
    if not isinstance(json.loads(line).get("step"), int):
      raise ValueError(f"A record of metrics has a whole number under 'step', got {line.strip()}.")
    self._file.write(line)
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads what MetricsWriter wrote, without a last line that a crash cut short.

  Raises:
    ValueError: a whole line is no record, by file and number.
  """
  records = []
  *lines, _ = Path(path).read_text().split("\n")
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{path}, line {number}: not JSON: {line!r}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
      raise ValueError(f"{path}, line {number}: no whole number under 'step': {line!r}.")
    records.append(record)
  return records


def _line(record: Record) -> str:
  return json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  # Numpy and jax scalars have `item`.
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
  """Steps done, loss, tokens/s and time left: a bar on a terminal, else a line every `seconds`."""

  def __init__(self, total_steps: int, *, first_step: int = 0, seconds: float = 10.0, stream: TextIO | None = None):
    self._stream = stream or sys.stderr
    self._total, self._first, self._step, self._seconds = total_steps, first_step, first_step, seconds
    self._began = self._said = time.monotonic()
    self._said_step: int | None = None
    self._text = ""
    terminal = self._stream.isatty()
    form = "{n_fmt}/{total_fmt} {bar} {postfix}, {remaining} left"
    self._bar = (
      tqdm(total=total_steps, initial=first_step, file=self._stream, bar_format=form, dynamic_ncols=True)
      if terminal
      else None
    )

  def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
    """Says that `step` steps are done; what is None is shown as it was last."""
    parts = []
    if loss is not None:
      parts.append(f"loss {loss:.4f}")
    if tokens_per_second is not None:
      parts.append(f"{_short(tokens_per_second)} tokens/s")
    self._text = ", ".join(parts) or self._text
    if self._bar is not None:
      self._bar.set_postfix_str(self._text, refresh=False)
      self._bar.update(step - self._step)
    self._step = step
    if self._bar is None and time.monotonic() - self._said >= self._seconds:
      self._say()

  def message(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      tqdm.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._step not in (self._first, self._said_step):
      self._say()

  def __enter__(self) -> Progress:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.close()

  def _say(self) -> None:
    self._said, self._said_step = time.monotonic(), self._step
    rate = (self._step - self._first) / max(self._said - self._began, 1e-9)
    left = tqdm.format_interval((self._total - self._step) / rate) if rate else "?"
    text = f"{self._text}, " if self._text else ""
    print(f"step {self._step}/{self._total}, {text}{left} left", file=self._stream, flush=True)


def _short(number: float) -> str:
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


def plot_losses(
  metrics_path: str | os.PathLike[str],
  output_png: str | os.PathLike[str],
  *,
  teacher_nll: float | None = None,
  title: str = "",
) -> None:
  """Draws training and held-out loss against tokens, and the teacher's held-out loss as a line.

  Args:
    metrics_path: what MetricsWriter wrote.
    output_png: where the picture goes.
    teacher_nll: nats per token of the transformer that the student came from, on the same held-out text.
    title: one line above.

  Raises:
    ValueError: the file holds no loss.
  """
  records = read_metrics(metrics_path)
  train, heldout = _points(records, "loss"), _points(records, "heldout_nll")
  if not len(train) and not len(heldout):
    raise ValueError(f"{metrics_path}: no loss to draw.")
  # Not pyplot, which would keep the figure in global state.
  figure = Figure(figsize=(7.2, 4.0), dpi=200, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  _draw_frame(axes, title)
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


def _points(records: Sequence[Record], name: str) -> np.ndarray:
  """[n, 2]: tokens and the finite values under `name`."""
  pairs = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
  return np.array(pairs, dtype=float).reshape(-1, 2)


def _smooth(values: np.ndarray) -> np.ndarray:
  """The mean of each value and its sqrt(n) neighbours to either side."""
  sums, number = np.concatenate([[0.0], np.cumsum(values)]), len(values)
  at = np.arange(number)
  # As far back as forward at the start, where the curve falls too fast for a lopsided mean.
  back = np.minimum(at, math.isqrt(number))
  forward = np.minimum(back, number - 1 - at)
  return (sums[at + forward + 1] - sums[at - back]) / (back + forward + 1)


def _draw_frame(axes: Axes, title: str) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(GREY)
  axes.tick_params(colors=GREY, labelcolor=INK, labelsize=10, length=3)
  axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
  axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  axes.set_xlabel("tokens", color=INK, fontsize=10.5)
  # A loss starts far above where it spends its life; a logarithmic axis leaves that part room.
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_locator(NullLocator())
  axes.set_title("loss, nats per token, logarithmic", loc="left", color=INK, fontsize=10.5)
  if title:
    axes.figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12.5, fontweight="bold")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
  """Writes each curve's name and last value right of it, moved apart where they would touch."""
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
