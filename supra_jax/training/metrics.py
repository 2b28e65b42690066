"""What a run says of itself: a file of JSON lines, the same in TensorBoard, progress on the terminal.

A record of training has step, tokens, loss, grad_norm, learning_rate, tokens_per_second,
tokens_per_second_per_device, mfu (null where the device's peak is unknown), data_wait (mean seconds a step waited for
data since the record before) and skipped (batches skipped so far); one of an evaluation has step, tokens, heldout_nll
and heldout_perplexity.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from supra_jax.core.files import local, place
from supra_jax.core.plain_json import to_json
from supra_jax.core.progress import Progress

Record = Mapping[str, Any]

_HELDOUT = "heldout_"


class MetricsWriter:
  """Appends records to a file, one JSON object a line, and to TensorBoard; each is on disk when `write` returns.

  TensorBoard has each number under `heldout/...` or `train/...`, against the step. It lacks nulls, and `tokens`, which
  is the step times a constant.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    restored_step: int | None = None,
    *,
    tensorboard: str | os.PathLike[str] | None = None,
    enabled: bool = True,
  ):
    """Opens the file.

    Args:
      path: created with its directories if it does not exist.
      restored_step: the step of the checkpoint a run resumes from; records of later steps, which it will write again,
        are taken out, and TensorBoard hides them. None is a run from the start: the file is emptied.
      tensorboard: directory of event files, created if it does not exist; None writes none.
      enabled: whether anything is touched or written. Of several processes one is to be enabled, no matter which.
    """
    self._file: TextIO | None = None
    self._board: _Board | None = None
    if not enabled:
      return
    path = local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if restored_step is not None and path.exists():
      kept = [record for record in read_metrics(path) if record["step"] <= restored_step]
    # Another file renamed, so that a crash in between leaves the old one.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text("".join(_line(record) for record in kept))
    os.replace(partial, path)
    self._file = path.open("a")
    if tensorboard is not None:
      self._board = _Board(local(tensorboard), 0 if restored_step is None else restored_step + 1)

  def write(self, record: Record) -> None:
    """Appends a record, which has a step; nan and infinities become null.

    Raises:
      ValueError: the record has no whole number under `step`.
    """
    line = _line(record)
    values = json.loads(line)
    if not isinstance(values.get("step"), int):
      raise ValueError(f"A record of metrics has a whole number under 'step', got {line.strip()}.")
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
    if self._board is not None:
      self._board.write(values)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    # What could not be written before cannot be now, and is no news beside the error that is on its way.
    with contextlib.suppress(OSError) if error else contextlib.nullcontext():
      self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads what MetricsWriter wrote, without a last line that a crash cut short.

  Raises:
    ValueError: a whole line is no record, by file and number.
  """
  records = []
  *lines, _ = place(path).read_text().split("\n")
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
  return to_json(record) + "\n"


class _Board:
  """A file of TensorBoard's events.

  Not TensorBoard's EventFileWriter: that writes in a thread, and once the thread has died, of a full disk say, its
  caller waits for ever.
  """

  def __init__(self, directory: Path, first_step: int):
    """Opens a new file in the directory; from first_step on, what other files have is hidden."""
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files with this name, in the order of their seconds; nanoseconds tell those of a second apart.
    now = time.time_ns()
    file = (directory / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}").open("xb")
    self._records = RecordWriter(file)
    self._add(0, file_version="brain.Event:2")
    self._add(first_step, session_log=SessionLog(status=SessionLog.START))

  def write(self, record: Record) -> None:
    numbers = {
      name: value for name, value in record.items() if name not in ("step", "tokens") and isinstance(value, int | float)
    }
    values = [Summary.Value(tag=_tag(name), simple_value=value) for name, value in numbers.items()]
    self._add(record["step"], summary=Summary(value=values))

  def _add(self, step: int, **what: Any) -> None:
    self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
    self._records.flush()

  def close(self) -> None:
    self._records.close()


def _tag(name: str) -> str:
  return f"heldout/{name.removeprefix(_HELDOUT)}" if name.startswith(_HELDOUT) else f"train/{name}"


def short_number(number: float) -> str:
  """12345 -> 12.3k."""
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


# How the progress of a run shows what a record holds.
SHOWN: Mapping[str, Callable[[float], str]] = {
  "loss": lambda value: f"loss {value:.4f}",
  "tokens_per_second": lambda value: f"{short_number(value)} tokens/s",
  "mfu": lambda value: f"MFU {value:.1%}",
  "skipped": lambda value: f"{value} skipped" if value else "",
}


def progress_of_steps(total: int, first: int = 0, **how: Any) -> Progress:
  """Progress of a run, whose values are those of a record of training.

  Args:
    total: number of steps of the whole run.
    first: number of steps done before.
    **how: further arguments of `Progress`.
  """
  bar = "{n_fmt}/{total_fmt} {bar} {postfix}, {remaining} left"
  return Progress(total, "step {done}/{total}", SHOWN, first=first, bar_format=bar, **how)
