"""The flag without which jax 0.10's compiler crashes."""

import importlib.metadata
import importlib.util
import os

import pytest

from supra_jax.core import xla_gpu

NO_TRITON = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
  ("plugin", "version", "before", "after"),
  [
    ("jax_cuda12_plugin", "0.10.2", "", NO_TRITON),
    ("jax_cuda13_plugin", "0.10.0", "--xla_a=1", f"--xla_a=1 {NO_TRITON}"),
    ("jax_cuda12_plugin", "0.10.2", "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
    ("jax_cuda13_plugin", "0.11.2", "", ""),
    ("libtpu", "0.10.2", "--xla_a=1", "--xla_a=1"),
  ],
)
def test_it_is_set_where_it_is_needed(monkeypatch, plugin, version, before, after):
  monkeypatch.setenv("XLA_FLAGS", before)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == plugin else None)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: {"jax": version}[name])
  xla_gpu.avoid_crash()
  assert os.environ["XLA_FLAGS"] == after
