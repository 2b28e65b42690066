"""Softmax attention over a window: against every token's own softmax in float64, in any pieces, at any lengths.

What holds for all mixers (documents, padding, decoding, meshes, saving) is in test_conformance.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.linearization.linearize import linearize
from supra_jax.linearization.starts import Window
from supra_jax.model.config import RopeConfig
from supra_jax.model.mixers.supra_window import WindowAttention, WindowState, ring_index, window_softmax_attention
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layers
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

WINDOW = tiny("supra_window").replace(
  max_positions=16, layers=layers(("supra_window",) * 2, feature_map="per_head", window=5, sinks=2)
)


def _arrays(time, rows=2, heads=6, groups=2, width=8, value=4, dtype=np.float64):
  rng = np.random.default_rng(0)
  shapes = ((rows, time, heads, width), (rows, time, groups, width), (rows, time, groups, value))
  return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _naive(q, far_q, k, v, window, sinks, first):
  """A mask of T x T, and for each of them the query that it meets."""
  at = jnp.arange(q.shape[1])
  sink = at < first[..., None] + sinks
  mask = (at <= at[:, None]) & ((at > at[:, None] - window) | sink) & (at >= first[..., None])
  far = sink & (at <= at[:, None] - window)
  groups = q.shape[2] // k.shape[2]
  q, far_q, k = (x.swapaxes(1, 2) for x in (q, far_q, jnp.repeat(k, groups, 2)))
  logits = jnp.where(far[:, None], far_q @ k.swapaxes(2, 3), q @ k.swapaxes(2, 3)) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), -1)
  return (weights @ jnp.repeat(v, groups, 2).swapaxes(1, 2)).swapaxes(1, 2)


def _far(q, window, sinks, first):
  """Another query from where the sinks are surely out of sight."""
  position = jnp.arange(q.shape[1]) - first
  return jnp.where((position > 2 * window + sinks)[..., None, None], jnp.flip(q, -1), q)


def _in_calls(q, far_q, k, v, window, sinks, first, cuts, padding=0):
  """Pieces from ring to ring, `padding` more tokens of rubbish behind each."""
  batch = len(q)
  ring = tuple(jnp.zeros((batch, sinks + window, *x.shape[2:]), x.dtype) for x in (k, v))
  outs, cached = [], 0
  for piece in zip(*(jnp.split(x, cuts, axis=1) for x in (q, k, v, far_q, first)), strict=True):
    count = piece[0].shape[1]
    *padded, far, start = (
      jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=3) for x in piece
    )
    where = {"cached_B": jnp.full(batch, cached), "count_B": jnp.full(batch, count), "first_BT": start}
    out, ring = window_softmax_attention(*padded, ring, sinks=sinks, far_q_BTHK=far, **where)
    outs.append(out[:, :count])
    cached += count
  return jnp.concatenate(outs, axis=1)


# Each window with all kinds of sinks that matter to it: none, fewer than it, more than it.
@pytest.mark.parametrize(
  ("window", "sinks", "cuts", "padding"),
  [
    *((1, 3, [], 0), (4, 0, [], 0), (4, 3, [], 0), (7, 1, [], 0), (14, 3, [], 0), (40, 1, [], 3)),
    *((1, 1, [5], 3), (1, 3, [5], 3), (4, 0, [1, 2, 3, 4, 9], 0), (4, 3, [1, 2, 3, 4, 9], 0)),
    *((5, 0, [2, 13], 3), (5, 3, [2, 13], 3), (14, 1, [6], 0), (40, 3, [4, 5], 1)),
  ],
)
def test_any_pieces_give_what_a_mask_gives(window, sinks, cuts, padding):
  """Values and gradients in float64; row 0 is one text, documents begin at 3 and 11 in row 1, at 1 and 2 in row 2."""
  with jax.enable_x64(True):
    q, k, v = _arrays(14, rows=3)
    first = np.array([[0] * 14, [0] * 3 + [3] * 8 + [11] * 3, [0, 1] + [2] * 12])
    cotangent = np.random.default_rng(1).standard_normal((3, 14, 6, 4))

    def run(function, *args):
      def attend(q, k, v):
        return function(q, _far(q, window, sinks, first), k, v, window, sinks, first, *args)

      return attend(q, k, v), jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), cotangent), argnums=(0, 1, 2))(q, k, v)

    want = jax.jit(lambda: run(_naive))()
    got = jax.jit(lambda: run(_in_calls, cuts, padding))()
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), got, want)


@pytest.mark.parametrize("sinks", [0, 2])
def test_rows_stand_where_they_stand(sinks):
  """Rows with unequal numbers of tokens before and in a call are what each is alone."""
  arrays, window = _arrays(20, dtype=np.float32), 4
  ring = tuple(jnp.zeros((2, sinks + window, *x.shape[2:])) for x in arrays[1:])
  first, at, outs = jnp.zeros((2, 11), jnp.int32), np.zeros(2, np.int32), [[], []]
  attend = jax.jit(functools.partial(window_softmax_attention, sinks=sinks))
  for count in np.array([[3, 11], [9, 0], [5, 9]], np.int32):
    pieces = [np.stack([np.roll(row, -start, 0)[:11] for row, start in zip(x, at, strict=True)]) for x in arrays]
    where = {"cached_B": at, "count_B": count, "first_BT": first}
    out, ring = attend(*pieces, ring, **where)
    for row in range(2):
      outs[row].append(out[row, : count[row]])
    at = at + count
  want = jax.jit(lambda: _naive(arrays[0], *arrays, window, sinks, np.zeros((2, 20), np.int32)))()
  for row in range(2):
    np.testing.assert_allclose(np.concatenate(outs[row]), want[row, : at[row]], atol=1e-5)


def test_ring():
  assert ring_index(jnp.array([0, 2, 3, 7]), 3).tolist() == [[-3, -2, -1], [0, 1, -1], [0, 1, 2], [6, 4, 5]]


@functools.cache
def _made(random_params):
  return WINDOW, random_params(WINDOW)


def test_sinks_are_no_further_than_the_teacher_ever_saw():
  """A text's first tokens, and its rotations: those of q where it meets them stand still from there on."""
  c, told = WINDOW.replace(sliding_window=40), WINDOW.layers[0]

  def reach(layer=told, **changes):
    return WindowAttention.reach(c.replace(**changes), layer)

  assert reach() == 15 and reach(max_positions=None) == 39
  assert reach(max_positions=3) == 12  # 2 W + N: they may be in sight
  assert reach(dataclasses.replace(told, sinks=0)) is reach(max_positions=None, sliding_window=None) is None
  context, _ = Transformer(c).place(jnp.zeros((1, 40), jnp.int32))
  for far, near in zip(context.far_rotations[15], context.rotation, strict=True):
    np.testing.assert_array_equal(far, near[:, np.minimum(np.arange(40), 15)])


