"""The transformers and RNNs of `benchmarks.mqar`: how they are made, trained and tested."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import resource
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.progress import Progress
from supra_jax.core.sharding import least_tokens, make_mesh, put_batch
from supra_jax.data.mqar import Recall
from supra_jax.linearization.calibrate import calibrate
from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Calibrated, Identity, Random, Start, Window
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.costs import state_bytes
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.registry import MixerConfig, layers, new_parameters
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model
from supra_jax.training.optimizer import OptimizerConfig
from supra_jax.training.step import TrainStep

Batch = dict[str, np.ndarray]
Model = tuple[Any, ModelConfig]  # parameters, one subtree per layer, and config
TASK = Recall()
PREVIOUS_BIAS = 7.5  # exp(-6) as much weight on the neighbours of the token before
TEACHER_SEED, TUNING_SEED, TEST_SEED, CALIBRATION_SEED = _SEEDS = range(4)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the teacher's training.

  Attributes:
    task: the task of the stage's rows.
    pairs: numbers of pairs; each batch has rows of every number.
    rows: rows of a batch with each number of pairs.
    steps: number of steps at most.
    rate: peak learning rate.
    enough: the stage ends when the mean loss of 50 steps, in nats per value, is less. 0: it does not, and the learning
      rate falls to a tenth; in other stages the rate is constant.
  """

  task: Recall
  pairs: tuple[int, ...]
  rows: int
  steps: int
  rate: float
  enough: float = 0.0


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all cells of a study have in common.

  Attributes:
    task: the task that RNNs are tuned on and tested on.
    pairs: numbers of pairs; each batch of tuning has rows of every number.
    rows: rows of a batch with each number of pairs, in tuning.
    test_rows: rows of the test with each number of pairs.
    stages: the teacher's training; the last stage has the same `task` and `pairs`.
    short_stages: number of stages, from the first, whose rows the tuning `short_first` begins with.
    teacher_accuracy: accuracy that the teacher has to reach for every number of pairs.
    seed: seeds the teacher's weights and rows, and the rows of the test.
  """

  task: Recall = TASK
  pairs: tuple[int, ...] = (4, 8, 16, 32)
  rows: int = 1
  test_rows: int = 64
  stages: tuple[Stage, ...] = (
    Stage(Recall(length=24, gap=0), (4,), rows=64, steps=4000, rate=5e-3, enough=0.3),
    Stage(Recall(length=64, gap=8), (4, 8), rows=16, steps=1500, rate=3e-3, enough=0.2),
    Stage(Recall(length=128, gap=32), (4, 8, 16), rows=6, steps=1000, rate=3e-3, enough=0.2),
    Stage(Recall(length=256, gap=96), (4, 8, 16, 32), rows=3, steps=800, rate=3e-3, enough=0.2),
    Stage(TASK, (4, 8, 16, 32), rows=2, steps=250, rate=3e-3),
  )
  short_stages: int = 2
  teacher_accuracy: float = 0.99
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to make an RNN of the teacher and to tune it.

  Attributes:
    start: start of the layers. None: softmax attention over a window whose keys and values take as many bytes as the
      state of `supra`.
    mixer: config of the layers; None: the start's own. `Calibrated` makes `supra` layers.
    rate: peak learning rate of the tuning.
    transfer: share of the steps that are attention transfer (`objectives.losses.attention_transfer_loss`).
  """

  start: Start | None
  mixer: MixerConfig | None = None
  rate: float = 3e-3
  transfer: float = 0.0


