"""The metrics of a run: records in a file of JSON lines and in TensorBoard, and progress on the terminal.

A record of training has step, tokens (trained on so far), loss (in steps of the attention transfer: attention_error
instead), grad_norm, learning_rate, tokens_per_second, tokens_per_second_per_device, mfu, data_wait (mean seconds that a
step waited for data, over the steps since the last record) and skipped (number of batches skipped so far). The two
speeds and mfu are null in the first record of each call of `train`; mfu is also null if the device's peak FLOP/s is
unknown. A record of an evaluation has step, tokens, heldout_nll and heldout_perplexity.
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
  """Appends records to a file, one JSON object per line, and to TensorBoard; flushes both after each record.

  TensorBoard has each number of a record but `step` and `tokens` under `heldout/...` or `train/...`, against the step;
  nulls are left out.
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
      path: the file of JSON lines; created with its directories if it does not exist.
      restored_step: step of the saved state that the run resumes from. Records of later steps, which the run will write
        again, are removed from the file and hidden in TensorBoard. None: the run starts anew, and the file is emptied.
      tensorboard: directory of event files, created if it does not exist; None: no event files.
      enabled: False touches and writes no file. With several processes, exactly one is to be enabled.

    Raises:
      ValueError: `restored_step` is given, and a line of the existing file is not a record.
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
    """Appends a record; NaN and infinities become null.

    Raises:
      ValueError: the record has no integer under `step`.
      OSError: the record cannot be written, for lack of disk space, say.
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
  """Returns the records of a file that `MetricsWriter` wrote; a last line that a crash cut short is left out.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: a complete line is not a record; the message names the file and the line's number.
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
  """Writes a file of TensorBoard events.

  Replaces TensorBoard's EventFileWriter, which writes in a thread: if that thread dies, because the disk is full, say,
  the caller waits for ever.
  """

  def __init__(self, directory: Path, first_step: int):
    """Opens a new event file in the directory; TensorBoard hides older files' events of steps >= `first_step`."""
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
  """Formats a number with three significant digits and a suffix: 12345 -> 12.3k."""
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


# Name of a value in a record of training -> how the progress of a run shows the value.
SHOWN: Mapping[str, Callable[[float], str]] = {
  "loss": lambda value: f"loss {value:.4f}",
  "attention_error": lambda value: f"attention error {value:.4f}" if value is not False else "",
  "tokens_per_second": lambda value: f"{short_number(value)} tokens/s",
  "mfu": lambda value: f"MFU {value:.1%}",
  "skipped": lambda value: f"{value} skipped" if value else "",
}


def progress_of_steps(total: int, first: int = 0, **how: Any) -> Progress:
  """Makes the `Progress` of a run, which counts steps and shows those values of training records that SHOWN has.

  Args:
    total: number of steps of the whole run.
    first: number of steps that earlier calls did.
    **how: further arguments of `Progress`.
  """
  bar = "{n_fmt}/{total_fmt} {bar} {postfix}, {remaining} left"
  return Progress(total, "step {done}/{total}", SHOWN, first=first, bar_format=bar, **how)
