"""The selective scan against its recurrence in float64, its gradients against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import linear_recurrence, selective_scan

BATCH, TIME, CHANNELS, SIZE = 2, 37, 5, 3


def drawn(dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = (BATCH, TIME, CHANNELS), (BATCH, TIME, CHANNELS), (CHANNELS, SIZE), (BATCH, TIME, SIZE), (BATCH, TIME, SIZE)
  x, delta, a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
  state = rng.standard_normal((BATCH, CHANNELS, SIZE)).astype(dtype)
  begins = rng.random((BATCH, TIME)) < 0.1
  return (x, np.abs(delta), -np.abs(a), b, c), state, begins


def by_a_loop(x, delta, a, b, c, state, begins):
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    state = np.where(begins[:, t, None, None], 0, state)
    state = np.exp(delta[:, t, :, None] * a) * state + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
    y[:, t] = np.einsum("ben,bn->be", state, c[:, t])
  return y, state


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_a_sequence(chunk):
  inputs, state, begins = drawn()
  got = selective_scan(*inputs, initial_state=state, begins_BT=begins, chunk=chunk)
  want = by_a_loop(*(np.float64(x) for x in inputs), np.float64(state), begins)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  alone = selective_scan(*inputs, chunk=chunk)
  want = by_a_loop(*(np.float64(x) for x in inputs), np.zeros_like(state, np.float64), np.zeros_like(begins))
  np.testing.assert_allclose(alone[0], want[0], rtol=1e-5, atol=1e-5)


def test_steps_are_the_sequence():
  inputs, state, begins = drawn()
  want, _ = selective_scan(*inputs, initial_state=state, begins_BT=begins)
  x, delta, a, b, c = inputs
  for t in range(TIME):
    now = slice(t, t + 1)
    y, state = selective_scan(
      x[:, now], delta[:, now], a, b[:, now], c[:, now], initial_state=state, begins_BT=begins[:, now]
    )
    np.testing.assert_allclose(y[:, 0], want[:, t], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_plain_autodiff():
  with jax.enable_x64(True):
    inputs, state, begins = drawn(np.float64)

    def plain(x, delta, a, b, c, state):
      def step(state, given):
        x, delta, b, c, begins = given
        decay = jnp.where(begins[:, None, None], 0, jnp.exp(delta[..., None] * a))
        state = decay * state + (delta * x)[..., None] * b[:, None]
        return state, (state * c[:, None]).sum(-1)

      state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(z, 1, 0) for z in (x, delta, b, c, begins)))
      return jnp.sin(y).sum() + jnp.cos(state).sum()

    def chunked(*args):
      y, state = selective_scan(*args[:-1], initial_state=args[-1], begins_BT=begins, chunk=8)
      return jnp.sin(y).sum() + jnp.cos(state).sum()

    want, got = (jax.grad(f, argnums=range(6))(*inputs, state) for f in (plain, chunked))
    for ours, theirs in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_bfloat16_is_computed_in_float32():
  inputs, _, _ = drawn()
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
  got, state = selective_scan(*narrow)
  want, _ = selective_scan(*(np.asarray(x, np.float32) for x in narrow))
  assert got.dtype == state.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


def test_linear_recurrence():
  decay, enters = jnp.array([0.5, 2.0, 0.0]), jnp.array([1.0, 1.0, 3.0])
  np.testing.assert_array_equal(linear_recurrence(decay, enters, jnp.array(4.0)), [3.0, 7.0, 3.0])