NO_DECAY = SupraConfig(decay="none")
METHODS = {  # in order of worth
  "window_16_no_decay": Method(Window(window=16, sinks=0), NO_DECAY),
  "identity_no_decay": Method(Identity(), NO_DECAY),
  "window_16": Method(Window(window=16, sinks=0)),
  "random": Method(Random()),
  "window_only": Method(None),
  "calibrated_no_decay": Method(Calibrated(tokens=32768), NO_DECAY),
  "identity": Method(Identity()),
  "calibrated": Method(Calibrated(tokens=32768)),
  "transfer_no_decay": Method(Identity(), NO_DECAY, transfer=0.3),
  "random_no_decay": Method(Random(), NO_DECAY),
  # As many bytes as the state of `supra` of "2x32": 22 retained tokens of each head.
  "memory": Method(Identity(), MemoryConfig(window=4, retained=(22,), sinks=0, chunk=4), rate=3e-4),
  "memory_at_random": Method(Identity(), MemoryConfig(window=4, retained=(22,), sinks=0, chunk=4, score="random")),
}
# The rows of tuning: an equal share of the tokens in rows of each short stage and in rows of the task; or the task's.
TUNINGS = ("short_first", "long")
# Heads and their width: the state of a `supra` layer has heads * width^2 numbers.
TEACHERS = {"2x32": (2, 32), "4x32": (4, 32)}


def teacher_config(heads: int, head_dim: int, task: Recall) -> ModelConfig:
  """Returns the config of a transformer of two layers and width 64."""
  return ModelConfig(
    vocab_size=task.vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    layers=layers(("softmax",) * 2),
    tie_embeddings=True,
    qkv_bias=True,
    rope=RopeConfig(base=500_000.0),
    max_positions=task.length,
  )


def equal_window(config: ModelConfig, softmax: ModelConfig) -> int:
  """Returns the number of tokens whose keys and values, in bfloat16, take as many bytes as the state of `config`."""
  return state_bytes(config, 1) // state_bytes(softmax, 1)


def _drawn(setting: Setting) -> tuple[int, ...]:
  """Returns what a setting adds to the seeds of rows: nothing for its first seed, whose rows stay what they were."""
  return (setting.seed,) if setting.seed else ()


def batches(task: Recall, pairs: Sequence[int], rows: int, seed: Sequence[int]) -> Iterator[Batch]:
  """Yields batches without end; each has `rows` rows with every number of pairs."""
  rng = np.random.default_rng(seed)
  while True:
    drawn = [task.rows(rng, rows, number) for number in pairs]
    yield {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}


