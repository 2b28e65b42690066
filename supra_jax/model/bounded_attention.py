"""Softmax attention over a bounded number of tokens, chosen by the attention that they have received.

A head holds the first N tokens of a document, the last W, up to C that came since the last choice, and M retained ones.
The same code reads a sequence, C tokens at a time, and a single token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from supra_jax.model.mixers.softmax import UNSEEN, attention_logits
from supra_jax.model.mixers.supra_window import ring_index, sink_slots, taken


class Slots(NamedTuple):
  """What the heads of one size hold; or, in `MemoryState`, a tuple for each field with an entry for each size.

  Attributes:
    k, v: keys [B, N + W + C, G, K], after RoPE, and values of the sinks, and of the last W + C tokens as a ring: that
      with index i is in slot N + i % (W + C).
    score: float32 [B, W + C, G], of the tokens in the ring.
    kept_k, kept_v: keys [B, M, G, K] and values of the retained tokens.
    kept_index: int32 [B, M, G], their indices in the row; -1: the slot is empty.
    kept_score: float32 [B, M, G].
  """

  k: Any
  v: Any
  score: Any
  kept_k: Any
  kept_v: Any
  kept_index: Any
  kept_score: Any


def empty_slots(
  batch: int, ring: int, retained: int, heads: int, sinks: int, widths: tuple[int, int], dtype: Any
) -> Slots:
  """Returns what heads of one size hold before any token; `ring` is W + C, `widths` those of keys and values."""
  near = [jnp.zeros((batch, sinks + ring, heads, width), dtype) for width in widths]
  kept = [jnp.zeros((batch, retained, heads, width), dtype) for width in widths]
  score, kept_score = (jnp.zeros((batch, count, heads), jnp.float32) for count in (ring, retained))
  tokens = jnp.full((batch, retained, heads), -1, jnp.int32)
  return Slots(near[0], near[1], score, kept[0], kept[1], tokens, kept_score)


class Where(NamedTuple):
  """Positions of the tokens of a call.

  Attributes:
    cached_B: int32 [B], number of tokens that were read before.
    count_B: int32 [B], number of real tokens in the call.
    first_BT: int32 [B, T], index of the first token of each token's document.
    aligned: whether all rows begin with the call, and each is one document: a choice is then made after every C tokens.
  """

  cached_B: jax.Array
  count_B: jax.Array
  first_BT: jax.Array
  aligned: bool


class Far(NamedTuple):
  """How tokens are seen from further away than the teacher has seen two tokens apart.

  Attributes:
    q_BTHK: queries after RoPE at a position of at most `reach`; sinks outside the window are seen by them.
    least: distance from the last choice at which a retained token is far: its key is then held before RoPE, and seen
      by these queries.
    without_rope: (keys [..., K], int32 positions [...]) -> the keys before RoPE.
  """

  q_BTHK: jax.Array
  least: int
  without_rope: Callable[[jax.Array, jax.Array], jax.Array]


def attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  held: Slots,
  where: Where,
  *,
  sinks: int,
  chunk: int,
  far: Far | None = None,
) -> tuple[jax.Array, Slots]:
  """Computes softmax attention over what is held, for heads of one size; chooses what is held on every C tokens.

  Takes O(T (N + W + M + C)) time. Tokens are read C at a time.

  Args:
    q_BTHK, k_BTGK, v_BTGV: queries, keys and values of T tokens, q and k after RoPE.
    held: what was held before.
    where: positions of the tokens.
    sinks: N.
    chunk: C.
    far: None: distances have no limit.

  Returns:
    (out [B, T, H, V]; what is held after the last real token).
  """
  batch, time = q_BTHK.shape[:2]
  ring = held.score.shape[1]
  size = min(time, chunk)
  blocks = -(-time // size)
  whole = blocks * size
  cached_B1 = where.cached_B[:, None]

  def padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, whole - time)] + [(0, 0)] * (x.ndim - 2))

  # The ring in the order of the text: entry i is the token with index cached - (W + C) + i.
  order = (cached_B1 - ring + jnp.arange(ring)) % ring
  near = (taken(held.k[:, sinks:], order), taken(held.v[:, sinks:], order))
  text = [jnp.concatenate([before, padded(x)], axis=1) for before, x in zip(near, (k_BTGK, v_BTGV), strict=True)]
  first = padded(where.first_BT)
  joined = [jnp.concatenate([before, x], axis=1) for before, x in zip(held[:2], (k_BTGK, v_BTGV), strict=True)]

  carry = Kept(held.kept_k, held.kept_v, held.kept_index, held.kept_score), taken(held.score, order)
  how = {"sinks": sinks, "chunk": chunk, "ring": ring, "size": size, "aligned": where.aligned, "far": far}
  queries = (q_BTHK,) if far is None else (q_BTHK, far.q_BTHK)

  def at(number, queries, text, first_Bc, carry):
    """Reads one block of tokens; `text`, keys and values, is of the W + C tokens before it too."""
    start_B1 = cached_B1 + number * size
    slot = sink_slots(first_Bc[:, 0], sinks, ring, cached_B1, cached_B1 + time)
    sunk = [taken(x, slot) for x in joined]
    real = jnp.arange(size) < where.count_B[:, None] - number * size
    return _block(queries, text, sunk, first_Bc, start_B1, real, carry, **how)

  if blocks == 1:
    out, (kept, score), seen = at(0, queries, text, first, carry)
    scores = seen[None]
  else:
    column = jnp.arange(blocks)[:, None] * size + jnp.arange(ring + size)

    def blocked(x: jax.Array) -> jax.Array:
      return x.reshape(batch, blocks, size, *x.shape[2:]).swapaxes(0, 1)

    windows = [x[:, column].swapaxes(0, 1) for x in text]

    def step(carry, block):
      number, asking, windows, first_Bc = block
      out, carry, seen = at(number, asking, windows, first_Bc, carry)
      return carry, (out, seen)

    steps = (jnp.arange(blocks), tuple(blocked(padded(q)) for q in queries), windows, blocked(first))
    (kept, score), (out, scores) = jax.lax.scan(step, carry, steps)
    out = out.swapaxes(0, 1).reshape(batch, whole, *out.shape[3:])[:, :time]

  # What is held after the last real token, back in the order of the ring.
  end_B1 = cached_B1 + where.count_B[:, None]
  index = ring_index(end_B1[:, 0], ring)
  k, v = (taken(x, index - (cached_B1 - ring)) for x in text)
  last_block = jnp.maximum(where.count_B - 1, 0) // size
  seen = scores[last_block, jnp.arange(batch)]
  score = taken(seen, index - (cached_B1 + last_block[:, None] * size - ring))
  last = jnp.take_along_axis(where.first_BT, jnp.maximum(where.count_B - 1, 0)[:, None], axis=1)
  slot = sink_slots(last, sinks, ring, cached_B1, end_B1)
  k, v = (jnp.concatenate([taken(x, slot), y], axis=1) for x, y in zip(joined, (k, v), strict=True))
  return out, Slots(k, v, score, kept.k, kept.v, kept.token, kept.score)


class Kept(NamedTuple):
  """The retained tokens, see `Slots`; `token` is `kept_index`."""

  k: jax.Array
  v: jax.Array
  token: jax.Array
  score: jax.Array


def _block(queries, text, sunk, first_Bc, start_B1, real_Bc, carry, *, sinks, chunk, ring, size, aligned, far):
  """Reads a block of at most C tokens, in which at most one choice is made.

  A choice is made after every C tokens of a document, so that of two documents that share a block one at most comes to
  a choice in it: the first, after token e. Tokens behind e see what is retained after the choice.

  Returns:
    (out [B, c, H, V]; (what is retained, scores of the last W + C tokens); scores of the block's tokens and of the
    W + C before it, [B, W + C + c, G]).
  """
  (kept, score), q, far_q = carry, queries[0], queries[-1]
  window = ring - chunk
  index = start_B1 + jnp.arange(size)
  position = index - first_Bc
  unjudged = first_Bc + position // chunk * chunk  # first token since the last choice
  key = start_B1 - ring + jnp.arange(ring + size)
  oldest = jnp.maximum(first_Bc, unjudged - window)[..., None]
  near = (key[:, None] <= index[..., None]) & (key[:, None] >= oldest)
  begun = first_Bc[:, :1]
  sink = begun + jnp.arange(sinks)
  out_of_sight = (sink[:, None] < oldest) & (first_Bc == begun)[..., None]
  fixed = jnp.concatenate([out_of_sight, near], axis=-1)[:, None, :, None]
  k, v = (jnp.concatenate(pair, axis=1).astype(q.dtype) for pair in zip(sunk, text, strict=True))
  logits = [attention_logits(far_q, k[:, :sinks])] * bool(sinks) + [attention_logits(q, k[:, sinks:])]
  fixed_logits = jnp.where(fixed, jnp.concatenate(logits, axis=-1), UNSEEN)
  seen = jnp.concatenate([score, jnp.zeros((score.shape[0], size, score.shape[2]), score.dtype)], axis=1)

  def weights(kept: Kept) -> jax.Array:
    """Returns the weights of the retained tokens, the sinks, and the last tokens, [B, G, c, R, M + N + W + C + c]."""
    token = kept.token.swapaxes(1, 2)[:, :, None, None]  # [B, G, 1, 1, M]
    own = attention_logits(q, kept.k.astype(q.dtype))
    if far is not None:
      is_far = unjudged[:, None, :, None, None] - 1 - token >= far.least
      from_afar = functools.partial(attention_logits, far_q, kept.k.astype(q.dtype))
      own = jax.lax.cond(is_far.any(), lambda own: jnp.where(is_far, from_afar(), own), lambda own: own, own)
    own = jnp.where(token >= first_Bc[:, None, :, None, None], own, UNSEEN)
    return jax.nn.softmax(jnp.concatenate([own, fixed_logits], axis=-1), axis=-1)

  def total(weights, kept):
    values = jnp.einsum("bgtrm,bmgv->btgrv", weights[..., :held], kept.v.astype(q.dtype))
    return values + jnp.einsum("bgtrs,bsgv->btgrv", weights[..., held:], v)

  def received(weights, counts_Bc):
    """Returns the attention that each token receives from the queries that count, [B, S, G]."""
    summed = jnp.einsum("bgtrs,bt->bsg", jax.lax.stop_gradient(weights), counts_Bc.astype(weights.dtype))
    return summed.astype(jnp.float32)

  held = kept.token.shape[1]
  chosen_Bc = real_Bc & ((position + 1) % chunk == 0)
  any_B = chosen_Bc.any(axis=1)
  at_B = jnp.argmax(chosen_Bc, axis=1)
  before_Bc = ~any_B[:, None] | (jnp.arange(size) <= at_B[:, None])
  first_weights = weights(kept)
  out = total(first_weights.astype(q.dtype), kept)
  got = received(first_weights, real_Bc & before_Bc)
  kept = kept._replace(score=kept.score + got[:, :held])
  seen = seen + got[:, held + sinks :]

  def choose(kept: Kept) -> Kept:
    leaving = at_B[:, None] + 1 + jnp.arange(chunk)  # among the last tokens: W + C to W + 1 tokens before the choice
    at = jnp.take_along_axis(first_Bc, at_B[:, None], axis=1)
    told = jnp.take_along_axis(key, leaving, axis=1).astype(jnp.int32)[..., None]
    tokens = jnp.broadcast_to(told, (*told.shape[:2], kept.token.shape[2]))
    fresh = Kept(taken(text[0], leaving), taken(text[1], leaving), tokens, taken(seen, leaving))
    both = Kept(*(jnp.concatenate(pair, axis=1) for pair in zip(kept, fresh, strict=True)))
    valid = jnp.concatenate(
      [kept.token >= at[..., None], jnp.broadcast_to(told - at[..., None] >= sinks, fresh.token.shape)], axis=1
    )
    age = (start_B1 + at_B[:, None] + 1)[..., None] - both.token
    worth = jnp.where(valid, both.score / age.astype(jnp.float32), -1.0)
    best, slot = jax.lax.top_k(worth.swapaxes(1, 2), held)
    slot = slot.swapaxes(1, 2)
    new = Kept(*(jnp.take_along_axis(x, slot[..., None] if x.ndim == 4 else slot, axis=1) for x in both))
    new = new._replace(token=jnp.where(best.swapaxes(1, 2) >= 0, new.token, -1))
    if far is not None:
      distance = (start_B1 + at_B[:, None])[..., None] - new.token
      crossed = (new.token >= at[..., None]) & (distance >= far.least) & (distance < far.least + chunk)
      position = jnp.where(crossed, new.token - at[..., None], 0)
      bare = jax.lax.cond(crossed.any(), lambda k: far.without_rope(k, position), lambda k: k, new.k)
      new = new._replace(k=jnp.where(crossed[..., None], bare, new.k))
    return Kept(*(jnp.where(any_B.reshape(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(new, kept, strict=True)))

  if held:
    kept = choose(kept) if aligned else jax.lax.cond(any_B.any(), choose, lambda kept: kept, kept)
  if held and not aligned and size > 1:

    def again(_):
      weighted = weights(kept)
      return total(weighted.astype(q.dtype), kept), received(weighted, real_Bc & ~before_Bc)

    later = (real_Bc & ~before_Bc).any()
    after, got = jax.lax.cond(later, again, lambda _: (out, jnp.zeros_like(got)), None)
    out = jnp.where(before_Bc[..., None, None, None], out, after)
    kept = kept._replace(score=kept.score + got[:, :held])
    seen = seen + got[:, held + sinks :]
  batch, time = q.shape[:2]
  return out.reshape(batch, time, -1, out.shape[-1]), (kept, seen[:, size:]), seen
