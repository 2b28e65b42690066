"""Adapts Orbax to the disk: free space, renaming of directories, fsync; for model directories and saved run states."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from supra_jax.core.files import AnyPath, syncs_directories

# With these options Orbax renames no directory, since not every disk can; a directory is complete once it holds
# COMMIT_FILE.
IN_PLACE = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
COMMIT_FILE = "commit_success.txt"  # Orbax's name


def check_space(directory: AnyPath, arrays: Any) -> None:
  """Checks that the disk of an existing directory has room for a pytree of arrays; a bucket always has.

  Raises:
    OSError: the disk has fewer free bytes than the arrays.
  """
  # Orbax fails on a full disk too, but late and with hundreds of lines on stderr.
  if not isinstance(directory, Path):
    return  # a bucket is never full
  needed, disk = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(directory)
  # Some network file systems say that they have 0 bytes in all.
  if disk.total and disk.free < needed:
    raise OSError(f"{needed:,} bytes are to be written to {directory}; {disk.free:,} are free")


def adapt_to_disk(directory: AnyPath) -> None:
  """Switches off tensorstore's fsync in this process if the directory's disk cannot fsync directories.

  tensorstore would fail to write there. The caller has to sync the written files with `files.sync_below` instead. Makes
  the directory if it does not exist.
  """
  if isinstance(directory, Path) and not syncs_directories(directory):
    # Orbax has no option for it; imported here, so that a release without these names serves all other disks.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
      context["file_io_sync"] = False


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, or of its repr if the message is empty."""
  return (str(error).strip() or repr(error)).splitlines()[0]
