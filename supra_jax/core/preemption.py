"""Signals that end a long job after it has saved what it did: SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

CTRL_C = "Ctrl-C"
# SIGUSR1 is what schedulers are told to send before the time is up.
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: CTRL_C}


class Preempted(Exception):
  """A signal ended a job; what it did is saved, and the same command goes on from there.

  Attributes:
    by: name of the signal.
  """

  def __init__(self, by: str, saved: str):
    super().__init__(f"{by}: saved {saved}. The same command goes on from there.")
    self.by = by


@contextlib.contextmanager
def preemption(sync_point: Callable[[int], bool] | None = None) -> Iterator[Callable[[int], str]]:
  """Yields a function: number of a step -> name of the signal that came, or "". A second Ctrl-C kills the process.

  Args:
    sync_point: `multihost_utils.reached_preemption_sync_point` if there are several processes. jax.distributed then
      handles SIGTERM, and finds a step that no process is past; other signals become a SIGTERM.
  """
  came: list[str] = []

  def note(number: int, _: Any) -> None:
    came.append(_SIGNALS[signal.Signals(number)])
    if number == signal.SIGINT:
      # Python's own handler waits for the program on the device. In a notebook it spares the kernel.
      signal.signal(signal.SIGINT, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)
      sys.stderr.write("\nCtrl-C: the steps that have begun are finished and saved. Once more ends the run at once.\n")
    if sync_point is not None:
      os.kill(os.getpid(), signal.SIGTERM)

  def preempted(step: int) -> str:
    if sync_point is None:
      return came[0] if came else ""
    return (came or ["SIGTERM"])[0] if sync_point(step) else ""

  caught = [number for number in _SIGNALS if sync_point is None or number != signal.SIGTERM]
  if threading.current_thread() is not threading.main_thread():
    caught = []  # Python handles signals in its main thread only
  before = {number: signal.signal(number, note) for number in caught}
  try:
    yield preempted
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
