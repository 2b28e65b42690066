"""Parameters on disk: an Orbax PyTree checkpoint, written array by array and read shard by shard."""

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

# Keeps Orbax from renaming directories, which not every file system can. The callers make the write atomic.
IN_PLACE = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)

# Size of a chunk, the unit of reading: a device that holds a part of a parameter reads the chunks that overlap it.
CHUNK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class UnreadArray:
  """A parameter that `save_model` reads just before it writes it, so that at most three are in memory at a time.

  Attributes:
    nbytes: size of the parameter in bytes.
    read: returns the parameter as a numpy array; called once.
  """

  nbytes: int
  read: Callable[[], np.ndarray]


def check_space(directory: AnyPath, arrays: Any) -> None:
  """Raises OSError if the disk of a directory has no room for a pytree of arrays."""
  # Orbax would fail on a full disk too, but late and with hundreds of lines on stderr.
  if not isinstance(directory, Path):
    return  # a bucket is never full
  needed, disk = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(directory)
  # Some network file systems report a total of 0 bytes.
  if disk.total and disk.free < needed:
    raise OSError(f"{needed:,} bytes are to be written to {directory}; {disk.free:,} are free")


def adapt_to_disk(directory: AnyPath) -> None:
  """Turns tensorstore's fsync off in this process if the file system of `directory` has no fsync of directories.

  Tensorstore would fail there. The caller syncs the files with `core.files.sync_below` instead.
  """
  if isinstance(directory, Path) and not syncs_directories(directory):
    # Orbax has no option for this, only private names: imported here, so that a release of Orbax without them still
    # works on all other disks.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
      context["file_io_sync"] = False


def write_params(path: AnyPath, params: Params) -> None:
  """Writes parameters as an Orbax PyTree checkpoint. All processes call it together; each writes its own shards.

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
  """Handler of `UnreadArray`: reads one array while the two before it are written; on disk all are numpy arrays."""

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


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, or its repr if the message is empty."""
  return (str(error).strip() or repr(error)).splitlines()[0]


def read_params(path: AnyPath, dtype: Any, shardings: Callable[[Params], Params] | None) -> Params:
  """Reads what `write_params` wrote; for `dtype` and `shardings` see `storage.model_directory.load_model`."""
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
