"""Each implementation against float64 truth: outputs, final states and all gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import chunked_xla, decay, linear_attention, linear_attention_step
from kernels_pallas.api import IMPLEMENTATIONS, REFUSALS
from tests.kernels_pallas import truth

GROUPS = {"G=H": (6, 6), "G<H": (2, 2), "Gk=H>Gv": (6, 3), "Gk<Gv": (1, 2)}
# Of two heads.
SMALL_GROUPS = {"G=H": (2, 2), "G<H": (1, 1), "Gk=H>Gv": (2, 1), "Gk<Gv": (1, 2)}
PLAIN = [name for name in IMPLEMENTATIONS if name not in REFUSALS]
OPTIONAL = ("initial_state", "segment_ids", "lengths")
GIVEN = [given for n in range(4) for given in itertools.combinations(OPTIONAL, n)]
TOKENS = (1, 257, 5, 100, 64)
# All pairs of groups and options while the lengths go round, then what that leaves out.
CASES = [
  (TOKENS[(i + 2 * j) % 5], groups, given) for i, given in enumerate(GIVEN) for j, groups in enumerate(list(GROUPS)[:3])
]
REST = [(257, "Gk<Gv", OPTIONAL), (257, "Gk=H>Gv", ()), (1, "G<H", OPTIONAL), (5, "G<H", OPTIONAL)]
CASES += REST
# The plain ones do the same for all lengths: each choice of options once, and what that leaves out.
FEW = [CASES[3 * i + i % 3] for i in range(len(GIVEN))] + [REST[0], REST[-1]]
# A kernel takes long to interpret: each length and each kind of groups, and all pairs of two options. Mosaic GPU's
# takes ten times as long and has tests of its own.
FEWER = [
  *((1, "G=H", ()), (100, "G<H", ("initial_state",)), (257, "Gk=H>Gv", ("segment_ids",)), (64, "G=H", ("lengths",))),
  *(REST[0], REST[-1]),
]
CASES_OF = {
  "chunked_xla": CASES,
  "triton": FEWER,
  "tpu": FEWER,
  "mosaic_gpu": [case for case in FEW if case[0] in (5, 64)],
}
NAMES_AND_CASES = [
  truth.params(name, case, marks=[pytest.mark.compat] * (case == REST[0]))
  for name in IMPLEMENTATIONS
  for case in CASES_OF.get(name, FEW)
]

pytestmark = pytest.mark.usefixtures("quick_compilation")
OPS = {name: functools.partial(linear_attention, implementation=name) for name in IMPLEMENTATIONS}


@functools.cache
def case_and_truth(tokens, groups, given, dtype=jnp.float32, heads=6):
  of_keys_and_values = (GROUPS if heads == 6 else SMALL_GROUPS)[groups]
  case = truth.rounded(truth.make_case(tokens, *of_keys_and_values, given, heads=heads), dtype)
  return case, truth.by_loop(case)


def case_id(case):
  return f"T{case[0]}-{case[1]}-{'+'.join(case[2]) or 'plain'}"


@pytest.mark.parametrize("name, case", NAMES_AND_CASES, ids=lambda x: x if isinstance(x, str) else case_id(x))
def test_truth(name, case):
  dtype, tolerance = truth.precision(name)
  case, expected = case_and_truth(*case, dtype, heads=truth.heads_for(name))
  truth.assert_close(truth.run(OPS[name], case, dtype), expected, tolerance)


@pytest.mark.parametrize(
  "name, groups",
  # Gradients of shared keys and values are sums over heads. Kernels take long to interpret.
  [*(truth.params(name, "G<H") for name in IMPLEMENTATIONS), *((name, "Gk=H>Gv") for name in PLAIN)],
)
def test_bfloat16(name, groups):
  case, expected = case_and_truth(100, groups, OPTIONAL, jnp.bfloat16, heads=truth.heads_for(name))
  actual = truth.run(OPS[name], case, jnp.bfloat16)
  assert {k: x.dtype for k, x in actual.items() if k in ("output", "state", "d_k", "d_initial_state")} == {
    "output": jnp.bfloat16,
    "state": jnp.float32,
    "d_k": jnp.bfloat16,
    "d_initial_state": jnp.float32,
  }
  truth.assert_close(actual, expected, 1e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_float64(name):
  case, expected = case_and_truth(100, "Gk=H>Gv", OPTIONAL)
  with jax.enable_x64(True):
    actual = truth.run(OPS[name], case, jnp.float64)
    assert {x.dtype for x in actual.values()} == {jnp.dtype(jnp.float64)}
    truth.assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("name", ["triton", "tpu"])
def test_float64_is_refused_by_name(name):
  with jax.enable_x64(True):
    x = jnp.ones((1, 2, 1, 3), jnp.float64)
    with pytest.raises(NotImplementedError, match=r"q float64\[1, 2, 1, 3\].*not support float64. 'chunked_xla' can"):
      OPS[name](x, x, x, jnp.ones(1), scale=1.0)


def test_the_gradients_of_the_truth_are_its_slopes():
  case, expected = case_and_truth(100, "Gk=H>Gv", OPTIONAL)
  d_output, d_state = truth.cotangents(case)
  rng = np.random.default_rng(2)
  direction = {name: rng.standard_normal(case[name].shape) for name in truth.ARRAYS}

  def along(step):
    moved = truth.by_loop(case | {name: case[name] + step * direction[name] for name in truth.ARRAYS})
    return np.sum(moved["output"] * d_output) + np.sum(moved["state"] * d_state)

  # Padding is NaN and has no gradient.
  gradient = sum(np.nansum(expected[f"d_{name}"] * direction[name]) for name in truth.ARRAYS)
  np.testing.assert_allclose((along(1e-3) - along(-1e-3)) / 2e-3, gradient, rtol=1e-5)


@pytest.mark.parametrize("chunk, num_chunks", [(1, 1), (8, 1), (16, 3), (128, 1)])
def test_every_cut_agrees(monkeypatch, chunk, num_chunks):
  monkeypatch.setattr(chunked_xla, "_CHUNK", chunk)
  monkeypatch.setattr(chunked_xla, "choose_num_chunks", lambda elements: num_chunks)
  case, expected = case_and_truth(100, "Gk<Gv", OPTIONAL)

  def op(q, k, v, slopes, *, scale, initial_state, segment_ids, lengths):
    segment_ids = decay.canonical_segments(segment_ids)
    return chunked_xla.chunked(q, k, v, slopes, initial_state, segment_ids, lengths, scale=scale)

  truth.assert_close(truth.run(op, case), expected, 1e-5)


@pytest.mark.parametrize("num_tokens", [1, 7, 63, 64, 65, 100, 128, 130, 1000])
def test_a_cut_covers_each_token_once(num_tokens):
  pieces = chunked_xla.cut(num_tokens, 16, 4)
  covered = [pieces.block._replace(start=i * pieces.block.tokens) for i in range(pieces.num_blocks)]
  covered += [pieces.tail] if pieces.tail else []
  assert [t for span in covered for t in range(span.start, span.start + span.tokens)] == list(range(num_tokens))
  assert all(0 <= span.num_chunks * span.chunk - span.tokens < span.num_chunks for span in covered)


@pytest.mark.parametrize("given", [(), ("initial_state",)], ids=["plain", "state"])
def test_steps_are_the_recurrence(given):
  case = truth.make_case(100, *GROUPS["Gk=H>Gv"], given)
  expected = truth.by_loop(case)
  state = jnp.asarray(case.get("initial_state", np.zeros(expected["state"].shape, np.float32)))
  step = jax.jit(functools.partial(linear_attention_step, scale=truth.SCALE))
  outputs = []
  for t in range(100):
    output, state = step(*(case[name][:, t] for name in "qkv"), case["slopes"], state)
    outputs.append(output)
  operands = (case[name] for name in ("q", "k", "v", "slopes"))
  whole = OPS["recurrent"](*operands, scale=truth.SCALE, initial_state=case.get("initial_state"))
  steps = {"output": jnp.stack(outputs, axis=1), "state": state}
  truth.assert_close(steps, dict(zip(("output", "state"), whole, strict=True)), 1e-6)
  truth.assert_close(steps, {name: expected[name] for name in steps}, 1e-5)
