"""Describes the machine that a benchmark runs on."""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.core.run_record import cpu_name


def described() -> dict[str, Any]:
  """Returns device, CPU cores, and versions of Python and jax, for the JSON of a result."""
  device = cpu_name() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
  return {"device": device, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}


def resident_bytes(*, peak: bool = False) -> int:
  """Returns the resident memory of this process now, or its peak; where the system does not say, the peak for both."""
  try:
    # Not getrusage, which may return the peak of the parent process.
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def threads() -> int:
  """Number of threads of each contestant of a benchmark: the CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceilings() -> dict[str, float]:
  """Measures bytes/s of a copy of a large array, and FLOP/s of a large matrix product; best of five.

  In bfloat16 on an accelerator, and in float32 on a CPU.
  """
  on_cpu = jax.default_backend() == "cpu"
  size, dtype, calls = (4096, jnp.float32, 1) if on_cpu else (16384, jnp.bfloat16, 10)
  # Random: zeros and ones take less power, and so are multiplied faster.
  x = jax.jit(lambda key: jax.random.normal(key, (size, size), dtype))(jax.random.key(0))

  def best(function: Callable, work: float) -> float:
    run, speeds = jax.jit(function), []
    jax.block_until_ready(run(x))
    for _ in range(5):
      began = time.perf_counter()
      for _ in range(calls):
        result = run(x)
      jax.block_until_ready(result)
      speeds.append(work * calls / (time.perf_counter() - began))
    return max(speeds)

  return {
    "bytes_per_second": best(lambda x: x + 1, 2 * x.nbytes),
    "flops_per_second": best(lambda x: x @ x, 2 * size**3),
  }
