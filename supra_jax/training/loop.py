"""Uptraining on one device or many hosts: exact, watched, and able to go on from where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from supra_jax.core import bucket
from supra_jax.core.distributed import together
from supra_jax.core.files import AnyPath, place, remove_directory
from supra_jax.core.plain_json import to_json
from supra_jax.core.run_record import RUNS_FILE, write_run_record
from supra_jax.core.sharding import make_mesh, process_shard, put_batch
from supra_jax.data import loading
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.adapters import merge_adapters
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.stacking import stack_runs, unstack
from supra_jax.storage.model_directory import CONFIG_FILE as MODEL_CONFIG_FILE
from supra_jax.storage.model_directory import ModelCheckpoint, load_model, load_model_without_params, save_model
from supra_jax.storage.run_states import TrainingCheckpoints
from supra_jax.training.config import TrainConfig
from supra_jax.training.metrics import MetricsWriter, progress_of_steps, read_metrics
from supra_jax.training.pictures import plot_losses
from supra_jax.training.reporting import Reporter
from supra_jax.training.setup import check_batch, heldout_nll, load_teacher, make_train_step, prepare_data, state_shapes
from supra_jax.training.step import TrainState, TrainStep

METRICS_FILE, PICTURE_FILE, CONFIG_FILE = "metrics.jsonl", "loss.png", "train_config.json"
# What changes neither the data nor, but for rounding, the mathematics.
MAY_CHANGE_ON_RESUME = (
  "log_every",
  "evaluate_every",
  "save_every",
  "keep_checkpoints",
  "max_skipped",
  "mesh",
  "microbatches",
  "remat",
)


@dataclasses.dataclass(frozen=True)
class TrainSummary:
  """What came of a run: held-out nats a token before and after, tokens seen, and tokens a second of a step."""

  nll_before: float
  nll_after: float
  tokens_trained: int
  tokens_per_second: float


class Preempted(Exception):
  """SIGTERM came; the state is saved and the same command goes on from it."""


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
    _claim(config, start, directory, files)
    with jax.set_mesh(mesh):
      run, state, first = _start(config, start, directory, files, mesh)
      try:
        state = _loop(run, state, first, profile_steps)
        _export(directory / "checkpoint", run.start, state.params, config, files.directory / METRICS_FILE)
      except BaseException:
        # Of several processes one may fail alone; it must not wait for the others' part in a save, nor they for it.
        if jax.process_count() == 1:
          run.checkpoints.close()
        raise
      run.checkpoints.close()
    if jax.process_index() == 0:
      _summary(config, files.directory / METRICS_FILE)  # refuses losses that are not finite, which nobody can draw
      plot_losses(files.directory / METRICS_FILE, files.directory / PICTURE_FILE, teacher_nll=teacher_nll)
  together("run done")
  return _summary(config, directory / METRICS_FILE)


@dataclasses.dataclass(frozen=True)
class _Run:
  """The parts of a run that its loop works with."""

  config: TrainConfig
  files: bucket.Copies
  mesh: Mesh
  start: ModelCheckpoint  # without parameters
  step: TrainStep
  shapes: TrainState
  extra: tuple[Any, ...]  # what each step is given besides state and batch: the teacher's parameters
  sources: Sequence[loading.Source]
  batches: loading.Batches
  heldout: AnyPath
  checkpoints: TrainingCheckpoints


def _claim(config: TrainConfig, start: ModelCheckpoint, workdir: AnyPath, files: bucket.Copies) -> None:
  """Writes the configs of run and model into a new workdir, or holds them against those that are there."""
  path = workdir / CONFIG_FILE
  values = _described(config, start.config)
  if path.exists():
    stored = json.loads(path.read_text())
    model = ModelConfig.from_json(to_json(stored.pop("model")))
    # Read and written again: an option that is newer than the run has its default.
    before, now = _flat(_described(TrainConfig.from_mapping(stored), model)), _flat(values)
    differ = [
      f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
      for name in sorted(before.keys() | now.keys())
      if before.get(name) != now.get(name) and name not in MAY_CHANGE_ON_RESUME
    ]
    if differ and (workdir / METRICS_FILE).exists():
      trained = workdir / "checkpoint"
      further = f" To train its model further, there: --config.init_checkpoint={trained}." if trained.exists() else ""
      raise ValueError(
        f"{workdir} belongs to a run with another config or model; choose another workdir.{further} "
        + "; ".join(differ)
      )
    if differ and jax.process_index() == 0:
      # The run before never began, for bad input perhaps; rows packed for it are of no use to this one.
      for leftover in ("data", "data.partial"):
        remove_directory(workdir / leftover)
  together("config read")
  if jax.process_index() == 0:
    path.write_text(to_json(values, indent=2) + "\n")
    write_run_record(files.directory, values)
    files.copy()
  together("config written")


def _described(config: TrainConfig, model: ModelConfig) -> dict[str, Any]:
  return {**dataclasses.asdict(config), "model": json.loads(model.to_json())}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def _start(
  config: TrainConfig, start: ModelCheckpoint, workdir: AnyPath, files: bucket.Copies, mesh: Mesh
) -> tuple[_Run, TrainState, int]:
  """The run, its state and the steps done: the newest that was saved, or new ones."""
  tokenizer = Tokenizer.from_files(start.tokenizer_files, start.config)
  teacher = load_model_without_params(config.distill_from).config if config.distill_from else None
  step = make_train_step(config, start.config, teacher)
  shapes = state_shapes(step, mesh)
  sources, heldout = prepare_data(config.data, tokenizer, start.config.vocab_size, workdir / "data")
  index, count = process_shard(mesh)
  batches = loading.make_loader(
    sources, batch_size=config.batch_size, seed=config.seed, shard_index=index, shard_count=count
  )
  checkpoints = TrainingCheckpoints(workdir / "training", keep=config.keep_checkpoints)
  extra = () if step.teacher is None else (load_teacher(config.distill_from, step.teacher, mesh),)
  run = _Run(config, files, mesh, start, step, shapes, extra, sources, batches, heldout, checkpoints)
  restored = checkpoints.restore(shapes)
  if restored is not None:
    first, state, position = restored
    batches.set_state(position)
    return run, state, first
  make = jax.jit(
    lambda params: step.init(stack_runs(params, start.config)),
    out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
  )
  params = load_model(
    config.init_checkpoint, jnp.float32, shardings=lambda stored: param_shardings(stored, mesh)
  ).params
  return run, make(params), 0


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


def _loop(run: _Run, state: TrainState, first: int, profile_steps: int) -> TrainState:
  config, workdir = run.config, run.files.directory
  shardings = jax.tree.map(lambda x: x.sharding, run.shapes)
  program = functools.cache(lambda active, transfer: run.step.compiled(shardings, active, transfer=transfer))
  speaks = jax.process_index() == 0
  with (
    MetricsWriter(
      workdir / METRICS_FILE, first or None, tensorboard=workdir / "tensorboard", enabled=speaks
    ) as metrics,
    progress_of_steps(config.num_steps, first, enabled=speaks) as progress,
    _preemption() as preempted,
    _profile(workdir / "profile") as profile,
  ):
    teacher = run.step.teacher
    reporter = Reporter(
      config, run.start.config, teacher.config if teacher else None, run.sources, metrics, progress, first
    )

    def evaluate(step: int) -> None:
      reporter.evaluated(step, heldout_nll(run.step.model, state.params, run.heldout, config, run.mesh))

    if first == 0:
      evaluate(0)
    for step in range(first + 1, config.num_steps + 1):
      began = time.monotonic()
      batch = next(run.batches)
      waited = time.monotonic() - began
      profile(step - first, profile_steps)
      state, values = program(config.active_groups(step), config.transfers(step))(
        state, put_batch(batch, run.mesh, config.microbatches), *run.extra
      )
      reporter.add(step, values, waited)
      last = step == config.num_steps
      stop = preempted(step) and not last
      evaluates = last or _every(config.evaluate_every, step)
      saves = stop or (config.save_every > 0 and (last or _every(config.save_every, step)))
      if evaluates or saves:
        reporter.drain()
      with reporter.clock.paused():
        # Before a state of the step, that a run that goes on from it has all lines before.
        _copy(run.files, reporter, 0.0 if saves else bucket.COPY_SECONDS)
        if evaluates and not stop:
          evaluate(step)
        if saves:
          with _tolerated(reporter):
            run.checkpoints.wait()
          with contextlib.nullcontext() if last or stop else _tolerated(reporter):
            run.checkpoints.save(step, state, run.batches.get_state())
      if stop:
        run.checkpoints.wait()
        raise Preempted(f"SIGTERM: saved after step {step} of {config.num_steps}. The same command goes on from there.")
  return state


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
def _profile(directory: Path) -> Iterator[Any]:
  """Yields a function of (step of this process, steps wanted) that traces steps 3 to 2 + wanted."""
  on = False

  def at(step: int, wanted: int) -> None:
    nonlocal on
    if wanted and step == 3:
      jax.profiler.start_trace(str(directory))
      on = True
    elif on and step == 3 + wanted:
      jax.profiler.stop_trace()
      on = False

  yield at
  if on:
    jax.profiler.stop_trace()


def _export(directory: AnyPath, start: ModelCheckpoint, params: Any, config: TrainConfig, metrics_path: Path) -> None:
  """Writes the trained model, one subtree a layer, beside the run; an earlier export gives way."""
  if jax.process_index() == 0:
    remove_directory(directory, first=MODEL_CONFIG_FILE)
  together("earlier export removed")
  save_model(
    directory,
    config=start.config,
    params=unstack(jax.jit(merge_adapters)(params) if config.adapters.rank else params, start.config),
    tokenizer_files=start.tokenizer_files,
    source=lambda: {
      "trained_from": start.source,
      "train_config": dataclasses.asdict(config),
      **_outcome(config, metrics_path),
    },
  )


def _outcome(config: TrainConfig, metrics_path: Path) -> dict[str, Any]:
  """For whom the model is given to."""
  heldout = _heldout(read_metrics(metrics_path))
  losses = {"before": heldout[0], "after": heldout[-1]}
  return {"tokens_trained": config.num_steps * config.tokens_a_step, "heldout_nll": losses}


def _heldout(records: Sequence[Mapping[str, Any]]) -> list[float | None]:
  """Nats a token of each evaluation; None where it was not finite."""
  return [record["heldout_nll"] for record in records if "heldout_nll" in record]


def _summary(config: TrainConfig, metrics_path: AnyPath) -> TrainSummary:
  records = read_metrics(metrics_path)
  heldout = _heldout(records)
  first, last = heldout[0], heldout[-1]
  speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
  if first is None or last is None:
    raise ValueError(f"{metrics_path.parent}: the held-out loss is not finite: the model there is of no use as it is.")
  return TrainSummary(
    nll_before=first,
    nll_after=last,
    tokens_trained=config.num_steps * config.tokens_a_step,
    tokens_per_second=statistics.median(speeds) if speeds else math.nan,
  )
