"""Paths, local or in a bucket, and files and directories that are there whole or not at all, whatever ends the process.

A disk renames a finished directory into place. A bucket, and some network disks, cannot: there a directory holds a file
UNFINISHED while it is written, and the file that says what is in it is the last to come.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from supra_jax.core import bucket

if TYPE_CHECKING:
  from etils import epath

AnyPath: TypeAlias = "Path | epath.Path"

TEMPORARY = ".tmp"
UNFINISHED = "unfinished"

# pathlib makes one slash of two. Windows has drives of one letter.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?:([^/]+)/*(.*))?")
# How mounted buckets and network disks say that they have no such call.
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
# How they say that they do not rename a directory with files; gcsfuse says that these are too many.
_NO_RENAME = _NO_SUCH_CALL | {errno.EMFILE, errno.EIO, errno.EXDEV}


def local(path: str | os.PathLike[str]) -> Path:
  """A path of this machine's file systems.

  Raises:
    ValueError: it is a URL.
  """
  given = os.fspath(path)
  if (url := _URL.fullmatch(given)) is not None:
    if url[1] == "file":
      raise ValueError(f"{given} is a URL: give the path alone.")
    raise ValueError(
      f"{_spelled(url)} is a URL, and only a local path will do here: copy it, or mount the bucket (gcsfuse, say) and "
      "give the path of the mount."
    )
  return Path(given)


def place(path: str | os.PathLike[str]) -> AnyPath:
  """A local path, or one in a bucket, gs://BUCKET/NAME.

  Raises:
    ValueError: it is another URL; or gcsfs is not installed, or the bucket cannot be reached.
  """
  given = os.fspath(path)
  url = _URL.fullmatch(given)
  if url is None or url[1] == "file":
    return local(given)
  if url[1] != bucket.SCHEME:
    raise ValueError(
      f"{_spelled(url)}: of URLs only gs:// can be read and written: copy it, or mount the bucket and give the path of "
      "the mount."
    )
  if not url[2] or not url[3]:
    raise ValueError(f"{given}: wanted gs://BUCKET/NAME.")
  return bucket.in_bucket(url[2], url[3])


def absolute(path: str | os.PathLike[str]) -> AnyPath:
  """`place`, from the root of the file system where it is local."""
  found = place(path)
  return found.absolute() if isinstance(found, Path) else found  # etils makes gs:// a local path


def _spelled(url: re.Match[str]) -> str:
  return f"{url[1]}://{url[2] or ''}" + (f"/{url[3]}" if url[3] else "")


def occupied(path: AnyPath) -> bool:
  """Whether there is something at a path that a new directory would replace; what a killed process left is nothing."""
  if not path.exists():
    return False
  return not path.is_dir() or (any(path.iterdir()) and not (path / UNFINISHED).exists())


def check_free(path: str | os.PathLike[str]) -> None:
  """Raises FileExistsError, or what `place` raises, where `new_directory` would: before there is work to lose."""
  if occupied(place(path)):
    raise FileExistsError(f"{path} already exists. Remove it or choose another output directory.")


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
      pass  # some network disks have no locks
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, last: str = "config.json") -> Iterator[AnyPath]:
  """Yields `temporary_directory(path)`, which becomes `path` when the block succeeds, and not before it is on the disk.

  It is removed if the block fails. What a killed process has left of one is removed first. In a bucket the block
  writes into `path` itself.

  Args:
    path: the directory.
    last: the file without which nobody takes the directory for whole; in a bucket the block has to write it last.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
    ValueError: another process makes the same directory.
  """
  check_free(path)
  final = absolute(path)
  with _in_bucket(final, last) if not isinstance(final, Path) else _renamed(final, last) as directory:
    yield directory


@contextlib.contextmanager
def _in_bucket(final: epath.Path, last: str) -> Iterator[epath.Path]:
  remove_directory(final, first=last)
  (final / UNFINISHED).write_text("")
  try:
    yield final
    (final / UNFINISHED).unlink()
  except BaseException:
    remove_directory(final)
    raise


@contextlib.contextmanager
def _renamed(final: Path, last: str) -> Iterator[Path]:
  temporary = final.with_name(f"{final.name}.partial-directory")
  with locked(temporary):
    try:
      for left in temporary.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
      yield temporary
      sync_below(temporary)
      if (final / UNFINISHED).exists():
        remove_directory(final, first=last)
      elif final.exists():
        final.rmdir()
      rename_directory(temporary, final, last=last)
      _sync(final.parent)
    except BaseException:
      remove_directory(temporary)
      raise


def temporary_directory(path: str | os.PathLike[str]) -> AnyPath:
  """What `new_directory` yields for a path."""
  final = absolute(path)
  return final.with_name(f"{final.name}.partial-directory") if isinstance(final, Path) else final


def rename_directory(directory: Path, target: Path, *, last: str) -> None:
  """Renames a directory; where the disk has no such call, moves its files, `last` as the last."""
  try:
    os.rename(directory, target)
  except OSError as error:
    if error.errno not in _NO_RENAME:
      raise
    move_files(directory, target, last=last)


def move_files(directory: Path, target: Path, *, last: str) -> None:
  """Moves the files of a directory into another, which holds UNFINISHED until all are there; goes on with a move."""
  target.mkdir(exist_ok=True)
  (target / UNFINISHED).touch()
  files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
  for path in sorted(files, key=lambda path: path == directory / last):
    there = target / path.relative_to(directory)
    there.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, there)
  shutil.rmtree(directory, ignore_errors=True)
  (target / UNFINISHED).unlink()


def renames_directories(parent: Path) -> bool:
  """Whether the disk of a directory renames directories that are not empty."""
  parent.mkdir(parents=True, exist_ok=True)
  probe = parent / f"probe-{os.getpid()}"
  probe.mkdir(exist_ok=True)
  try:
    (probe / "file").touch()
    renamed = probe.with_name(f"{probe.name}-renamed")
    os.rename(probe, renamed)
    probe = renamed
  except OSError as error:
    if error.errno not in _NO_RENAME:
      raise
    return False
  finally:
    shutil.rmtree(probe, ignore_errors=True)
  return True


def remove_directory(directory: AnyPath, *, first: str | None = None) -> None:
  """Removes a directory into which threads of a failed write may still write, and which they would make anew.

  Args:
    directory: need not exist.
    first: a file in it that goes before all others: the one without which nobody takes it for whole.
  """
  if first is not None and directory.exists():
    (directory / first).unlink(missing_ok=True)
  for _ in range(20):
    if not directory.exists():
      return
    if isinstance(directory, Path):
      shutil.rmtree(directory, ignore_errors=True)
    else:
      bucket.remove(directory)
    time.sleep(0.3)


def sync_below(directory: Path) -> None:
  """Waits until all files below a directory are on the disk."""
  for parent, _, names in os.walk(directory):
    for name in names:
      _sync(Path(parent, name))
    _sync(Path(parent))


def syncs_directories(directory: Path) -> bool:
  """Whether the disk of a directory can tell when its names are on it."""
  directory.mkdir(parents=True, exist_ok=True)
  return _sync(directory)


def _sync(path: Path) -> bool:
  """Waits until a file's contents, or a directory's names, are on the disk; False where it cannot tell."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno not in _NO_SUCH_CALL:
      raise
    return False
  finally:
    os.close(handle)
  return True
