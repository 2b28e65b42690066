"""Describes the machine that a benchmark runs on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import jax


def described() -> dict[str, Any]:
  """Returns device, CPU cores, and versions of Python and jax, for the JSON of a result."""
  device = cpu_name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
  return {"device": device, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}


def cpu_name() -> str:
  """Returns the CPU's name, with family and model if the system has them, since rented CPUs often hide their name."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    name, family, model = (
      re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE).group(1) for key in ("model name", "cpu family", "model")
    )
    return f"{name} (family {family}, model {model})"
  except (OSError, AttributeError):
    return platform.processor() or platform.machine()
