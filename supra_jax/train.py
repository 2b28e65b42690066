"""Uptraining: one process, one device; exact resume, metrics, progress and a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import optax

from supra_jax import data
from supra_jax.checkpoint import ModelCheckpoint, TrainingCheckpoints, load_model, save_model
from supra_jax.config import from_mapping
from supra_jax.evaluate import mean_nll
from supra_jax.losses import language_model_loss
from supra_jax.metrics import MetricsWriter, Progress, plot_losses, read_metrics
from supra_jax.optimizer import OptimizerConfig, make_optimizer, make_schedule
from supra_jax.tokenizer import Tokenizer
from supra_jax.transformer import Remat, Transformer, stack_runs, unstack

METRICS_FILE, PICTURE_FILE, CONFIG_FILE = "metrics.jsonl", "loss.png", "train_config.json"
MAY_CHANGE_ON_RESUME = ("log_every", "evaluate_every", "save_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, and how it is packed.

  Attributes:
    input: what `data.read_documents` reads.
    text_key: of JSON lines.
    sequence_length: T, tokens a row.
    documents: `join` runs them together as the paper does; `separate` resets state and position at seams.
    bos: start each document with the begin-of-text id.
    heldout_every: every so many documents one is held out.
    heldout_rows: at most so many held-out rows are evaluated; 0 means all.
  """

  input: str
  text_key: str = "text"
  sequence_length: int = 2048
  documents: data.Join = "join"
  bos: bool = False
  heldout_every: int = 20
  heldout_rows: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A run.

  Attributes:
    init_checkpoint: the model directory to start from.
    data, optimizer: see their classes.
    batch_size: rows a step.
    num_steps: of the whole run; the schedule ends there.
    dtype: of the computation. Master weights, their moments and all reductions are float32.
    remat: `block` recomputes a layer's activations in the backward pass.
    seed: of the order of the data.
    log_every, evaluate_every, save_every: in steps; 0 evaluates only before and after, and saves no training state.
    keep_checkpoints: so many of the newest training states.
  """

  init_checkpoint: str
  data: DataConfig
  batch_size: int
  num_steps: int
  optimizer: OptimizerConfig = OptimizerConfig()
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Remat = "block"
  seed: int = 0
  log_every: int = 10
  evaluate_every: int = 0
  save_every: int = 1000
  keep_checkpoints: int = 2

  def __post_init__(self):
    for name in ("batch_size", "num_steps", "log_every", "keep_checkpoints"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: wanted at least 1.")
    if self.dtype not in ("float32", "bfloat16") or self.remat not in ("none", "block"):
      raise ValueError(f"dtype={self.dtype!r}, remat={self.remat!r}: wanted float32 or bfloat16, and none or block.")

  @classmethod
  def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
    """Reads a ConfigDict's `to_dict()`."""
    return from_mapping(cls, values, "train config")


@flax.struct.dataclass
class TrainState:
  """What a step reads and writes: float32 parameters in stacked runs, AdamW's state, steps done."""

  params: Any
  opt_state: Any
  step: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainSummary:
  """What came of a run: held-out nats a token before and after, tokens seen, and tokens a second of a step."""

  nll_before: float
  nll_after: float
  tokens_trained: int
  tokens_per_second: float


def prepare_data(config: DataConfig, tokenizer: Tokenizer, vocab_size: int, directory: Path) -> tuple[Path, Path]:
  """Packs the text into directory/train and directory/heldout, unless they are there and fit; returns the two."""
  for part in data.PARTS:
    path = directory / part
    if path.exists():
      data.check_packed(
        path,
        sequence_length=config.sequence_length,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        join=config.documents,
        bos=config.bos,
      )
      continue
    documents = data.read_documents(config.input, config.text_key)
    try:
      data.pack(
        data.split_documents(documents, every=config.heldout_every, part=part),
        tokenizer,
        path,
        vocab_size=vocab_size,
        sequence_length=config.sequence_length,
        join=config.documents,
        bos=config.bos,
      )
    except ValueError as error:
      raise ValueError(
        f"The {part} part of {config.input}, with every {config.heldout_every}th document held out: {error}"
      ) from error
  return directory / "train", directory / "heldout"


def heldout_nll(model: Transformer, params: Any, path: Path, config: TrainConfig) -> float:
  """Mean nats a token of the held-out rows."""
  rows = data.load_info(path).rows
  if config.data.heldout_rows:
    rows = min(rows, config.data.heldout_rows)
  loader = data.make_loader(path, batch_size=1, seed=0, shuffle=False, num_epochs=1)
  return mean_nll(model, params, (batch for batch, _ in zip(loader, range(rows), strict=False)))


def make_step(model: Transformer, optimizer: OptimizerConfig, num_steps: int):
  """(state, batch) -> (state, metrics); the state is given away."""
  tx, schedule = make_optimizer(optimizer, num_steps), make_schedule(optimizer, num_steps)

  def loss_fn(params, batch):
    sums = language_model_loss(model, params, batch, z_loss=optimizer.z_loss)
    return sums.loss / sums.weight, sums.nll / sums.weight

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    (_, nll), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": nll,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
    }
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

  return tx, step


