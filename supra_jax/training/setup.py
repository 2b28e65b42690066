"""What a recipe becomes before the first step: data, the step, a teacher, and the state to go on from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from supra_jax.core.distributed import together
from supra_jax.core.files import AnyPath, place
from supra_jax.core.sharding import TIME_AXIS, batch_shards, process_shard, put_batch
from supra_jax.data import loading
from supra_jax.data.packed import check_packed, leaves_of
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import step_flops_per_token
from supra_jax.model.placement import param_shardings
from supra_jax.model.shapes import parameter_shapes
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.heldout import mean_nll
from supra_jax.storage.model_directory import ModelCheckpoint, load_model, load_model_without_params
from supra_jax.storage.run_states import RunStates
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.step import TrainState, TrainStep, with_shardings
from supra_jax.training.workdir import DATA_DIRECTORY, STATES_DIRECTORY


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run that its loop works with.

  Attributes:
    step: makes the programs of its steps.
    shardings: where each array of its state lives.
    state: the state that it goes on from.
    first: number of steps done before.
    extra: what a step is given besides state and batch: the teacher's parameters, if there is a teacher.
    batches: its batches, this process's rows of each.
    put: places a batch on the devices.
    evaluate: parameters -> mean nats a token of the held-out rows.
    rows_of_step: number of a step, from 1 -> names of the rows that it reads.
    states: its saved states.
    flops_per_token: FLOPs of a step for each token.
  """

  step: TrainStep
  shardings: TrainState
  state: TrainState
  first: int
  extra: tuple[Any, ...]
  batches: loading.Batches
  put: Callable[[loading.Batch], Any]
  evaluate: Callable[[Any], float]
  rows_of_step: Callable[[int], Sequence[str]]
  states: RunStates
  flops_per_token: float


def set_up(config: TrainConfig, start: ModelCheckpoint, workdir: AnyPath, mesh: Mesh) -> Run:
  """Makes a run; its state is the newest that was saved, or a new one. Call it under `jax.set_mesh(mesh)`.

  Args:
    config: the run's config.
    start: the model that it starts from, without parameters.
    workdir: its directory, for packed data and saved states.
    mesh: its devices.

  Raises:
    ValueError: data, model, teacher and mesh do not fit each other.
  """
  tokenizer = Tokenizer.from_files(start.tokenizer_files, start.config)
  teacher = load_model_without_params(config.distill_from).config if config.distill_from else None
  step = make_train_step(config, start.config, teacher)
  shapes = step.state_shapes(mesh)
  sources, heldout = prepare_data(config.data, tokenizer, start.config.vocab_size, workdir / DATA_DIRECTORY)
  index, count = process_shard(mesh)
  order: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
  batches = loading.make_loader(sources, **order, shard_index=index, shard_count=count)
  rows: dict[str, Any] = {"batch_size": config.rows_a_microbatch, "max_rows": config.data.heldout_rows}
  states = RunStates(workdir / STATES_DIRECTORY, keep=config.keep_checkpoints)
  extra = () if step.teacher is None else (load_teacher(config.distill_from, step.teacher, mesh),)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  restored = states.restore(shapes)
  if restored is None:
    first, state = 0, _new_state(step, config.init_checkpoint, shardings, mesh)
  else:
    first, state, position = restored
    batches.set_state(position)
  return Run(
    step=step,
    shardings=shardings,
    state=state,
    first=first,
    extra=extra,
    batches=batches,
    put=lambda batch: put_batch(batch, mesh, config.microbatches),
    evaluate=lambda params: heldout_nll(step.model, params, heldout, **rows, mesh=mesh),
    rows_of_step=lambda number: loading.rows_of_batch(sources, **order, step=number - 1),
    states=states,
    flops_per_token=step_flops_per_token(start.config, config.data.sequence_length, teacher),
  )


def _new_state(step: TrainStep, path: str, shardings: TrainState, mesh: Mesh) -> TrainState:
  """The state of a run that starts from a model directory."""
  make = jax.jit(lambda params: step.init(stack_layers(params, step.model.config)), out_shardings=shardings)
  return make(load_model(path, jnp.float32, shardings=lambda stored: param_shardings(stored, mesh)).params)


def prepare_data(
  config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int, directory: AnyPath
) -> tuple[Sequence[loading.Source], AnyPath]:
  """(sources to train on, held-out directory); packs text into `directory` unless it is there and fits.

  Raises:
    ValueError: packed data or text do not fit the model or the config; or there is text and no tokenizer.
  """
  if config.sources:
    sources, heldout = loading.parse_sources(config.sources), place(config.heldout)
    for path in [*(path for path, _ in sources), heldout]:
      check_packed(path, sequence_length=config.sequence_length, vocab_size=vocab_size, tokenizer=tokenizer)
    return sources, heldout
  if tokenizer is None:
    raise ValueError(f"The model has no tokenizer to read {config.input} with.")
  if jax.process_index() == 0:
    prepare(
      config.input,
      tokenizer,
      directory,
      text_key=config.text_key,
      vocab_size=vocab_size,
      sequence_length=config.sequence_length,
      documents=config.documents,
      bos=config.bos,
      heldout_every=config.heldout_every,
    )
  together("data packed")
  return ((str(directory / "train"), 1.0),), directory / "heldout"


