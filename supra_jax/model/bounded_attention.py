"""Softmax attention over a bounded number of tokens, chosen by the attention that they have received.

A head holds the first N tokens of a document, the last W, up to C that came since the last choice, and M retained ones.
M may differ from head to head: the key/value heads are A repeats of a pattern of P heads, of which each has an M of its
own, and the S retained tokens of a pattern lie side by side. The same code reads a sequence, C tokens at a time, and a
single token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from supra_jax.model.bounded_block import Block, Far, Kept
from supra_jax.model.bounded_positions import positions
from supra_jax.model.mixers.base import MixerState
from supra_jax.model.mixers.supra_window import ring_index, sink_slots, taken
from supra_jax.model.slot_layout import Layout


@flax.struct.dataclass
class MemoryState(MixerState):
  """What a layer holds.

  Attributes:
    k, v: keys [B, N + W + C, G, K], after RoPE, and values of the sinks, and of the last W + C tokens as a ring: that
      with index i is in slot N + i % (W + C).
    score: float32 [B, W + C, G], of the tokens in the ring.
    kept_k, kept_v: keys [B, A, S, K] and values of the retained tokens, see `Layout`.
    kept_index: int32 [B, A, S], their indices in the row; -1: the slot is empty.
    kept_score: float32 [B, A, S].
  """

  k: jax.Array
  v: jax.Array
  score: jax.Array
  kept_k: jax.Array
  kept_v: jax.Array
  kept_index: jax.Array
  kept_score: jax.Array


def empty_slots(
  batch: int, heads: int, layout: Layout, *, ring: int, sinks: int, widths: tuple[int, int], dtype: Any
) -> MemoryState:
  """Returns what a layer of G heads holds before any token; `ring` is W + C, `widths` those of keys and values."""
  near = [jnp.zeros((batch, sinks + ring, heads, width), dtype) for width in widths]
  lead = (batch, heads // len(layout.sizes), layout.slots)
  kept = [jnp.zeros((*lead, width), dtype) for width in widths]
  score, kept_score = (jnp.zeros(shape, jnp.float32) for shape in ((batch, ring, heads), lead))
  return MemoryState(near[0], near[1], score, kept[0], kept[1], jnp.full(lead, -1, jnp.int32), kept_score)


class Where(NamedTuple):
  """Positions of the tokens of a call.

  Attributes:
    cached_B: int32 [B], number of tokens that were read before.
    count_B: int32 [B], number of real tokens in the call.
    first_BT: int32 [B, T], index of the first token of each token's document.
    fresh: whether nothing was read before in any row.
    packed: whether documents may begin within the call.
  """

  cached_B: jax.Array
  count_B: jax.Array
  first_BT: jax.Array
  fresh: bool
  packed: bool


def attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  held: MemoryState,
  where: Where,
  layout: Layout,
  *,
  sinks: int,
  chunk: int,
  far: Far | None = None,
  at_random: bool = False,
) -> tuple[jax.Array, MemoryState]:
  """Computes softmax attention over what is held; chooses what is held on every C tokens.

  Takes O(T (N + W + M + C)) time. Tokens are read C at a time.

  Args:
    q_BTHK, k_BTGK, v_BTGV: queries, keys and values of T tokens, q and k after RoPE.
    held: what was held before.
    where: positions of the tokens.
    layout: M of each head.
    sinks: N.
    chunk: C.
    far: None: no two tokens are too far apart.
    at_random: a token's score is a random number that depends on its index.

  Returns:
    (out [B, T, H, V]; what is held after the last real token).
  """
  queries = (q_BTHK,) if far is None else (q_BTHK, far.q_BTHK)
  read = _read_one if q_BTHK.shape[1] == 1 else _read_in_blocks
  how: dict[str, Any] = {"layout": layout, "far": far, "at_random": at_random}
  return read(queries, (k_BTGK, v_BTGV), held, where, sinks=sinks, chunk=chunk, **how)


def _read_one(queries, new, held: MemoryState, where: Where, *, sinks: int, chunk: int, **how):
  """Does one decoding step: overwrites the oldest ring slot (and a sink slot while position < N), then attends."""
  batch, ring = held.score.shape[:2]
  cached_B1, first_B1, real_B1 = where.cached_B[:, None], where.first_BT, where.count_B[:, None] > 0
  slot, position = cached_B1 % ring, cached_B1 - first_B1
  places = jnp.concatenate([sinks + slot, jnp.where(position < sinks, position, sinks + ring)], axis=1)
  at = jnp.arange(batch)[:, None], jnp.where(real_B1, places, sinks + ring)  # out of range: dropped
  k, v = (x.at[at].set(token, mode="drop") for x, token in zip((held.k, held.v), new, strict=True))
  score = jnp.where((real_B1 & (slot == jnp.arange(ring)))[..., None], 0, held.score)
  key = ring_index(where.cached_B + jnp.minimum(where.count_B, 1), ring)
  sizes: dict[str, Any] = {"sinks": sinks, "chunk": chunk, "aligned": True}
  here = positions(first_B1, cached_B1, real_B1, key, **sizes, window=ring - chunk)
  out, kept, score = Block(**how, **sizes)(queries, (k, v), score, here, _kept(held))
  return out, MemoryState(k, v, score, *kept)


def _read_in_blocks(queries, new, held: MemoryState, where: Where, *, sinks: int, chunk: int, **how):
  """Reads at most C tokens at a time.

  Blocks end where choices are made: the first block begins with the tokens since the last choice, though they were read
  before. If documents may begin within the call, blocks begin with the call, and choices are made within blocks.
  """
  batch, time = new[0].shape[:2]
  ring = held.score.shape[1]
  window = ring - chunk
  cached_B1, first_B1 = where.cached_B[:, None], where.first_BT[:, :1]
  again: Any = 0  # number of tokens of the first block that were read before, an int or int32 [B, 1]
  size, blocks = min(time, chunk), -(-time // min(time, chunk))
  if not (where.fresh or where.packed):
    again, size, blocks = (cached_B1 - first_B1) % chunk, chunk, -(-(time + chunk - 1) // chunk)
  before = ring if where.packed else window  # number of tokens before a block that it sees
  whole = blocks * size
  origin_B1 = cached_B1 - again  # index of the first token of the first block

  def of_blocks(x: jax.Array, *, lead: int = 0, before: int = 0) -> jax.Array:
    """Returns the entries of all blocks, and of `before` tokens before them, of x [B, lead + T], `lead` of them old."""
    return _cut(x, lead - before - again, before + whole)

  def blocked(x: jax.Array) -> jax.Array:
    return x.reshape(batch, blocks, size, *x.shape[2:]).swapaxes(0, 1)

  # The ring in the order of the text: entry i is the token with index cached - (W + C) + i.
  order = (cached_B1 - ring + jnp.arange(ring)) % ring
  text = [jnp.concatenate([taken(x[:, sinks:], order), y], axis=1) for x, y in zip((held.k, held.v), new, strict=True)]
  joined = [jnp.concatenate(pair, axis=1) for pair in zip((held.k, held.v), new, strict=True)]
  first = blocked(of_blocks(where.first_BT))
  begun = first[:, :, 0].T if where.packed else first_B1  # of each block, or of all
  slot = sink_slots(begun, sinks, ring, cached_B1, cached_B1 + time)
  column = jnp.arange(blocks)[:, None] * size + jnp.arange(before + size)

  def seen(x: jax.Array, near: jax.Array) -> jax.Array:
    """Returns what each block sees of keys or values, [blocks, B, N + before + c, ...]."""
    sink = taken(x, slot).reshape(batch, begun.shape[1], sinks, *x.shape[2:])
    sink = jnp.broadcast_to(sink, (batch, blocks, *sink.shape[2:]))
    return jnp.concatenate([sink, of_blocks(near, lead=ring, before=before)[:, column]], axis=2).swapaxes(0, 1)

  sizes: dict[str, Any] = {"sinks": sinks, "chunk": chunk, "aligned": not where.packed or size == 1}
  start = origin_B1 + jnp.arange(blocks)[:, None, None] * size
  index = start + jnp.arange(size)
  real = (index >= cached_B1) & (index < cached_B1 + where.count_B[:, None])
  key = start - before + jnp.arange(before + size)
  here = jax.vmap(lambda *given: positions(*given, window=window, **sizes))(first, start, real, key)
  read = Block(**how, **sizes)

  def step(carry, block):
    (kept, score), (asking, near, here) = carry, block
    out, kept, score = read(asking, near, score, here, kept)
    return (kept, jnp.pad(score[:, size:], ((0, 0), (0, size), (0, 0)))), (out, score)

  score = jnp.pad(taken(held.score, order), ((0, 0), (0, size), (0, 0)))
  carry = _kept(held), _cut(score, ring - before - again, before + size)
  asked = tuple(blocked(of_blocks(q)) for q in queries)
  steps = (asked, [seen(*pair) for pair in zip(joined, text, strict=True)], here)
  if blocks == 1:
    (kept, _), (out, scores) = step(carry, jax.tree.map(lambda x: x[0], steps))
    out, scores = out[None], scores[None]
  else:
    (kept, _), (out, scores) = jax.lax.scan(step, carry, steps)
  out = out.swapaxes(0, 1).reshape(batch, whole, *out.shape[3:])

  # What is held after the last real token, back in the order of the ring.
  end_B1 = cached_B1 + where.count_B[:, None]
  index = ring_index(end_B1[:, 0], ring)
  k, v = (taken(x, index - (cached_B1 - ring)) for x in text)
  last_block = jnp.maximum(end_B1 - origin_B1 - 1, 0) // size
  column = index - (origin_B1 + last_block * size - before)  # negative: the token will not be seen again
  score = taken(scores[last_block[:, 0], jnp.arange(batch)], jnp.maximum(column, 0))
  last = jnp.take_along_axis(where.first_BT, jnp.maximum(where.count_B - 1, 0)[:, None], axis=1)
  slot = sink_slots(last, sinks, ring, cached_B1, end_B1)
  k, v = (jnp.concatenate([taken(x, slot), y], axis=1) for x, y in zip(joined, (k, v), strict=True))
  return _cut(out, again, time), MemoryState(k, v, score, *kept)


def _cut(x: jax.Array, first: Any, length: int) -> jax.Array:
  """Returns x[b, first[b] : first[b] + length] of x [B, S, ...]; what lies outside x may be anything.

  Args:
    x: the array.
    first: int32 [B, 1], or one int >= 0 for all rows.
    length: number of entries.
  """
  if isinstance(first, int):
    x = x[:, first : first + length]
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return taken(x, jnp.clip(first + jnp.arange(length), 0, x.shape[1] - 1))


def _kept(held: MemoryState) -> Kept:
  return Kept(held.kept_k, held.kept_v, held.kept_index, held.kept_score)
