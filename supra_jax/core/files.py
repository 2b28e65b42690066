"""Paths, local or in a bucket, and atomic writes: even after a kill, a file or directory is whole or absent.

On a disk, a finished directory is renamed into place. Buckets and some network disks cannot rename directories: there
a directory holds the file UNFINISHED while it is being written, and the file that describes the directory's contents is
written last.
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

# One slash is enough, since pathlib turns `gs://` into `gs:/`. Two letters at least: `C:/` is a Windows drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?:([^/]+)/*(.*))?")
# Errors of mounted buckets and network disks that do not implement a call.
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
# Errors of mounted buckets and network disks that cannot rename a directory with files in it; EMFILE is gcsfuse's.
_NO_RENAME = _NO_SUCH_CALL | {errno.EMFILE, errno.EIO, errno.EXDEV}


def local(path: str | os.PathLike[str]) -> Path:
  """Returns `path` as a `pathlib.Path`; a leading `~`, which no shell expands within `--flag=~/name`, is expanded.

  Raises:
    ValueError: `path` is a URL.
  """
  given = os.fspath(path)
  if (url := _URL.fullmatch(given)) is not None:
    if url[1] == "file":
      raise ValueError(f"{given} is a URL: give the path alone.")
    raise ValueError(
      f"{_spelled(url)} is a URL, and only a local path will do here: copy it, or mount the bucket (gcsfuse, say) and "
      "give the path of the mount."
    )
  return Path(os.path.expanduser(given))


def place(path: str | os.PathLike[str]) -> AnyPath:
  """Returns a local path as a `pathlib.Path`, and gs://BUCKET/NAME as an `etils.epath.Path`.

  Raises:
    ValueError: `path` is a URL of another scheme, or gs:// without a bucket or a name; or gcsfs is not installed, or
      the bucket cannot be read.
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
  """Returns `place(path)`, made absolute if the path is local.

  Raises:
    ValueError: `place` rejects `path`.
  """
  found = place(path)
  return found.absolute() if isinstance(found, Path) else found  # etils' absolute() turns gs:// into a local path


def _spelled(url: re.Match[str]) -> str:
  return f"{url[1]}://{url[2] or ''}" + (f"/{url[3]}" if url[3] else "")


def occupied(path: AnyPath) -> bool:
  """Whether something is at `path` that a new directory must not replace.

  False for an empty directory, and for a directory with the file UNFINISHED, which a killed process left.
  """
  if not path.exists():
    return False
  return not path.is_dir() or (any(path.iterdir()) and not (path / UNFINISHED).exists())


def check_free(path: str | os.PathLike[str]) -> None:
  """Checks that `new_directory(path)` may make its directory; to be called before the work whose result goes there.

  Raises:
    FileExistsError: `path` is `occupied`.
    OSError: no directory can be made there.
    ValueError: `place` rejects `path`.
  """
  final = absolute(path)
  if occupied(final):
    raise FileExistsError(f"{path} already exists. Remove it or choose another output directory.")
  if isinstance(final, Path):
    above = next(directory for directory in final.parents if directory.exists())
    if not above.is_dir():
      raise NotADirectoryError(f"{path}: {above} is a file, so that no directory can be made below it.")
    if not os.access(above, os.W_OK | os.X_OK):
      raise PermissionError(f"{path}: no directory can be made in {above}, which this user may not write to.")


@contextlib.contextmanager
def into_place(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`; when the block succeeds, syncs the new file and renames it to `path`."""
  temporary = path.with_name(path.name + TEMPORARY)
  yield temporary
  _sync(temporary)
  os.replace(temporary, path)
  _sync(path.parent)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
  """Makes a directory if it does not exist, and holds an exclusive lock (flock) on it while the block runs.

  Some network disks have no locks; there the block runs without one.

  Raises:
    ValueError: another process holds the lock.
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
  """Yields `temporary_directory(path)`; when the block succeeds, syncs that directory to disk and renames it to `path`.

  If the block fails, the temporary directory is removed. Files that a killed process left in the temporary directory
  are removed before the block starts. In a bucket the block writes into `path` itself.

  Args:
    path: the directory to make, local or in a bucket.
    last: name of the file without which readers reject the directory; in a bucket the block has to write it last.

  Raises:
    FileExistsError: `path` is `occupied`.
    ValueError: another process is making the same directory, or `place` rejects `path`.
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
  """Returns the directory that `new_directory(path)` yields: `PATH.partial-directory`, or `path` itself in a bucket.

  Raises:
    ValueError: `place` rejects `path`.
  """
  final = absolute(path)
  return final.with_name(f"{final.name}.partial-directory") if isinstance(final, Path) else final


def rename_directory(directory: Path, target: Path, *, last: str) -> None:
  """Renames `directory` to `target`; where the file system cannot rename directories, uses `move_files`."""
  try:
    os.rename(directory, target)
  except OSError as error:
    if error.errno not in _NO_RENAME:
      raise
    move_files(directory, target, last=last)


def move_files(directory: Path, target: Path, *, last: str) -> None:
  """Moves the files of a directory one by one into `target`, the file named `last` after all others.

  While files are being moved, `target` holds the file UNFINISHED. If the process is killed, calling `move_files` again
  with the same arguments moves the remaining files.
  """
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
  """Whether the file system of `parent` can rename directories that hold files; makes `parent` if it does not exist."""
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
  """Removes a directory; tries for up to 6 seconds, since threads of a failed write may recreate the directory.

  Args:
    directory: the directory; need not exist.
    first: name of the file to remove before all others: the one without which readers reject the directory. None: the
      files are removed in any order.
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
  """Syncs (fsync) a directory, and all files and directories below it, to disk."""
  for parent, _, names in os.walk(directory):
    for name in names:
      _sync(Path(parent, name))
    _sync(Path(parent))


def syncs_directories(directory: Path) -> bool:
  """Whether the file system of `directory` can fsync directories; makes `directory` if it does not exist."""
  directory.mkdir(parents=True, exist_ok=True)
  return _sync(directory)


def _sync(path: Path) -> bool:
  """Syncs a file's contents, or a directory's entries, to disk; returns False where the file system has no fsync."""
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
