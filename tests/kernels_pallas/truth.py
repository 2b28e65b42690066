"""What the op and its gradients are: a loop over tokens in float64 numpy, which shares no code with the package.

A case is a dict of numpy arrays: q, k, v, slopes, and where present initial_state, segment_ids and lengths. `given`
says which of the optional ones it has.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import decay
from kernels_pallas.api import IMPLEMENTATIONS

SCALE = 0.3
SLOPES = (0.0, 0.01, 0.2, 1.0, 4.0, 14.0)
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


def make_case(num_tokens, key_groups, value_groups, given, *, batch=2, heads=6, key_width=8, value_width=5, seed=0):
  rng = np.random.default_rng(seed)
  case = {
    "q": rng.standard_normal((batch, num_tokens, heads, key_width)),
    "k": rng.standard_normal((batch, num_tokens, key_groups, key_width)),
    "v": rng.standard_normal((batch, num_tokens, value_groups, value_width)),
    "slopes": np.array(SLOPES[:heads]),
  }
  case = {name: x.astype(np.float32) for name, x in case.items()}
  if "initial_state" in given:
    case["initial_state"] = rng.standard_normal((batch, heads, key_width, value_width)).astype(np.float32)
  if "segment_ids" in given:  # ids out of {3, 5}: each comes back again and again
    changes = rng.random((batch, num_tokens)) < 0.08
    case["segment_ids"] = np.where(np.cumsum(changes, axis=1) % 2, 5, 3).astype(np.int32)
  if "lengths" in given:  # one row has padding, at times nothing else
    case["lengths"] = np.array([num_tokens, num_tokens * 3 // 4][:batch], np.int32)
    for name in ("q", "k", "v"):
      case[name][1, case["lengths"][1] :] = np.nan
  return case


def rounded(case, dtype):
  """The case with q, k and v as `dtype` has them."""
  return {name: np.asarray(jnp.asarray(x, dtype), np.float32) if name in "qkv" else x for name, x in case.items()}


def cotangents(case, seed=1):
  """Random factors of (output, state): the gradient of their sums with these is what the tests compare."""
  rng = np.random.default_rng(seed)
  batch, num_tokens, heads, key_width = case["q"].shape
  value_width = case["v"].shape[-1]
  shapes = (batch, num_tokens, heads, value_width), (batch, heads, key_width, value_width)
  return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def by_loop(case, given_cotangents=None):
  """{"output", "state", "d_q", ...} of the definition and of its transpose, token by token in float64 numpy."""
  q, k, v, gamma = (case[name].astype(np.float64) for name in ("q", "k", "v", "slopes"))
  gamma = np.exp(-gamma)
  d_output, d_state = (x.astype(np.float64) for x in given_cotangents or cotangents(case))
  batch, num_tokens, heads, _ = q.shape
  segment_ids = case.get("segment_ids", np.zeros((batch, num_tokens)))
  lengths = case.get("lengths", np.full(batch, num_tokens))
  before = case.get("initial_state", np.zeros(d_state.shape)).astype(np.float64)

  out = {"output": np.zeros(d_output.shape), "state": np.zeros(d_state.shape)}
  out |= {"d_q": np.zeros(q.shape), "d_k": np.zeros(k.shape), "d_v": np.zeros(v.shape), "d_initial_state": 0 * before}
  for b, h in np.ndindex(batch, heads):
    gk, gv = h // (heads // k.shape[2]), h // (heads // v.shape[2])
    seam = np.append(False, segment_ids[b, 1:] != segment_ids[b, :-1])
    states = [before[b, h]]
    for t in range(lengths[b]):
      states.append((0 if seam[t] else gamma[h]) * states[-1] + np.outer(k[b, t, gk], v[b, t, gv]))
      out["output"][b, t, h] = SCALE * q[b, t, h] @ states[-1]
    out["state"][b, h] = states[-1]

    d_after = d_state[b, h]
    for t in reversed(range(lengths[b])):
      out["d_q"][b, t, h] = SCALE * states[t + 1] @ d_output[b, t, h]
      d_after = d_after + SCALE * np.outer(q[b, t, h], d_output[b, t, h])
      out["d_k"][b, t, gk] += d_after @ v[b, t, gv]
      out["d_v"][b, t, gv] += k[b, t, gk] @ d_after
      d_after = (0 if seam[t] else gamma[h]) * d_after
    out["d_initial_state"][b, h] = d_after
  if "initial_state" not in case:
    del out["d_initial_state"]
  return out


def direct(attend):
  """An implementation past the op's door, whose compiled programs know nothing of what a test has patched."""

  def op(q, k, v, slopes, *, scale, initial_state=None, segment_ids=None, lengths=None):
    if initial_state is None:
      initial_state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
    segment_ids = None if segment_ids is None else decay.canonical_segments(segment_ids)
    return attend(q, k, v, slopes, initial_state, segment_ids, lengths, scale=scale)

  return op


def arrays(case, dtype):
  """The differentiable arguments, as a dict, and the rest."""
  differentiable = {name: jnp.asarray(case[name], dtype) for name in ARRAYS if name in case}
  if "initial_state" in differentiable and dtype == jnp.bfloat16:
    differentiable["initial_state"] = jnp.asarray(case["initial_state"])
  return differentiable, {name: jnp.asarray(case[name]) for name in OPTIONS if name in case}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(op, differentiable, slopes, options, d_output, d_state):
  def call(x):
    return op(x["q"], x["k"], x["v"], slopes, scale=SCALE, initial_state=x.get("initial_state"), **options)

  (output, state), pullback = jax.vjp(call, differentiable)
  return output, state, pullback((d_output.astype(output.dtype), d_state.astype(state.dtype)))[0]


def run(op, case, dtype=jnp.float32):
  """{"output", "state", "d_q", ...} of an op with the signature of `linear_attention`."""
  differentiable, options = arrays(case, dtype)
  slopes = jnp.asarray(case["slopes"])
  output, state, gradients = value_and_gradients(op, differentiable, slopes, options, *cotangents(case))
  return {"output": output, "state": state} | {f"d_{name}": x for name, x in gradients.items()}


def relative_error(actual, expected):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30)


def assert_close(actual, expected, tolerance):
  assert actual.keys() == expected.keys()
  errors = {name: relative_error(actual[name], expected[name]) for name in expected}
  wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # NaN counts as wrong
  assert not wrong, wrong
