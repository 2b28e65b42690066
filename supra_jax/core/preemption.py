"""What ends a long job after it has saved what it did: SIGTERM, SIGUSR1, Ctrl-C, and a time that is up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

CTRL_C, TIME_IS_UP = "Ctrl-C", "the time is up"
# Exit statuses: as shells have it for Ctrl-C; "try again later" of sysexits.h; 0 for other signals, which ask to end.
STATUSES = {CTRL_C: 130, TIME_IS_UP: 75}
SAVING_SECONDS = 60.0
# SIGUSR1 is what schedulers are told to send before the time is up.
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: CTRL_C}


class Preempted(Exception):
  """A signal, or the time, ended a job; what it did is saved, and the same command goes on from there.

  Attributes:
    by: name of the signal, or TIME_IS_UP.
  """

  def __init__(self, by: str, saved: str):
    super().__init__(f"{by}: saved {saved}. The same command goes on from there.")
    self.by = by


def at_once() -> None:
  """Lets Ctrl-C end the process at once, as before the first step, when there is nothing to save yet.

  Python would raise KeyboardInterrupt, which is lost if it comes within a callback, and end the program with a
  traceback if it comes within an import.
  """
  in_main = threading.current_thread() is threading.main_thread()
  if in_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell starts what runs behind a script
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def as_python_does() -> None:
  """Lets Ctrl-C raise KeyboardInterrupt, if it would end the process at once."""
  if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Steps:
  """The time that steps take."""

  def __init__(self) -> None:
    self._last: float | None = None
    self._longest = 0.0

  def next_ends(self) -> float:
    """Returns when the step after the next will have ended, if each is as long as the longest so far.

    To be called after each step. The first step is not counted: it compiles.
    """
    now = time.monotonic()
    if self._last is not None:
      self._longest = max(self._longest, now - self._last)
    self._last = now
    return now + 2 * self._longest


@contextlib.contextmanager
def preemption(
  sync_point: Callable[[int], bool] | None = None, before: float | None = None
) -> Iterator[Callable[[int], str]]:
  """Yields a function, to be called after each step: number of the step -> what ends the job, or "".

  A second Ctrl-C kills the process.

  Args:
    sync_point: `multihost_utils.reached_preemption_sync_point` if there are several processes. jax.distributed then
      handles SIGTERM, and finds a step that no process is past; other signals become a SIGTERM.
    before: value of `time.monotonic()` at which all has to be saved; the job ends so much earlier as two of its longest
      steps and SAVING_SECONDS take. None: at any time.
  """
  came: list[str] = []
  steps = Steps()

  def note(number: int, _: Any) -> None:
    came.append(_SIGNALS[signal.Signals(number)])
    if number == signal.SIGINT:
      # Python's own handler waits for the program on the device. In a notebook it spares the kernel.
      signal.signal(signal.SIGINT, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
      sys.stderr.write("\nCtrl-C: the steps that have begun are finished and saved. Once more ends the run at once.\n")
    if sync_point is not None:
      os.kill(os.getpid(), signal.SIGTERM)

  def preempted(step: int) -> str:
    if before is not None and not came and steps.next_ends() + SAVING_SECONDS > before:
      came.append(TIME_IS_UP)
      if sync_point is not None:
        os.kill(os.getpid(), signal.SIGTERM)
    if sync_point is None:
      return came[0] if came else ""
    return (came or ["SIGTERM"])[0] if sync_point(step) else ""

  caught = [number for number in _SIGNALS if sync_point is None or number != signal.SIGTERM]
  if threading.current_thread() is not threading.main_thread():
    caught = []  # Python handles signals in its main thread only
  handlers = {number: signal.signal(number, note) for number in caught}
  try:
    yield preempted
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
