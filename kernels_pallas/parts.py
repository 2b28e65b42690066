"""Cuts a row into parts that run in parallel, and computes the initial state of each part.

What a part adds to the state does not depend on the state before it. Hence three steps: (1) all parts in parallel
compute what they add to the state, starting from zero; (2) `prefix`, one small matrix product, gives each part its
initial state; (3) all parts in parallel compute their outputs. Keys and values are read twice, in (1) and in (3), which
pays off if the GPU has more multiprocessors than there are heads in all rows together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import decay

# Estimated times in units of one chunk's time in step (3).
_STATE_CHUNKS = 2  # loading and storing a state
_STATES_ONLY = 0.5  # one chunk in step (1)
_MAX_PARTS = 64


class Parts(NamedTuple):
  """A row cut into `num_parts` parts of `num_chunks` chunks of `chunk` tokens; the last part may exceed the row."""

  num_parts: int
  num_chunks: int
  chunk: int

  @property
  def tokens(self) -> int:
    """Number of tokens in all parts together, the padding after the row's end included."""
    return self.num_parts * self.num_chunks * self.chunk


def cut(num_tokens: int, chunk: int, count: int) -> Parts:
  """Cuts a row of `num_tokens` into at most `count` equal parts of whole chunks of `chunk` tokens; no part is empty."""
  total = -(-num_tokens // chunk)
  num_chunks = -(-total // count)
  return Parts(-(-total // num_chunks), num_chunks, chunk)


def choose_count(programs: int, num_chunks: int, at_once: int) -> int:
  """Returns the number of parts with the least estimated time. Assumes waves of programs and equal times of all chunks.

  Args:
    programs: number of programs if a row is one part: rows times heads times blocks of the value width.
    num_chunks: number of chunks of a row.
    at_once: number of programs that the device runs at once.
  """

  def time(count: int) -> float:
    waves, chunks = -(-programs * count // at_once), -(-num_chunks // count)
    return waves * (chunks + _STATE_CHUNKS) * (1 if count == 1 else 1 + _STATES_ONLY)

  return min(range(1, min(_MAX_PARTS, num_chunks) + 1), key=time)


def boundaries(
  parts: Parts, num_tokens: int, segment_ids_BT: jax.Array | None, lengths_B: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Returns arguments of `carry_weights` for the P + 1 boundaries of the P parts, both ends of the row included.

  Args:
    parts: how the row is cut.
    num_tokens: T.
    segment_ids_BT: [B, T] int32, canonical; None: one document.
    lengths_B: [B] int32, number of valid tokens per row; None: no padding.

  Returns:
    The number of valid tokens before each boundary, [B or 1, P + 1], and the document of the state at each
    boundary, [B, P + 1]; None without segment ids.
  """
  at_P = parts.num_chunks * parts.chunk * jnp.arange(parts.num_parts + 1)
  valid_BP = jnp.atleast_2d(jnp.minimum(at_P, num_tokens if lengths_B is None else lengths_B[:, None]))
  return valid_BP, None if segment_ids_BT is None else decay.state_documents(segment_ids_BT, lengths_B, at_P)


def carry_weights(slopes_H: jax.Array, valid_BP: jax.Array, documents_BP: jax.Array | None) -> jax.Array:
  """Returns the factor by which a state at one boundary has decayed at each later boundary.

  Args:
    slopes_H: [H] float, at least 0; the weights take its dtype.
    valid_BP: [B or 1, P] int, number of valid tokens before each boundary.
    documents_BP: [B, P] int, document of the state at each boundary; None: one document.

  Returns:
    Weights [B or 1, H, P, P]. Entry [p, r] is gamma^n for n valid tokens between boundaries r <= p; it is 0 for r > p,
    and if a document begins between them.
  """
  weights_BHPP = jnp.moveaxis(decay.powers(slopes_H, valid_BP[:, :, None] - valid_BP[:, None, :]), 0, 1)
  connected_BPP = jnp.tril(jnp.ones((1, *weights_BHPP.shape[2:]), bool))
  if documents_BP is not None:
    connected_BPP &= documents_BP[:, :, None] == documents_BP[:, None, :]
  return weights_BHPP * connected_BPP[:, None]


def prefix(
  state_BHKV: jax.Array, added_BPHKV: jax.Array, weights_BHPP: jax.Array, *, reverse: bool = False
) -> jax.Array:
  """Returns the state from which each part starts: the state before the part, or after the part if `reverse`.

  Args:
    state_BHKV: [B, H, K, V], state from which the first part to run starts.
    added_BPHKV: [B, P - 1, H, K, V], what each part but the last to run adds to a zero state.
    weights_BHPP: result of `carry_weights` for all P + 1 boundaries.
    reverse: whether parts run from the last token to the first.

  Returns:
    The states [B, P, H, K, V], in the order of the tokens.
  """
  if reverse:
    states_BPHKV = jnp.concatenate([added_BPHKV, state_BHKV[:, None]], axis=1)
    weights_BHPP = jnp.swapaxes(weights_BHPP[:, :, 1:, 1:], 2, 3)
  else:
    states_BPHKV = jnp.concatenate([state_BHKV[:, None], added_BPHKV], axis=1)
    weights_BHPP = weights_BHPP[:, :, :-1, :-1]
  weights_BHPP = jnp.broadcast_to(weights_BHPP, (state_BHKV.shape[0], *weights_BHPP.shape[1:]))
  # By default, accelerators multiply float32 at lower precision.
  return jnp.einsum("bhpr,brhkv->bphkv", weights_BHPP, states_BPHKV, precision=jax.lax.Precision.HIGHEST)
