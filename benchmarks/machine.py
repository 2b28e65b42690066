"""The name of the machine that a benchmark ran on."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
  """The CPU's name and, where the system tells them, family and model: rented CPUs often hide the rest."""
  try:
    info = Path("/proc/cpuinfo").read_text()
    name, family, model = (
      re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE).group(1) for key in ("model name", "cpu family", "model")
    )
    return f"{name} (family {family}, model {model})"
  except (OSError, AttributeError):
    return platform.processor() or platform.machine()
