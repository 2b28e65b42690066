"""The training loop, on one device or many hosts: trains, reports, evaluates, saves states and resumes from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from kernels_pallas import verdict
from supra_jax.core import bucket
from supra_jax.core.distributed import together
from supra_jax.core.files import place
from supra_jax.core.preemption import Preempted, preemption
from supra_jax.core.run_record import RUNS_FILE
from supra_jax.core.sharding import make_mesh
from supra_jax.storage.model_directory import load_model_without_params
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import MetricsWriter, progress_of_steps
from supra_jax.training.pictures import plot_losses
from supra_jax.training.reporting import Reporter
from supra_jax.training.setup import Run, check_batch, set_up
from supra_jax.training.workdir import (
  CONFIG_FILE,
  METRICS_FILE,
  MODEL_DIRECTORY,
  PICTURE_FILE,
  TrainSummary,
  claim,
  extension,
  kernels_of_run,
  outcome,
  summary,
  write_model,
)


def train(
  config: TrainConfig,
  workdir: str | Path,
  *,
  teacher_nll: float | None = None,
  profile_steps: int = 0,
  extend: bool = False,
  save_before: float | None = None,
) -> TrainSummary:
  """Trains a model, or resumes the run that an earlier call with the same workdir did not finish.

  Leaves in `workdir`: `checkpoint/` (the model, for `supra_jax.load`), `metrics.jsonl`, `tensorboard/`, `loss.png`,
  `training/` (states to resume from), `data/` (packed rows), `train_config.json` and `runs.jsonl` (command, versions
  and devices of each call). In a run of several processes, every process calls `train`, with a workdir on a file system
  that all of them share. If the workdir is in a bucket, files that grow during the run are written to a local directory
  and copied to the bucket at least once a minute and before each saved state.

  Args:
    config: the config of the run.
    workdir: directory of this run alone, local or gs://.
    teacher_nll: held-out loss of the teacher in nats per token, drawn as a line in `loss.png`; None: no line.
    profile_steps: number of steps to trace into `profile/`, beginning with the third step of this call; 0: none.
    extend: whether a run of fewer steps, finished or not, goes on to `config.num_steps`. Its learning rate follows from
      now on the schedule of a run of so many steps, as printed; it has to have saved a state.
    save_before: value of `time.monotonic()` at which the run has to have saved its state and ended; see `preemption`.

  Returns:
    The summary of the whole run, earlier calls included.

  Raises:
    ValueError: the workdir belongs to a run with another config or model; data, model, teacher and mesh do not fit each
      other; all saved states are damaged; max_skipped batches in a row had a loss or gradient that was not finite; or
      the first or last held-out loss is not finite.
    OSError: a file cannot be read or written.
    Preempted: SIGTERM, SIGUSR1, Ctrl-C or `save_before` ended the run after its state was saved. A second Ctrl-C kills
      the process; in a notebook it raises KeyboardInterrupt.
  """
  directory = place(workdir)
  mesh = make_mesh(config.mesh)
  check_batch(config, mesh)
  start = load_model_without_params(config.init_checkpoint)
  if extend and not (directory / CONFIG_FILE).exists():
    raise ValueError(f"--extend: {workdir} has no run that could go on.")
  directory.mkdir(parents=True, exist_ok=True)
  with bucket.copies(directory, (METRICS_FILE, RUNS_FILE)) as files:
    steps_before = claim(directory, config, start.config, files, extend=extend)
    metrics = files.directory / METRICS_FILE
    with jax.set_mesh(mesh), verdict.using(kernels_of_run(directory)):
      run = set_up(config, start, directory, mesh)
      said = extension(config, steps_before, run.first)
      try:
        params = _loop(config, run, files, profile_steps, save_before, said)
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


def _loop(
  config: TrainConfig, run: Run, files: bucket.Copies, profile_steps: int, save_before: float | None, said: str
) -> Any:
  """Runs all steps that are left, and returns the trained parameters; raises Preempted if a signal came."""
  workdir, state, first = files.directory, run.state, run.first
  program = functools.cache(lambda active, transfer: run.step.compiled(run.shardings, active, transfer=transfer))
  speaks = jax.process_index() == 0
  sync_point = multihost_utils.reached_preemption_sync_point if jax.process_count() > 1 else None
  with (
    MetricsWriter(
      workdir / METRICS_FILE, first or None, tensorboard=workdir / "tensorboard", enabled=speaks
    ) as metrics,
    progress_of_steps(config.num_steps, first, enabled=speaks) as progress,
    preemption(sync_point, save_before) as preempted,
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
    elif first < config.num_steps:
      reporter.say(f"Goes on after step {first} of {config.num_steps}.{said}")
    for step in range(first + 1, config.num_steps + 1):
      began = time.monotonic()
      batch = next(run.batches)
      waited = time.monotonic() - began
      profile(step - first)
      state, values = program(config.active_groups(step), config.transfers(step))(state, run.put(batch), *run.extra)
      reporter.add(step, values, waited)
      last = step == config.num_steps
      by = preempted(step)
      stop = bool(by) and not last
      evaluates = last or _every(config.evaluate_every, step)
      saves = stop or (config.save_every > 0 and (last or _every(config.save_every, step)))
      if evaluates or saves:
        reporter.drain()
      with reporter.clock.paused():
        # Metrics are copied before the state is saved, so that a run that resumes from the state has all its records.
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
        raise Preempted(by, f"after step {step} of {config.num_steps}")
  return state.params


def _copy(files: bucket.Copies, reporter: Reporter, seconds: float) -> None:
  try:
    files.copy(seconds=seconds)
  except OSError as error:
    reporter.say(f"{error}. Training goes on; it is tried again.")


@contextlib.contextmanager
def _tolerated(reporter: Reporter) -> Iterator[None]:
  """Turns an OSError of a save into a message; with several processes, where others may have saved, raises it."""
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
  """Yields a function to call before each step with the step's number, from 1; traces the steps 3 to 2 + `steps`."""
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