def train(config: TrainConfig, workdir: str | Path, *, teacher_nll: float | None = None) -> TrainSummary:
  """Trains, or goes on where an earlier call in the same workdir stopped.

  Leaves in `workdir`: `checkpoint/` (the model, for `supra_jax.load`), `metrics.jsonl`, `loss.png`, `training/` (states
  to resume from), `data/` (packed rows) and `train_config.json`.

  Args:
    config: the run.
    workdir: a directory of its own.
    teacher_nll: drawn as a line in the picture.

  Raises:
    ValueError: the workdir is of a run with another config, or data or model do not fit.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  _claim(config, workdir)
  start = load_model(config.init_checkpoint)
  tokenizer = Tokenizer.from_files(start.tokenizer_files, start.config)
  if tokenizer is None:
    raise ValueError(f"{config.init_checkpoint} has no tokenizer to read {config.data.input} with.")
  train_path, heldout_path = prepare_data(config.data, tokenizer, start.config.vocab_size, workdir / "data")
  model = Transformer(start.config, dtype=jnp.dtype(config.dtype), stacked=True, remat=config.remat)
  tx, step_fn = make_step(model, config.optimizer, config.num_steps)
  batches = iter(data.make_loader(train_path, batch_size=config.batch_size, seed=config.seed))

  checkpoints = TrainingCheckpoints(workdir / "training", keep=config.keep_checkpoints)
  state, first = _start_state(start, tx, checkpoints, batches)
  # Only what the export needs: the parameters live on in `state`.
  start = dataclasses.replace(start, params={})
  run = _Run(model, step_fn, batches, heldout_path, checkpoints)
  state = _loop(config, workdir, run, state, first)
  _export(workdir / "checkpoint", start, state.params, config)
  checkpoints.close()
  plot_losses(workdir / METRICS_FILE, workdir / PICTURE_FILE, teacher_nll=teacher_nll)
  return _summary(config, workdir / METRICS_FILE)


@dataclasses.dataclass(frozen=True)
class _Run:
  """The parts of a run that its loop works with."""

  model: Transformer
  step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
  batches: data.Batches
  heldout: Path
  checkpoints: TrainingCheckpoints


def _claim(config: TrainConfig, workdir: Path) -> None:
  """Writes the config into a new workdir, or holds it against the one that is there."""
  path = workdir / CONFIG_FILE
  values = dataclasses.asdict(config)
  if path.exists():
    before, now = _flat(json.loads(path.read_text())), _flat(values)
    differ = [
      f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
      for name in sorted(before.keys() | now.keys())
      if before.get(name) != now.get(name) and name not in MAY_CHANGE_ON_RESUME
    ]
    if differ and not (workdir / METRICS_FILE).exists():
      # The run before never began, for bad input perhaps; rows packed for it are of no use to this one.
      shutil.rmtree(workdir / "data", ignore_errors=True)
    elif differ:
      raise ValueError(f"{workdir} belongs to a run with another config; choose another workdir. " + "; ".join(differ))
  path.write_text(json.dumps(values, indent=2) + "\n")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def _start_state(
  start: ModelCheckpoint, tx: optax.GradientTransformation, checkpoints: TrainingCheckpoints, batches
) -> tuple[TrainState, int]:
  """A new state of the model's parameters, or the newest one that was saved."""

  @jax.jit
  def make(params):
    params = jax.tree.map(lambda x: x.astype(jnp.float32), stack_runs(params, start.config))
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

  step = checkpoints.latest_step()
  if step is None:
    return make(start.params), 0
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(make, start.params)
  )
  return checkpoints.restore(step, like, batches), step


class _Clock:
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


def _loop(config: TrainConfig, workdir: Path, run: _Run, state: TrainState, first: int) -> TrainState:
  tokens_a_step = config.batch_size * config.data.sequence_length
  with (
    MetricsWriter(workdir / METRICS_FILE, first or None) as metrics,
    Progress(config.num_steps, first_step=first) as progress,
  ):

    def evaluate(step: int) -> None:
      nll = heldout_nll(run.model, state.params, run.heldout, config)
      metrics.write({"step": step, "tokens": step * tokens_a_step, "heldout_nll": nll})
      progress.message(f"step {step}: held-out loss {nll:.4f} nats a token")

    if first == 0:
      evaluate(0)
    clock, logged = _Clock(), first
    for step in range(first + 1, config.num_steps + 1):
      state, values = run.step(state, next(run.batches))
      last = step == config.num_steps
      # The first step is waited for, so that its compilation is in no figure.
      if last or step == first + 1 or step % config.log_every == 0:
        numbers = {name: float(value) for name, value in values.items()}
        speed, logged = clock.lap((step - logged) * tokens_a_step), step
        metrics.write({"step": step, "tokens": step * tokens_a_step, **numbers, "tokens_per_second": speed})
        progress.update(step, loss=numbers["loss"], tokens_per_second=speed)
      with clock.paused():
        if last or (config.evaluate_every and step % config.evaluate_every == 0):
          evaluate(step)
        if config.save_every and (last or step % config.save_every == 0):
          run.checkpoints.save(step, state, run.batches)
  return state


def _export(directory: Path, start: ModelCheckpoint, params: Any, config: TrainConfig) -> None:
  """Writes the trained model, one subtree a layer, beside the run; an earlier export gives way."""
  if directory.exists():
    shutil.rmtree(directory)
  save_model(
    directory,
    config=start.config,
    params=unstack(params, start.config),
    tokenizer_files=start.tokenizer_files,
    source={"trained_from": start.source, "train_config": dataclasses.asdict(config)},
  )


def _summary(config: TrainConfig, metrics_path: Path) -> TrainSummary:
  records = read_metrics(metrics_path)
  heldout = [record["heldout_nll"] for record in records if "heldout_nll" in record]
  speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
  return TrainSummary(
    nll_before=heldout[0],
    nll_after=heldout[-1],
    tokens_trained=config.num_steps * config.batch_size * config.data.sequence_length,
    tokens_per_second=statistics.median(speeds) if speeds else math.nan,
  )
