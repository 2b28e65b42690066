"""Token generation: a prefill that reads the prompt in pieces, then a compiled decode loop."""

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

PREFILL_TOKENS = 512  # most tokens of a piece of the prompt, so that activations do not grow with the prompt
SHORTEST_PREFILL = 16  # least tokens of a piece; padding to 16 costs no time, since reading the weights takes longer
SHORTEST_CACHE = 64  # least tokens that a cache has room for
DECODE_TOKENS = 8  # steps per call of the decode loop: enough to hide the host's work, few enough to stream


def round_up_length(n: int) -> int:
  """Rounds n up to a number of three significant bits (1, 2, .., 8, 10, 12, 14, 16, 20, ...), at most 1.25 n."""
  step = 1 << max(n.bit_length() - 3, 0)
  return -(-n // step) * step


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(model: Transformer, params, tokens_BT, state: DecodeState, lengths_B) -> tuple[jax.Array, DecodeState]:
  """Returns (logits [B, V] after each row's last real token, state after these tokens)."""
  bound = model.bind({"params": params})
  hidden_BTD, state = bound(tokens_BT, state, lengths=lengths_B)
  last = jnp.take_along_axis(hidden_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
  return bound.unembed(last)[:, 0], state


def prefill(model: Transformer, params: Mapping[str, Any], tokens_BT: np.ndarray, state: DecodeState):
  """Reads a prompt in pieces of PREFILL_TOKENS, and returns the logits and the state after its last token.

  Args:
    model: the model, not stacked.
    params: the model's parameters, one subtree per layer.
    tokens_BT: int32 [B, T] without padding, T >= 1.
    state: the state to continue from, with room for T more tokens; it is donated.

  Returns:
    (logits float32 [B, vocabulary] after the last token, state after the last token).
  """
  batch, time = tokens_BT.shape
  for start in range(0, time, PREFILL_TOKENS):
    piece = tokens_BT[:, start : start + PREFILL_TOKENS]
    count = piece.shape[1]
    piece = np.pad(piece, ((0, 0), (0, max(round_up_length(count), SHORTEST_PREFILL) - count)))
    logits, state = _prefill(model, params, piece, state, np.full(batch, count, np.int32))
  return logits, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode_steps(model: Transformer, sampling: Sampling, steps: int, params, token_B, state: DecodeState, key):
  """Decodes `steps` tokens: each step reads the last token and draws the next. The state is donated.

  Returns:
    ((tokens int32 [steps, B], whether all logits were finite, bool [steps, B]), last token [B], state, key).
  """

  def step(carry, _):
    token, state, key = carry
    key, draw = jax.random.split(key)
    logits, state = model.bind({"params": params}).logits(token[:, None], state)
    token = sample(logits[:, 0], draw, sampling)
    return (token, state, key), (token, jnp.isfinite(logits[:, 0]).all(-1))

  (token_B, state, key), drawn = jax.lax.scan(step, (token_B, state, key), length=steps)
  return drawn, token_B, state, key


@functools.partial(jax.jit, static_argnums=0)
def _first(sampling: Sampling, logits_BV: jax.Array, key):
  """Draws the token after the prompt.

  Compiled, so that the results are on the same devices as those of `decode_steps`, which so compiles only once.

  Returns:
    ((tokens int32 [1, B], whether all logits were finite, bool [1, B]), token [B], key).
  """
  key, draw = jax.random.split(key)
  token_B = sample(logits_BV, draw, sampling)
  return (token_B[None], jnp.isfinite(logits_BV).all(-1)[None]), token_B, key


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
  """Yields the tokens that the model generates after a prompt.

  Args:
    model: the model, not stacked.
    params: the model's parameters, one subtree per layer.
    prompt_ids: token ids of the prompt, at least one.
    max_new_tokens: number of tokens after which generation ends; below 1: no token is generated.
    sampling: how a token is drawn; greedy by default.
    seed: seeds the draws, which do not depend on DECODE_TOKENS.
    stop_ids: token ids that end the text; they are not yielded.

  Raises:
    NotFiniteError: the logits after a token are not finite; the message says after which token.
    ValueError: the prompt is empty; raised when the first token is asked for.
  """
  if not prompt_ids:
    raise ValueError("The prompt is empty, and the model has no token that starts or ends a text: give at least one.")
  if max_new_tokens < 1:
    return
  # Room for DECODE_TOKENS more: each call of `decode_steps` runs all its steps, so the last may draw too many.
  # Rounded up, so that texts of about the same length share their programs.
  capacity = len(prompt_ids) + max_new_tokens + DECODE_TOKENS
  state = model.init_state(1, max(round_up_length(capacity), SHORTEST_CACHE))
  logits, state = prefill(model, params, np.asarray([prompt_ids], np.int32), state)
  ready, token_B, key = _first(sampling, logits, jax.random.key(seed))
  done, last = 0, prompt_ids[-1]
  while True:
    # Dispatched first, so that the device computes the next tokens while the host turns these into text.
    following = None
    if max_new_tokens - done > len(ready[0]):
      following, token_B, state, key = decode_steps(model, sampling, DECODE_TOKENS, params, token_B, state, key)
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
