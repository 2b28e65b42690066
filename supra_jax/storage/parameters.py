"""How parameters lie on disk: an Orbax PyTree checkpoint, written array by array and read shard by shard."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from supra_jax.core.files import AnyPath, syncs_directories

Params = Mapping[str, Any]

# Orbax then renames no directory, which not every disk can. Whoever writes parameters makes them whole or not there.
IN_PLACE = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)

# What is read at once: a device that has a part of a parameter reads the chunks that its part lies in.
CHUNK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class UnreadArray:
  """A parameter that `save_model` reads when it comes to it, so that only a few are in memory at a time.

  Attributes:
    nbytes: how many bytes it has.
    read: returns it as a numpy array; called once.
  """

  nbytes: int
  read: Callable[[], np.ndarray]


def check_space(directory: AnyPath, arrays: Any) -> None:
  """Raises OSError where the disk of a directory has no room for a tree of arrays."""
  # Orbax fails on a full disk too, but late and with hundreds of lines on stderr.
  if not isinstance(directory, Path):
    return  # a bucket is never full
  needed, disk = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(directory)
  # Some network file systems say that they have 0 bytes in all.
  if disk.total and disk.free < needed:
    raise OSError(f"{needed:,} bytes are to be written to {directory}; {disk.free:,} are free")


def adapt_to_disk(directory: AnyPath) -> None:
  """Has tensorstore do without fsync in this process where a directory's disk has none for directories; it would fail.

  Whoever writes there then waits for the files with `files.sync_below`.
  """
  if isinstance(directory, Path) and not syncs_directories(directory):
    # Orbax has no option for it; imported here, so that a release without these names serves all other disks.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
      context["file_io_sync"] = False


def write_params(path: AnyPath, params: Params) -> None:
  """Writes a nested dict of jax arrays, numpy arrays and UnreadArrays; all processes together, each its own shards.

  Raises:
    OSError: the disk is full, or fails.
  """
  kinds = [(kind, ocp.type_handlers.get_type_handler(kind)) for kind in (np.ndarray, jax.Array)]
  adapt_to_disk(path.parent)
  registry = ocp.type_handlers.create_type_handler_registry((UnreadArray, _Unread(deepcopy_host_arrays=False)), *kinds)
  # zstd takes a fifth off bfloat16, and longer than a disk.
  handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
  with ocp.Checkpointer(handler, atomicity_options=IN_PLACE) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(params, save_args))


class _Unread(ocp.type_handlers.NumpyHandler):
  """Reads one array while the two before are written; on disk they are numpy arrays as any."""

  async def serialize(self, values, infos, args=None) -> Any:
    writing: list[Any] = []
    try:
      for value, info, arg in zip(values, infos, args, strict=True):
        array = value.read()
        if len(writing) == 2:
          _wait(writing.pop(0))
        writing += await super().serialize([array], [info], [arg])
    finally:
      # Whoever removes what was written must not meet a thread that goes on writing.
      for future in writing:
        _wait(future)
    return []


def _wait(future: Any) -> None:
  try:
    future.result()
  except Exception as error:
    raise OSError(f"The parameters could not be written: {first_line(error)}") from error


def first_line(error: Exception) -> str:
  """What an error says, or is, in one line."""
  return (str(error).strip() or repr(error)).splitlines()[0]


def read_params(path: AnyPath, dtype: Any, shardings: Callable[[Params], Params] | None) -> Params:
  """Reads what `write_params` wrote; `dtype` and `shardings` as in `supra_jax.storage.model_directory.load_model`."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)
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

    return checkpointer.restore(path, restore_args=jax.tree.map(restore_args, shapes, places))
