"""Sets up jax's persistent compilation cache, so that programs compiled in one start are loaded in the next.

jax itself writes and reads the compiled programs. This module chooses their directory, checks that only the user can
write there, removes damaged files, and limits the total size.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import stat
import sys
import warnings
from pathlib import Path
from typing import Any

import zstandard

from supra_jax.core.bucket import cache_directory

MAX_BYTES = 2 * 2**30  # of all programs together; beyond it, the least recently used are removed
MIN_SECONDS = 0.2  # programs that compile in less time are not kept
_CPUS = Path("/proc/cpuinfo")
_CHECKED = "checked"  # an empty file: programs written before it are known to be whole


def keep_programs(max_bytes: int = MAX_BYTES) -> Path | None:
  """Makes jax keep compiled programs on disk, below the user's cache directory (`~/.cache/supra_jax/programs`).

  Says so on stderr the first time. Leaves jax's settings unchanged if jax is not imported, if the user chose another
  directory (`JAX_COMPILATION_CACHE_DIR`) or no cache (`JAX_ENABLE_COMPILATION_CACHE=false`), or, with a message on
  stderr, if the directory cannot be made or other users may write there.

  Args:
    max_bytes: largest total size in bytes of the programs on disk; above it, the call first removes the least recently
      used ones.

  Returns:
    The directory that jax now keeps programs in; None if jax's settings are unchanged.
  """
  jax: Any = sys.modules.get("jax")
  if jax is None or jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return None
  try:
    root = cache_directory() / "programs"
    is_new = not root.exists()
    root.mkdir(mode=0o700, exist_ok=True)
    # A program that is loaded is run: nobody else may write one.
    status = root.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
      print(
        f"{root}: no compiled programs are kept, since others may write here. Remove it, or: chmod 700 {root}",
        file=sys.stderr,
      )
      return None
    directory = root / _machine()
    directory.mkdir(mode=0o700, exist_ok=True)
    _tidy(root, max_bytes)
  except (OSError, RuntimeError) as error:  # no home, or a disk that is full or not to be written to
    cure = "XDG_CACHE_HOME names another directory, JAX_ENABLE_COMPILATION_CACHE=false needs none"
    print(f"No compiled programs are kept: {error}. {cure}.", file=sys.stderr)
    return None
  if is_new:
    said = f"Compiled programs are kept in {root}, {max_bytes / 2**30:g} GiB at most, for quicker starts"
    print(f"{said}; JAX_ENABLE_COMPILATION_CACHE=false keeps none.", file=sys.stderr)
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
  # Two processes may meet at one file: the one that finds it half written compiles for itself.
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
  return directory


def _machine() -> str:
  """Returns a hash of CPU features and jaxlib's version, since machines with other CPUs may share a home directory."""
  try:
    lines = _CPUS.read_text().splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    features = platform.processor()
  told = (platform.machine(), features, importlib.metadata.version("jaxlib"))
  return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _tidy(root: Path, max_bytes: int) -> None:
  """Removes programs that a killed process left half-written, then the least recently used ones beyond `max_bytes`.

  jax would fail to read the half-written ones and never replace them.
  """
  stamp = root / _CHECKED
  checked = stamp.stat().st_mtime_ns if stamp.exists() else 0
  stamp.touch()
  whole = []
  for path, status in _files(root):
    with contextlib.suppress(FileNotFoundError):
      if path.name.endswith("-cache") and status.st_mtime_ns >= checked and not _is_whole(path.read_bytes()):
        path.unlink()
      else:
        whole.append((path, status))
  total = sum(status.st_size for _, status in whole)
  for path, status in sorted(whole, key=lambda file: max(file[1].st_atime_ns, file[1].st_mtime_ns)):
    if total <= max_bytes:
      return
    path.unlink(missing_ok=True)
    total -= status.st_size


def _files(directory: Path) -> list[tuple[Path, os.stat_result]]:
  """Returns all files below a directory; other processes may remove some of them meanwhile."""
  found = []
  for path in directory.rglob("*"):
    with contextlib.suppress(FileNotFoundError):
      found.append((path, path.stat()))
  return [(path, status) for path, status in found if stat.S_ISREG(status.st_mode)]


def _is_whole(compressed: bytes) -> bool:
  reader = zstandard.ZstdDecompressor().decompressobj()
  try:
    reader.decompress(compressed)
  except zstandard.ZstdError:
    return False
  return reader.eof
