"""Logits of every position of a batch of rows, checked and padded so that few programs are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.inference.decode import round_up_length
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState, Padding, Transformer


def logits_of(
  model: Transformer,
  params: Mapping[str, Any],
  tokens: jax.typing.ArrayLike,
  state: DecodeState | None,
  *,
  lengths: jax.typing.ArrayLike | None,
  segment_ids: jax.typing.ArrayLike | None,
  padding: Padding,
) -> tuple[jax.Array, DecodeState]:
  """Returns (logits float32 [B, T, vocabulary], state); for the arguments and errors see `LM.__call__`."""
  inputs: dict[str, Any] = {"tokens": tokens, "lengths": lengths, "segment_ids": segment_ids}
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((inputs, state)))
  to_array: Callable[[Any], Any] = jnp.asarray if traced else np.asarray
  inputs = {name: None if x is None else to_array(x) for name, x in inputs.items()}
  run = _logits if traced else _checked
  return run(model, params, inputs.pop("tokens"), state, padding=padding, **inputs)


def _checked(model, params, tokens, state, *, lengths, segment_ids, padding):
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 1:
    raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}: wanted integers [B, T] with T >= 1.")
  batch, time = tokens.shape
  for name, array, shape in (("lengths", lengths, (batch,)), ("segment_ids", segment_ids, (batch, time))):
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} have shape {list(array.shape)}: wanted {list(shape)}.")
  count = np.full(batch, time) if lengths is None else lengths
  if count.min() < 0 or count.max() > time:
    raise ValueError(f"lengths are {count.tolist()}: wanted 0 to {time}.")
  step = np.arange(time)
  real = step < count[:, None] if padding == "right" else step >= time - count[:, None]
  outside = tokens[real & ((tokens < 0) | (tokens >= model.config.vocab_size))]
  if outside.size:
    raise ValueError(f"Token {outside[0]} is not in the vocabulary, 0 to {model.config.vocab_size - 1}.")

  if any(mixer_class(mixer).GROWS for mixer in model.config.mixers):
    held = np.zeros(batch, np.int64) if state is None else np.asarray(state.cached)
    state = _with_capacity(model, state, batch, int((held + count).max()))
  # jit compiles a program per shape: rounding T up keeps them few, and padding does not change the result.
  fill = round_up_length(time) - time
  if fill and lengths is None:
    lengths = count
  sides = (0, fill) if padding == "right" else (fill, 0)
  tokens = np.pad(tokens, ((0, 0), sides))
  segment_ids = None if segment_ids is None else np.pad(segment_ids, ((0, 0), sides))
  logits, state = _logits(
    model, params, tokens.astype(np.int32), state, lengths=lengths, segment_ids=segment_ids, padding=padding
  )
  return logits[:, sides[0] : sides[0] + time], state


@functools.partial(jax.jit, static_argnums=0, static_argnames="padding")
def _logits(model, params, tokens, state, **kwargs):
  return model.apply({"params": params}, tokens, state, method="logits", **kwargs)


def _with_capacity(model: Transformer, state: DecodeState | None, batch: int, wanted: int) -> DecodeState:
  """Returns a new or grown state with room for `wanted` tokens, rounded up to a power of two to compile few shapes."""
  capacity = 1 << max(wanted - 1, 0).bit_length()
  if state is None:
    return model.init_state(batch, capacity)
  return state if state.capacity is None or state.capacity >= wanted else state.grow(capacity)
