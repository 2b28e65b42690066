"""SUPRA's linear attention, and beside it the teacher's softmax attention over the last and the first few tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.schema import POSITIVE, AtLeast
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Dense
from supra_jax.model.mixers.base import Axes, Context, Mixer, side_by_side
from supra_jax.model.mixers.softmax import attention_flops, attention_logits, weighted_sum
from supra_jax.model.mixers.supra import STATE, LinearProjections, LinearState, SupraConfig
from supra_jax.model.registry import register

# (logits [B, G, T, R, S], values [B, S, G, V], mask [B, T, S]) -> output [B, T, H, ...], such as `weighted_sum`.
Weigh = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class WindowConfig(SupraConfig):
  """Config of linear attention (see `SupraConfig`) with softmax attention over W + N tokens beside it.

  Attributes:
    window: W, number of last tokens, the token itself included, that the softmax attention sees.
    sinks: N, number of first tokens of the document that the softmax attention sees as well (Xiao et al. 2023, arXiv
      2309.17453). N = 1 does nearly as well as N = 4.
  """

  window: Annotated[int, POSITIVE] = 64
  sinks: Annotated[int, AtLeast(0)] = 4


@flax.struct.dataclass
class WindowState(LinearState):
  """S of the linear attention; and for the softmax attention keys k [B, N + W, G, K], after RoPE, and values v.

  Values are [B, N + W, G, V]. Slots 0 to N - 1 hold the sinks. The other W slots are a ring: of the last W tokens, the
  one with index i is in slot N + i % W.
  """

  k: jax.Array
  v: jax.Array


@register("supra_window")
class WindowAttention(LinearProjections):
  """`W_o softmax(q k^T / sqrt(K)) v` over the last W tokens and the first N, plus `W_l o`; not in the paper.

  q, k, v and RoPE of the softmax attention are the teacher's. o is the output of the linear attention over all tokens.
  The layer is still an RNN: the state does not grow.
  """

  Config = WindowConfig
  NEW = f"{LinearProjections.NEW}|linear_o_proj"
  AXES: ClassVar[Axes] = (*LinearProjections.AXES, ("linear_o_proj/kernel", ("heads", "embed")))
  PARTS = {"linear": ("s",), "window": ("k", "v")}
  STATE_AXES = {"s": STATE, "k": ("batch", None, "heads", None), "v": ("batch", None, "heads", None)}

  def setup(self):
    super().setup()
    self.linear_o_proj = Dense(self.config.hidden_size, dtype=self.dtype)  # one bias is enough: o_proj's

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> WindowState:
    del capacity
    slots = self.layer.sinks + self.layer.window
    return WindowState(self.init_linear_state(batch), *nothing_held(self, batch, slots))

  def outputs(
    self, x_BTD: jax.Array, state: WindowState | None, context: Context
  ) -> tuple[dict[str, jax.Array], WindowState]:
    q, k, v = self.project(x_BTD)
    linear_out, s = self.attend_linearly(q, k, v, state, context)
    q, k = self.rotate_by_head(q), self.rotate_by_head(k)
    reach = self.reach(self.config, self.layer)
    far_q = self.rotate(q, context.rotation if reach is None else context.far_rotations[reach])
    q, k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)
    k, v = self.held(k), self.held(v)
    slots = self.layer.sinks + self.layer.window
    held = nothing_held(self, len(x_BTD), slots) if state is None else (state.k, state.v)
    how = {"sinks": self.layer.sinks, "far_q_BTHK": far_q, **window_places(context)}
    softmax_out, held = window_softmax_attention(q, k, v, held, **how)
    outputs = {"o_proj": side_by_side(softmax_out), "linear_o_proj": side_by_side(linear_out)}
    return outputs, WindowState(s, *held)

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Adds softmax attention over W + N keys and the second output projection; returns multiply-adds per token."""
    softmax = attention_flops(config, tokens, layer.window + layer.sinks)
    return super().flops(config, layer, tokens) + softmax + config.num_heads * config.value_width * config.hidden_size

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    seen = config.sliding_window
    if seen is None or layer.window <= seen:
      return None
    return f"window={layer.window}: the teacher's own softmax sees {seen} tokens; wanted no more."

  @classmethod
  def reach(cls, config: ModelConfig, layer: Any) -> int | None:
    """Returns the largest position that q is rotated to when it meets the sinks; None: any position.

    It is the largest distance between two tokens that the teacher has seen in training, but at least 2 W + N, as
    `window_softmax_attention` requires.
    """
    seen = [tokens for tokens in (config.max_positions, config.sliding_window) if tokens is not None]
    if not seen or not layer.sinks or config.rope.kind not in ("half", "interleaved"):
      return None
    return max(min(seen) - 1, 2 * layer.window + layer.sinks)

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    """Returns feature maps as for `supra`, and W_l = 0: the layer begins as the teacher's, limited to W + N tokens.

    W_l = 0 can be trained: the gradient of W_l is not 0, and after one step that of the feature maps is not 0 either.
    """
    begun = super().begin(drawn, start)
    return {**begun, "linear_o_proj": jax.tree.map(jnp.zeros_like, drawn["linear_o_proj"])}


