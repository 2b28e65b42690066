"""Text from a model: a chunked prefill hands its state to a compiled decode loop."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.finite import generated_not_finite, not_finite
from supra_jax.transformer import DecodeState, Transformer

PREFILL_TOKENS = 512  # a piece of the prompt; memory does not grow with the prompt beyond the state
DECODE_TOKENS = 8  # a call of the decode loop: enough to hide the host, few enough to stream


# Of a generation_config.json: name -> the value that switches it off, beside null.
_NOT_SUPPORTED = {
  "repetition_penalty": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
  "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 0 takes the likeliest token.
    top_k: only the k likeliest tokens; 0 means all.
    top_p: only the likeliest tokens that together reach this probability; 1 means all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  @classmethod
  def of_checkpoint(cls, generation: Mapping[str, Any], **given: float | None) -> Sampling:
    """What a generation_config.json asks for: greedy, unless it says `do_sample`.

    Args:
      generation: its contents, or empty. Where it is silent transformers' defaults hold, the 50 likeliest tokens among
        them. What it asks for besides and is not supported is named in a warning.
      **given: values of fields, which go before it unless they are None.

    Raises:
      ValueError: a value is out of range, or none at all.
    """
    ignored = [f"{name}={generation[name]}" for name, off in _NOT_SUPPORTED.items() if generation.get(name, off) != off]
    if ignored:
      warnings.warn(f"generation_config.json asks for {', '.join(ignored)}, which is not supported.", stacklevel=3)
    values: dict[str, Any] = {}
    if generation.get("do_sample") is True:
      said = {name: generation[name] for name in ("temperature", "top_k", "top_p") if generation.get(name) is not None}
      values = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | said
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
      return cls(**values | chosen)
    except (TypeError, ValueError) as error:
      where = f"generation_config.json says {said}; " if values else ""
      raise ValueError(f"{where}{error}") from error

  def __post_init__(self):
    whole = isinstance(self.top_k, int) and self.top_k >= 0
    if not (0 <= self.temperature < math.inf and whole and 0 < self.top_p <= 1):
      raise ValueError(f"{self}: wanted a finite temperature >= 0, a whole top_k >= 0, and 0 < top_p <= 1.")


def round_up_length(n: int) -> int:
  """The next length with at most three leading bits (1, 2, .., 8, 10, 12, 14, 16, 20, ...): at most a quarter more."""
  step = 1 << max(n.bit_length() - 3, 0)
  return -(-n // step) * step


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token a row, int32 [B]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits = logits_BV / sampling.temperature
  if sampling.top_k:
    kept = min(sampling.top_k, logits.shape[-1])
    logits = jnp.where(logits >= jax.lax.top_k(logits, kept)[0][..., -1:], logits, -jnp.inf)
  if sampling.top_p < 1:
    ranked = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
    last = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True) - 1
    logits = jnp.where(logits >= jnp.take_along_axis(ranked, last, axis=-1), logits, -jnp.inf)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


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
