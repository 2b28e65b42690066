"""What a run was started with: a line of `runs.jsonl` for each start, so that its numbers can be had again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from supra_jax.core.files import local
from supra_jax.core.plain_json import to_json

RUNS_FILE = "runs.jsonl"
PACKAGES = ("supra_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

_SOURCE = Path(__file__).resolve().parent.parent


def write_run_record(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
  """Appends one JSON object to `workdir/runs.jsonl`.

  It has time (UTC), command, config, python, packages (versions), commit and modified (of the source, null unless it is
  a git checkout), platform, device_kind, devices, processes and flags (XLA's, from the environment). Call it in one
  process, where jax already knows of the others.

  Args:
    workdir: of the run; created if it does not exist.
    config: plain values, as `dataclasses.asdict` leaves them.

  Raises:
    TypeError: a value of the config is none that JSON has.
  """
  commit, modified = _commit(_SOURCE)
  record = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": sys.argv,
    "config": config,
    "python": platform.python_version(),
    "packages": {name: _version(name) for name in PACKAGES},
    "commit": commit,
    "modified": modified,
    "platform": jax.default_backend(),
    "device_kind": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "flags": {name: os.environ.get(name) for name in FLAGS},
  }
  line = to_json(record) + "\n"
  path = local(workdir) / RUNS_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write(line)


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit(source: Path) -> tuple[str | None, bool | None]:
  """(commit, whether the packages differ from it) of a checkout; (None, None) where `source` is none.

  Args:
    source: the directory that holds the packages.
  """
  # An installed copy may lie inside some other project's checkout, whose commit says nothing: is it tracked there?
  if _git(source, "ls-files", "--error-unmatch", "supra_jax/__init__.py") is None:
    return None, None
  commit = _git(source, "rev-parse", "HEAD")
  # Only the packages: a workdir inside the checkout changes nothing about the run.
  status = _git(source, "status", "--porcelain", "--", "supra_jax", "kernels_pallas")
  return commit, None if status is None else bool(status)


def _git(source: Path, *arguments: str) -> str | None:
  """What git prints; None where it fails, is not there, or hangs on a slow disk."""
  try:
    done = subprocess.run(["git", "-C", source, *arguments], capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None
