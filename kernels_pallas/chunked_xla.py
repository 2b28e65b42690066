"""The op in plain XLA: a scan over blocks of chunks with its own backward scan, for CPUs and wherever no kernel exists.

A row is cut into chunks of C tokens. Attention is quadratic inside a chunk; only the state passes between chunks. One
step of the scan handles a block of M consecutive chunks, with each kind of matrix product batched over the block.

Query heads that share a key or value head are rows of one matrix product, so keys and values are never repeated over
heads in memory. Blocks are sliced out of the operands in their layout [B, T, H, D], and results are written in place:
transposing whole operands first costs up to twice the time of the forward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import decay
from kernels_pallas.decay import ChunkWeights

_CHUNK = 64
# Wanted number of elements of an operand per block. Much smaller blocks do not occupy all cores, and much larger blocks
# do not fit into the cache.
_BLOCK_ELEMENTS = 2**17
_MAX_CHUNKS = 4


class Span(NamedTuple):
  """`tokens` tokens from index `start` on, cut into `num_chunks` chunks of `chunk` tokens; the last may be padded."""

  start: int | jax.Array
  tokens: int
  num_chunks: int
  chunk: int


class Cut(NamedTuple):
  """How a row is cut: `num_blocks` blocks like `block`, then the shorter block `tail` (None: no tokens are left)."""

  num_blocks: int
  block: Span
  tail: Span | None


def cut(num_tokens: int, chunk: int, num_chunks: int) -> Cut:
  """Cuts a row into blocks of num_chunks * chunk tokens, and a tail whose shorter chunks need little padding."""
  block = Span(0, chunk * num_chunks, num_chunks, chunk)
  num_blocks, rest = divmod(num_tokens, block.tokens)
  if not rest:
    return Cut(num_blocks, block, None)
  tail_chunks = -(-rest // chunk)
  return Cut(num_blocks, block, Span(num_tokens - rest, rest, tail_chunks, -(-rest // tail_chunks)))


def choose_num_chunks(elements_per_chunk: int) -> int:
  """Returns M, the chunks per block: the least power of two with _BLOCK_ELEMENTS per operand, at most _MAX_CHUNKS."""
  num_chunks = 1
  while num_chunks < _MAX_CHUNKS and num_chunks * elements_per_chunk < _BLOCK_ELEMENTS:
    num_chunks *= 2
  return num_chunks


def chunked(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  slopes_H: jax.Array,
  initial_state_BHKV: jax.Array,
  segment_ids_BT: jax.Array | None,
  lengths_B: jax.Array | None,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes the op in plain XLA, with the arguments and results of `kernels_pallas.api.Implementation`.

  For the backward pass, the forward pass keeps the operands and the state before each block of M chunks of C tokens:
  T / (M C) * K * V numbers per head, in the accumulation dtype.
  """
  batch, num_tokens, num_heads, key_width = q_BTHK.shape
  width = max(key_width, v_BTGV.shape[-1])
  pieces = cut(num_tokens, _CHUNK, choose_num_chunks(batch * num_heads * _CHUNK * width))
  return _attend(pieces, scale, q_BTHK, k_BTGK, v_BTGV, initial_state_BHKV, slopes_H, segment_ids_BT, lengths_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(pieces: Cut, scale: float, q_BTHK, k_BTGK, v_BTGV, state_BHKV, slopes_H, segment_ids_BT, lengths_B):
  weigh = _weigher(pieces, scale, slopes_H, segment_ids_BT, lengths_B)
  return _forward(pieces, weigh, q_BTHK, k_BTGK, v_BTGV, state_BHKV, lengths_B)[:2]


def _attend_fwd(pieces, scale, q_BTHK, k_BTGK, v_BTGV, state_BHKV, slopes_H, segment_ids_BT, lengths_B):
  weigh = _weigher(pieces, scale, slopes_H, segment_ids_BT, lengths_B)
  output_BTHV, after_BHKV, states = _forward(pieces, weigh, q_BTHK, k_BTGK, v_BTGV, state_BHKV, lengths_B)
  return (output_BTHV, after_BHKV), (q_BTHK, k_BTGK, v_BTGV, states, slopes_H, segment_ids_BT, lengths_B)


def _attend_bwd(pieces, scale, residuals, cotangents):
  q_BTHK, k_BTGK, v_BTGV, states, slopes_H, segment_ids_BT, lengths_B = residuals
  weigh = _weigher(pieces, scale, slopes_H, segment_ids_BT, lengths_B)
  d_output_BTHV, d_state_BHKV = cotangents
  gradients = _backward(pieces, weigh, q_BTHK, k_BTGK, v_BTGV, d_output_BTHV, d_state_BHKV, states, lengths_B)
  return *gradients, None, None, None  # None for the slopes: `api` refuses to differentiate them


_attend.defvjp(_attend_fwd, _attend_bwd)


def _weigher(pieces: Cut, scale: float, slopes_H, segment_ids_BT, lengths_B):
  """Returns a function span -> `ChunkWeights`, which all blocks share if there are no segment ids and no lengths."""

  def tabulate(segment_ids_BT, lengths_B, span: Span) -> ChunkWeights:
    return decay.chunk_weights(
      slopes_H, segment_ids_BT, lengths_B, start=span.start, num_chunks=span.num_chunks, chunk=span.chunk, scale=scale
    )

  tables = None
  if segment_ids_BT is None and lengths_B is None and pieces.num_blocks:
    tables = tabulate(None, None, pieces.block)

  def weigh(span: Span) -> ChunkWeights:
    padded = span.tokens < span.num_chunks * span.chunk
    if not padded and span.chunk == pieces.block.chunk and tables is not None:
      return tables
    lengths = jnp.full((1,), span.start + span.tokens) if padded and lengths_B is None else lengths_B
    return tabulate(segment_ids_BT, lengths, span)

  return weigh


def _forward(pieces: Cut, weigh, q_BTHK, k_BTGK, v_BTGV, state_BHKV, lengths_B):
  """Returns the output, the final state and, for the backward pass, (states before blocks, state before the tail)."""

  def block(carry, span: Span):
    before_BHKV, output_BTHV = carry
    q, k, v = (_split(x, span, lengths_B, before_BHKV.dtype) for x in (q_BTHK, k_BTGK, v_BTGV))
    output_BMHCV, after_BHKV = _forward_block(q, k, v, before_BHKV, weigh(span))
    return (after_BHKV, _write(output_BTHV, output_BMHCV, span)), before_BHKV

  carry = state_BHKV, jnp.zeros((*q_BTHK.shape[:3], v_BTGV.shape[-1]), v_BTGV.dtype)
  block_states = tail_state = None
  if pieces.num_blocks:
    starts = pieces.block.tokens * jnp.arange(pieces.num_blocks)
    carry, block_states = jax.lax.scan(lambda c, start: block(c, pieces.block._replace(start=start)), carry, starts)
  if pieces.tail:
    carry, tail_state = block(carry, pieces.tail)
  return carry[1], carry[0], (block_states, tail_state)


def _backward(pieces: Cut, weigh, q_BTHK, k_BTGK, v_BTGV, d_output_BTHV, d_state_BHKV, states, lengths_B):
  """Returns the gradients of q, k, v and the initial state. Goes through the blocks of `_forward` in reverse."""

  def block(carry, span: Span, state_BHKV):
    d_state_BHKV, written = carry
    operands = (q_BTHK, k_BTGK, v_BTGV, d_output_BTHV)
    q, k, v, d_output = (_split(x, span, lengths_B, d_state_BHKV.dtype) for x in operands)
    *gradients, d_state_BHKV = _backward_block(q, k, v, d_output, state_BHKV, d_state_BHKV, weigh(span))
    written = tuple(_write(x, dx, span) for x, dx in zip(written, gradients, strict=True))
    return (d_state_BHKV, written), None

  block_states, tail_state = states
  # Buffers for dq, dk and dv. Every token is overwritten, so their contents do not matter. Copies of q, k and v are
  # cheaper than zeros: XLA makes one array of zeros for all three and then copies it.
  carry = d_state_BHKV, (q_BTHK, k_BTGK, v_BTGV)
  if pieces.tail:
    carry, _ = block(carry, pieces.tail, tail_state)
  if pieces.num_blocks:
    starts = pieces.block.tokens * jnp.arange(pieces.num_blocks)
    carry, _ = jax.lax.scan(
      lambda c, x: block(c, pieces.block._replace(start=x[0]), x[1]), carry, (starts, block_states), reverse=True
    )
  d_state_BHKV, (dq, dk, dv) = carry
  return dq, dk, dv, d_state_BHKV


def _forward_block(q_BMHCK, k_BMGCK, v_BMGCV, state_BHKV, weights: ChunkWeights):
  """Computes o = (q k^T * intra) v + row * (q S) in each chunk. Returns o and the state after the last chunk."""
  key_groups, value_groups = k_BMGCK.shape[2], v_BMGCV.shape[2]
  states_BMHKV, state_BHKV = _states(k_BMGCK, v_BMGCV, state_BHKV, weights)

  scores = jnp.einsum("bmgik,bmgjk->bmgij", _rows(q_BMHCK, key_groups), k_BMGCK)
  scores_BMHCC = _heads(scores, q_BMHCK.shape[2]) * weights.intra_BMHCC
  output = jnp.einsum("bmgij,bmgjv->bmgiv", _rows(scores_BMHCC, value_groups), v_BMGCV)
  carried_BMHCV = jnp.einsum("bmhik,bmhkv->bmhiv", q_BMHCK, states_BMHKV) * weights.row_BMHC[..., None]
  return _heads(output, q_BMHCK.shape[2]) + carried_BMHCV, state_BHKV


def _backward_block(q_BMHCK, k_BMGCK, v_BMGCV, d_output_BMHCV, state_BHKV, d_state_BHKV, weights: ChunkWeights):
  """Returns the gradients of q, k, v and the initial state, given those of the output and final state of one block.

  XLA's CPU backend multiplies fast only if the summed axis of the left factor is last. Hence k q^T is computed
  directly, not as the transpose of q k^T; other left factors are transposed where they are multiplied by their weights.
  """
  num_heads, key_groups, value_groups = q_BMHCK.shape[2], k_BMGCK.shape[2], v_BMGCV.shape[2]
  q_rows, d_output_rows = _rows(q_BMHCK, key_groups), _rows(d_output_BMHCV, value_groups)
  intra_BMHCC, row_BMHC1 = weights.intra_BMHCC, weights.row_BMHC[..., None]
  intra_transposed_BMHCC = jnp.swapaxes(intra_BMHCC, 3, 4)

  states_BMHKV = state_BHKV[:, None]
  if k_BMGCK.shape[1] > 1:
    but_last = ChunkWeights(intra_BMHCC, row_BMHC1, weights.column_BMHC[:, :-1], weights.carry_BMH[:, :-1])
    states_BMHKV, last_BHKV = _states(k_BMGCK[:, :-1], v_BMGCV[:, :-1], state_BHKV, but_last)
    states_BMHKV = jnp.concatenate([states_BMHKV, last_BHKV[:, None]], axis=1)
  q_columns = jnp.swapaxes(q_BMHCK, 3, 4) * jnp.swapaxes(row_BMHC1, 3, 4)
  added = jnp.einsum("bmhki,bmhiv->bmhkv", q_columns, d_output_BMHCV)
  d_states_BMHKV, d_state_BHKV = _pass_on(d_state_BHKV, added, weights.carry_BMH, reverse=True)

  d_scores = _heads(jnp.einsum("bmgiv,bmgjv->bmgij", d_output_rows, v_BMGCV), num_heads)
  dq = jnp.einsum("bmgij,bmgjk->bmgik", _rows(d_scores * intra_BMHCC, key_groups), k_BMGCK)
  dq_carried = jnp.einsum("bmhiv,bmhkv->bmhik", d_output_BMHCV, states_BMHKV) * row_BMHC1

  d_scores_transposed = _side_by_side(jnp.swapaxes(d_scores, 3, 4) * intra_transposed_BMHCC, key_groups)
  dk = jnp.einsum("bmgji,bmgik->bmgjk", d_scores_transposed, q_rows)
  dk += jnp.einsum(
    "bmgcr,bmgkr->bmgck",
    _weighted_side_by_side(v_BMGCV, weights.column_BMHC, key_groups),
    _side_by_side(d_states_BMHKV, key_groups),
  )

  scores_transposed = jnp.einsum("bmgjk,bmgik->bmgji", k_BMGCK, q_rows)
  scores_transposed = _apart(scores_transposed, num_heads) * intra_transposed_BMHCC
  dv = jnp.einsum("bmgji,bmgiv->bmgjv", _side_by_side(scores_transposed, value_groups), d_output_rows)
  dv += jnp.einsum(
    "bmgcr,bmgrv->bmgcv",
    _weighted_side_by_side(k_BMGCK, weights.column_BMHC, value_groups),
    _rows(d_states_BMHKV, value_groups),
  )
  return _heads(dq, num_heads) + dq_carried, dk, dv, d_state_BHKV


def _states(k_BMGCK, v_BMGCV, state_BHKV, weights: ChunkWeights):
  """Returns the states before each chunk of a block, [B, M, H, K, V], and the state after the last chunk."""
  columns = _weighted_columns(k_BMGCK, weights.column_BMHC, v_BMGCV.shape[2])
  added = jnp.einsum("bmgrc,bmgcv->bmgrv", columns, v_BMGCV)
  return _pass_on(state_BHKV, added, weights.carry_BMH)


def _pass_on(state_BHKV, added, carry_BMH, *, reverse: bool = False):
  """Runs S <- carry S + added over a block's chunks. Returns the S entering each, [B, M, H, K, V], and the last S."""
  added_BMHKV = added.reshape(*added.shape[:2], *state_BHKV.shape[1:])
  before = []
  for m in reversed(range(added.shape[1])) if reverse else range(added.shape[1]):
    before.append(state_BHKV)
    state_BHKV = carry_BMH[:, m, :, None, None] * state_BHKV + added_BMHKV[:, m]
  return jnp.stack(before[::-1] if reverse else before, axis=1), state_BHKV


def _split(x_BTHD, span: Span, lengths_B, dtype):
  """Returns the tokens of a span as [B, M, H, C, D] in `dtype`, with padding set to zero."""
  x_BTHD = jax.lax.dynamic_slice_in_dim(x_BTHD, span.start, span.tokens, axis=1)
  if lengths_B is not None:
    x_BTHD = decay.keep(decay.valid_tokens(lengths_B, span.start, span.tokens), x_BTHD)
  x_BTHD = jnp.pad(x_BTHD, ((0, 0), (0, span.num_chunks * span.chunk - span.tokens), (0, 0), (0, 0)))
  x_BMCHD = x_BTHD.reshape(x_BTHD.shape[0], span.num_chunks, span.chunk, *x_BTHD.shape[2:])
  return jnp.swapaxes(x_BMCHD, 2, 3).astype(dtype)


def _write(whole_BTHD, x_BMHCD, span: Span):
  """Returns `whole` with x in a span. x is 0 at padding, as are the q, k, v and cotangents that x was computed from."""
  x_BMCHD = jnp.swapaxes(x_BMHCD, 2, 3)
  x_BTHD = x_BMCHD.reshape(x_BMCHD.shape[0], -1, *x_BMCHD.shape[3:])[:, : span.tokens].astype(whole_BTHD.dtype)
  return jax.lax.dynamic_update_slice_in_dim(whole_BTHD, x_BTHD, span.start, axis=1)


def _rows(x_BMHXY, groups: int):
  """[B, M, H, X, Y] -> [B, M, G, R * X, Y]: stacks the R = H / G heads of a group along X."""
  return x_BMHXY.reshape(*x_BMHXY.shape[:2], groups, -1, x_BMHXY.shape[-1])


def _heads(x, num_heads: int):
  """The inverse of `_rows`: [B, M, G, R * X, Y] -> [B, M, H, X, Y]."""
  return x.reshape(*x.shape[:2], num_heads, -1, x.shape[-1])


def _side_by_side(x_BMHXY, groups: int):
  """[B, M, H, X, Y] -> [B, M, G, X, R * Y]: concatenates the R = H / G heads of a group along Y."""
  x = x_BMHXY.reshape(*x_BMHXY.shape[:2], groups, -1, *x_BMHXY.shape[3:])
  return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:3], x.shape[4], -1)


