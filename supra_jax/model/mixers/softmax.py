"""The teacher's softmax attention: causal, with grouped heads, RoPE and, if the config says so, a sliding window."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import current_time_shards
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.base import Context, MixerState, Projections, side_by_side
from supra_jax.model.registry import MixerConfig, register

# Queries are cut into at most four blocks of at least this many tokens, each with the keys until its end: less than two
# thirds of the logits. More blocks hardly save more, and take longer to compile.
LEAST_BLOCK = 128

# Logit of what is not seen. It is finite: so is the output of a padded token that sees nothing, which else could make
# other outputs NaN.
UNSEEN = float(jnp.finfo(jnp.float32).min) / 2


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
  """Config of softmax attention, without fields: `ModelConfig.sliding_window` holds for all softmax layers."""


@flax.struct.dataclass
class KVCache(MixerState):
  """Keys [B, S, G, K], after RoPE, and values [B, S, G, V] of the tokens read so far."""

  k: jax.Array
  v: jax.Array

  @property
  def capacity(self) -> int:
    return self.k.shape[1]

  def grow(self, capacity: int) -> Self:
    more = max(capacity - self.capacity, 0)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))), self) if more else self


@register("softmax")
class SoftmaxAttention(Projections):
  """softmax(q k^T / sqrt(K)) v over all tokens of the document so far, or over the last `sliding_window` of them."""

  Config = SoftmaxConfig
  PARTS = {"cache": ("k", "v")}
  STATE_AXES = {"k": ("batch", None, "heads", None), "v": ("batch", None, "heads", None)}
  GROWS = True

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> KVCache:
    c = self.config
    k = jnp.zeros((batch, capacity, c.num_kv_heads, c.head_dim), self.held_dtype)
    return KVCache(k, jnp.zeros((*k.shape[:-1], c.value_width), self.held_dtype))

  def outputs(self, x_BTD: jax.Array, state: KVCache | None, context: Context) -> tuple[dict[str, jax.Array], KVCache]:
    c = self.config
    q, k, v = self.project(x_BTD)
    q, k = (self.rotate(self.rotate_by_head(x), context.rotation) for x in (q, k))
    k, v = self.held(k), self.held(v)
    cache = KVCache(k, v) if state is None else _append(state, k, v, context)
    k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    oldest = context.first
    if c.sliding_window is not None:
      oldest = jnp.maximum(oldest, context.index - c.sliding_window + 1)
    is_whole = state is not None or current_time_shards() > 1
    out = []
    for block, seen in [(slice(None), slice(None))] if is_whole else _blocks(q.shape[1], c.sliding_window):
      slot = jnp.arange(cache.capacity)[seen]
      mask = (slot <= context.index[:, block, None]) & (slot >= oldest[:, block, None])
      out.append(masked_softmax_attention(q[:, block], k[:, seen], v[:, seen], mask))
    return {"o_proj": side_by_side(jnp.concatenate(out, axis=1))}, cache

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    return super().flops(config, layer, tokens) + attention_flops(config, tokens, config.sliding_window)


def _blocks(tokens: int, window: int | None) -> list[tuple[slice, slice]]:
  """Returns (the queries, the keys that they may see) of each block of a row that begins with its first token."""
  length = max(-(-tokens // 4), LEAST_BLOCK)
  blocks = [(first, min(first + length, tokens)) for first in range(0, tokens, length)]
  return [(slice(first, end), slice(max(first + 1 - (window or end), 0), end)) for first, end in blocks]


def _append(state: KVCache, k: jax.Array, v: jax.Array, context: Context) -> KVCache:
  """Returns the cache with the keys and values of the real tokens added; those beyond the capacity are dropped."""
  slots, capacity = context.index, state.capacity
  if context.lengths is not None:
    padded = jnp.arange(slots.shape[1]) >= context.lengths[:, None]
    slots = jnp.where(padded, capacity, slots)  # out of range: dropped
  rows = jnp.arange(slots.shape[0])[:, None]
  return KVCache(state.k.at[rows, slots].set(k, mode="drop"), state.v.at[rows, slots].set(v, mode="drop"))


def attention_flops(config: ModelConfig, tokens: int, window: int | None) -> float:
  """Returns the multiply-adds per token of q k^T and of the weighted sum of values: H (K + V) n.

  n is the number of keys that a token sees, averaged over a sequence of T = `tokens` tokens: (T + 1) / 2, fewer with a
  window.

  Args:
    config: config of the model.
    tokens: T.
    window: largest number of tokens that a token sees; None: no window.
  """
  window = min(tokens, window or tokens)
  seen = window - window * (window - 1) / (2 * tokens)
  return config.num_heads * (config.head_dim + config.value_width) * seen


def masked_softmax_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Returns softmax(q k^T / sqrt(K)) v over the slots where the mask is true, [B, T, H, V], with float32 logits."""
  return weighted_sum(attention_logits(q_BTHK, k_BSGK), v_BSGV, mask_BTS)


def attention_logits(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
  """Returns q k^T / sqrt(K), [B, G, T, R, S] with R = H / G query heads per key head, in float32 at least."""
  batch, time, heads, width = q_BTHK.shape
  groups = k_BSGK.shape[2]
  q = q_BTHK.reshape(batch, time, groups, heads // groups, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  return jnp.einsum("btgrk,bsgk->bgtrs", q, k_BSGK, preferred_element_type=wide) / math.sqrt(width)


def weighted_sum(logits_BGTRS: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Returns the sum of values, weighted by the softmax of the logits where the mask is true, [B, T, H, V]."""
  batch, groups, time, repeats, _ = logits_BGTRS.shape
  logits = jnp.where(mask_BTS[:, None, :, None], logits_BGTRS, UNSEEN)
  weights = jax.nn.softmax(logits, axis=-1).astype(v_BSGV.dtype)
  out = jnp.einsum("bgtrs,bsgv->btgrv", weights, v_BSGV)
  return out.reshape(batch, time, groups * repeats, v_BSGV.shape[-1])
