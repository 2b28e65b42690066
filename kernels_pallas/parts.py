"""A row cut into parts that run side by side: where they begin, and which state each one begins with.

A part knows what it adds to the state without knowing the state before it. So: (1) each part from a zero state, states
only; (2) `prefix`, one small product, gives each part its own initial state; (3) each part for good, all at once. It
reads keys and values twice, and pays where there are fewer heads and rows than multiprocessors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import decay

# In units of the time of one chunk in step (3): a state's way in and out, and one chunk in step (1).
_STATE_CHUNKS = 2
_STATES_ONLY = 0.5
_MAX_PARTS = 64


class Parts(NamedTuple):
  """`num_parts` parts of `num_chunks` chunks of `chunk` tokens; the last one may reach beyond the row."""

  num_parts: int
  num_chunks: int
  chunk: int

  @property
  def tokens(self) -> int:
    return self.num_parts * self.num_chunks * self.chunk


def cut(num_tokens: int, chunk: int, count: int) -> Parts:
  """At most `count` equal parts, none of which begins beyond the row."""
  total = -(-num_tokens // chunk)
  num_chunks = -(-total // count)
  return Parts(-(-total // num_chunks), num_chunks, chunk)


def choose_count(programs: int, num_chunks: int, at_once: int) -> int:
  """The number of parts that takes the least time, were programs to run in waves and each chunk to take as long.

  Args:
    programs: how many there are without parts, rows times heads times blocks of the value width.
    num_chunks: what each of them has to do then.
    at_once: how many the device runs at once.
  """

  def time(count: int) -> float:
    waves, chunks = -(-programs * count // at_once), -(-num_chunks // count)
    return waves * (chunks + _STATE_CHUNKS) * (1 if count == 1 else 1 + _STATES_ONLY)

  return min(range(1, min(_MAX_PARTS, num_chunks) + 1), key=time)


def boundaries(
  parts: Parts, num_tokens: int, segment_ids_BT: jax.Array | None, lengths_B: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """What `carry_weights` asks about the P + 1 boundaries between parts, both ends of the row among them.

  Args:
    parts: how the row is cut.
    num_tokens: T.
    segment_ids_BT: [B, T] int32, canonical; None: one document.
    lengths_B: [B] int32; None: no padding.
  """
  at_P = parts.num_chunks * parts.chunk * jnp.arange(parts.num_parts + 1)
  valid_BP = jnp.atleast_2d(jnp.minimum(at_P, num_tokens if lengths_B is None else lengths_B[:, None]))
  return valid_BP, None if segment_ids_BT is None else decay.state_documents(segment_ids_BT, lengths_B, at_P)


def carry_weights(slopes_H: jax.Array, valid_BP: jax.Array, documents_BP: jax.Array | None) -> jax.Array:
  """What is left at a boundary of a state at an earlier one.

  Args:
    slopes_H: [H] float, at least 0; the weights take its dtype.
    valid_BP: [B or 1, P] int, how many valid tokens lie before each boundary.
    documents_BP: [B, P] int, the document of the state there; None: one document.

  Returns:
    [B or 1, H, P, P]: gamma to the number of valid tokens between boundaries r <= p at [p, r], 0 where a document
    begins in between and above the diagonal.
  """
  weights_BHPP = jnp.moveaxis(decay.powers(slopes_H, valid_BP[:, :, None] - valid_BP[:, None, :]), 0, 1)
  connected_BPP = jnp.tril(jnp.ones((1, *weights_BHPP.shape[2:]), bool))
  if documents_BP is not None:
    connected_BPP &= documents_BP[:, :, None] == documents_BP[:, None, :]
  return weights_BHPP * connected_BPP[:, None]


def prefix(
  state_BHKV: jax.Array, added_BPHKV: jax.Array, weights_BHPP: jax.Array, *, reverse: bool = False
) -> jax.Array:
  """The state that each part begins with, in the direction in which it runs.

  Args:
    state_BHKV: what the first part to run begins with.
    added_BPHKV: [B, P - 1, H, K, V], what each part but the last to run adds, from a zero state.
    weights_BHPP: of `carry_weights`.
    reverse: whether parts run from the last token to the first.

  Returns:
    [B, P, H, K, V], in the order of the tokens.
  """
  if reverse:
    states_BPHKV = jnp.concatenate([added_BPHKV, state_BHKV[:, None]], axis=1)
    weights_BHPP = jnp.swapaxes(weights_BHPP[:, :, 1:, 1:], 2, 3)
  else:
    states_BPHKV = jnp.concatenate([state_BHKV[:, None], added_BPHKV], axis=1)
    weights_BHPP = weights_BHPP[:, :, :-1, :-1]
  weights_BHPP = jnp.broadcast_to(weights_BHPP, (state_BHKV.shape[0], *weights_BHPP.shape[1:]))
  # Accelerators multiply float32 with fewer bits unless told otherwise.
  return jnp.einsum("bhpr,brhkv->bphkv", weights_BHPP, states_BPHKV, precision=jax.lax.Precision.HIGHEST)