def row_leaves(config: DataConfig, vocab_size: int) -> tuple[str, ...]:
  """Names of the arrays of the rows that a run will read, from what packed directories say where they exist already.

  Raises:
    ValueError: a packed directory that exists does not fit the model or the config.
  """
  names = leaves_of(config.documents)
  if config.sources:
    paths = [*(path for path, _ in loading.parse_sources(config.sources)), config.heldout]
    for path in paths:
      if place(path).exists():
        names = check_packed(path, sequence_length=config.sequence_length, vocab_size=vocab_size).leaves
  return names


def heldout_nll(
  model: Transformer, params: Any, path: AnyPath, *, batch_size: int, max_rows: int = 0, mesh: Mesh | None = None
) -> float:
  """Mean nats a token of held-out rows.

  Args:
    model: the transformer.
    params: its parameters.
    path: a packed directory.
    batch_size: rows of a batch, over all devices.
    max_rows: number of rows to read; 0 means all.
    mesh: where batches go; None is one device.
  """
  index, count = (0, 1) if mesh is None else process_shard(mesh)
  batches = loading.heldout_batches(
    path, batch_size=batch_size, max_rows=max_rows, shard_index=index, shard_count=count
  )
  if mesh is not None:
    batches = (jax.tree.map(lambda x: x[0], put_batch(batch, mesh)) for batch in batches)
  return mean_nll(model, params, batches)


def make_train_step(config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None = None) -> TrainStep:
  """The step that a recipe describes; with a teacher where it distils.

  Raises:
    ValueError: model and teacher have not the same vocabulary and width, or number of layers where these are compared;
      or the recipe distils and there is no teacher.
  """
  config = config.for_model(model)
  transformer = functools.partial(Transformer, dtype=jnp.dtype(config.dtype), stacked=True)
  if config.distill_from and teacher is None:
    raise ValueError(f"distill_from={config.distill_from!r}: wanted the config of that transformer too.")
  if teacher is not None:
    by_layer = ("num_layers",) if config.distill_hidden or config.transfer_steps else ()
    for name in ("vocab_size", "hidden_size", "tie_embeddings", *by_layer):
      if getattr(teacher, name) != getattr(model, name):
        raise ValueError(
          f"distill_from={config.distill_from!r} has {name}={getattr(teacher, name)}, the model "
          f"{getattr(model, name)}: wanted the transformer that the model came from."
        )
  return TrainStep(
    transformer(model, remat=config.remat),
    config.optimizer,
    config.num_steps,
    config.groups,
    (config.new_weights, config.new_weights_rate),
    None if teacher is None else transformer(teacher),
    config.distill_weight,
    config.distill_hidden,
    config.adapters,
    config.seed,
  )


def load_teacher(path: str, teacher: Transformer, mesh: Mesh) -> Any:
  """The parameters of a teacher, stacked, in the dtype of its computation; each device holds its shards.

  Args:
    path: the teacher's model directory.
    teacher: the transformer that will run with them.
    mesh: the mesh to place them on.
  """
  stored = load_model(path, teacher.dtype, shardings=lambda shapes: param_shardings(shapes, mesh)).params
  stack = functools.partial(stack_layers, config=teacher.config)
  return jax.jit(stack, out_shardings=param_shardings(jax.eval_shape(stack, stored), mesh))(stored)


def teacher_shapes(teacher: Transformer, mesh: Mesh) -> Any:
  """jax.ShapeDtypeStruct, with its sharding, of every array that `load_teacher` loads."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, teacher.dtype), parameter_shapes(teacher))
  return with_shardings(shapes, param_shardings(shapes, mesh))


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
  """Raises ValueError where a microbatch cannot be cut evenly over the mesh."""
  rows = config.rows_a_microbatch
  if rows % batch_shards(mesh):
    raise ValueError(
      f"batch_size={config.batch_size} in microbatches={config.microbatches} parts of {rows} rows cannot be cut over "
      f"the {batch_shards(mesh)} shards of the mesh {dict(mesh.shape)}. Choose other sizes."
    )
  if config.data.sequence_length % mesh.shape[TIME_AXIS]:
    raise ValueError(
      f"sequence_length={config.data.sequence_length} cannot be cut over the {mesh.shape[TIME_AXIS]} shards of time of "
      f"the mesh {dict(mesh.shape)}. Choose other sizes."
    )
