"""Softmax attention as plain functions: over all slots of a mask, and over the last tokens and the first few."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp


def masked_softmax_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v over the slots where the mask is true; float32 logits, [B, T, H, V]."""
  return _weighted(_logits(q_BTHK, k_BSGK), v_BSGV, mask_BTS)


def _logits(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  batch, time, heads, width = q_BTHK.shape
  groups = k_BSGK.shape[2]
  q = q_BTHK.reshape(batch, time, groups, heads // groups, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  return jnp.einsum("btgrk,bsgk->bgrts", q, k_BSGK, preferred_element_type=wide) / math.sqrt(width)


def _weighted(logits_BGRTS: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  batch, groups, repeats, time, _ = logits_BGRTS.shape
  # A finite floor: a padded row that sees nothing stays finite, so that it cannot poison the rows that are real.
  logits = jnp.where(mask_BTS[:, None, None], logits_BGRTS, jnp.finfo(jnp.float32).min / 2)
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BSGV.dtype)
  out = jnp.einsum("bgrts,bsgv->btgrv", weights, v_BSGV)
  return out.reshape(batch, time, groups * repeats, v_BSGV.shape[-1])


def _with_sinks(q, far_q, k, v, mask, sinks: int):
  """`masked_softmax_attention` where the first slots meet another query."""
  if not sinks:
    return masked_softmax_attention(q, k, v, mask)
  logits = [_logits(far_q, k[:, :sinks]), _logits(q, k[:, sinks:])]
  return _weighted(jnp.concatenate(logits, axis=-1), v, mask)


def ring_index(count_B: jax.Array, window: int) -> jax.Array:
  """Which token each slot of a ring holds after so many: the last i < count with i % W = slot, int32 [B, W].

  Below 0 where the slot is still empty.
  """
  last_B1 = count_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(window)) % window


def window_softmax_attention(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  held: tuple[jax.Array, jax.Array],
  *,
  sinks: int = 0,
  far_q_BTHK: jax.Array | None = None,
  cached_B: jax.Array,
  count_B: jax.Array,
  first_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Softmax attention over the last W tokens, itself included, and the first N of its document, in O(T (W + N)).

  T is cut into blocks of W, each of which sees itself and what lies before it, another block or the ring; and the first
  N of the document that it begins in, where they lie further back. Those that begin later lie in sight.

  Args:
    q_BTHK, k_BTGK, v_BTGV: of T tokens, after RoPE.
    held: keys [B, N + W, G, K] and values [B, N + W, G, V] of what came before them: of the first N tokens of the
      document that may go on, and of the last W tokens, token i in slot N + i % W.
    sinks: N.
    far_q_BTHK: what those first tokens meet when they are further back than the window; None: q. Up to 2 W + N tokens
      into a document it has to be q.
    cached_B: int32, how many tokens came before.
    count_B: int32, how many of the T are real, the first ones.
    first_BT: int32, the first token of each one's document, as `ring_index` counts.

  Returns:
    (out [B, T, H, V], what is held after the last real token).
  """
  (batch, time), window = q_BTHK.shape[:2], held[0].shape[1] - sinks
  far_q = q_BTHK if far_q_BTHK is None else far_q_BTHK
  if time == 1:
    return _step(q_BTHK, far_q, k_BTGK, v_BTGV, held, sinks, cached_B, count_B, first_BT)
  size = min(time, window)
  blocks = -(-time // size)
  whole = blocks * size

  def blocked(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, whole - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, blocks, size, *x.shape[2:])

  def seen(before: jax.Array, x: jax.Array) -> jax.Array:
    """What each block sees, [B, blocks, W + size, ...]."""
    x = blocked(x)
    earlier = jnp.concatenate([before[:, None], x[:, :-1]], axis=1) if blocks > 1 else before[:, None]
    return jnp.concatenate([earlier, x], axis=2)

  cached_B1, number = cached_B[:, None], jnp.arange(sinks)
  index = cached_B1 + jnp.arange(whole)
  joined = [jnp.concatenate(pair, axis=1) for pair in zip(held, (k_BTGK, v_BTGV), strict=True)]

  def first_of(first: jax.Array, end_B1: jax.Array) -> jax.Array:
    """Where in `joined` the first tokens are of the documents that begin there, [B, ...] -> [B, ... * N]."""
    token = (first[..., None] + number).reshape(batch, -1)
    old = jnp.broadcast_to(number, (*first.shape, sinks)).reshape(batch, -1)
    return jnp.where((token >= cached_B1) & (token < end_B1), sinks + window + token - cached_B1, old)

  query, first = blocked(index)[..., None], blocked(first_BT)[..., None]
  key = seen(ring_index(cached_B, window), index)[:, :, None]
  near = (key > query - window) | (key < first + sinks)
  mask = near & (key <= query) & (key >= first)
  k, v = (seen(before[:, sinks:], x) for before, x in zip(held, (k_BTGK, v_BTGV), strict=True))
  if sinks:
    begun = first[:, :, 0, 0]
    slot = first_of(begun, cached_B1 + time)
    k, v = (
      jnp.concatenate([_taken(x, slot).reshape(batch, blocks, sinks, *x.shape[2:]), y], axis=2)
      for x, y in zip(joined, (k, v), strict=True)
    )
    out_of_sight = begun[..., None] + number < query[:, :, 0] - window
    mask = jnp.concatenate([out_of_sight[:, :, None] & (first == begun[..., None, None]), mask], axis=-1)
  # Blocks stay an axis of their own, which a mesh may cut as it cut the time.
  attend = jax.vmap(functools.partial(_with_sinks, sinks=sinks), in_axes=1, out_axes=1)
  out = attend(blocked(q_BTHK), blocked(far_q), k, v, mask)
  out_BTHV = out.reshape(batch, whole, *out.shape[3:])[:, :time]

  kept = ring_index(cached_B + count_B, window)
  slot = jnp.where(kept >= cached_B1, sinks + window + kept - cached_B1, sinks + jnp.arange(window))
  last = jnp.take_along_axis(first_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
  slot = jnp.concatenate([first_of(last, cached_B1 + count_B[:, None]), slot], axis=1)
  k_held, v_held = (_taken(x, slot) for x in joined)
  return out_BTHV, (k_held, v_held)


def _taken(x_BSGK: jax.Array, slot_BN: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BSGK, slot_BN[..., None, None], axis=1)


def _step(q_BTHK, far_q_BTHK, k_BTGK, v_BTGV, held, sinks, cached_B, count_B, first_BT):
  """One token, which takes the place of the one that leaves the window, and a sink's if it is one; no other moves."""
  batch, slots = held[0].shape[:2]
  window, first_B1 = slots - sinks, first_BT[:, :1]
  position_B1 = cached_B[:, None] - first_B1
  places_B2 = jnp.concatenate(
    [sinks + cached_B[:, None] % window, jnp.where(position_B1 < sinks, position_B1, slots)], 1
  )
  at = jnp.arange(batch)[:, None], jnp.where(count_B[:, None] > 0, places_B2, slots)  # out of range: dropped
  k, v = (x.at[at].set(new, mode="drop") for x, new in zip(held, (k_BTGK, v_BTGV), strict=True))
  ring_BW = ring_index(cached_B + 1, window) >= first_B1
  sink_BN = first_B1 + jnp.arange(sinks) <= cached_B[:, None] - window
  mask_B1S = jnp.concatenate([sink_BN, ring_BW], axis=1)[:, None]
  return _with_sinks(q_BTHK, far_q_BTHK, k, v, mask_B1S, sinks), (k, v)
