"""Uptraining on one device or many hosts: exact, watched, and able to go on from where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from supra_jax.core import bucket
from supra_jax.core.distributed import together
from supra_jax.core.files import place
from supra_jax.core.run_record import RUNS_FILE
from supra_jax.core.sharding import make_mesh
from supra_jax.storage.model_directory import load_model_without_params
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import MetricsWriter, progress_of_steps
from supra_jax.training.pictures import plot_losses
from supra_jax.training.reporting import Reporter
from supra_jax.training.setup import Run, check_batch, set_up
from supra_jax.training.workdir import (
  METRICS_FILE,
  MODEL_DIRECTORY,
  PICTURE_FILE,
  TrainSummary,
  claim,
  outcome,
  summary,
  write_model,
)


class Preempted(Exception):
  """SIGTERM came; the state is saved and the same command resumes from it."""


def train(
  config: TrainConfig, workdir: str | Path, *, teacher_nll: float | None = None, profile_steps: int = 0
) -> TrainSummary:
  """Trains, or goes on where an earlier call in the same workdir stopped.

  Leaves in `workdir`: `checkpoint/` (the model, for `supra_jax.load`), `metrics.jsonl`, `tensorboard/`, `loss.png`,
  `training/` (states to resume from), `data/` (packed rows), `train_config.json` and `runs.jsonl` (what made it).
  With several processes each calls it, on a file system they share. In a bucket, what a run adds lines to is written on
  this machine, and copied at least once a minute and before each training state.

  Args:
    config: the run.
    workdir: a directory of its own, local or gs://.
    teacher_nll: drawn as a line in the picture.
    profile_steps: so many steps are traced into `profile/`, after those that compile.

  Raises:
    ValueError: the workdir is of a run with another config, data, model or mesh do not fit, or max_skipped batches in a
      row were not finite.
    OSError: a file cannot be read or written.
    Preempted: SIGTERM ended it.
  """
  directory = place(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  mesh = make_mesh(config.mesh)
  check_batch(config, mesh)
  start = load_model_without_params(config.init_checkpoint)
  with bucket.copies(directory, (METRICS_FILE, RUNS_FILE)) as files:
    claim(directory, config, start.config, files)
    metrics = files.directory / METRICS_FILE
    with jax.set_mesh(mesh):
      run = set_up(config, start, directory, mesh)
      try:
        params = _loop(config, run, files, profile_steps)
        write_model(
          directory / MODEL_DIRECTORY,
          start,
          run.step.finished(params),
          lambda: {"train_config": dataclasses.asdict(config), **outcome(metrics, config.tokens)},
        )
      except BaseException:
        # Of several processes one may fail alone; it must not wait for the others' part in a save, nor they for it.
        if jax.process_count() == 1:
          run.states.close()
        raise
      run.states.close()
    if jax.process_index() == 0:
      summary(metrics, config.tokens)  # refuses losses that are not finite, which nobody can draw
      plot_losses(metrics, files.directory / PICTURE_FILE, teacher_nll=teacher_nll)
  together("run done")
  return summary(directory / METRICS_FILE, config.tokens)


@contextlib.contextmanager
def _preemption() -> Iterator[Any]:
  """Yields a function of the step that says whether SIGTERM came; all processes agree on the step."""
  if jax.process_count() > 1:
    # jax.distributed has its own handler, and a protocol to find a step that no process is past.
    yield multihost_utils.reached_preemption_sync_point
    return
  came: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
  try:
    yield lambda step: bool(came)
  finally:
    signal.signal(signal.SIGTERM, before)


def _loop(config: TrainConfig, run: Run, files: bucket.Copies, profile_steps: int) -> Any:
  """Trains to the end; returns the parameters."""
  workdir, state, first = files.directory, run.state, run.first
  program = functools.cache(lambda active, transfer: run.step.compiled(run.shardings, active, transfer=transfer))
  speaks = jax.process_index() == 0
  with (
    MetricsWriter(
      workdir / METRICS_FILE, first or None, tensorboard=workdir / "tensorboard", enabled=speaks
    ) as metrics,
    progress_of_steps(config.num_steps, first, enabled=speaks) as progress,
    _preemption() as preempted,
    _profile(workdir / "profile", profile_steps) as profile,
  ):
    reporter = Reporter(
      metrics,
      progress,
      first=first,
      last=config.num_steps,
      log_every=config.log_every,
      max_skipped=config.max_skipped,
      tokens_a_step=config.tokens_a_step,
      flops_per_token=run.flops_per_token,
      rows_of_step=run.rows_of_step,
    )
    if first == 0:
      reporter.evaluated(0, run.evaluate(state.params))
    for step in range(first + 1, config.num_steps + 1):
      began = time.monotonic()
      batch = next(run.batches)
      waited = time.monotonic() - began
      profile(step - first)
      state, values = program(config.active_groups(step), config.transfers(step))(state, run.put(batch), *run.extra)
      reporter.add(step, values, waited)
      last = step == config.num_steps
      stop = preempted(step) and not last
      evaluates = last or _every(config.evaluate_every, step)
      saves = stop or (config.save_every > 0 and (last or _every(config.save_every, step)))
      if evaluates or saves:
        reporter.drain()
      with reporter.clock.paused():
        # Before the state of a step is saved, so that a run that resumes from it has all lines of before.
        _copy(files, reporter, 0.0 if saves else bucket.COPY_SECONDS)
        if evaluates and not stop:
          reporter.evaluated(step, run.evaluate(state.params))
        if saves:
          with _tolerated(reporter):
            run.states.wait()
          with contextlib.nullcontext() if last or stop else _tolerated(reporter):
            run.states.save(step, state, run.batches.get_state())
      if stop:
        run.states.wait()
        raise Preempted(f"SIGTERM: saved after step {step} of {config.num_steps}. The same command goes on from there.")
  return state.params


def _copy(files: bucket.Copies, reporter: Reporter, seconds: float) -> None:
  try:
    files.copy(seconds=seconds)
  except OSError as error:
    reporter.say(f"{error}. Training goes on; it is tried again.")


@contextlib.contextmanager
def _tolerated(reporter: Reporter) -> Iterator[None]:
  """Says a save's OSError, no more. Of several processes others may not have had it, so there it ends the run."""
  try:
    yield
  except OSError as error:
    if jax.process_count() > 1:
      raise
    reporter.say(f"{error}. Training goes on; older checkpoints are kept.")


def _every(steps: int, step: int) -> bool:
  return steps > 0 and step % steps == 0


@contextlib.contextmanager
def _profile(directory: Path, steps: int) -> Iterator[Callable[[int], None]]:
  """Yields a function to call before each step, with its number in this process; traces steps 3 to 2 + `steps`."""
  on = False

  def at(step: int) -> None:
    nonlocal on
    if steps and step == 3:
      jax.profiler.start_trace(str(directory))
      on = True
    elif on and step == 3 + steps:
      jax.profiler.stop_trace()
      on = False

  yield at
  if on:
    jax.profiler.stop_trace()
