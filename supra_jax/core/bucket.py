"""Google Cloud Storage: listing, moving, removing, and copying files between a bucket and this machine's disk.

A directory in a bucket is only a prefix of file names: it cannot be renamed or locked, and files cannot be appended to.
Orbax writes models and run states to a bucket itself. Packed rows, and the log files that a run appends to, need a real
disk: they are written to a local one and copied to the bucket.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from etils import epath

SCHEME = "gs"
# Least time in seconds between two copies of the files that a run appends to.
COPY_SECONDS = 60.0


def _storage() -> Any:
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError as error:
    raise ValueError(f"{error}: paths that begin with gs:// need `pip install 'supra_jax[gcs]'`.") from error
  # No cached listings: tensorstore and other machines write to the bucket too. fsspec caches file systems by their
  # arguments; etils.epath passes these, so both use one instance.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return fsspec.filesystem("gcs", finalize_on_close=True)


@functools.cache
def _look(bucket: str) -> None:
  try:
    _storage().info(bucket)
  except ValueError:
    raise
  except FileNotFoundError as error:
    raise ValueError(f"gs://{bucket} does not exist, or you may not read it.") from error
  except Exception as error:  # gcsfs, aiohttp and google-auth each raise types of their own
    raise ValueError(f"gs://{bucket} cannot be reached: {_said(error)}") from error


def in_bucket(bucket: str, name: str) -> epath.Path:
  """Returns the path gs://BUCKET/NAME after checking that the bucket can be read.

  Raises:
    ValueError: gcsfs is not installed; or the bucket does not exist, may not be read or cannot be reached.
  """
  _look(bucket)
  from etils import epath

  return epath.Path(f"{SCHEME}://{bucket}", name)


def sizes(directory: epath.Path) -> dict[str, int]:
  """Returns {file name: size in bytes} of the files directly in a directory; {} if there is no such directory.

  Raises:
    OSError: the bucket cannot be read.
  """
  with _errors(directory), contextlib.suppress(FileNotFoundError):
    found = _storage().ls(str(directory), detail=True)
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}
  return {}


def checksums(directory: epath.Path) -> dict[str, str]:
  """Returns {path relative to `directory`: "crc32c CHECKSUM"} of all files below a directory, as the bucket computed.

  Raises:
    OSError: the bucket cannot be read.
  """
  with _errors(directory):
    found = _storage().find(str(directory), detail=True)
  prefix = str(directory).removeprefix(f"{SCHEME}://") + "/"
  return {name.removeprefix(prefix): f"crc32c {entry['crc32c']}" for name, entry in sorted(found.items())}


def move(directory: epath.Path, target: epath.Path) -> None:
  """Moves all files below `directory` to the same relative paths below `target`.

  Raises:
    OSError: a file cannot be moved.
  """
  with _errors(directory):
    # Not `mv` of gcsfs, which also requests the directories, as if they were files.
    for name in checksums(directory):
      _storage().cp_file(str(directory / name), str(target / name))
    directory.rmtree()


def remove(directory: epath.Path) -> None:
  """Removes a directory in a bucket; does nothing if there is no such directory.

  Raises:
    OSError: the directory cannot be removed.
  """
  with _errors(directory), contextlib.suppress(FileNotFoundError):
    directory.rmtree()


def upload(file: Path, target: epath.Path) -> None:
  """Copies a local file to a path in a bucket.

  Raises:
    OSError: the file cannot be copied.
  """
  with _errors(target):
    _storage().put_file(str(file), str(target))


def download(path: epath.Path, file: Path) -> None:
  """Copies a file of a bucket to a local path.

  Raises:
    OSError: the file cannot be copied.
  """
  with _errors(path):
    _storage().get_file(str(path), str(file))


class Copies:
  """Copies files of a local directory into a bucket: each call of `copy` copies those that have changed.

  Attributes:
    directory: the local directory that the caller writes files to.
  """

  def __init__(self, directory: Path, target: epath.Path | None):
    """Regards the files that are in `directory` now as already copied.

    Args:
      directory: the local directory to copy from.
      target: the directory in the bucket; None: `copy` does nothing.
    """
    self.directory, self._target = directory, target
    self._copied = self._found() if target is not None else {}
    self._at = time.monotonic()

  def _found(self) -> Mapping[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in sorted(self.directory.rglob("*")) if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

  def copy(self, *, seconds: float = 0.0) -> None:
    """Copies the files that have changed since the last copy.

    Args:
      seconds: least time in seconds since the last copy; before that time has passed, `copy` does nothing.

    Raises:
      OSError: a file could not be copied.
    """
    if self._target is None or time.monotonic() - self._at < seconds:
      return
    self._at, found = time.monotonic(), self._found()
    for path, stat in found.items():
      if self._copied.get(path) != stat:
        upload(path, self._target / path.relative_to(self.directory))
    self._copied = found


@contextlib.contextmanager
def copies(target: Path | epath.Path, names: tuple[str, ...]) -> Iterator[Copies]:
  """Yields a `Copies` from a temporary local directory into `target`; when the block ends, copies all changed files.

  Args:
    target: a directory in a bucket. For a local `target`, the directory of the `Copies` is `target` itself, and nothing
      is copied.
    names: names of files that are first downloaded from `target` into the temporary directory, where they exist.

  Raises:
    OSError: a file cannot be copied.
  """
  if isinstance(target, Path):
    yield Copies(target, None)
    return
  with tempfile.TemporaryDirectory(prefix="supra_jax-") as directory:
    there = sizes(target)
    for name in names:
      if name in there:
        download(target / name, Path(directory, name))
    made = Copies(Path(directory), target)
    try:
      yield made
    finally:
      made.copy()


def cache_directory() -> Path:
  """Returns `$XDG_CACHE_HOME/supra_jax`, or else `~/.cache/supra_jax`, for downloads and compiled programs.

  Makes the directory if it does not exist. A relative XDG_CACHE_HOME is ignored, as its specification wants.

  Raises:
    OSError: the directory cannot be made.
    RuntimeError: the user has no home directory.
  """
  chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
  cache = (chosen if chosen.is_absolute() else Path("~/.cache").expanduser()) / "supra_jax"
  cache.mkdir(parents=True, exist_ok=True)
  return cache


@contextlib.contextmanager
def _errors(where: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError:
    raise
  except Exception as error:  # gcsfs, aiohttp and google-auth each raise types of their own
    raise OSError(f"{where}: {_said(error)}") from error


def _said(error: Exception) -> str:
  return (str(error).strip() or repr(error)).splitlines()[0]
