"""Files and directories that are there whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp"


@contextlib.contextmanager
def into_place(path: Path) -> Iterator[Path]:
  """Yields a temporary sibling that becomes `path` when the block succeeds, and not before it is on the disk."""
  temporary = path.with_name(path.name + TEMPORARY)
  yield temporary
  _sync(temporary)
  os.replace(temporary, path)
  _sync(path.parent)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
  """Makes a directory if need be, and keeps other processes from writing into it.

  Raises:
    ValueError: another process writes into it.
  """
  directory.mkdir(parents=True, exist_ok=True)
  handle = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{directory} is being written by another process.") from error
    except OSError:
      pass  # some network file systems have no locks
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields a temporary sibling that becomes `path` when the block succeeds, and not before it is on the disk.

  It is removed if the block fails. What a killed process has left of one is removed first.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
    ValueError: another process makes the same directory.
  """
  final = Path(path).absolute()
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise FileExistsError(f"{path} already exists. Remove it or choose another output directory.")
  temporary = temporary_directory(final)
  with locked(temporary):
    try:
      for left in temporary.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
      yield temporary
      for parent, _, names in os.walk(temporary):
        for name in names:
          _sync(Path(parent, name))
        _sync(Path(parent))
      if final.exists():
        final.rmdir()
      os.rename(temporary, final)
      _sync(final.parent)
    except BaseException:
      _remove(temporary)
      raise


def temporary_directory(path: Path) -> Path:
  """What `new_directory` yields for a path."""
  return path.with_name(f"{path.name}.partial-directory")


def _remove(directory: Path) -> None:
  """Removes a directory into which threads of a failed write may still write, and which they would make anew."""
  for _ in range(20):
    shutil.rmtree(directory, ignore_errors=True)
    time.sleep(0.3)
    if not directory.exists():
      return


def _sync(path: Path) -> None:
  """Waits until a file's contents, or a directory's names, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
