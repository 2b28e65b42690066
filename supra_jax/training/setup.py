"""What a recipe becomes before the first step: data, the step, the shapes and places of its state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from supra_jax.core.distributed import together
from supra_jax.core.files import AnyPath, place
from supra_jax.core.sharding import TIME_AXIS, batch_shards, check_heads, process_shard, put_batch
from supra_jax.data import loading
from supra_jax.data.packed import check_packed, leaves_of
from supra_jax.data.packing import prepare
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.model.config import ModelConfig
from supra_jax.model.placement import param_shardings
from supra_jax.model.stacking import stack_runs
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.heldout import mean_nll
from supra_jax.storage.model_directory import load_model
from supra_jax.training.config import DataConfig, TrainConfig
from supra_jax.training.step import TrainState, TrainStep, parameter_shapes


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


def heldout_nll(model: Transformer, params: Any, path: AnyPath, config: TrainConfig, mesh: Mesh | None = None) -> float:
  """Mean nats a token of the held-out rows; without a mesh on one device."""
  rows = config.batch_size // config.microbatches
  index, count = (0, 1) if mesh is None else process_shard(mesh)
  batches = loading.heldout_batches(
    path, batch_size=rows, max_rows=config.data.heldout_rows, shard_index=index, shard_count=count
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
  stack = functools.partial(stack_runs, config=teacher.config)
  return jax.jit(stack, out_shardings=param_shardings(jax.eval_shape(stack, stored), mesh))(stored)


def teacher_shapes(teacher: Transformer, mesh: Mesh) -> Any:
  """jax.ShapeDtypeStruct, with its sharding, of every array that `load_teacher` loads."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, teacher.dtype), parameter_shapes(teacher))
  return _with_shardings(shapes, param_shardings(shapes, mesh))


def state_shapes(step: TrainStep, mesh: Mesh) -> TrainState:
  """jax.ShapeDtypeStruct, with its sharding, of every array of a run's state."""
  model = step.model.config
  check_heads(model.num_heads, model.num_kv_heads, mesh)
  shapes = jax.eval_shape(step.init, step.shapes)
  return _with_shardings(shapes, step.shardings(shapes, mesh))


def _with_shardings(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
  """Raises ValueError where a microbatch cannot be cut evenly over the mesh."""
  rows = config.batch_size // config.microbatches
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