def nothing_held(mixer: Mixer, batch: int, slots: int) -> tuple[jax.Array, jax.Array]:
  """Returns the keys and values, [B, slots, G, K] and [B, slots, G, V], that a mixer holds before any token: zeros."""
  c = mixer.config
  k = jnp.zeros((batch, slots, c.num_kv_heads, c.head_dim), mixer.held_dtype)
  return k, jnp.zeros((*k.shape[:-1], c.value_width), mixer.held_dtype)


def window_places(context: Context) -> dict[str, Any]:
  """Returns where the tokens of a call are, by the names of arguments of `window_softmax_attention`."""
  batch, time = context.index.shape
  count = jnp.full(batch, time, jnp.int32) if context.lengths is None else context.lengths
  return {"cached_B": context.index[:, 0], "count_B": count, "first_BT": context.first}


def ring_index(count_B: jax.Array, window: int) -> jax.Array:
  """Returns the index of the token that each slot of a ring holds, int32 [B, W]; negative where the slot is empty.

  Slot s holds the largest i < count with i % W = s.

  Args:
    count_B: int32 [B], number of tokens that were written to the ring.
    window: W.
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
  weigh: Weigh = weighted_sum,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes softmax attention of each token over the last W tokens, itself included, and its document's first N.

  Takes O(T (W + N)) time.

  Args:
    q_BTHK, k_BTGK, v_BTGV: queries, keys and values of T tokens, q and k after RoPE.
    held: keys [B, N + W, G, K] and values [B, N + W, G, V] of earlier tokens, as `WindowState` holds them.
    sinks: N.
    far_q_BTHK: queries that are multiplied with sinks outside the window; None: `q_BTHK`. At the first 2 W + N
      positions of a document, they have to equal `q_BTHK`.
    cached_B: int32, number of tokens read before.
    count_B: int32, number of real tokens among the T; padding is on the right.
    first_BT: int32, the index of the first token of each token's document; `cached_B` is the index of token 0.
    weigh: function that makes the output of logits, values and mask.

  Returns:
    (out [B, T, H, V]; (keys, values), to hold after the last real token, with the shapes of `held`).
  """
  far_q = q_BTHK if far_q_BTHK is None else far_q_BTHK
  new = (k_BTGK, v_BTGV)
  if q_BTHK.shape[1] == 1:
    return _attend_one(q_BTHK, far_q, new, held, sinks, cached_B, count_B, first_BT, weigh)
  out = _attend_in_blocks(q_BTHK, far_q, new, held, sinks, cached_B, first_BT, weigh)
  return out, _hold(new, held, sinks, cached_B, count_B, first_BT)