def _apart(x, num_heads: int):
  """The inverse of `_side_by_side`: [B, M, G, X, R * Y] -> [B, M, H, X, Y]."""
  batch, num_chunks, groups, rows, _ = x.shape
  x = x.reshape(batch, num_chunks, groups, rows, num_heads // groups, -1)
  return jnp.swapaxes(x, 3, 4).reshape(batch, num_chunks, num_heads, rows, -1)


def _per_head(x_BMGXY, weights_BMHXY):
  """Multiplies x of each group by the weights of each head of the group; returns [B, M, H, X, Y]."""
  weights = weights_BMHXY.reshape(*weights_BMHXY.shape[:2], x_BMGXY.shape[2], -1, *weights_BMHXY.shape[3:])
  x = x_BMGXY[:, :, :, None] * weights
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _weighted_side_by_side(x_BMGCD, weights_BMHC, groups: int):
  """Multiplies x by the weights of each head, then concatenates a group's heads along D: [B, M, groups, C, R * D]."""
  return _side_by_side(_per_head(x_BMGCD, weights_BMHC[..., None]), groups)


def _weighted_columns(x_BMGCD, weights_BMHC, groups: int):
  """Returns what `_weighted_side_by_side` returns, with the last two axes swapped: [B, M, groups, R * D, C]."""
  return _rows(_per_head(jnp.swapaxes(x_BMGCD, 3, 4), weights_BMHC[..., None, :]), groups)
