"""Google Cloud Storage, whose directories are names: they cannot be renamed or locked, nor files there appended to.

Models and run states go there through Orbax. What needs a real disk is made on this machine's and copied: packed rows,
and the files that a run adds lines to.
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
# Seconds between two copies of what a run adds lines to.
COPY_SECONDS = 60.0


def _storage() -> Any:
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError as error:
    raise ValueError(f"{error}: paths that begin with gs:// need `pip install 'supra_jax[gcs]'`.") from error
  # Tensorstore and other machines write there too, so that a listing that is kept goes out of date. The same arguments
  # as in etils.epath give its instance.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return fsspec.filesystem("gcs", finalize_on_close=True)


@functools.cache
def _look(bucket: str) -> None:
  try:
    _storage().info(bucket)
  except ValueError:
    raise
  except FileNotFoundError as error:
    raise ValueError(f"gs://{bucket} is not there, or not for you to read.") from error
  except Exception as error:  # of whatever its client and those below it raise
    raise ValueError(f"gs://{bucket} cannot be reached: {_said(error)}") from error


def in_bucket(bucket: str, name: str) -> epath.Path:
  """The path gs://bucket/name.

  Raises:
    ValueError: gcsfs is not installed, or the bucket cannot be reached.
  """
  _look(bucket)
  from etils import epath

  return epath.Path(f"{SCHEME}://{bucket}", name)


def sizes(directory: epath.Path) -> dict[str, int]:
  """File name -> bytes, of the files of a directory."""
  with _errors(directory), contextlib.suppress(FileNotFoundError):
    found = _storage().ls(str(directory), detail=True)
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}
  return {}


def checksums(directory: epath.Path) -> dict[str, str]:
  """Relative path -> CRC-32C of every file below, as the storage has it of what it keeps."""
  with _errors(directory):
    found = _storage().find(str(directory), detail=True)
  prefix = str(directory).removeprefix(f"{SCHEME}://") + "/"
  return {name.removeprefix(prefix): f"crc32c {entry['crc32c']}" for name, entry in sorted(found.items())}


def move(directory: epath.Path, target: epath.Path) -> None:
  """Copies the files of a directory to another place, and removes them here."""
  with _errors(directory):
    # Not `mv`, which asks for the directories too, as if they were files.
    for name in checksums(directory):
      _storage().cp_file(str(directory / name), str(target / name))
    directory.rmtree()


def remove(directory: epath.Path) -> None:
  """Removes what is there, if anything."""
  with _errors(directory), contextlib.suppress(FileNotFoundError):
    directory.rmtree()


def upload(file: Path, target: epath.Path) -> None:
  with _errors(target):
    _storage().put_file(str(file), str(target))


def download(path: epath.Path, file: Path) -> None:
  with _errors(path):
    _storage().get_file(str(path), str(file))


class Copies:
  """Files on this machine that are copied into a bucket as they change.

  Attributes:
    directory: of this machine, where they are written.
  """

  def __init__(self, directory: Path, target: epath.Path | None):
    """Copies what changes from now on; nothing without a target."""
    self.directory, self._target = directory, target
    self._copied = self._found() if target is not None else {}
    self._at = time.monotonic()

  def _found(self) -> Mapping[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in sorted(self.directory.rglob("*")) if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

  def copy(self, *, seconds: float = 0.0) -> None:
    """Copies what has changed, unless the last time was within so many seconds.

    Raises:
      OSError: it could not be copied.
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
  """Yields Copies into a directory of a bucket, with those of the names that it holds; copies all in the end.

  A local directory is its own: nothing is copied.
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
  """Where this machine keeps what it has copied."""
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "supra_jax"
  cache.mkdir(parents=True, exist_ok=True)
  return cache


@contextlib.contextmanager
def _errors(where: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError:
    raise
  except Exception as error:  # of whatever its client and those below it raise
    raise OSError(f"{where}: {_said(error)}") from error


def _said(error: Exception) -> str:
  return (str(error).strip() or repr(error)).splitlines()[0]