def _attend_in_blocks(q_BTHK, far_q_BTHK, new, held, sinks, cached_B, first_BT, weigh):
  """Cuts T into blocks of W tokens; a block sees itself, the W tokens before it, and N sinks that lie further back.

  The sinks are those of the document in which the block begins: a document that begins later in the block has its sinks
  within the block.
  """
  (batch, time), window = q_BTHK.shape[:2], held[0].shape[1] - sinks
  size = min(time, window)
  blocks = -(-time // size)
  whole = blocks * size

  def blocked(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, whole - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, blocks, size, *x.shape[2:])

  def seen(before: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the entries of `before` and `x` that each block sees, [B, blocks, W + size, ...]."""
    x = blocked(x)
    earlier = jnp.concatenate([before[:, None], x[:, :-1]], axis=1) if blocks > 1 else before[:, None]
    return jnp.concatenate([earlier, x], axis=2)

  cached_B1, number = cached_B[:, None], jnp.arange(sinks)
  index = cached_B1 + jnp.arange(whole)
  query, first = blocked(index)[..., None], blocked(first_BT)[..., None]
  key = seen(ring_index(cached_B, window), index)[:, :, None]
  near = (key > query - window) | (key < first + sinks)
  mask = near & (key <= query) & (key >= first)
  k, v = (seen(before[:, sinks:], x) for before, x in zip(held, new, strict=True))
  if sinks:
    begun = first[:, :, 0, 0]
    slot = sink_slots(begun, sinks, window, cached_B1, cached_B1 + time)
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(held, new, strict=True)]
    k, v = (
      jnp.concatenate([taken(x, slot).reshape(batch, blocks, sinks, *x.shape[2:]), y], axis=2)
      for x, y in zip(joined, (k, v), strict=True)
    )
    out_of_sight = begun[..., None] + number < query[:, :, 0] - window
    mask = jnp.concatenate([out_of_sight[:, :, None] & (first == begun[..., None, None]), mask], axis=-1)
  # Blocks stay an axis of their own, which a mesh may shard as it sharded the time.
  attend = jax.vmap(functools.partial(_with_sinks, sinks=sinks, weigh=weigh), in_axes=1, out_axes=1)
  out = attend(blocked(q_BTHK), blocked(far_q_BTHK), k, v, mask)
  return out.reshape(batch, whole, *out.shape[3:])[:, :time]


def _attend_one(q_BTHK, far_q_BTHK, new, held, sinks, cached_B, count_B, first_BT, weigh):
  """Does one decoding step: overwrites the oldest ring slot (and a sink slot while position < N), then attends."""
  batch, slots = held[0].shape[:2]
  window, first_B1 = slots - sinks, first_BT[:, :1]
  position_B1 = cached_B[:, None] - first_B1
  places_B2 = jnp.concatenate(
    [sinks + cached_B[:, None] % window, jnp.where(position_B1 < sinks, position_B1, slots)], 1
  )
  at = jnp.arange(batch)[:, None], jnp.where(count_B[:, None] > 0, places_B2, slots)  # out of range: dropped
  k, v = (x.at[at].set(token, mode="drop") for x, token in zip(held, new, strict=True))
  ring_BW = ring_index(cached_B + 1, window) >= first_B1
  sink_BN = first_B1 + jnp.arange(sinks) <= cached_B[:, None] - window
  mask_B1S = jnp.concatenate([sink_BN, ring_BW], axis=1)[:, None]
  return _with_sinks(q_BTHK, far_q_BTHK, k, v, mask_B1S, sinks, weigh), (k, v)


def _hold(new, held, sinks, cached_B, count_B, first_BT):
  """Returns the keys and values to hold after the last real token: of its document's first N, and the last W of all."""
  cached_B1, window = cached_B[:, None], held[0].shape[1] - sinks
  kept = ring_index(cached_B + count_B, window)
  slot = jnp.where(kept >= cached_B1, sinks + window + kept - cached_B1, sinks + jnp.arange(window))
  last = jnp.take_along_axis(first_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
  sink_slot = sink_slots(last, sinks, window, cached_B1, cached_B1 + count_B[:, None])
  slot = jnp.concatenate([sink_slot, slot], axis=1)
  k, v = (taken(jnp.concatenate(pair, axis=1), slot) for pair in zip(held, new, strict=True))
  return k, v


def sink_slots(first, sinks: int, window: int, cached_B1, end_B1):
  """Returns the slots of the first N tokens of documents in the concatenation of held and new tokens.

  Args:
    first: int32 [B, ...], index of the first token of each document.
    sinks, window: N and W.
    cached_B1, end_B1: int32 [B, 1]; new tokens have the indices i with cached_B1 <= i < end_B1.

  Returns:
    int32 [B, ... * N].
  """
  number = jnp.arange(sinks)
  token = (first[..., None] + number).reshape(len(first), -1)
  old = jnp.broadcast_to(number, (*first.shape, sinks)).reshape(len(first), -1)
  return jnp.where((token >= cached_B1) & (token < end_B1), sinks + window + token - cached_B1, old)


def _with_sinks(q, far_q, k, v, mask, sinks: int, weigh: Weigh):
  """Weighs values by the products of q and k, but with the queries `far_q` for the first `sinks` slots."""
  k, v = k.astype(q.dtype), v.astype(q.dtype)
  logits = attention_logits(q, k[:, sinks:])
  if sinks:
    logits = jnp.concatenate([attention_logits(far_q, k[:, :sinks]), logits], axis=-1)
  return weigh(logits, v, mask)


def taken(x_BS: jax.Array, slot_BN: jax.Array) -> jax.Array:
  """Returns x[b, slot[b, n]] of x [B, S, ...]; slots are within 0 to S - 1."""
  slot = slot_BN.reshape(*slot_BN.shape, *[1] * (x_BS.ndim - 2))
  return jnp.take_along_axis(x_BS, slot, axis=1, mode="promise_in_bounds")