@functools.cache
def programs(
  config: ModelConfig, steps: int, rate: float, last_rate: float, teacher: ModelConfig | None = None
) -> tuple[Any, ...]:
  """Returns (TrainStep, its program, its program of attention transfer; None without a teacher) of a run."""
  optimizer = OptimizerConfig(
    learning_rate=rate,
    end_learning_rate=last_rate,
    warmup_steps=max(min(steps // 20, 50), 1),
    weight_decay=0.01,
    z_loss=0.0,
  )
  groups, theirs = [("kept", ".*")], None
  if teacher is not None:
    groups.insert(0, ("transfer", f"{new_parameters(config.mixers)}|[qk]_proj"))
    theirs = Transformer(teacher, stacked=True)
  step = TrainStep(Transformer(config, stacked=True), optimizer, steps, groups, teacher=theirs, teacher_weight=0.0)
  shardings = jax.tree.map(lambda x: x.sharding, step.state_shapes(make_mesh()))
  transfer = None if teacher is None else step.compiled(shardings, ("transfer",), transfer=True)
  return step, step.compiled(shardings), transfer


def trained(
  model: Model,
  steps: int,
  rows: Iterable[Batch],
  rate: float,
  *,
  teacher: Model | None = None,
  transfer: int = 0,
  enough: float = 0.0,
  label: str = "",
) -> tuple[Any, list[float]]:
  """Trains a model on the values behind queries.

  Args:
    model: the model.
    steps: number of steps.
    rows: the batches; they may be endless.
    rate: peak learning rate.
    teacher: the transformer that the model came from, for attention transfer.
    transfer: number of steps, from the first on, that are attention transfer.
    enough: see `Stage`.
    label: what progress is shown as; empty: it is not shown.

  Returns:
    (parameters, one subtree per layer; loss of each step but those of attention transfer, in nats per value).
  """
  params, config = model
  last_rate = rate if enough else rate / 10
  step, program, first = programs(config, steps, rate, last_rate, None if teacher is None else teacher[1])
  extra = () if teacher is None else (stack_layers(*teacher),)
  state = jax.jit(step.init)(stack_layers(params, config))
  losses: list[float] = []
  describe = f"{label}, step {{done}} of {{total}}"
  with Progress(steps, describe, {"loss": "loss {:.3f}".format}, enabled=bool(label), desc=label) as progress:
    for number, batch in enumerate(itertools.islice(rows, steps)):
      if number < transfer:
        # The layers learn what attention does at every token.
        state, _ = first(state, put_batch({"tokens": batch["tokens"]}, make_mesh()), *extra)
        continue
      state, metrics = program(state, put_batch(batch, make_mesh()), *extra)
      losses.append(float(metrics["loss"]))
      recent = statistics.fmean(losses[-50:])
      progress.advance_to(number + 1, loss=recent)
      if len(losses) >= 50 and recent < enough:
        break
  return step.finished(state.params), losses


@functools.partial(jax.jit, static_argnums=0)
def _right(model: Transformer, params: Any, batch: Batch) -> jax.Array:
  logits, _ = model.apply({"params": params}, batch["tokens"][:, :-1], method="logits")
  return jnp.sum((logits.argmax(-1) == batch["tokens"][:, 1:]) * batch["target_weights"][:, 1:])


def accuracies(model: Model, setting: Setting, rows: int = 16) -> dict[str, float]:
  """Returns {number of pairs: share of the queries whose value has the largest logit}, `rows` rows at a time."""
  params, config = model
  found = {}
  for number in setting.pairs:
    test = batches(setting.task, [number], rows, (TEST_SEED, number, *_drawn(setting)))
    parts = itertools.islice(test, -(-setting.test_rows // rows))
    right = [float(_right(Transformer(config), params, batch)) for batch in parts]
    found[str(number)] = sum(right) / (len(right) * rows * number)
  return found


def _first_parameters(config: ModelConfig, seed: int) -> Any:
  """Draws parameters whose first layer looks at the token before, and whose output projections are 0.

  Two layers find a pair in two steps: at a value, the first layer reads the key before; at a query, the second layer
  looks for the value behind that key. Training finds the second step in minutes only where the first is there already.
  Biases make it: with k = b and q = R(-1) b, RoPE turns q k to sum_i b_i^2 cos(theta_i (d - 1)) at distance d.
  """
  key = jax.random.key(len(_SEEDS) * seed + TEACHER_SEED)
  drawn = Transformer(config).init(key, least_tokens(), method="logits")["params"]
  zeros = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if path[-2].key in ("o_proj", "down_proj") else x, drawn
  )
  half = config.head_dim // 2
  fast = np.arange(half) < half // 4
  angles = config.rope.base ** (-np.arange(half) / half)
  size = PREVIOUS_BIAS * fast
  biases = {"k_proj": [size, 0 * size], "q_proj": [size * np.cos(angles), -size * np.sin(angles)]}
  attention = dict(zeros["layers_0"]["self_attn"])
  for name, parts in biases.items():
    bias = jnp.asarray(np.tile(np.concatenate(parts), config.num_heads), jnp.float32)
    attention[name] = {"kernel": 0.1 * attention[name]["kernel"], "bias": bias}
  return {**zeros, "layers_0": {**zeros["layers_0"], "self_attn": attention}}


def make_teacher(directory: Path, shape: tuple[int, int], setting: Setting) -> tuple[Model, dict[str, Any]]:
  """Trains a teacher, but for the stages that earlier calls did; returns (teacher, facts about it).

  Raises:
    ValueError: the teacher recalls less than `Setting.teacher_accuracy`.
  """
  config = teacher_config(*shape, setting.task)
  params, facts = _first_parameters(config, setting.seed), {"steps": [], "tokens": 0, "cpu_seconds": 0.0}
  directory.mkdir(parents=True, exist_ok=True)
  for number, stage in enumerate(setting.stages):
    path, began = directory / f"stage_{number}", cpu_seconds()
    if not path.exists():
      rows = batches(stage.task, stage.pairs, stage.rows, (TEACHER_SEED, number, *_drawn(setting)))
      label = f"Transformer of {shape[0]} heads, rows of {stage.task.length}"
      how: dict[str, Any] = {"enough": stage.enough, "label": label}
      params, losses = trained((params, config), stage.steps, rows, stage.rate, **how)
      facts = {
        "accuracy": accuracies((params, config), dataclasses.replace(setting, task=stage.task, pairs=stage.pairs)),
        "steps": [*facts["steps"], len(losses)],
        "tokens": facts["tokens"] + len(losses) * stage.task.length * len(stage.pairs) * stage.rows,
        "state_bytes": state_bytes(config, setting.task.length),
        "cpu_seconds": facts["cpu_seconds"] + cpu_seconds() - began,
      }
      save_model(path, config=config, params=params, tokenizer_files={}, source=facts)
    stored = load_model(path)
    params, facts = stored.params, dict(stored.source)
  worst = min(facts["accuracy"].values())
  if worst < setting.teacher_accuracy:
    raise ValueError(f"The teacher recalls {worst:.1%}: wanted {setting.teacher_accuracy:.0%} or more. {facts}")
  return (params, config), facts


def student(method: Method, teacher: Model, setting: Setting, seed: int) -> Model:
  """Makes the RNN of a method, before any tuning."""
  params, config = teacher
  if method.start is None:
    linear = config.replace(layers=layers(("supra",) * config.num_layers))
    return params, config.replace(sliding_window=equal_window(linear, config))
  if isinstance(method.start, Calibrated):
    made = linearize(params, config, Identity(), mixer=method.mixer)
    rows = batches(setting.task, setting.pairs, 2, (CALIBRATION_SEED, seed))
    count = -(-method.start.tokens // (2 * len(setting.pairs) * setting.task.length))
    read = list(itertools.islice(rows, count))
    with jax.set_mesh(make_mesh()):
      return calibrate(teacher, (made.params, made.config), read, make_mesh(), ridge=method.start.ridge), made.config
  start = dataclasses.replace(method.start, seed=seed) if isinstance(method.start, Random) else method.start
  made = linearize(params, config, start, mixer=method.mixer)
  return made.params, made.config


def measure(method: Method, teacher: Model, setting: Setting, tuning: str, tokens: int, seed: int) -> dict[str, Any]:
  """Makes and tunes the RNN of a cell; returns accuracy, bytes of state and the loss at the end of tuning.

  Raises:
    ValueError: a window of equal bytes reaches from a query to its pair.
  """
  params, config = student(method, teacher, setting, seed)
  held = state_bytes(config, config.sliding_window or 1)
  window = held // state_bytes(teacher[1], 1)
  if setting.task.gap < config.num_layers * window:
    raise ValueError(f"gap={setting.task.gap}: wanted {config.num_layers} layers times {window} tokens or more.")
  kinds = [(setting.task, setting.pairs, setting.rows)]
  if tuning == "short_first":
    kinds = [(stage.task, stage.pairs, stage.rows) for stage in setting.stages[: setting.short_stages]] + kinds
  loss, theirs = None, teacher if method.transfer else None
  for number, (task, pairs, rows) in enumerate(kinds if tokens else []):
    steps = max(round(tokens / len(kinds) / (task.length * len(pairs) * rows)), 1)
    drawn = batches(task, pairs, rows, (TUNING_SEED, seed, number))
    how: dict[str, Any] = {"teacher": theirs, "transfer": round(method.transfer * steps)}
    params, losses = trained((params, config), steps, drawn, method.rate, **how)
    loss = statistics.fmean(losses[-max(steps // 10, 1) :])
  return {
    "accuracy": accuracies((params, config), setting),
    "loss": loss,
    "state_bytes": held,
    "equal_window": window,
  }


def cpu_seconds() -> float:
  """Returns the CPU time of this process so far, on all threads."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime
