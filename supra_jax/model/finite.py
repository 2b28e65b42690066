"""Where a model's numbers stop being finite, for the error that says so."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.model.transformer import STREAMS, DecodeState, Transformer

_PIECE_TOKENS = 512  # read at once; memory does not grow with the text beyond the state


class NotFiniteError(ValueError):
  """Logits are NaN or infinite; the message says where, and what to try."""


def not_finite(
  model: Transformer, params: Mapping[str, Any], windows: Sequence[Sequence[int]], *, before: int = 0
) -> NotFiniteError:
  """The error for a text whose logits are not all finite; reads the text again to find the first.

  Args:
    model, params: parameters with one subtree a layer.
    windows: the text, in windows that do not see each other.
    before: how many tokens come before the first window.
  """
  for window in windows:
    state = model.init_state(1, len(window))
    for start in range(0, len(window), _PIECE_TOKENS):
      piece = np.asarray(window[start : start + _PIECE_TOKENS], np.int32)
      read = functools.partial(_read_finite, model, params, piece, state)
      (is_finite, _), state = read(len(piece))
      if not is_finite:
        # In a parallel pass tokens that come before are NaN too: 0, their share of what they do not see, times NaN.
        at = bisect.bisect_left(range(1, len(piece)), True, key=lambda count: not read(count)[0][0])
        layers = np.flatnonzero(~np.asarray(read(at + 1)[0][1]))
        layer = f"; layer {layers[0]} is the first whose output is not finite" if layers.size else ""
        return NotFiniteError(
          f"The logits after token {before + start + at + 1} of the text (id {piece[at]}) are not finite{layer}. "
          f"{_advice(model)}"
        )
    before += len(window)
  return NotFiniteError(f"The logits of the text are not finite. {_advice(model)}")


def generated_not_finite(model: Transformer, count: int, token: int) -> NotFiniteError:
  """The error for logits that are not finite after `count` new tokens, of which `token` is the last."""
  return NotFiniteError(f"The logits after new token {count} (id {token}) are not finite. {_advice(model)}")


def _advice(model: Transformer) -> str:
  name = jnp.dtype(model.dtype).name
  if jnp.dtype(model.dtype).itemsize < 4:
    return f"{name} may be too small for them: try --dtype=float32, in Python dtype='float32'."
  return f"They were computed in {name}, so the parameters themselves are at fault."


@functools.partial(jax.jit, static_argnums=0)
def _read_finite(
  model: Transformer, params, tokens_T, state: DecodeState, count: int
) -> tuple[tuple[jax.Array, jax.Array], DecodeState]:
  """Whether the logits of the first `count` tokens are finite, and what leaves each layer [L]; the state after all."""
  seen_T = jnp.arange(tokens_T.size) < count
  tokens_BT = jnp.where(seen_T, tokens_T, tokens_T[0])[None]
  (logits, state), kept = model.apply({"params": params}, tokens_BT, state, method="logits", mutable=[STREAMS])
  leaves = [kept[STREAMS][f"layers_{i}"]["leaves"] for i in range(model.config.num_layers)]
  finite = [(jnp.isfinite(x_BTD[0]).all(-1) | ~seen_T).all() for x_BTD in (logits, *leaves)]
  return (finite[0], jnp.stack(finite[1:])), state
