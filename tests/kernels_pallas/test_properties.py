"""What must hold whatever the numbers are: splitting, packing, padding, constants, checks."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import chunked_xla, decay, linear_attention, linear_attention_step, parts
from kernels_pallas.api import IMPLEMENTATIONS, REFUSALS
from tests.kernels_pallas import truth

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPS = {name: functools.partial(linear_attention, implementation=name) for name in IMPLEMENTATIONS}


@pytest.mark.parametrize(
  "name, first",
  [*(truth.params(name, 37) for name in IMPLEMENTATIONS), *(("chunked_xla", first) for first in (1, 64, 99))],
)
def test_split_anywhere_is_the_whole(name, first):
  dtype, tolerance = truth.precision(name)
  heads = truth.heads_for(name)
  case = truth.rounded(truth.make_case(100, 2, heads // 2, ("initial_state",), heads=heads), dtype)
  case["lengths"] = np.array([100, 40], np.int32)

  def in_two(q, k, v, slopes, *, scale, initial_state, lengths):
    part = functools.partial(OPS[name], scale=scale)
    head, tail = ([x[:, :first] for x in (q, k, v)], [x[:, first:] for x in (q, k, v)])
    output, state = part(*head, slopes, initial_state=initial_state, lengths=lengths)
    rest, state = part(*tail, slopes, initial_state=state, lengths=lengths - first)
    return jnp.concatenate([output, rest], axis=1), state

  truth.assert_close(truth.run(in_two, case, dtype), truth.by_loop(case), tolerance)


@pytest.mark.parametrize("name", truth.NAMES)
def test_packed_documents_are_separate_ones(name):
  ends, ids = [17, 81, 86, 100], [7, 2, 7, 7 - 9]
  dtype, tolerance = truth.precision(name)
  heads = truth.heads_for(name)
  case = truth.rounded(truth.make_case(100, 2, heads // 2, ("initial_state",), heads=heads), dtype)
  starts = [0, *ends[:-1]]
  case["segment_ids"] = np.repeat(ids, np.diff([0, *ends]))[None].repeat(2, axis=0).astype(np.int32)
  case["lengths"] = np.array([100, 100], np.int32)  # all, so that it is the program of the test of padding

  actual = truth.run(OPS[name], case, dtype)
  d_output, d_state = truth.cotangents(case)
  for start, end in zip(starts, ends, strict=True):
    document = {x: case[x][:, start:end] for x in "qkv"} | {"slopes": case["slopes"]}
    document["initial_state"] = case["initial_state"] * (start == 0)
    state_counts = end == ends[-1]
    expected = truth.by_loop(document, (d_output[:, start:end], d_state * state_counts))
    tokens = {x: actual[x][:, start:end] for x in ("output", "d_q", "d_k", "d_v")}
    truth.assert_close(tokens, {x: expected[x] for x in tokens}, tolerance)
    if start == 0:
      truth.assert_close({"d": actual["d_initial_state"]}, {"d": expected["d_initial_state"]}, tolerance)
    if state_counts:
      truth.assert_close({"s": actual["state"]}, {"s": expected["state"]}, tolerance)


@pytest.mark.parametrize("name", truth.NAMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_padding_does_not_leak(name, poison):
  heads = truth.heads_for(name)
  case = truth.make_case(100, 2, heads // 2, ("initial_state", "segment_ids"), heads=heads)
  case["lengths"] = np.array([70, 0], np.int32)
  padding = np.arange(100) >= case["lengths"][:, None]
  for x in "qkv":
    case[x][padding] = poison
  # The cotangent of an output that is constant may be anything too.
  d_output, d_state = truth.cotangents(case)
  d_output[padding] = poison
  differentiable, options = truth.arrays(case, truth.precision(name)[0])
  output, state, gradients = truth.value_and_gradients(
    OPS[name], differentiable, case["slopes"], options, d_output, d_state
  )
  assert not np.any(np.asarray(output)[padding])
  assert all(not np.any(np.asarray(gradients[x])[padding]) for x in "qkv")
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((output, state, gradients)))
  np.testing.assert_array_equal(state[1], case["initial_state"][1])


@pytest.mark.parametrize("lengths", [[-3, 4], [0, 9]])
def test_lengths_are_clipped_to_the_row(lengths):
  case = truth.make_case(4, 6, 6, ())
  run = functools.partial(OPS["chunked_xla"], case["q"], case["k"], case["v"], case["slopes"], scale=1.0)
  actual, expected = run(lengths=np.array(lengths)), run(lengths=np.array([0, 4]))
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


TOKENS, CHUNK, CHUNKS = 45, 4, 2


@functools.partial(jax.jit, static_argnums=0)
def _small_chunks(chunked, q, k, v, slopes, state, segment_ids, lengths):
  def loss(q, k, v, state):
    if chunked:
      pieces = chunked_xla.cut(TOKENS, CHUNK, CHUNKS)
      ids = decay.canonical_segments(segment_ids)
      output, last = chunked_xla._attend(pieces, 0.3, q, k, v, state, slopes, ids, lengths)
    else:
      options = {"initial_state": state, "segment_ids": segment_ids, "lengths": lengths}
      output, last = OPS["recurrent"](q, k, v, slopes, scale=0.3, **options)
    return jnp.sum(output**2) + jnp.sum(last**2), {"output": output, "state": last}

  gradients, result = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, state)
  return result | dict(zip(("d_q", "d_k", "d_v", "d_initial_state"), gradients, strict=True))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  ids=st.lists(st.integers(-1, 2), min_size=2 * TOKENS, max_size=2 * TOKENS),
  repeat=st.integers(1, 20),
  lengths=st.tuples(st.integers(0, TOKENS), st.integers(0, TOKENS)),
  slopes=st.lists(st.floats(0, 14, width=32), min_size=4, max_size=4),
  seed=st.integers(0, 100),
)
def test_any_segments_and_lengths(ids, repeat, lengths, slopes, seed):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.standard_normal((2, TOKENS, heads, 3)).astype(np.float32) for heads in (4, 2, 1))
  state = rng.standard_normal((2, 4, 3, 3)).astype(np.float32)
  segment_ids = np.repeat(np.reshape(ids, (2, TOKENS)), repeat, axis=1)[:, :TOKENS]
  arguments = (q, k, v, np.array(slopes, np.float32), state, segment_ids, np.array(lengths))
  truth.assert_close(_small_chunks(True, *arguments), _small_chunks(False, *arguments), 1e-5)


@pytest.mark.parametrize("name", [truth.params(name) for name in REFUSALS])
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape(name, data):
  dtype, tolerance = truth.precision(name)
  heads = data.draw(st.sampled_from([n for n in (1, 2, 3, 6) if n <= truth.heads_for(name)]), "heads")
  groups = [data.draw(st.sampled_from([g for g in (1, 2, 3, 6) if heads % g == 0]), "groups") for _ in "kv"]
  widths = [data.draw(st.integers(1, 140), "width") for _ in "kv"]
  given = [option for option in ("initial_state", *truth.OPTIONS) if data.draw(st.booleans(), option)]
  tokens, count = data.draw(st.integers(1, 150), "tokens"), data.draw(st.integers(1, 4), "parts")
  sizes = {"heads": heads, "key_width": widths[0], "value_width": widths[1]}
  case = truth.rounded(truth.make_case(tokens, *groups, given, **sizes), dtype)
  case["slopes"] = np.array(data.draw(st.lists(st.floats(0, 14, width=32), min_size=heads, max_size=heads)), np.float32)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts, "choose_count", lambda *_: count)
    actual = truth.run(truth.direct(IMPLEMENTATIONS[name]), case, dtype)
  truth.assert_close(actual, truth.by_loop(case), tolerance)


@pytest.mark.parametrize("name", truth.NAMES)
def test_the_gradient_is_the_transpose(name):
  """<LA(v), u> = <v, LA_rev(u)>."""
  dtype, tolerance = truth.precision(name)
  heads = truth.heads_for(name)
  case = truth.make_case(100, 2, heads // 2, truth.OPTIONS, heads=heads)
  q, k, v = (jnp.nan_to_num(jnp.asarray(case[x], dtype)) for x in "qkv")
  options = {option: case[option] for option in truth.OPTIONS}

  def both(v):
    output, pullback = jax.vjp(lambda v: OPS[name](q, k, v, case["slopes"], scale=truth.SCALE, **options)[0], v)
    u = output + jnp.asarray(truth.cotangents(case)[0], dtype)
    return [np.asarray(x, np.float64) for x in (output, u, v, pullback(u)[0])]

  output, u, v, transposed = both(v)
  assert np.vdot(output, u) > 0.1 * np.linalg.norm(output) * np.linalg.norm(u)
  np.testing.assert_allclose(np.vdot(v, transposed), np.vdot(output, u), rtol=tolerance)


def _call(slopes, name="chunked_xla", q=None):
  q = jnp.ones((1, 6, 2, 3)) if q is None else q
  return linear_attention(q, q, q, slopes, scale=1.0, implementation=name)[0].sum()


def _scanned(slopes, name):
  return jax.lax.scan(lambda carry, _: (carry + _call(slopes, name), None), 0.0, None, length=2)[0]


SLOPES = jnp.array([0.1, 0.2])
WAYS = {
  "grad": lambda name: jax.grad(functools.partial(_call, name=name)),
  "jit of grad": lambda name: jax.jit(jax.grad(functools.partial(_call, name=name))),
  "jvp": lambda name: lambda slopes: jax.jvp(functools.partial(_call, name=name), (slopes,), (slopes,)),
  "scan": lambda name: jax.grad(functools.partial(_scanned, name=name)),
  "remat": lambda name: jax.grad(jax.checkpoint(functools.partial(_call, name=name))),
  "remat of scan": lambda name: jax.jit(jax.grad(jax.checkpoint(functools.partial(_scanned, name=name)))),
}


@pytest.mark.parametrize("name", truth.FLOAT32)
@pytest.mark.parametrize("way", WAYS)
def test_slopes_cannot_be_differentiated(way, name):
  with pytest.raises(TypeError, match="slopes, which are constants"):
    WAYS[way](name)(SLOPES)


def test_slopes_of_a_step_cannot_be_differentiated():
  x, state = jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3, 3))
  with pytest.raises(TypeError, match="slopes, which are constants"):
    jax.grad(lambda slopes: linear_attention_step(x, x, x, slopes, state, scale=1.0)[0].sum())(SLOPES)


@pytest.mark.parametrize("name", truth.FLOAT32)
def test_slopes_may_be_traced_or_closed_over(name):
  q = jnp.arange(36.0).reshape(1, 6, 2, 3) / 36
  traced = jax.jit(lambda q, slopes: jax.grad(lambda q: _call(slopes, name, q))(q))(q, SLOPES)
  closed = jax.grad(lambda q: _call(SLOPES, name, q))(q)
  stopped = jax.grad(lambda q, s: _call(jax.lax.stop_gradient(s), name, q), argnums=(0, 1))(q, SLOPES)
  remat = jax.jit(jax.grad(jax.checkpoint(lambda q: _scanned(SLOPES, name) + _call(SLOPES, name, q))))(q)
  for gradient in (closed, stopped[0], remat):
    np.testing.assert_allclose(gradient, traced, rtol=1e-6)
  assert not np.any(stopped[1])


@functools.cache
def _curvature(name):
  case = truth.make_case(100, 2, 3, (), batch=1)

  def loss(q, k, v):
    output, state = OPS[name](q, k, v, case["slopes"], scale=truth.SCALE)
    return jnp.sum(output**2) + jnp.sum(state**2)

  def size_of_gradient(q, k, v):
    return sum(jnp.sum(x**2) for x in jax.grad(loss, argnums=(0, 1, 2))(q, k, v))

  gradients = jax.jit(jax.grad(size_of_gradient, argnums=(0, 1, 2)))(case["q"], case["k"], case["v"])
  return dict(zip("qkv", gradients, strict=True))


@pytest.mark.parametrize("name", ["chunked_xla", "triton", "tpu"])
def test_a_gradient_can_be_differentiated(name):
  truth.assert_close(_curvature(name), _curvature("reference"), 1e-5)


def test_vmap_is_another_batch():
  case = truth.make_case(20, 2, 3, ())
  q, k, v = (jnp.asarray(case[x]) for x in "qkv")
  run = functools.partial(OPS["chunked_xla"], slopes=case["slopes"], scale=1.0)
  output, state = jax.vmap(lambda q, k, v: run(q[None], k[None], v[None]))(q, k, v)
  expected = run(q, k, v)
  truth.assert_close({"o": output[:, 0], "s": state[:, 0]}, dict(zip("os", expected, strict=True)), 1e-6)


def _good(**changes):
  arguments = {
    "q": np.ones((2, 5, 6, 4), np.float32),
    "k": np.ones((2, 5, 3, 4), np.float32),
    "v": np.ones((2, 5, 2, 7), np.float32),
    "slopes": np.ones(6, np.float32),
    "initial_state": np.zeros((2, 6, 4, 7), np.float32),
    "segment_ids": np.zeros((2, 5), np.int32),
    "lengths": np.array([5, 5]),
    "implementation": "auto",
  }
  return arguments | changes


BAD = {
  "rank": (dict(q=np.ones((2, 5, 6), np.float32)), r"q has shape \(2, 5, 6\), wanted 4 axes \[B, T, H, K\]"),
  "batch": (dict(k=np.ones((1, 5, 3, 4), np.float32)), r"k has shape \(1, 5, 3, 4\), wanted the leading \[B, T\]"),
  "width": (dict(k=np.ones((2, 5, 3, 5), np.float32)), "k has width 5, wanted the width of q, 4"),
  "groups": (dict(v=np.ones((2, 5, 4, 7), np.float32)), "v has 4 heads, wanted a divisor of q's 6"),
  "integer": (dict(q=np.ones((2, 5, 6, 4), np.int32)), "q has dtype int32, wanted a floating one"),
  "empty": (dict(q=np.ones((2, 0, 6, 4), np.float32)), "at least one element"),
  "slopes": (dict(slopes=np.ones(3, np.float32)), r"slopes has shape \(3,\), wanted \[H\] = \(6,\)"),
  "negative slopes": (dict(slopes=-np.ones(6, np.float32)), "wanted all finite and none below 0"),
  "infinite slopes": (dict(slopes=np.full(6, np.inf, np.float32)), "wanted all finite"),
  "slopes beyond float32": (dict(slopes=np.full(6, 1e39)), "wanted all finite"),
  "slopes that are no numbers": (dict(slopes=np.full(6, np.nan, np.float32)), "wanted all finite"),
  "state": (dict(initial_state=np.zeros((2, 3, 4, 7), np.float32)), r"wanted \[B, H, K, V\] = \(2, 6, 4, 7\)"),
  "ids": (dict(segment_ids=np.zeros((2, 5), np.float32)), "segment_ids has dtype float32, wanted one of kind integer"),
  "lengths": (dict(lengths=np.array([5])), r"lengths has shape \(1,\), wanted \[B\] = \(2,\)"),
  "name": (dict(implementation="fastest"), "'fastest' is none of .*'auto', 'reference', 'recurrent', 'chunked_xla'"),
}


def _at_the_door(q, k, v, slopes, **rest):
  return linear_attention(q, k, v, slopes, scale=1.0, **rest)


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(what):
  changes, message = BAD[what]
  with pytest.raises(ValueError, match=message):
    _at_the_door(**_good(**changes))


def test_what_fits_is_let_in():
  output, state = _at_the_door(**_good())
  assert (output.shape, output.dtype) == ((2, 5, 6, 7), jnp.float32)
  assert (state.shape, state.dtype) == ((2, 6, 4, 7), jnp.float32)


def test_a_step_is_checked_too():
  x = np.ones((2, 6, 4), np.float32)
  with pytest.raises(ValueError, match=r"state has shape \(2, 6, 4\), wanted \[B, H, K, V\] = \(2, 6, 4, 4\)"):
    linear_attention_step(x, x, x, np.ones(6, np.float32), x, scale=1.0)
