"""What a run says of each step while it trains: metrics, progress, skipped batches, held-out loss."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from supra_jax.core.progress import Progress
from supra_jax.data import loading
from supra_jax.model import costs as flops
from supra_jax.model.config import ModelConfig
from supra_jax.objectives.heldout import perplexity
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import MetricsWriter

# Steps that run ahead of the one whose metrics the host reads, so that devices never wait for it.
AHEAD = 2


class Clock:
  """Tokens a second of the steps alone: the first, which compiles, and pauses are left out."""

  def __init__(self):
    self._since: float | None = None

  def lap(self, tokens: int) -> float | None:
    """Tokens a second since the last lap or pause; None for the first lap."""
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
  """Takes each step's metrics as they leave the devices, and writes and shows them some steps later.

  Attributes:
    clock: to be paused by what is not a step.
  """

  def __init__(
    self,
    config: TrainConfig,
    model: ModelConfig,
    teacher: ModelConfig | None,
    sources: Sequence[loading.Source],
    metrics: MetricsWriter,
    progress: Progress,
    first: int,
  ):
    self._config, self._sources, self._metrics, self._progress = config, sources, metrics, progress
    self._first = self._logged = first
    self._pending: collections.deque[tuple[int, dict[str, jax.Array], float]] = collections.deque()
    self._waited: list[float] = []
    self._flops = flops.step_flops_per_token(model, config.data.sequence_length, teacher)
    self._peak = flops.peak_flops(jax.devices()[0])
    self._written = True
    self.clock = Clock()

  def add(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
    """Takes the metrics of a step, and how many seconds it waited for its data."""
    self._pending.append((step, values, waited))
    # The first step is waited for, so that its compilation is in no figure.
    self.drain(0 if step == self._first + 1 else AHEAD)

  def drain(self, leave: int = 0) -> None:
    """Reports all steps but the last `leave`.

    Raises:
      ValueError: max_skipped batches in a row were not finite; names the last one's rows.
    """
    while len(self._pending) > leave:
      self._report(*self._pending.popleft())

  def _report(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
    self._waited.append(waited)
    config = self._config
    numbers = {name: value.item() for name, value in jax.device_get(values).items()}
    in_row = numbers.pop("skipped_in_row")
    if in_row:
      self._progress.message(f"step {step}: loss or gradient is not finite; batch skipped, {numbers['skipped']} so far")
    if in_row >= config.max_skipped:
      rows = loading.rows_of_batch(self._sources, batch_size=config.batch_size, seed=config.seed, step=step - 1)
      raise ValueError(
        f"{in_row} batches in a row gave a loss or gradient that is not finite. Stopped at step {step}; parameters "
        f"were changed last at step {step - in_row}. The rows of its batch: {', '.join(rows)}."
      )
    if step == config.num_steps or step == self._first + 1 or step % config.log_every == 0:
      tokens = (step - self._logged) * config.tokens_a_step
      speed, self._logged = self.clock.lap(tokens), step
      each = speed / jax.device_count() if speed else None
      wait, self._waited = statistics.fmean(self._waited), []
      mfu = flops.mfu(each, self._flops, self._peak) if each and self._peak else None
      speeds = {"tokens_per_second": speed, "tokens_per_second_per_device": each, "mfu": mfu, "data_wait": wait}
      self._write({"step": step, "tokens": step * config.tokens_a_step, **numbers, **speeds})
      self._progress.advance_to(step, **numbers, **speeds)

  def evaluated(self, step: int, nll: float) -> None:
    """Reports the held-out loss after a step, nats a token."""
    record = {"step": step, "tokens": step * self._config.tokens_a_step, "heldout_nll": nll}
    self._write({**record, "heldout_perplexity": perplexity(nll)})
    said = f"{nll:.4f} nats a token" if math.isfinite(nll) else "is not finite"
    self._progress.message(f"step {step}: held-out loss {said}")

  def _write(self, record: Mapping[str, Any]) -> None:
    try:
      self._metrics.write(record)
      self._written = True
    except OSError as error:
      # A full disk ends no run: a checkpoint that fills it up is removed, and then there is room again.
      if self._written:
        self.say(f"step {record['step']}: metrics could not be written: {error}. Training goes on.")
      self._written = False

  def say(self, text: str) -> None:
    """Shows a line."""
    self._progress.message(text)
