"""Shows the progress of a long job: a tqdm bar on a terminal, a line every 30 seconds in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

SECONDS = 30.0  # least time between two lines where there is no terminal


class Progress:
  """Shows how much is done and the time left: a bar on a terminal, else a line every `seconds` and one at the end.

  A line consists of the filled-in `describe`, the latest values given to `advance_to`, and the time left, as in
  "step 3/9, loss 2.0, 00:10 left".

  Attributes:
    total: amount of work, in any unit.
    done: amount done so far, in the same unit.
  """

  def __init__(
    self,
    total: int,
    describe: str,
    forms: Mapping[str, Callable[[Any], str]] | None = None,
    *,
    first: int = 0,
    seconds: float = SECONDS,
    stream: TextIO | None = None,
    enabled: bool = True,
    **bar: Any,
  ):
    """Starts the clock, and shows the bar on a terminal.

    Args:
      total: amount of work, in any unit.
      describe: format string of the start of a line, with the fields `done`, `total` and `share` (done / total).
      forms: value name -> function that formats the value, in the order in which values are shown. Other values are
        not shown, nor is a value whose function returns an empty string.
      first: amount that was done before the start; left out of the speed from which the time left is estimated.
      seconds: least time in seconds between two lines where there is no terminal.
      stream: file to print to; None means stderr.
      enabled: False prints nothing.
      **bar: further arguments of `tqdm.tqdm`.
    """
    self._stream = stream or sys.stderr
    self._describe, self._forms, self._seconds, self._enabled = describe, forms or {}, seconds, enabled
    self.total, self.done, self._first = total, first, first
    self._began = self._moved = self._said = self._made = time.monotonic()
    self._said_at: int | None = None
    self._texts: dict[str, str] = {}
    self._lock = threading.RLock()
    shown = enabled and self._stream.isatty()
    self._bar = tqdm(total=total, initial=first, file=self._stream, dynamic_ncols=True, **bar) if shown else None

  @property
  def elapsed(self) -> float:
    """Seconds since this object was made, at least 1e-9 so that callers can divide by it."""
    return max(time.monotonic() - self._made, 1e-9)

  def advance(self, more: int) -> None:
    """Adds `more` to the amount done; thread-safe."""
    with self._lock:
      self.advance_to(self.done + more)

  def advance_to(self, done: int, /, **values: Any) -> None:
    """Sets the amount done, and prints a line if one is due; thread-safe.

    Args:
      done: amount done so far.
      **values: values to show, by their names in `forms`. A value that is absent or None keeps its last text.
    """
    with self._lock:
      self._texts |= {name: form(values[name]) for name, form in self._forms.items() if values.get(name) is not None}
      if self._bar is not None:
        self._bar.set_postfix_str(", ".join(self._known()), refresh=False)
        self._bar.update(done - self.done)
      self.done, self._moved = done, time.monotonic()
      if self._bar is None and self._moved - self._said >= self._seconds:
        self._say()

  def begin(self, total: int, first: int = 0) -> None:
    """Starts another round of `total` units of work, of which `first` are done and left out of the speed."""
    self.total, self.done, self._first, self._began = total, first, first, time.monotonic()
    self._said_at = None
    if self._bar is not None:
      self._bar.reset(total)
      self._bar.initial = self._bar.n = first

  def message(self, text: str) -> None:
    """Prints a line of text, above the bar where there is one."""
    if self._bar is not None:
      tqdm.write(text, file=self._stream)
    else:
      self._print(text)

  def close(self) -> None:
    """Closes the bar; where there is no terminal, prints a line if work was done since the previous line."""
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

  def _known(self) -> list[str]:
    return [text for name in self._forms if (text := self._texts.get(name))]

  def _say(self) -> None:
    self._said, self._said_at = time.monotonic(), self.done
    rate = (self.done - self._first) / max(self._said - self._began, 1e-9)
    left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
    begin = self._describe.format(done=self.done, total=self.total, share=self.done / max(self.total, 1))
    self._print(", ".join(filter(None, (begin, *self._known(), f"{left} left"))))

  def _print(self, text: str) -> None:
    if self._enabled:
      print(text, file=self._stream, flush=True)


def of_bytes(name: str, total: int, *, enabled: bool) -> Progress:
  """Returns a `Progress` over `total` bytes, labelled `name`; without `enabled` it prints nothing."""
  describe = f"{name.replace('{', '{{').replace('}', '}}')}, {{share:.0%}} of {tqdm.format_sizeof(total, 'B', 1024)}"
  return Progress(total, describe, enabled=enabled, desc=name, unit="B", unit_scale=True, unit_divisor=1024)