def test_a_long_decoding_goes_round_the_ring_and_grows_nothing(random_params):
  config, params = _made(random_params)
  model, tokens = Transformer(config), np.random.default_rng(0).integers(0, 97, (2, 64)).astype(np.int32)
  read = functools.partial(model.apply, {"params": params}, method="logits")
  want, end = jax.jit(read)(tokens)
  start = model.init_state(2, capacity=10**9)
  assert start.capacity is None and all(isinstance(layer, WindowState) for layer in start.layers)

  def step(state, token):
    logits, state = read(token[:, None], state)
    return state, logits[:, 0]

  state, logits = jax.jit(lambda: jax.lax.scan(step, start, tokens.T))()
  np.testing.assert_allclose(logits.swapaxes(0, 1), want, atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), state, end)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)


def test_token_by_token_is_the_same_function_to_the_last_digits(random_params):
  """In float64, so that rounding hides nothing: loss and all gradients of both forms, 1 < G < H."""
  config, params = _made(random_params)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 7)).astype(np.int32)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    model = Transformer(config, jnp.float64)
    read = functools.partial(model.apply, method="logits")
    weights = np.random.default_rng(1).standard_normal((2, 7, 97))

    def parallel(params):
      return jnp.vdot(read({"params": params}, tokens)[0], weights)

    def recurrent(params):
      def step(state, now):
        token, weight = now
        logits, state = read({"params": params}, token[:, None], state)
        return state, jnp.vdot(logits[:, 0], weight)

      start = model.init_state(2)
      start = start.replace(layers=jax.tree.map(lambda x: x.astype(jnp.float64), start.layers))
      return jax.lax.scan(step, start, (tokens.T, weights.swapaxes(0, 1)))[1].sum()

    got, want = jax.jit(jax.value_and_grad(parallel))(params), jax.jit(jax.value_and_grad(recurrent))(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, want)
  assert all(np.any(x) for x in jax.tree.leaves(got))


def test_cost_grows_with_the_text_and_not_with_its_square(random_params):
  config, params = _made(random_params)

  def flops(time):
    lowered = jax.jit(Transformer(config).apply).lower({"params": params}, jnp.zeros((1, time), jnp.int32))
    return lowered.cost_analysis()["flops"]

  # With T^2 it would grow by more from the second to the third than from the first to the second.
  a, b, c = (flops(time) for time in (1000, 2000, 3000))
  assert c - b == pytest.approx(b - a, rel=0.02)


def _begun(rope, window, random_params):
  """(teacher, its parameters, tokens, student, its parameters)"""
  teacher = tiny("softmax").replace(rope=RopeConfig(kind=rope), num_heads=4, num_kv_heads=4, output_bias=True)
  params = random_params(teacher)
  made = linearize(params, teacher, Window(window, sinks=0))
  tokens = np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)
  return teacher, params, tokens, made.config, made.params


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  return Transformer(config).apply({"params": params}, tokens, method="logits")[0]


@pytest.mark.parametrize(
  ("rope", "window"), [("half", 24), ("half", 6), ("interleaved", 6), ("by_head", 6), ("none", 24)]
)
def test_a_window_as_wide_as_the_text_begins_as_the_teacher(rope, window, random_params):
  """The linear attention's projection being 0; and with the window it is the teacher that has that window."""
  teacher, params, tokens, config, student = _begun(rope, window, random_params)
  want = _logits(teacher.replace(sliding_window=window), params, tokens)
  np.testing.assert_allclose(_logits(config, student, tokens), want, atol=1e-5)


def test_the_first_gradient_reaches_the_projection_alone(random_params):
  *_, tokens, config, student = _begun("half", 6, random_params)
  grads = jax.jit(jax.grad(lambda params: (_logits(config, params, tokens) ** 2).sum()))(student)
  grads = grads["layers_1"]["self_attn"]
  assert grads["linear_o_proj"]["kernel"].any() and not grads["feature_map"]["kernel"].any()
