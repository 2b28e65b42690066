"""How far a long job is: a bar on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

SECONDS = 30.0  # between two lines where there is no terminal


class Progress:
  """How much is done and how much time is left: a bar on a terminal, else a line every `seconds`, and the last one."""

  def __init__(
    self,
    total: int,
    describe: Callable[[int, int], str],
    *,
    first: int = 0,
    seconds: float = SECONDS,
    stream: TextIO | None = None,
    enabled: bool = True,
    **bar: Any,
  ):
    """Begins.

    Args:
      total: how much there is to do.
      describe: (done, total) -> how a line begins.
      first: how much was done before.
      seconds: between two lines where there is no terminal.
      stream: None is stderr.
      enabled: whether anything is said.
      **bar: what tqdm takes besides.
    """
    self._stream = stream or sys.stderr
    self._describe, self._seconds, self._enabled = describe, seconds, enabled
    self.total, self.done, self._first = total, first, first
    self._began = self._moved = self._said = time.monotonic()
    self._said_at: int | None = None
    self._text = ""
    self._lock = threading.RLock()
    shown = enabled and self._stream.isatty()
    self._bar = tqdm(total=total, initial=first, file=self._stream, dynamic_ncols=True, **bar) if shown else None

  def advance(self, more: int) -> None:
    """Says that so much more is done; from any thread."""
    with self._lock:
      self.advance_to(self.done + more)

  def advance_to(self, done: int, text: str = "") -> None:
    """Says how much is done, and what else there is to say."""
    with self._lock:
      if self._bar is not None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self.done)
      self.done, self._text, self._moved = done, text, time.monotonic()
      if self._bar is None and self._moved - self._said >= self._seconds:
        self._say()

  def begin(self, total: int) -> None:
    """Begins another round, at the time when the last one ended."""
    self.total, self.done, self._first, self._began = total, 0, 0, self._moved
    self._said_at = None
    if self._bar is not None:
      ended = self._bar.last_print_t
      self._bar.reset(total)
      self._bar.start_t = self._bar.last_print_t = ended

  def message(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      tqdm.write(text, file=self._stream)
    else:
      self._print(text)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self.done not in (self._first, self._said_at):
      self._say()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    self.close()

  def _say(self) -> None:
    self._said, self._said_at = time.monotonic(), self.done
    rate = (self.done - self._first) / max(self._said - self._began, 1e-9)
    left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
    self._print(", ".join(filter(None, (self._describe(self.done, self.total), self._text, f"{left} left"))))

  def _print(self, text: str) -> None:
    if self._enabled:
      print(text, file=self._stream, flush=True)


def of_bytes(name: str, total: int, *, enabled: bool) -> Progress:
  """Progress of a job of so many bytes."""

  def describe(done: int, total: int) -> str:
    return f"{name}, {done / max(total, 1):.0%} of {tqdm.format_sizeof(total, 'B', 1024)}"

  return Progress(total, describe, enabled=enabled, desc=name, unit="B", unit_scale=True, unit_divisor=1024)
