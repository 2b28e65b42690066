"""What depends on the compiled program: rounding errors, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_attention
from kernels_pallas.api import IMPLEMENTATIONS
from tests.kernels_pallas import truth

OPS = {name: functools.partial(linear_attention, implementation=name) for name in IMPLEMENTATIONS}


@pytest.mark.parametrize("given", [(), ("initial_state", "segment_ids", "lengths")], ids=["plain", "all"])
@pytest.mark.parametrize("groups", [(6, 6), (2, 2)], ids=str)
def test_optimised(groups, given):
  case = truth.make_case(200, *groups, given)
  truth.assert_close(truth.run(OPS["chunked_xla"], case), truth.by_loop(case), 1e-5)


def test_error_is_at_most_twice_that_of_the_token_recurrence():
  rng = np.random.default_rng(0)
  shapes = {"q": (1, 2048, 9, 64), "k": (1, 2048, 3, 64), "v": (1, 2048, 3, 64)}
  case = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  case |= {"q": np.maximum(case["q"], 0), "k": np.maximum(case["k"], 0), "slopes": np.float32(2.0) ** -np.arange(9)}

  def run(name, dtype):
    operands = (jnp.asarray(case[x], dtype) for x in ("q", "k", "v", "slopes"))
    return OPS[name](*operands, scale=64**-0.5)

  with jax.enable_x64(True):
    expected = [np.asarray(x) for x in run("recurrent", jnp.float64)]
  for chunked, recurrent, exact in zip(
    run("chunked_xla", jnp.float32), run("recurrent", jnp.float32), expected, strict=True
  ):
    errors = [np.abs(np.asarray(x) - exact) for x in (chunked, recurrent)]
    for size in (np.mean, np.max):
      assert size(errors[0]) <= 2 * size(errors[1]), [size(error) for error in errors]


def _traced(name, backward):
  tokens, heads, width = 16001, 16, 32
  operand = lambda heads: jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.float32)  # noqa: E731
  slopes = jnp.full(heads, 0.1)

  def run(q, k, v):
    return OPS[name](q, k, v, slopes, scale=1.0)

  def gradients(q, k, v, d_output):
    output, pullback = jax.vjp(lambda *x: run(*x)[0], q, k, v)
    return output, pullback(d_output)

  operands = [operand(heads), operand(1), operand(1)]
  traced = jax.jit(gradients).trace(*operands, operand(heads)) if backward else jax.jit(run).trace(*operands)
  return traced, tokens, tokens * heads * width * 4


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      if inner := getattr(parameter, "jaxpr", parameter if hasattr(parameter, "eqns") else None):
        yield from _shapes(inner)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name, frugal", [("chunked_xla", True), ("reference", False)])
def test_no_square_of_the_length(name, frugal, backward):
  traced, tokens, _ = _traced(name, backward)
  shapes = list(_shapes(traced.jaxpr.jaxpr))
  assert any(tokens in shape for shape in shapes)
  assert frugal == all(shape.count(tokens) < 2 for shape in shapes)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name, frugal", [("chunked_xla", True), ("reference", False)])
def test_keys_are_not_repeated_over_heads(name, frugal, backward):
  # What the compiled program needs beyond operands and results: chunks and, backward, a state for each block, less than
  # half the size of the repeated keys; not the repeated keys or values themselves.
  traced, _, repeated = _traced(name, backward)
  assert frugal == (traced.lower().compile().memory_analysis().temp_size_in_bytes < repeated)
