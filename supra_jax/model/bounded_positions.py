"""What a memory (`bounded_attention`) sees and chooses among, as far as it follows from the positions of tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from supra_jax.model.mixers.supra_window import taken


class Positions(NamedTuple):
  """Positions of the tokens of a block of c tokens, and of the X tokens of a text that are in it or before it.

  They are the same in all layers with the same N, W and C, which therefore share them in a compiled program. Indices
  are those of tokens in their row.

  Attributes:
    first_Bc: int32 [B, c], index of the first token of each token's document.
    real_Bc: bool [B, c], whether a token is none of the padding.
    sees_BcX: bool [B, c, N + X], which sinks and which tokens of the text each token sees. Tokens that come after a
      choice see what left the window at it only if it is retained.
    unjudged_Bc: int32 [B, c], index of the first token since the last choice.
    key_BX: int32 [B, X], indices of the tokens of the text; negative where there is none.
    any_B: bool [B], whether a choice is made in the block; the next five are of that choice.
    late_Bc: bool [B, c], whether each token comes after it.
    end_B1: int32 [B, 1], index of the token after which it is made.
    first_at_end_B1: int32 [B, 1], index of the first token of that token's document.
    token_BC: int32 [B, C], indices of the tokens that leave the window.
    column_BC: int32 [B, C], where in the text they are.
  """

  first_Bc: jax.Array
  real_Bc: jax.Array
  sees_BcX: jax.Array
  unjudged_Bc: jax.Array
  key_BX: jax.Array
  any_B: jax.Array
  late_Bc: jax.Array
  end_B1: jax.Array
  first_at_end_B1: jax.Array
  token_BC: jax.Array
  column_BC: jax.Array


def positions(
  first_Bc: jax.Array,
  start_B1: jax.Array,
  real_Bc: jax.Array,
  key_BX: jax.Array,
  *,
  sinks: int,
  window: int,
  chunk: int,
  aligned: bool,
) -> Positions:
  """Computes `Positions`.

  Args:
    first_Bc, real_Bc, key_BX: as in `Positions`. Keys are in the order of the text, or in that of a ring, whose slot 0
      then holds a multiple of its extent.
    start_B1: int32 [B, 1], index of the block's first token.
    sinks, window, chunk: N, W and C.
    aligned: whether no token comes after a choice.
  """
  index = start_B1 + jnp.arange(first_Bc.shape[1])
  position = index - first_Bc
  unjudged = first_Bc + position // chunk * chunk
  oldest = jnp.maximum(first_Bc, unjudged - window)[..., None]
  near = (key_BX[:, None] <= index[..., None]) & (key_BX[:, None] >= oldest)
  begun = first_Bc[:, :1]
  sink = begun + jnp.arange(sinks)
  out_of_sight = (sink[:, None] < oldest) & (first_Bc == begun)[..., None]
  chooses_Bc = real_Bc & ((position + 1) % chunk == 0)
  if aligned:
    any_B, end_B1, first_at_end_B1 = chooses_Bc[:, -1], index[:, -1:], first_Bc[:, -1:]
    late_Bc = jnp.zeros_like(real_Bc)
  else:
    at_B1 = jnp.argmax(chooses_Bc, axis=1)[:, None]
    any_B, end_B1, first_at_end_B1 = chooses_Bc.any(axis=1), start_B1 + at_B1, taken(first_Bc, at_B1)
    late_Bc = any_B[:, None] & (index > end_B1)
  token_BC = end_B1 + 1 - window - chunk + jnp.arange(chunk)
  column_BC = (token_BC - key_BX[:, :1]) % key_BX.shape[1]
  sees = jnp.concatenate([out_of_sight, near], axis=-1)
  choice = (any_B, late_Bc, end_B1, first_at_end_B1, token_BC, column_BC)
  return Positions(first_Bc, real_Bc, sees, unjudged, key_BX, *choice)
