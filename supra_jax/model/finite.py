"""Finds where a model's numbers stop being finite, and makes the error that says so."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.model.transformer import STREAMS, DecodeState, Transformer

_PIECE_TOKENS = 512  # tokens read at once, so that no memory but that of the state grows with the text


class NotFiniteError(ValueError):
  """Logits are NaN or infinite; the message says where, and what to try."""


def not_finite(
  model: Transformer,
  params: Mapping[str, Any],
  windows: Sequence[Sequence[int]],
  *,
  before: int = 0,
  otherwise: str | None = None,
) -> NotFiniteError:
  """Returns the error for a text whose logits are not all finite; reads the text again to find the first such logits.

  Args:
    model: the model, not stacked.
    params: parameters with one subtree per layer.
    windows: the token ids of the text, cut into windows that do not see each other.
    before: number of tokens of the text before the first window.
    otherwise: what to say if all logits are finite this time.
  """
  for window in windows:
    state = model.init_state(1, len(window))
    for start in range(0, len(window), _PIECE_TOKENS):
      piece = np.asarray(window[start : start + _PIECE_TOKENS], np.int32)
      read = functools.partial(_read_finite, model, params, piece, state)
      (is_finite, _), state = read(len(piece))
      if not is_finite:
        # In a parallel pass the logits of earlier tokens are NaN too, since a masked weight of 0 times NaN is NaN.
        at = bisect.bisect_left(range(1, len(piece)), True, key=lambda count: not read(count)[0][0])
        layers = np.flatnonzero(~np.asarray(read(at + 1)[0][1]))
        layer = f"; layer {layers[0]} is the first whose output is not finite" if layers.size else ""
        return NotFiniteError(
          f"The logits after token {before + start + at + 1} of the text (id {piece[at]}) are not finite{layer}. "
          f"{_advice(model)}"
        )
    before += len(window)
  return NotFiniteError(otherwise or f"The logits of the text are not finite. {_advice(model)}")


def generated_not_finite(model: Transformer, count: int, token: int) -> NotFiniteError:
  """Returns the error for logits that are not finite after `count` generated tokens, the last with id `token`."""
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
  """Reads a piece of a text, of which the first `count` tokens are checked.

  Returns:
    ((whether their logits are finite, bool [L]: whether the output of each layer is), the state after the whole piece).
  """
  seen_T = jnp.arange(tokens_T.size) < count
  tokens_BT = jnp.where(seen_T, tokens_T, tokens_T[0])[None]
  (logits, state), kept = model.apply({"params": params}, tokens_BT, state, method="logits", mutable=[STREAMS])
  leaves = [kept[STREAMS][f"layers_{i}"]["leaves"] for i in range(model.config.num_layers)]
  finite = [(jnp.isfinite(x_BTD[0]).all(-1) | ~seen_T).all() for x_BTD in (logits, *leaves)]
  return (finite[0], jnp.stack(finite[1:])), state
