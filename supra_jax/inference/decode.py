"""Text from a model: a chunked prefill hands its state to a compiled decode loop."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.inference.sampling import Sampling, sample
from supra_jax.model.finite import generated_not_finite, not_finite
from supra_jax.model.transformer import DecodeState, Transformer

PREFILL_TOKENS = 512  # a piece of the prompt; memory does not grow with the prompt beyond the state
DECODE_TOKENS = 8  # a call of the decode loop: enough to hide the host, few enough to stream


def round_up_length(n: int) -> int:
  """The next length with at most three leading bits (1, 2, .., 8, 10, 12, 14, 16, 20, ...): at most a quarter more."""
  step = 1 << max(n.bit_length() - 3, 0)
  return -(-n // step) * step


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(model: Transformer, params, tokens_BT, state: DecodeState, lengths_B) -> tuple[jax.Array, DecodeState]:
  """Logits [B, V] of each row's last real token, and the state after it."""
  bound = model.bind({"params": params})
  hidden_BTD, state = bound(tokens_BT, state, lengths=lengths_B)
  last = jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
  return bound.unembed(last)[:, 0], state


def prefill(model: Transformer, params: Mapping[str, Any], tokens_BT: np.ndarray, state: DecodeState):
  """Reads a prompt piece by piece.

  Args:
    model, params: parameters with one subtree a layer.
    tokens_BT: int32 [B, T], no padding, T >= 1.
    state: to go on from; it is given away.

  Returns:
    (logits float32 [B, vocabulary] after the last token, state).
  """
  batch, time = tokens_BT.shape
  for start in range(0, time, PREFILL_TOKENS):
    piece = tokens_BT[:, start : start + PREFILL_TOKENS]
    count = piece.shape[1]
    piece = np.pad(piece, ((0, 0), (0, round_up_length(count) - count)))
    logits, state = _prefill(model, params, piece, state, np.full(batch, count, np.int32))
  return logits, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _decode(model: Transformer, sampling: Sampling, steps: int, params, token_B, state: DecodeState, key):
  """Reads `token`, draws the next, `steps` times over: ((tokens, whether logits were finite) [steps, B], last token,
  state, key)."""

  def step(carry, _):
    token, state, key = carry
    key, draw = jax.random.split(key)
    logits, state = model.bind({"params": params}).logits(token[:, None], state)
    token = sample(logits[:, 0], draw, sampling)
    return (token, state, key), (token, jnp.isfinite(logits[:, 0]).all(-1))

  (token_B, state, key), drawn = jax.lax.scan(step, (token_B, state, key), length=steps)
  return drawn, token_B, state, key


def generate_tokens(
  model: Transformer,
  params: Mapping[str, Any],
  prompt_ids: Sequence[int],
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop_ids: Collection[int] = (),
) -> Iterator[int]:
  """Yields the tokens that follow a prompt.

  Args:
    model, params: parameters with one subtree a layer.
    prompt_ids: at least one token.
    max_new_tokens: at most so many.
    sampling: greedy unless told otherwise.
    seed: of the sampling; which tokens are drawn does not depend on how the loop is cut.
    stop_ids: a drawn token that is among them ends the text and is not yielded.

  Raises:
    NotFiniteError: the logits that a token is drawn from are not finite; says after which token.
  """
  if not prompt_ids:
    raise ValueError("The prompt is empty, and the model has no token that starts or ends a text: give at least one.")
  if max_new_tokens < 1:
    return
  key, draw = jax.random.split(jax.random.key(seed))
  # DECODE_TOKENS of slack: the loop runs whole calls, and the last may draw tokens that nobody asked for.
  state = model.init_state(1, len(prompt_ids) + max_new_tokens + DECODE_TOKENS)
  logits, state = prefill(model, params, np.asarray([prompt_ids], np.int32), state)
  token_B = sample(logits, draw, sampling)
  ready, done, last = (token_B[None], jnp.isfinite(logits).all(-1)[None]), 0, prompt_ids[-1]
  while True:
    # The next tokens are under way on the device while the host turns these into text.
    following = None
    if max_new_tokens - done > len(ready[0]):
      following, token_B, state, key = _decode(model, sampling, DECODE_TOKENS, params, token_B, state, key)
    tokens, finite = (np.asarray(x)[: max_new_tokens - done, 0].tolist() for x in ready)
    for token, is_finite in zip(tokens, finite, strict=True):
      if not is_finite:
        raise generated_not_finite(model, done, last) if done else not_finite(model, params, [prompt_ids])
      if token in stop_ids:
        return
      last, done = token, done + 1
      yield token
    if following is None:
      return
    ready = following
