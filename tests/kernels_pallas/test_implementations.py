"""Each implementation against float64 truth: outputs, final states and all gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import chunked_xla, decay, linear_attention, linear_attention_step
from kernels_pallas.api import IMPLEMENTATIONS
from tests.kernels_pallas import truth

GROUPS = {"G=H": (6, 6), "G<H": (2, 2), "Gk=H>Gv": (6, 3), "Gk<Gv": (1, 2)}
OPTIONAL = ("initial_state", "segment_ids", "lengths")
ALL_GIVEN = [given for n in range(4) for given in itertools.combinations(OPTIONAL, n)]
# All combinations at one length with two chunks and an odd end; at other lengths the groups with all options and none.
CASES = [(100, groups, given) for groups in list(GROUPS)[:3] for given in ALL_GIVEN]
CASES += [(tokens, groups, given) for tokens in (1, 5, 64, 257) for groups in GROUPS for given in ((), OPTIONAL)]

OPS = {name: functools.partial(linear_attention, implementation=name) for name in IMPLEMENTATIONS}


@functools.cache
def case_and_truth(tokens, groups, given):
  case = truth.make_case(tokens, *GROUPS[groups], given)
  return case, truth.by_recurrence(case)


def case_id(case):
  return f"T{case[0]}-{case[1]}-{'+'.join(case[2]) or 'plain'}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float32(name, case):
  case, expected = case_and_truth(*case)
  truth.assert_close(truth.run(OPS[name], case), expected, 1e-5)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16(name, groups):
  case, _ = case_and_truth(100, groups, OPTIONAL)
  case = {k: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) if k in "qkv" else x for k, x in case.items()}
  actual = truth.run(OPS[name], case, jnp.bfloat16)
  assert {k: x.dtype for k, x in actual.items() if k in ("output", "state", "d_k", "d_initial_state")} == {
    "output": jnp.bfloat16,
    "state": jnp.float32,
    "d_k": jnp.bfloat16,
    "d_initial_state": jnp.float32,
  }
  truth.assert_close(actual, truth.by_recurrence(case), 1e-2)


@pytest.mark.parametrize("given", [(), OPTIONAL], ids=["plain", "all"])
def test_the_truth_is_the_definition(given):
  case, expected = case_and_truth(100, "Gk=H>Gv", given)
  output, state = truth.by_loop(case)
  truth.assert_close({"output": expected["output"], "state": expected["state"]}, {"output": output, "state": state}, 1e-12)

  d_output, d_state = truth.cotangents(case)
  rng = np.random.default_rng(2)
  moved = [name for name in truth.ARRAYS if name in case]
  direction = {name: rng.standard_normal(case[name].shape) for name in moved}

  def along(step):
    output, state = truth.by_loop(case | {name: case[name] + step * direction[name] for name in moved})
    return np.sum(output * d_output) + np.sum(state * d_state)

  slope = (along(1e-3) - along(-1e-3)) / 2e-3  # of a cubic: the error is that of 1e-6 times its third derivative
  np.testing.assert_allclose(slope, sum(np.sum(expected[f"d_{name}"] * direction[name]) for name in moved), rtol=1e-4)


@pytest.mark.parametrize("chunk, num_chunks", [(1, 1), (4, 1), (8, 2), (8, 4), (16, 3), (128, 1)])
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
  case, expected = case_and_truth(100, "Gk=H>Gv", given)
  state = jnp.asarray(case.get("initial_state", np.zeros_like(expected["state"], np.float32)))
  step = jax.jit(functools.partial(linear_attention_step, scale=truth.SCALE))
  outputs = []
  for t in range(100):
    output, state = step(*(case[name][:, t] for name in "qkv"), case["slopes"], state)
    outputs.append(output)
  output, whole_state = OPS["recurrent"](
    *(case[name] for name in "qkv"), case["slopes"], scale=truth.SCALE, initial_state=case.get("initial_state")
  )
  truth.assert_close({"o": jnp.stack(outputs, 1), "s": state}, {"o": output, "s": whole_state}, 1e-6)


def test_error_is_that_of_the_token_recurrence():
  rng = np.random.default_rng(0)
  shapes = {"q": (1, 2048, 9, 64), "k": (1, 2048, 3, 64), "v": (1, 2048, 3, 64)}
  case = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  case |= {"q": np.maximum(case["q"], 0), "k": np.maximum(case["k"], 0), "slopes": np.float32(2.0) ** -np.arange(9)}

  def both(implementation, dtype):
    x = [jnp.asarray(case[name], dtype) for name in ("q", "k", "v", "slopes")]
    return linear_attention(*x, scale=64**-0.5, implementation=implementation)

  with jax.enable_x64(True):
    expected = [np.asarray(x) for x in both("recurrent", jnp.float64)]
  chunked, recurrent = both("chunked_xla", jnp.float32), both("recurrent", jnp.float32)
  for actual, baseline, exact in zip(chunked, recurrent, expected, strict=True):
    rms = [np.sqrt(np.mean((np.asarray(x) - exact) ** 2)) for x in (actual, baseline)]
    assert rms[0] <= 2 * rms[1], rms
    worst = [np.max(np.abs(np.asarray(x) - exact)) for x in (actual, baseline)]
    assert worst[0] <= 2 * worst[1], worst
