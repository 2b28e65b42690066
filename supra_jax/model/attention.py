"""The mixers: softmax attention, the linear attention of SUPRA that takes its place, and both side by side."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import context_parallel, linear_attention, linear_attention_step
from supra_jax.core.sharding import TIME_AXIS, constrain, current_time_shards, per_device
from supra_jax.model.config import ModelConfig, SupraConfig
from supra_jax.model.feature_maps import make_feature_maps
from supra_jax.model.layers import Dense, Norm, group_norm
from supra_jax.model.rope import apply_rope, rope_table
from supra_jax.model.softmax import masked_softmax_attention, window_softmax_attention

RETNET_FIRST_EXPONENT = 5
# Dimensions of q, k, v and of the state, for the mesh.
HEADS = ("batch", "time", "heads", None)
STATE = ("batch", "heads", None, None)


@flax.struct.dataclass
class Context:
  """Where the tokens of one call stand; the same for all layers.

  Attributes:
    rotation: (cos, sin), float32 [B, T, 1, K/2], of each token's position in its document; None where there is no RoPE
      by position.
    far_rotation: alike, of no position beyond `ModelConfig.sink_reach`: what q has where it meets a window's sinks.
    index: int32 [B, T], the cache slot of each token.
    first: int32 [B, T], the first cache slot of its document.
    lengths: int32 [B], how many tokens are real; None means all.
    segment_ids: int32 [B, T], document ids; None means that no document starts inside.
    continues: bool [B], whether token 0 goes on with the state's document; None means that all do.
  """

  rotation: tuple[jax.Array, jax.Array] | None
  far_rotation: tuple[jax.Array, jax.Array] | None
  index: jax.Array
  first: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  continues: jax.Array | None


@flax.struct.dataclass
class KVCache:
  """Keys [B, S, G, K], after RoPE, and values [B, S, G, V] of a softmax layer."""

  k: jax.Array
  v: jax.Array


@flax.struct.dataclass
class LinearState:
  """S = sum_j gamma^(T-1-j) k_j v_j^T, float32 [B, H, K, V], of a SUPRA layer; k as phi and RoPE leave it."""

  s: jax.Array


@flax.struct.dataclass
class WindowState(LinearState):
  """S, and keys [B, N + W, G, K], after RoPE, and values [B, N + W, G, V].

  Those of a document's first N tokens, and of the last W of all: of slot i in slot N + i % W.
  """

  k: jax.Array
  v: jax.Array


def head_slopes(supra: SupraConfig, num_heads: int) -> np.ndarray:
  """Slopes s_h >= 0 of the decays gamma_h = exp(-s_h), float32 [H].

  Lightning (Qin et al. 2023; ALiBi's series): `start * ratio^h` for a power of two, else the series of the power of two
  below followed by every second slope of the one above. RetNet (Sun et al. 2023): gamma_h = 1 - 2^-(5+h).
  """
  if supra.decay == "none":
    return np.zeros(num_heads, np.float32)
  if supra.decay == "retnet":
    # float64 up to here: in float32, as the reference has it, gamma rounds to 1 from head 20 on.
    return (-np.log1p(-(2.0 ** -(RETNET_FIRST_EXPONENT + np.arange(num_heads))))).astype(np.float32)

  def series(heads: int) -> np.ndarray:
    ratio = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
    start = ratio if supra.decay_start is None else supra.decay_start
    return start * ratio ** np.arange(heads)

  below = 2 ** math.floor(math.log2(num_heads))
  slopes = series(below)
  if below < num_heads:
    slopes = np.concatenate([slopes, series(2 * below)[::2][: num_heads - below]])
  return slopes.astype(np.float32)


def _side_by_side(x_BTHV: jax.Array) -> jax.Array:
  return x_BTHV.reshape(*x_BTHV.shape[:2], -1)


class _Projections(nn.Module):
  """q, k, v and output projections, under the names that all mixers share, so that they pass from one to the other."""

  config: ModelConfig
  dtype: Any = jnp.float32
  implementation: str = "auto"

  def setup(self):
    c = self.config
    qkv = functools.partial(Dense, use_bias=c.qkv_bias, dtype=self.dtype)
    self.q_proj = qkv(c.num_heads * c.head_dim)
    self.k_proj = qkv(c.num_kv_heads * c.head_dim)
    self.v_proj = qkv(c.num_kv_heads * c.value_width)
    self.o_proj = Dense(c.hidden_size, use_bias=c.output_bias, dtype=self.dtype)
    if c.qk_norm != "none":
      self.q_proj_norm = Norm(c.norm, c.norm_eps, self.dtype)
      self.k_proj_norm = Norm(c.norm, c.norm_eps, self.dtype)

  def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], normalised as the teacher does it."""
    c, lead = self.config, x_BTD.shape[:2]
    q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
    if c.qk_norm == "all_heads":
      q, k = self.q_proj_norm(q), self.k_proj_norm(k)
    q, k = q.reshape(*lead, c.num_heads, c.head_dim), k.reshape(*lead, c.num_kv_heads, c.head_dim)
    if c.qk_norm == "head":
      q, k = self.q_proj_norm(q), self.k_proj_norm(k)
    q, k, v = (constrain(x, *HEADS) for x in (q, k, v.reshape(*lead, c.num_kv_heads, c.value_width)))
    return q, k, v

  @nn.nowrap
  def rotate(self, x_BTHK: jax.Array, rotation: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """RoPE by position, where the config has it."""
    if rotation is None:
      return x_BTHK
    return apply_rope(x_BTHK, *rotation, interleaved=self.config.rope.kind == "interleaved")

  @nn.nowrap
  def rotate_by_head(self, x_BTNK: jax.Array) -> jax.Array:
    """RoPE by head, where the config has it; linear attention, whose q and k of a head would turn alike, needs none."""
    c = self.config
    if c.rope.kind != "by_head":
      return x_BTNK
    return apply_rope(x_BTNK, *rope_table(c.rope, c.head_dim, jnp.arange(x_BTNK.shape[2])))

  def merge(self, out_BTHV: jax.Array) -> jax.Array:
    return self.o_proj(_side_by_side(out_BTHV))


class SoftmaxAttention(_Projections):
  """The teacher's attention: causal, grouped, with RoPE and, where the config says so, a sliding window."""

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> KVCache:
    c = self.config
    k = jnp.zeros((batch, capacity, c.num_kv_heads, c.head_dim), self.dtype)
    return KVCache(k, jnp.zeros((*k.shape[:-1], c.value_width), self.dtype))

  def __call__(self, x_BTD: jax.Array, state: KVCache | None, context: Context) -> tuple[jax.Array, KVCache]:
    c = self.config
    q, k, v = self.project(x_BTD)
    q, k = (self.rotate(self.rotate_by_head(x), context.rotation) for x in (q, k))
    cache = KVCache(k, v) if state is None else self._append(state, k, v, context)
    slot = jnp.arange(cache.k.shape[1])
    oldest = context.first
    if c.sliding_window is not None:
      oldest = jnp.maximum(oldest, context.index - c.sliding_window + 1)
    mask_BTS = (slot <= context.index[..., None]) & (slot >= oldest[..., None])
    return self.merge(masked_softmax_attention(q, cache.k, cache.v, mask_BTS)), cache

  @nn.nowrap
  def _append(self, state: KVCache, k: jax.Array, v: jax.Array, context: Context) -> KVCache:
    slots, capacity = context.index, state.k.shape[1]
    if context.lengths is not None:
      padded = jnp.arange(slots.shape[1]) >= context.lengths[:, None]
      slots = jnp.where(padded, capacity, slots)  # out of range: dropped
    rows = jnp.arange(slots.shape[0])[:, None]
    return KVCache(state.k.at[rows, slots].set(k, mode="drop"), state.v.at[rows, slots].set(v, mode="drop"))


def _sequence(q, k, v, slopes, initial_state, segment_ids, lengths, *, scale, implementation):
  """What a device does with its rows, heads and tokens."""
  op = linear_attention
  if current_time_shards() > 1:
    op = functools.partial(context_parallel.linear_attention, axis=TIME_AXIS)
  return op(
    q,
    k,
    v,
    slopes,
    scale=scale,
    initial_state=initial_state,
    segment_ids=segment_ids,
    lengths=lengths,
    implementation=implementation,
  )


class _LinearProjections(_Projections):
  """And phi, with the linear attention that it is for."""

  def setup(self):
    super().setup()
    c = self.config
    q_map, k_map = make_feature_maps(c, self.dtype)
    self.feature_map = q_map
    if k_map is not None:
      self.feature_map_kv = k_map
    self.has_own_k_map = k_map is not None
    if c.supra.qk_norm:
      self.q_norm = Norm(c.norm, c.norm_eps, self.dtype)
      self.k_norm = Norm(c.norm, c.norm_eps, self.dtype)

  @nn.nowrap
  def init_linear_state(self, batch: int) -> jax.Array:
    c = self.config
    return jnp.zeros((batch, c.num_heads, c.head_dim, c.value_width), jnp.float32)

  def attend_linearly(
    self, q: jax.Array, k: jax.Array, v: jax.Array, state: LinearState | None, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """GroupNorm's result [B, T, H, V] and S, of what `project` gave."""
    q = self.feature_map(q)
    k = self.feature_map_kv(k) if self.has_own_k_map else self.feature_map(k)
    if self.config.supra.qk_norm:
      q, k = self._qk_norm(q, k)
    q, k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)

    slopes = jnp.asarray(head_slopes(self.config.supra, self.config.num_heads))
    scale = self.config.head_dim**-0.5
    initial = None if state is None else state.s
    if initial is not None and context.continues is not None:
      initial = jnp.where(context.continues[:, None, None, None], initial, 0)
    if q.shape[1] == 1 and initial is not None and context.lengths is None:
      out, s = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, initial, scale=scale)
      out = out[:, None]
    else:
      sequence = functools.partial(_sequence, scale=scale, implementation=self.implementation)
      op = per_device(sequence, (HEADS, HEADS, HEADS, ("heads",), STATE, ("batch", "time"), ("batch",)), (HEADS, STATE))
      out, s = op(q, k, v, slopes, initial, context.segment_ids, context.lengths)
    return group_norm(out), s

  def _qk_norm(self, q_BTHK: jax.Array, k_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Norms over all heads together. k's gains are one a query head, so that k leaves with H heads."""
    k_BTHK = jnp.repeat(k_BTGK, self.config.num_heads // self.config.num_kv_heads, axis=2)
    lead = q_BTHK.shape[:2]
    q = self.q_norm(q_BTHK.reshape(*lead, -1)).reshape(q_BTHK.shape)
    return q, self.k_norm(k_BTHK.reshape(*lead, -1)).reshape(q_BTHK.shape)


class LinearAttention(_LinearProjections):
  """SUPRA's attention, parallel over a sequence and recurrent over a token alike.

  `o_i = GroupNorm(sum_{j<=i} gamma^(i-j) (q_i . k_j / sqrt(K)) v_j)` with q, k = RoPE(phi(W_q x)), RoPE(phi(W_k x)):
  paper eq. 9 and 10, `LinearAttn` of TRI-ML/linear_open_lm. Steps in the order that released checkpoints need.
  """

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> LinearState:
    del capacity  # what makes it an RNN
    return LinearState(self.init_linear_state(batch))

  def __call__(self, x_BTD: jax.Array, state: LinearState | None, context: Context) -> tuple[jax.Array, LinearState]:
    out, state = self.mix(x_BTD, state, context)
    return self.merge(out), state

  def mix(self, x_BTD: jax.Array, state: LinearState | None, context: Context) -> tuple[jax.Array, LinearState]:
    """All but the output projection: GroupNorm's result [B, T, H, V], and the state."""
    out, s = self.attend_linearly(*self.project(x_BTD), state, context)
    return out, LinearState(s)


class WindowAttention(_LinearProjections):
  """SUPRA's attention, and beside it the teacher's own over the last W tokens and the first N; not in the paper.

  `W_o softmax(q k^T / sqrt(K)) v`, of those tokens, with q, k, v and RoPE as the teacher has them, and `W_l o` with the
  o of `LinearAttention`, of all tokens. An RNN still: what it remembers does not grow.
  """

  def setup(self):
    super().setup()
    self.linear_o_proj = Dense(self.config.hidden_size, dtype=self.dtype)  # one bias is enough: o_proj's

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> WindowState:
    del capacity
    return WindowState(self.init_linear_state(batch), *self._nothing_held(batch))

  def __call__(self, x_BTD: jax.Array, state: WindowState | None, context: Context) -> tuple[jax.Array, WindowState]:
    (softmax_out, linear_out), state = self.mix(x_BTD, state, context)
    return self.merge(softmax_out) + self.linear_o_proj(_side_by_side(linear_out)), state

  def mix(
    self, x_BTD: jax.Array, state: WindowState | None, context: Context
  ) -> tuple[tuple[jax.Array, jax.Array], WindowState]:
    """All but the output projections: what softmax and GroupNorm give, each [B, T, H, V], and the state."""
    q, k, v = self.project(x_BTD)
    linear_out, s = self.attend_linearly(q, k, v, state, context)
    q, k = self.rotate_by_head(q), self.rotate_by_head(k)
    q, far_q, k = (
      self.rotate(x, at) for x, at in ((q, context.rotation), (q, context.far_rotation), (k, context.rotation))
    )
    batch, time = x_BTD.shape[:2]
    held = self._nothing_held(batch) if state is None else (state.k, state.v)
    count = jnp.full(batch, time, jnp.int32) if context.lengths is None else context.lengths
    where = {"cached_B": context.index[:, 0], "count_B": count, "first_BT": context.first}
    softmax_out, held = window_softmax_attention(
      q, k, v, held, sinks=self.config.supra.sinks, far_q_BTHK=far_q, **where
    )
    return (softmax_out, linear_out), WindowState(s, *held)

  @nn.nowrap
  def _nothing_held(self, batch: int) -> tuple[jax.Array, jax.Array]:
    c = self.config
    k = jnp.zeros((batch, c.supra.sinks + c.supra.window, c.num_kv_heads, c.head_dim), self.dtype)
    return k, jnp.zeros((*k.shape[:-1], c.value_width), self.dtype)


MIXERS: dict[str, type[SoftmaxAttention] | type[LinearAttention] | type[WindowAttention]] = {
  "softmax": SoftmaxAttention,
  "supra": LinearAttention,
  "supra_window": WindowAttention,
}
