"""Reports the steps of a run while it trains: metrics, progress, skipped batches and held-out loss."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from supra_jax.core.progress import Progress
from supra_jax.model import costs as flops
from supra_jax.objectives.heldout import perplexity
from supra_jax.training.metrics import MetricsWriter

# Number of steps dispatched after the step whose metrics the host reads, so that devices never wait for the host.
AHEAD = 2


class Clock:
  """Measures the speed of training steps in tokens per second; leaves out pauses, and the first lap, which compiles."""

  def __init__(self):
    self._since: float | None = None

  def lap(self, tokens: int) -> float | None:
    """Ends a lap in which `tokens` tokens were trained on; returns tokens per second without pauses, None at first."""
    now, since = time.monotonic(), self._since
    self._since = now
    return None if since is None else tokens / (now - since)

  @contextlib.contextmanager
  def paused(self):
    began = time.monotonic()
    yield
    if self._since is not None:
      self._since += time.monotonic() - began


class Reporter:
  """Collects the metrics of each step, and writes and shows them up to AHEAD steps later.

  Attributes:
    clock: measures the speed of the steps; pause it (`clock.paused()`) during evaluations and saves.
  """

  def __init__(
    self,
    metrics: MetricsWriter,
    progress: Progress,
    *,
    first: int,
    last: int,
    log_every: int,
    max_skipped: int,
    tokens_a_step: int,
    flops_per_token: float,
    rows_of_step: Callable[[int], Sequence[str]],
  ):
    """Makes a reporter for the steps `first` + 1 to `last`.

    Args:
      metrics: where records are written.
      progress: where progress and messages are shown.
      first: number of steps that earlier calls of `train` did.
      last: number of the run's last step, counted from 1.
      log_every: steps between two records; the first and the last step are recorded too.
      max_skipped: number of skipped batches in a row at which the run ends with an error.
      tokens_a_step: number of tokens per step, over all devices.
      flops_per_token: FLOPs of a step per token.
      rows_of_step: number of a step -> names of the rows that the step read.
    """
    self._metrics, self._progress, self._tokens, self._flops = metrics, progress, tokens_a_step, flops_per_token
    self._last, self._log_every, self._max_skipped, self._rows_of_step = last, log_every, max_skipped, rows_of_step
    self._first = self._logged = first
    self._pending: collections.deque[tuple[int, dict[str, jax.Array], float]] = collections.deque()
    self._waited: list[float] = []
    self._peak = flops.peak_flops(jax.devices()[0])
    self._written = True
    self.clock = Clock()

  def add(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
    """Takes the metrics of a step, and reports earlier steps.

    Args:
      step: number of the step, counted from 1.
      values: metrics of the step, as the function that `TrainStep.compiled` returns gives them; still on the devices.
      waited: seconds that the step waited for its data.

    Raises:
      ValueError: as `drain`.
    """
    self._pending.append((step, values, waited))
    # Waits for the first step, so that its compilation counts in no speed.
    self.drain(0 if step == self._first + 1 else AHEAD)

  def drain(self, leave: int = 0) -> None:
    """Reports all steps that `add` took but the last `leave` of them; waits for the devices to finish these steps.

    Raises:
      ValueError: max_skipped batches in a row had a loss or gradient that was not finite; the message names the rows of
        the last of these batches.
    """
    while len(self._pending) > leave:
      self._report(*self._pending.popleft())

  def _report(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
    self._waited.append(waited)
    numbers = {name: value.item() for name, value in jax.device_get(values).items()}
    in_row = numbers.pop("skipped_in_row")
    if in_row:
      self._progress.message(f"step {step}: loss or gradient is not finite; batch skipped, {numbers['skipped']} so far")
    if in_row >= self._max_skipped:
      raise ValueError(
        f"{in_row} batches in a row gave a loss or gradient that is not finite. Stopped at step {step}; parameters "
        f"were changed last at step {step - in_row}. The rows of its batch: {', '.join(self._rows_of_step(step))}."
      )
    if step == self._last or step == self._first + 1 or step % self._log_every == 0:
      tokens = (step - self._logged) * self._tokens
      speed, self._logged = self.clock.lap(tokens), step
      each = speed / jax.device_count() if speed else None
      wait, self._waited = statistics.fmean(self._waited), []
      mfu = flops.mfu(each, self._flops, self._peak) if each and self._peak else None
      speeds = {"tokens_per_second": speed, "tokens_per_second_per_device": each, "mfu": mfu, "data_wait": wait}
      self._write({"step": step, "tokens": step * self._tokens, **numbers, **speeds})
      # A transfer ends: its last error goes from the line.
      self._progress.advance_to(step, **{"attention_error": False, **numbers}, **speeds)

  def evaluated(self, step: int, nll: float) -> None:
    """Writes and shows the held-out loss `nll` after a step, in nats per token."""
    record = {"step": step, "tokens": step * self._tokens, "heldout_nll": nll}
    self._write({**record, "heldout_perplexity": perplexity(nll)})
    said = f"{nll:.4f} nats a token" if math.isfinite(nll) else "is not finite"
    self._progress.message(f"step {step}: held-out loss {said}")

  def _write(self, record: Mapping[str, Any]) -> None:
    try:
      self._metrics.write(record)
      self._written = True
    except OSError as error:
      # A full disk does not end the run: there is room again once a checkpoint that filled it up is removed.
      if self._written:
        self.say(f"step {record['step']}: metrics could not be written: {error}. Training goes on.")
      self._written = False

  def say(self, text: str) -> None:
    """Shows a line of text beside the progress."""
    self._progress.message(text)
