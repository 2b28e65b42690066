"""Parameters on disk: an Orbax PyTree checkpoint, written array by array and read shard by shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from supra_jax.core.files import AnyPath
from supra_jax.model.config import ModelConfig
from supra_jax.model.shapes import check_fit
from supra_jax.storage.disk import IN_PLACE, adapt_to_disk, first_line

Params = Mapping[str, Any]

# Size in bytes of the pieces that an array is stored in: a device that holds a shard reads only its pieces.
CHUNK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class UnreadArray:
  """A parameter that `save_model` reads just before writing it, so that few parameters are in memory at a time.

  Attributes:
    nbytes: size of the parameter in bytes.
    read: returns the parameter as a numpy array; called once.
  """

  nbytes: int
  read: Callable[[], np.ndarray]


def write_params(path: AnyPath, params: Params) -> None:
  """Writes parameters as an Orbax PyTree checkpoint. All processes make this call together; each writes its own shards.

  Args:
    path: directory of the checkpoint.
    params: nested dict of jax arrays, numpy arrays and `UnreadArray`s.

  Raises:
    OSError: the disk is full, or fails.
  """
  kinds = [(kind, ocp.type_handlers.get_type_handler(kind)) for kind in (np.ndarray, jax.Array)]
  adapt_to_disk(path.parent)
  registry = ocp.type_handlers.create_type_handler_registry((UnreadArray, _Unread(deepcopy_host_arrays=False)), *kinds)
  # No compression: zstd saves a fifth of bfloat16 weights and is slower than a disk.
  handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
  with ocp.Checkpointer(handler, atomicity_options=IN_PLACE) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(params, save_args))


class _Unread(ocp.type_handlers.NumpyHandler):
  """Writes each `UnreadArray` as a numpy array; reads one array while the two before it are being written."""

  async def serialize(self, values, infos, args=None) -> Any:
    writing: list[Any] = []
    try:
      for value, info, arg in zip(values, infos, args, strict=True):
        array = value.read()
        if len(writing) == 2:
          _wait(writing.pop(0))
        writing += await super().serialize([array], [info], [arg])
    finally:
      # After an error too: the caller removes the files, and no thread may go on writing them.
      for future in writing:
        _wait(future)
    return []


def _wait(future: Any) -> None:
  try:
    future.result()
  except Exception as error:
    raise OSError(f"The parameters could not be written: {first_line(error)}") from error


def stored_shapes(checkpointer: ocp.Checkpointer, path: AnyPath) -> Params:
  """Returns the nested dict of shapes and dtypes of a checkpoint's parameters, as jax.ShapeDtypeStruct.

  Raises:
    ValueError: the directory is no Orbax checkpoint, or a damaged one.
  """
  try:
    metadata = checkpointer.metadata(path).item_metadata
  except Exception as error:  # Orbax and tensorstore raise many types
    raise ValueError(f"{path}: no parameters can be read: {first_line(error)}") from error
  if metadata is None:
    raise ValueError(f"{path}: no parameters can be read: it is no Orbax checkpoint, or a damaged one.")
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)), metadata.tree)


def checked_shapes(checkpointer: ocp.Checkpointer, path: AnyPath, config: ModelConfig) -> Params:
  """Returns what `stored_shapes` returns, if these are the parameters of a model.

  Args:
    checkpointer: reads the checkpoint.
    path: directory of the checkpoint.
    config: config of the model that the parameters have to belong to.

  Raises:
    ValueError: names or shapes of the stored parameters are not those of the model, or they are damaged.
  """
  shapes = stored_shapes(checkpointer, path)
  try:
    check_fit(config, shapes)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return shapes


def read_params(path: AnyPath, config: ModelConfig, dtype: Any, shardings: Callable[[Params], Params] | None) -> Params:
  """Returns the parameters in a checkpoint that `write_params` wrote, a nested dict of jax arrays.

  Args:
    path: directory of the checkpoint.
    config: config of the model that the parameters have to belong to.
    dtype, shardings: see `storage.model_directory.load_model`.

  Raises:
    ValueError: names or shapes of the stored parameters are not those of the model, and nothing is read; or the
      parameters are damaged.
  """
  with ocp.PyTreeCheckpointer() as checkpointer:
    shapes = checked_shapes(checkpointer, path, config)
    if shardings is None:
      first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      places = jax.tree.map(lambda _: first, shapes)
    else:
      places = shardings(shapes)

    def restore_args(leaf, sharding):
      wanted = np.dtype(leaf.dtype)
      if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
        wanted = np.dtype(dtype)
      return ocp.ArrayRestoreArgs(sharding=sharding, dtype=wanted, global_shape=leaf.shape)

    try:
      return checkpointer.restore(path, restore_args=jax.tree.map(restore_args, shapes, places))
    except Exception as error:
      said = first_line(error).partition(". See full")[0]
      raise ValueError(f"{path}: the parameters cannot be read, a file is damaged or missing: {said}.") from error
