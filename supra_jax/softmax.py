"""Softmax attention as plain functions: over all slots of a mask, and over the last tokens alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def masked_softmax_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v over the slots where the mask is true; float32 logits, [B, T, H, V]."""
  batch, time, heads, width = q_BTHK.shape
  groups = k_BSGK.shape[2]
  q = q_BTHK.reshape(batch, time, groups, heads // groups, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("btgrk,bsgk->bgrts", q, k_BSGK, preferred_element_type=wide) / math.sqrt(width)
  # A finite floor: a padded row that sees nothing stays finite, so that it cannot poison the rows that are real.
  logits = jnp.where(mask_BTS[:, None, None], logits, jnp.finfo(jnp.float32).min / 2)
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BSGV.dtype)
  out = jnp.einsum("bgrts,bsgv->btgrv", weights, v_BSGV)
  return out.reshape(batch, time, heads, v_BSGV.shape[-1])


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
  ring: tuple[jax.Array, jax.Array],
  *,
  cached_B: jax.Array,
  count_B: jax.Array,
  first_BT: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Softmax attention over the last W tokens, itself included, in O(T W).

  T is cut into blocks of W, each of which sees itself and what lies before it: another block, or the ring.

  Args:
    q_BTHK, k_BTGK, v_BTGV: of T tokens, after RoPE.
    ring: keys [B, W, G, K] and values [B, W, G, V] of the last W tokens before them, token i in slot i % W.
    cached_B: int32, how many tokens came before.
    count_B: int32, how many of the T are real, the first ones.
    first_BT: int32, the first token of each one's document, as `ring_index` counts.

  Returns:
    (out [B, T, H, V], the ring after the last real token).
  """
  (batch, time), window = q_BTHK.shape[:2], ring[0].shape[1]
  if time == 1:
    return _step(q_BTHK, k_BTGK, v_BTGV, ring, cached_B, count_B, first_BT)
  size = min(time, window)
  blocks = -(-time // size)
  fill = blocks * size - time

  def blocked(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, blocks, size, *x.shape[2:])

  def seen(before: jax.Array, x: jax.Array) -> jax.Array:
    """What each block sees, [B, blocks, W + size, ...]."""
    x = blocked(x)
    earlier = jnp.concatenate([before[:, None], x[:, :-1]], axis=1) if blocks > 1 else before[:, None]
    return jnp.concatenate([earlier, x], axis=2)

  held, index_BT = ring_index(cached_B, window), cached_B[:, None] + jnp.arange(time)
  query, key = blocked(index_BT)[..., None], seen(held, index_BT)[:, :, None]
  mask = (key <= query) & (key > query - window) & (key >= blocked(first_BT)[..., None])
  k, v = (seen(before, x) for before, x in zip(ring, (k_BTGK, v_BTGV), strict=True))
  # Blocks stay an axis of their own, which a mesh may cut as it cut the time.
  out = jax.vmap(masked_softmax_attention, in_axes=1, out_axes=1)(blocked(q_BTHK), k, v, mask)
  out_BTHV = out.reshape(batch, blocks * size, *out.shape[3:])[:, :time]

  kept = ring_index(cached_B + count_B, window)
  slot = jnp.where(kept >= cached_B[:, None], window + kept - cached_B[:, None], jnp.arange(window))
  joined = (jnp.concatenate(pair, axis=1) for pair in zip(ring, (k_BTGK, v_BTGV), strict=True))
  k_ring, v_ring = (jnp.take_along_axis(x, slot[..., None, None], axis=1) for x in joined)
  return out_BTHV, (k_ring, v_ring)


def _step(q_BTHK, k_BTGK, v_BTGV, ring, cached_B, count_B, first_BT):
  """One token, which takes the place of the one that leaves the window: nothing else in the ring moves."""
  batch, window = ring[0].shape[:2]
  slot_B = jnp.where(count_B > 0, cached_B % window, window)  # out of range: dropped
  at = jnp.arange(batch), slot_B
  k, v = (held.at[at].set(x[:, 0], mode="drop") for held, x in zip(ring, (k_BTGK, v_BTGV), strict=True))
  mask_BTW = ring_index(cached_B + 1, window)[:, None] >= first_BT[..., None]
  return masked_softmax_attention(q_BTHK, k, v, mask_BTW), (k, v)
