"""Sets up a run from its recipe: packed data, the training step, the teacher and the state to start or resume from."""

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
  """The parts of a run that the training loop works with.

  Attributes:
    step: compiles the programs of the run's steps.
    shardings: sharding of each array of the state.
    state: the state before the next step.
    first: number of steps that earlier calls of `train` did.
    extra: arguments of a step after state and batch: the teacher's parameters if there is a teacher, else none.
    batches: iterator over the run's batches; yields this process's rows of each batch.
    put: places a batch on the devices, cut into microbatches.
    evaluate: parameters -> mean held-out loss in nats per token.
    rows_of_step: number of a step, from 1 -> names of the rows that the step reads.
    states: the saved states of the run.
    flops_per_token: FLOPs of a step per token.
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
  """Makes a run, with the newest saved state if there is one, else a new state. Call this under `jax.set_mesh(mesh)`.

  Args:
    config: the run's config.
    start: the model that the run starts from, without parameters.
    workdir: directory of the run, for packed data and saved states.
    mesh: device mesh of the run.

  Raises:
    FileNotFoundError: a model directory, text or packed directory is missing.
    ValueError: data, model, teacher and mesh do not fit each other; a regex of the config does not fit the model; or
      all saved states are damaged.
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
  """Returns the state, before the first step, of a run that starts from the model directory `path`."""
  make = jax.jit(lambda params: step.init(stack_layers(params, step.model.config)), out_shardings=shardings)
  return make(load_model(path, jnp.float32, shardings=lambda stored: param_shardings(stored, mesh)).params)


def prepare_data(
  config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int, directory: AnyPath
) -> tuple[Sequence[loading.Source], AnyPath]:
  """Returns the packed data of a run; packs the text of `config.input` unless an earlier call has packed it.

  Args:
    config: the run's data config.
    tokenizer: tokenizer of the model; None if it has none. Text needs one; packed `sources` do not.
    vocab_size: number of rows of the model's embedding.
    directory: where text is packed to; unused with `sources`.

  Returns:
    (packed directories to train on with their weights, packed directory of the held-out rows).

  Raises:
    FileNotFoundError: text or a packed directory is missing.
    ValueError: packed data or text do not fit the model or the config; or there is text and no tokenizer.
  """
  if config.sources:
    sources, heldout = loading.parse_sources(config.sources), place(config.heldout)
    for path in [*(path for path, _ in sources), heldout]:
      check_packed(path, sequence_length=config.sequence_length, vocab_size=vocab_size, tokenizer=tokenizer)
    return sources, heldout
  if tokenizer is None:
    raise ValueError(f"data.input={config.input!r}: the model of init_checkpoint has no tokenizer to read it with.")
  if jax.process_index() == 0:
    prepare(
      config.input,
      tokenizer,
      directory,
      text_key=config.text_key,
      messages_key=config.messages_key,
      vocab_size=vocab_size,
      sequence_length=config.sequence_length,
      documents=config.documents,
      bos=config.bos,
      heldout_every=config.heldout_every,
    )
  together("data packed")
  return ((str(directory / "train"), 1.0),), directory / "heldout"


def row_leaves(config: DataConfig, vocab_size: int) -> tuple[str, ...]:
  """Returns the names of the arrays that each row of a run has, as `loading.make_loader` yields them.

  Packed directories that exist decide; without any, `config` does.

  Raises:
    ValueError: a packed directory that exists does not fit the model or the config.
  """
  if config.sources:
    paths = [*(path for path, _ in loading.parse_sources(config.sources)), config.heldout]
    fits: dict[str, Any] = {"sequence_length": config.sequence_length, "vocab_size": vocab_size}
    found = {path: check_packed(path, **fits) for path in paths if place(path).exists()}
    trained = [info for path, info in found.items() if path != config.heldout] or [*found.values()]
    if trained:
      return leaves_of(trained[0].join, masked=any(info.learned_tokens is not None for info in trained))
  return leaves_of(config.documents, masked=bool(config.messages_key))


def heldout_nll(
  model: Transformer, params: Any, path: AnyPath, *, batch_size: int, max_rows: int = 0, mesh: Mesh | None = None
) -> float:
  """Returns the mean loss of the rows of a packed directory, in nats per token.

  Args:
    model: the transformer.
    params: the transformer's parameters, stacked if `model.stacked`.
    path: packed directory of the held-out rows.
    batch_size: rows per batch, over all devices.
    max_rows: number of rows to read, from the start; 0 means all.
    mesh: device mesh that batches are placed on; None: one device.

  Raises:
    FileNotFoundError: the directory, or a file of it, is missing.
    ValueError: a file is damaged, a batch cannot be cut over the mesh, or no row has a target.
  """
  index, count = (0, 1) if mesh is None else process_shard(mesh)
  batches = loading.heldout_batches(
    path, batch_size=batch_size, max_rows=max_rows, shard_index=index, shard_count=count
  )
  if mesh is not None:
    batches = (jax.tree.map(lambda x: x[0], put_batch(batch, mesh)) for batch in batches)
  return mean_nll(model, params, batches)


def make_train_step(config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None = None) -> TrainStep:
  """Makes the training step that a recipe describes.

  Args:
    config: the recipe.
    model: config of the model that trains.
    teacher: config of the teacher; required if the recipe has `distill_from`.

  Raises:
    ValueError: model and teacher differ in vocab_size, hidden_size or tie_embeddings, or, with `distill_hidden` or
      `transfer_steps`, in num_layers; `distill_from` is set and `teacher` is None; or a regex of the recipe finds no
      parameter to train.
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
  """Loads the parameters of a teacher: stacked, in the dtype `teacher.dtype`, sharded over a mesh.

  Args:
    path: model directory of the teacher.
    teacher: the Flax module that the parameters are for.
    mesh: the mesh to place the parameters on.

  Raises:
    FileNotFoundError: `path` is not a model directory, or a part of it is missing.
    ValueError: the model directory is damaged.
  """
  stored = load_model(path, teacher.dtype, shardings=lambda shapes: param_shardings(shapes, mesh)).params
  stack = functools.partial(stack_layers, config=teacher.config)
  return jax.jit(stack, out_shardings=param_shardings(jax.eval_shape(stack, stored), mesh))(stored)


def teacher_shapes(teacher: Transformer, mesh: Mesh) -> Any:
  """Returns a `jax.ShapeDtypeStruct` with sharding for every array that `load_teacher` returns; loads nothing."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, teacher.dtype), parameter_shapes(teacher))
  return with_shardings(shapes, param_shardings(shapes, mesh))


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
  """Raises ValueError if the rows or the tokens of a microbatch cannot be cut evenly over the mesh."""
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
