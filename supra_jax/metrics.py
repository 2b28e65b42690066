"""What a run says of itself: a file of JSON lines, progress on the terminal, a picture of the losses.

Training records: step, tokens, loss, grad_norm, learning_rate, tokens_per_second. Evaluations: step, tokens, heldout_nll.
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
from matplotlib.ticker import FuncFormatter, MaxNLocator
from tqdm import tqdm

Record = Mapping[str, Any]

INK, GREY, TRAIN, HELDOUT = "#2b2b2b", "#8a8a8a", "#8fb3d9", "#c1442e"


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
    if not isinstance(record.get("step"), int):
      raise ValueError(f"A record of metrics has an integer step, got {dict(record)!r}.")
    self._file.write(_line(record))
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
      record["step"] + 0  # noqa: B018  # a record is an object with a number of steps
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}, line {number}: not a record of metrics: {line!r}.") from error
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

  def __init__(
    self, total_steps: int, *, first_step: int = 0, seconds: float = 10.0, stream: TextIO | None = None
  ):
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
  """Draws training loss and held-out loss against tokens, and the teacher's held-out loss as a line.

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
  figure = Figure(figsize=(7.2, 4.0), dpi=200, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  _draw_frame(axes, title)
  last = max(points[-1, 0] for points in (train, heldout) if len(points))
  labels: list[tuple[float, str, str]] = []
  if len(train):
    axes.plot(*train.T, color=TRAIN, alpha=0.45, linewidth=0.8)
    smooth = _smooth(train[:, 1])
    axes.plot(train[:, 0], smooth, color=TRAIN, linewidth=2)
    labels.append((smooth[-1], f"training {smooth[-1]:.2f}", "#5a86b5"))
  if len(heldout):
    axes.plot(*heldout.T, color=HELDOUT, linewidth=1.2, marker="o", markersize=4)
    labels.append((heldout[-1, 1], f"held out {heldout[-1, 1]:.2f}", HELDOUT))
  if teacher_nll is not None:
    axes.axhline(teacher_nll, color=INK, linewidth=1, dashes=(5, 3))
    labels.append((teacher_nll, f"teacher {teacher_nll:.2f}", INK))
  axes.set_xlim(0, last if last > 0 else 1)
  _set_heights(axes, [points[:, 1] for points in (train, heldout) if len(points)], teacher_nll)
  _label_ends(axes, labels)
  figure.savefig(output_png)
