"""What disks can and cannot do, as far as Orbax has to know it; model directories and states of runs both ask here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from supra_jax.core.files import AnyPath, syncs_directories

# With this Orbax renames no directory, which not every disk can; what it writes is whole once COMMIT_FILE is there.
IN_PLACE = AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
COMMIT_FILE = "commit_success.txt"  # Orbax's name


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
  """Switches tensorstore's fsync off in this process if the directory's disk cannot fsync directories: it would fail.

  Whoever writes there then waits for the files with `files.sync_below`.
  """
  if isinstance(directory, Path) and not syncs_directories(directory):
    # Orbax has no option for it; imported here, so that a release without these names serves all other disks.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
      context["file_io_sync"] = False


def first_line(error: Exception) -> str:
  """The first line of an error's message, or of its repr if the message is empty."""
  return (str(error).strip() or repr(error)).splitlines()[0]
