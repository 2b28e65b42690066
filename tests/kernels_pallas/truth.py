"""Implementations beside the truth, and how close they have to be."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import decay
from kernels_pallas.api import IMPLEMENTATIONS
from kernels_pallas.checkup import operands as arrays
from kernels_pallas.checkup import rounded, run, value_and_gradients
from kernels_pallas.truth import SCALE, by_loop, cotangents, make_case, relative_error

__all__ = [
  "SCALE",
  "arrays",
  "by_loop",
  "cotangents",
  "make_case",
  "relative_error",
  "rounded",
  "run",
  "value_and_gradients",
]
ARRAYS = ("q", "k", "v", "initial_state")
OPTIONS = ("segment_ids", "lengths")
# All but mosaic_gpu, whose products are of bfloat16 alone and which older releases of jax cannot run.
FLOAT32 = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="mosaic_gpu needs jax 0.11")


# Interpreted, it takes ten times as long as the others.
INTERPRETED = (needs_mosaic_gpu, pytest.mark.slow)


def params(name, *values, marks=()):
  """Parameters of a test that begin with the name of an implementation."""
  return pytest.param(name, *values, marks=(*marks, *(() if name in FLOAT32 else INTERPRETED)))


NAMES = [params(name) for name in IMPLEMENTATIONS]


def precision(name):
  """The dtype that an implementation is tested in, and the relative error that is allowed."""
  return (jnp.float32, 1e-5) if name in FLOAT32 else (jnp.bfloat16, 1e-2)


def heads_for(name):
  """How many heads a case has: two where each takes seconds to interpret."""
  return 6 if name in FLOAT32 else 2


def direct(attend):
  """An implementation past the op's door, whose compiled programs know nothing of what a test has patched."""

  def op(q, k, v, slopes, *, scale, initial_state=None, segment_ids=None, lengths=None):
    if initial_state is None:
      initial_state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
    segment_ids = None if segment_ids is None else decay.canonical_segments(segment_ids)
    return attend(q, k, v, slopes, initial_state, segment_ids, lengths, scale=scale)

  return op


def assert_close(actual, expected, tolerance):
  assert actual.keys() == expected.keys()
  errors = {name: relative_error(actual[name], expected[name]) for name in expected}
  wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # NaN counts as wrong
  assert not wrong, wrong
