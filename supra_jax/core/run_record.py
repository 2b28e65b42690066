"""Records each start of a run in `runs.jsonl`: command, config, versions and devices, to reproduce its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
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

_SOURCE = Path(__file__).resolve().parents[2]  # holds the packages


def run_record() -> dict[str, Any]:
  """Returns a JSON object that describes this process, to reproduce its results.

  The object has the keys time (UTC), command, python, packages (versions), commit (git commit of the source), modified
  (whether the source differs from that commit), platform, device_kind, devices, processes and flags (the environment
  variables FLAGS). Outside a git checkout commit and modified are null. The program in `command` is named as in the
  source; `device` is device_kind, and on a CPU its name.
  """
  program, *arguments = sys.argv
  if Path(program).is_relative_to(_SOURCE):
    program = str(Path(program).relative_to(_SOURCE))
  commit, modified = _commit(_SOURCE)
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": [program, *arguments],
    "python": platform.python_version(),
    "packages": {name: _version(name) for name in PACKAGES},
    "commit": commit,
    "modified": modified,
    "platform": jax.default_backend(),
    "device_kind": jax.devices()[0].device_kind,
    "device": cpu_name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "flags": {name: os.environ.get(name) for name in FLAGS},
  }


def write_run_record(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
  """Appends `run_record()` and the run's config, under `config`, to `workdir/runs.jsonl`.

  In a run of several processes, only one process calls this function, after `jax.distributed.initialize`.

  Args:
    workdir: directory of the run, a local path; made if it does not exist.
    config: config of the run as plain values, such as `dataclasses.asdict` returns.

  Raises:
    TypeError: a value of the config has a type that JSON does not have.
    ValueError: `workdir` is a URL.
  """
  line = to_json(run_record() | {"config": config}) + "\n"
  path = local(workdir) / RUNS_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write(line)


def cpu_name() -> str:
  """Returns the CPU's name, with family and model if the system has them, since rented CPUs often hide their name."""
  try:
    info = Path("/proc/cpuinfo").read_text()
  except OSError:
    info = ""
  found = [re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE) for key in ("model name", "cpu family", "model")]
  if None in found:
    return platform.processor() or platform.machine()
  name, family, model = (match[1] for match in found if match)
  return f"{name} (family {family}, model {model})"


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit(source: Path) -> tuple[str | None, bool | None]:
  """Returns (git commit, whether the packages differ from that commit); None for each that git cannot tell.

  Outside a checkout of this project, both are None.

  Args:
    source: the directory that holds the packages `supra_jax` and `kernels_pallas`.
  """
  # A copy installed inside another project's checkout is not tracked there, and that project's commit means nothing.
  if _git(source, "ls-files", "--error-unmatch", "supra_jax/__init__.py") is None:
    return None, None
  commit = _git(source, "rev-parse", "HEAD")
  # Only the packages count: a workdir inside the checkout does not change the program.
  status = _git(source, "status", "--porcelain", "--", "supra_jax", "kernels_pallas")
  return commit, None if status is None else bool(status)


def _git(source: Path, *arguments: str) -> str | None:
  """Returns git's stdout; None if git fails, is not installed, or takes over 30 seconds (on a slow disk)."""
  try:
    done = subprocess.run(["git", "-C", source, *arguments], capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None
