"""Compiled programs on disk: what one start compiled, the next start loads.

jax keeps them (its persistent compilation cache). This module says where, for whom, and how many.
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

MAX_BYTES = 2 * 2**30  # of all programs together; those unused for longest are removed
MIN_SECONDS = 0.2  # programs that compile in less are not kept
_CPUS = Path("/proc/cpuinfo")
_CHECKED = "checked"  # an empty file: programs written before it are known to be whole


def keep_programs(max_bytes: int = MAX_BYTES) -> Path | None:
  """Has jax keep compiled programs under the user's cache directory, `~/.cache/supra_jax/programs`.

  Says so on stderr the first time. Does nothing where jax is not imported, where the user chose a directory
  (`JAX_COMPILATION_CACHE_DIR`) or none (`JAX_ENABLE_COMPILATION_CACHE=false`), and where no directory can be made.

  Args:
    max_bytes: size of all programs together above which those unused for longest are removed, before this start.

  Returns:
    The directory; None where nothing was done.
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
      print(f"{root}: others may write here, so that no compiled programs are kept.", file=sys.stderr)
      return None
    directory = root / _machine()
    directory.mkdir(mode=0o700, exist_ok=True)
    _remove_damaged(directory)
    _remove_oldest(root, max_bytes)
  except (OSError, RuntimeError):  # no home, or a disk that is full or not to be written to
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
  """Name of what a program was compiled for, beyond what jax's own keys hold: a home may be shared by unequal CPUs."""
  try:
    lines = _CPUS.read_text().splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  except OSError:
    features = platform.processor()
  told = (platform.machine(), features, importlib.metadata.version("jaxlib"))
  return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _remove_damaged(directory: Path) -> None:
  """Removes programs that a killed process wrote half; jax would fail to read them at each start, and never replace."""
  stamp = directory / _CHECKED
  checked = stamp.stat().st_mtime_ns if stamp.exists() else 0
  stamp.touch()
  for path, status in _files(directory):
    with contextlib.suppress(FileNotFoundError):
      if path.name.endswith("-cache") and status.st_mtime_ns >= checked and not _is_whole(path.read_bytes()):
        path.unlink()


def _files(directory: Path) -> list[tuple[Path, os.stat_result]]:
  """All files below a directory from which other processes may remove some meanwhile."""
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


def _remove_oldest(root: Path, max_bytes: int) -> None:
  """Removes programs, those used last long ago first, until all together have no more than `max_bytes`."""
  found = _files(root)
  total = sum(status.st_size for _, status in found)
  for path, status in sorted(found, key=lambda file: max(file[1].st_atime_ns, file[1].st_mtime_ns)):
    if total <= max_bytes:
      return
    path.unlink(missing_ok=True)
    total -= status.st_size
