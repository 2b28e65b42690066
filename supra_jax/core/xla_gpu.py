"""Work-around for XLA's GPU backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

_FLAG = "--xla_gpu_enable_triton_gemm"


def avoid_crash() -> None:
  """Sets a flag without which jax 0.10's compiler crashes on the backward pass of linear attention for an H100.

  Does nothing without jax's plug-in for CUDA, on later releases of jax, or if XLA_FLAGS has the flag. Has an effect
  until jax first uses a device.
  """
  if importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None:
    return
  flags = os.environ.get("XLA_FLAGS", "")
  if importlib.metadata.version("jax").startswith("0.10.") and _FLAG not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=false".strip()
