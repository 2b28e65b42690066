"""Decay weights, document ids and padding masks, shared by every implementation of the op.

Exponents of gamma are never negative, and nothing is divided by a power of gamma, so no slope can cause an overflow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ChunkWeights(NamedTuple):
  """Weights between the tokens and states of M consecutive chunks of C tokens.

  The axis B has size 1 if all rows have the same weights. The axis M of `intra` and `row` has size 1 if all chunks have
  the same weights.

  Attributes:
    intra_BMHCC: at [..., a, b], weight with which token a sees token b of the same chunk.
    row_BMHC: weight with which each token sees the state before its chunk.
    column_BMHC: weight of each token b in the state after its chunk, carry * (state before) + sum_b column_b k_b v_b^T.
    carry_BMH: weight of the state before a chunk in the state after it.
  """

  intra_BMHCC: jax.Array
  row_BMHC: jax.Array
  column_BMHC: jax.Array
  carry_BMH: jax.Array


def canonical_segments(segment_ids_BT: jax.Array) -> jax.Array:
  """Numbers documents 0, 1, 2, ... in order of appearance, so that a re-used id is a new document.

  Args:
    segment_ids_BT: [B, T] integer, any ids; a document ends where the id changes.

  Returns:
    [B, T] int32, never decreasing along T, 0 for the first token's document.
  """
  changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  return jnp.pad(jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def first_tokens(segment_ids_BT: jax.Array) -> jax.Array:
  """Returns the index of the first token of each token's document, [B, T] int32; takes canonical segment ids."""
  begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
  positions_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
  return jax.lax.cummax(jnp.where(begins_BT, positions_T, 0), axis=1)


def valid_tokens(lengths_B: jax.Array, start: int | jax.Array, num_tokens: int) -> jax.Array:
  """Whether each of the tokens t = start, start + 1, ... is valid, that is t < lengths[b]; bool [B, num_tokens]."""
  return start + jnp.arange(num_tokens) < lengths_B[:, None]


def keep(mask_BT: jax.Array | None, x_BTHD: jax.Array) -> jax.Array:
  """Returns x with zeros at tokens whose mask is False; mask None returns x unchanged.

  Tokens are selected, not multiplied by 0, because padding may hold NaN and 0 * NaN is NaN.
  """
  if mask_BT is None:
    return x_BTHD
  return jnp.where(mask_BT[:, :, None, None], x_BTHD, jnp.zeros((), x_BTHD.dtype))


def powers(slopes_H: jax.Array, distance: jax.Array) -> jax.Array:
  """Returns gamma_h^distance = exp(-s_h * distance), of shape [H, *distance.shape], in the dtype of the slopes.

  Args:
    slopes_H: [H] float, at least 0.
    distance: integers of any shape. Negative distances count as 0; callers mask the results for them.
  """
  distance = jnp.maximum(distance, 0).astype(slopes_H.dtype)
  return jnp.exp(-slopes_H.reshape(-1, *(1,) * distance.ndim) * distance)


def causal_powers(slopes_H: jax.Array, num_tokens: int) -> jax.Array:
  """Returns gamma_h^(i-j) where j <= i, and 0 above the diagonal, [H, T, T]."""
  distance_TT = jnp.arange(num_tokens)[:, None] - jnp.arange(num_tokens)
  return jnp.where(distance_TT >= 0, powers(slopes_H, distance_TT), 0)


def state_documents(segment_ids_BT: jax.Array, lengths_B: jax.Array | None, starts_M: jax.Array) -> jax.Array:
  """Returns the document to which the state before token `starts_M[m]` belongs, [B, M] int32.

  That is the document of the last valid token before `starts_M[m]`, or token 0's document if there is no such token.

  Args:
    segment_ids_BT: [B, T] int32, canonical ids (or any per-document values, which are then returned).
    lengths_B: [B] int32, number of valid tokens per row; None: no padding.
    starts_M: [M] int, token indices, which may exceed T.
  """
  batch, num_tokens = segment_ids_BT.shape
  ends_BM = jnp.minimum(starts_M, num_tokens if lengths_B is None else lengths_B[:, None])
  last_BM = jnp.broadcast_to(jnp.maximum(ends_BM - 1, 0), (batch, starts_M.size))
  return jnp.take_along_axis(segment_ids_BT, last_BM, axis=1)


def chunk_weights(
  slopes_H: jax.Array,
  segment_ids_BT: jax.Array | None,
  lengths_B: jax.Array | None,
  *,
  start: int | jax.Array,
  num_chunks: int,
  chunk: int,
  scale: float,
) -> ChunkWeights:
  """Returns the weights of the `num_chunks` chunks of `chunk` tokens that begin at token `start`.

  Args:
    slopes_H: [H] float; the weights take its dtype.
    segment_ids_BT: [B, T] int32, canonical ids of the whole row; None: one document.
    lengths_B: [B] int32, number of valid tokens per row; None: no padding.
    start: index of the first chunk's first token. The chunks may exceed T only if `lengths_B` excludes those tokens.
    num_chunks: M, the number of chunks.
    chunk: C, the number of tokens per chunk.
    scale: factor of `intra` and `row`, the weights in outputs; the weights in states are not scaled.
  """
  position_C = jnp.arange(chunk)
  intra_BMHCC = scale * causal_powers(slopes_H, chunk)[None, None]
  row_BMHC = scale * powers(slopes_H, position_C + 1)[None, None]
  if segment_ids_BT is None and lengths_B is None:
    column_HC, carry_H = powers(slopes_H, chunk - 1 - position_C), powers(slopes_H, jnp.asarray(chunk))
    column_BMHC, carry_BMH = (jnp.broadcast_to(x, (1, num_chunks, *x.shape)) for x in (column_HC, carry_H))
    return ChunkWeights(intra_BMHCC, row_BMHC, column_BMHC, carry_BMH)

  starts_M = start + chunk * jnp.arange(num_chunks)
  if lengths_B is None:
    lengths_B = jnp.full((1,), start + num_chunks * chunk, jnp.int32)
  count_BM = jnp.clip(lengths_B[:, None] - starts_M, 0, chunk)
  column_BMHC = jnp.moveaxis(powers(slopes_H, count_BM[:, :, None] - 1 - position_C), 0, 2)
  column_BMHC *= (position_C < count_BM[:, :, None])[:, :, None]
  carry_BMH = jnp.moveaxis(powers(slopes_H, count_BM), 0, 2)
  if segment_ids_BT is None:
    return ChunkWeights(intra_BMHCC, row_BMHC, column_BMHC, carry_BMH)

  ends_M = jnp.append(starts_M, starts_M[-1] + chunk)
  state_document_BM = state_documents(segment_ids_BT, lengths_B, ends_M)
  before_BM, after_BM = state_document_BM[:, :-1], state_document_BM[:, 1:]
  tokens_MC = jnp.minimum(starts_M[:, None] + position_C, segment_ids_BT.shape[1] - 1)
  document_BMC = segment_ids_BT[:, tokens_MC]
  return ChunkWeights(
    intra_BMHCC * (document_BMC[:, :, None, :, None] == document_BMC[:, :, None, None, :]),
    row_BMHC * (document_BMC == before_BM[:, :, None])[:, :, None],
    column_BMHC * (document_BMC == after_BM[:, :, None])[:, :, None],
    carry_BMH * (before_BM == after_BM)[:, :, None],
  )
