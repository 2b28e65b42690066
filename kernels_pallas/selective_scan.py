"""The selective scan of Mamba (S6; Gu and Dao 2023, arXiv 2312.00752, algorithm 2): over a sequence, and as one step.

  h_t = exp(delta_t a) * h_{t-1} + delta_t x_t b_t
  y_t = h_t . c_t

Shape suffixes: B batch, T time, E channels, N numbers in the state of a channel, C tokens of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 32  # tokens: what the backward pass holds of the states, per chunk, and of one chunk at a time all


def selective_scan(
  x_BTE: jax.Array,
  delta_BTE: jax.Array,
  a_EN: jax.Array,
  b_BTN: jax.Array,
  c_BTN: jax.Array,
  *,
  initial_state: jax.Array | None = None,
  begins_BT: jax.Array | None = None,
  chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Computes the selective scan, in float32 at least.

  Memory of the backward pass is that of T / C + C states: those inside a chunk are computed again.

  Args:
    x_BTE: inputs.
    delta_BTE: step sizes, at least 0; a token with 0 does not change the state.
    a_EN: rates, below 0.
    b_BTN, c_BTN: what a token writes to and reads from the state.
    initial_state: h before the first token, [B, E, N]; None: 0.
    begins_BT: bool, whether a token begins a document, for which h before it is 0; None: none does.
    chunk: C.

  Returns:
    (y [B, T, E], h after the last token, [B, E, N]).
  """
  wide = jnp.promote_types(x_BTE.dtype, jnp.float32)
  x, delta, a, b, c = (y.astype(wide) for y in (x_BTE, delta_BTE, a_EN, b_BTN, c_BTN))
  batch, time, channels = x.shape
  state = jnp.zeros((batch, channels, a.shape[1]), wide) if initial_state is None else initial_state.astype(wide)
  begins = jnp.zeros((batch, time), wide) if begins_BT is None else begins_BT.astype(wide)
  if time == 1:
    decay, enters = _terms(x[:, 0], delta[:, 0], a, b[:, 0], begins[:, 0])
    state = decay * state + enters
    return jnp.einsum("ben,bn->be", state, c[:, 0])[:, None], state

  chunk = min(chunk, time)

  def in_chunks(y: jax.Array) -> jax.Array:
    """[B, T, ...] -> [T / C, C, B, ...]; the tokens that are added have delta 0 and change nothing."""
    y = jnp.moveaxis(jnp.pad(y, ((0, 0), (0, -time % chunk), *[(0, 0)] * (y.ndim - 2))), 1, 0)
    return y.reshape(-1, chunk, *y.shape[1:])

  @jax.checkpoint
  def one(state: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    x, delta, b, c, begins = given
    states = linear_recurrence(*_terms(x, delta, a, b, begins), state)
    return states[-1], jnp.einsum("cben,cbn->cbe", states, c)

  state, y = jax.lax.scan(one, state, tuple(in_chunks(z) for z in (x, delta, b, c, begins)))
  return jnp.moveaxis(y.reshape(-1, batch, channels), 0, 1)[:, :time], state


def _terms(
  x: jax.Array, delta: jax.Array, a_EN: jax.Array, b: jax.Array, begins: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (exp(delta a), or 0 where a document begins; delta x b), both [..., E, N]."""
  decay = jnp.exp(delta[..., None] * a_EN) * (1 - begins)[..., None, None]
  return decay, (delta * x)[..., None] * b[..., None, :]


@jax.custom_vjp
def linear_recurrence(decay: jax.Array, enters: jax.Array, state: jax.Array) -> jax.Array:
  """Returns h_t = decay_t * h_{t-1} + enters_t for all t, [T, ...].

  The gradient is one more recurrence, backwards; what plain autodiff would save for it is not saved.

  Args:
    decay, enters: [T, ...].
    state: h before the first t, [...].
  """

  def step(state: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    state = given[0] * state + given[1]
    return state, state

  return jax.lax.scan(step, state, (decay, enters))[1]


def _forward(decay, enters, state):
  states = linear_recurrence(decay, enters, state)
  return states, (decay, states, state)


def _backward(residuals, grad):
  decay, states, state = residuals
  # The gradient of h_t is what comes from outside and decay_{t+1} times the gradient of h_{t+1}.
  later = jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])])
  of_states = linear_recurrence(later[::-1], grad[::-1], jnp.zeros_like(state))[::-1]
  before = jnp.concatenate([state[None], states[:-1]])
  return of_states * before, of_states, decay[0] * of_states[0]


linear_recurrence.defvjp(_forward, _backward)
