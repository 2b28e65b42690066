"""SUPRA's linear attention (arXiv 2405.06640, section 3): parallel for a sequence, recurrent for a single token."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import context_parallel, linear_attention, linear_attention_step
from supra_jax.core.schema import POSITIVE, AtMost, check
from supra_jax.core.sharding import TIME_AXIS, current_time_shards, per_device
from supra_jax.model.config import ModelConfig
from supra_jax.model.feature_maps import FeatureMapKind, feature_map_flops, into_projection, make_feature_maps
from supra_jax.model.layers import Norm, group_norm
from supra_jax.model.mixers.base import HEADS, Axes, Context, MixerState, Projections, side_by_side
from supra_jax.model.registry import MixerConfig, register

Decay = Literal["lightning", "retnet", "none"]

RETNET_FIRST_EXPONENT = 5
STATE = ("batch", "heads", None, None)
_LARGEST_SLOPE = 3.4e38  # slopes are float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(MixerConfig):
  """What the configs of all linear attention say.

  Attributes:
    decay: kind of the decays gamma_h, see `head_slopes`; `none`: gamma_h = 1.
    decay_start: first slope of the lightning series; None means the ratio of the series, see `head_slopes`.
    rope: whether phi(q) and phi(k) are rotated by the model's RoPE.
  """

  decay: Decay = "lightning"
  decay_start: Annotated[float, POSITIVE, AtMost(_LARGEST_SLOPE), "a slope that float32 can hold"] | None = None
  rope: bool = True

  def __post_init__(self):
    check(self, type(self).__name__)


@dataclasses.dataclass(frozen=True)
class SupraConfig(LinearConfig):
  """Config of SUPRA's linear attention (arXiv 2405.06640, section 3).

  Attributes:
    feature_map: kind of W in phi(x) = relu(W x + b). `dense`: one W [H*K, H*K] over all heads, and, if G < H, another W
      [G*K, G*K] for k, as in released checkpoints. `per_head`: W [G, K, K], where each group of query heads shares a
      [K, K] with its key head, as the paper writes it. `per_head_separate`: W [H, K, K] for q and [G, K, K] for k.
    qk_norm: whether q and k are normalised, over all heads together, after phi and before RoPE.
  """

  feature_map: FeatureMapKind = "dense"
  qk_norm: bool = False


@flax.struct.dataclass
class LinearState(MixerState):
  """S = sum_j gamma^(T-1-j) k_j v_j^T over the T tokens read, float32 [B, H, K, V]; k_j is a key after phi and RoPE."""

  s: jax.Array


def head_slopes(config: LinearConfig, num_heads: int) -> np.ndarray:
  """Returns the slopes s_h >= 0 of the decays gamma_h = exp(-s_h), float32 [H], for h = 0, ..., H - 1.

  `config.decay` chooses them. `none`: 0. `retnet` (Sun et al. 2023): gamma_h = 1 - 2^-(5+h). `lightning` (Qin et al.
  2023; the series of ALiBi): if H is a power of two, s_h = start * ratio^h with ratio = 2^(-8/H) and start =
  `config.decay_start` or else ratio; otherwise the series for the largest power of two P below H, followed by the first
  H - P of every second slope of the series for 2 P.
  """
  if config.decay == "none":
    return np.zeros(num_heads, np.float32)
  if config.decay == "retnet":
    # float64 up to here: in float32, as the reference has it, gamma rounds to 1 from head 20 on.
    return (-np.log1p(-(2.0 ** -(RETNET_FIRST_EXPONENT + np.arange(num_heads))))).astype(np.float32)

  def series(heads: int) -> np.ndarray:
    ratio = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
    start = ratio if config.decay_start is None else config.decay_start
    return start * ratio ** np.arange(heads)

  below = 2 ** math.floor(math.log2(num_heads))
  slopes = series(below)
  if below < num_heads:
    slopes = np.concatenate([slopes, series(2 * below)[::2][: num_heads - below]])
  return slopes.astype(np.float32)


class LinearProjections(Projections):
  """A mixer with the projections of softmax attention, the feature maps phi, and linear attention of their results."""

  NEW = "feature_map|[qk]_norm"
  NO_ADAPTERS = "feature_map"
  AXES: ClassVar[Axes] = (
    *Projections.AXES,
    # Dense, [N*K, N*K]; and one matrix per head, [N, K, K].
    ("feature_map(_kv)?/kernel", ("embed", "heads")),
    ("feature_map(_kv)?/kernel", ("heads", "embed", None)),
  )

  def setup(self):
    super().setup()
    c = self.config
    q_map, k_map = make_feature_maps(c, self.layer.feature_map, self.dtype)
    self.feature_map = q_map
    if k_map is not None:
      self.feature_map_kv = k_map
    self.has_own_k_map = k_map is not None
    if self.layer.qk_norm:
      self.q_norm = Norm(c.norm, c.norm_eps, self.dtype)
      self.k_norm = Norm(c.norm, c.norm_eps, self.dtype)

  @nn.nowrap
  def init_linear_state(self, batch: int) -> jax.Array:
    c = self.config
    return jnp.zeros((batch, c.num_heads, c.head_dim, c.value_width), jnp.float32)

  def attend_linearly(
    self, q: jax.Array, k: jax.Array, v: jax.Array, state: LinearState | None, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Applies linear attention to the q, k and v that `project` returns.

    `o_i = GroupNorm(sum_{j<=i} gamma^(i-j) (q_i . k_j / sqrt(K)) v_j)` with q, k = RoPE(phi(W_q x)), RoPE(phi(W_k x)):
    paper eq. 9 and 10, `LinearAttn` of TRI-ML/linear_open_lm. The order of the steps is that of released checkpoints.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, V].
      state: the state before these tokens; None: no tokens were read before.
      context: positions and documents of the tokens.

    Returns:
      (o [B, T, H, V], S after the last real token, float32 [B, H, K, V]).
    """
    q, k = self.features(q, k, context)
    slopes = jnp.asarray(head_slopes(self.layer, self.config.num_heads))
    scale = self.config.head_dim**-0.5
    initial = None if state is None else state.s
    out, s = read_linearly(q, k, v, slopes, initial, context, scale=scale, implementation=self.implementation)
    return group_norm(out), s

  def features(self, q: jax.Array, k: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns phi(q) and phi(k), normalised and rotated as the layer's config says; k then has G or H heads."""
    q = self.feature_map(q)
    k = self.feature_map_kv(k) if self.has_own_k_map else self.feature_map(k)
    if self.layer.qk_norm:
      q, k = self._qk_norm(q, k)
    if self.layer.rope:
      q, k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)
    return q, k

  def _qk_norm(self, q_BTHK: jax.Array, k_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normalises q and k over all heads together; k is first repeated to H heads, as its gains are per query head."""
    k_BTHK = jnp.repeat(k_BTGK, self.config.num_heads // self.config.num_kv_heads, axis=2)
    lead = q_BTHK.shape[:2]
    q = self.q_norm(q_BTHK.reshape(*lead, -1)).reshape(q_BTHK.shape)
    return q, self.k_norm(k_BTHK.reshape(*lead, -1)).reshape(q_BTHK.shape)

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Adds to the projections the feature maps, and 2 H K V for S += k v^T and q S; returns multiply-adds per token."""
    state = 2 * config.num_heads * config.head_dim * config.value_width
    return super().flops(config, layer, tokens) + feature_map_flops(config, layer.feature_map) + state

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    """Returns the new parameters as drawn, but if `start.phi` is "identity", feature maps with W = I and b = 0."""
    if start.phi == "random":
      return drawn
    return {name: identity_map(tree) if name.startswith("feature_map") else tree for name, tree in drawn.items()}


def read_linearly(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  slopes_H: jax.Array,
  initial_BHKV: jax.Array | None,
  context: Context,
  *,
  scale: float,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """Runs the linear attention op on the tokens of a call, each document from S = 0, on one device or on a mesh.

  Args:
    q_BTHK, k_BTGK, v_BTGV: queries, keys and values, as `kernels_pallas.linear_attention` takes them.
    slopes_H: slopes of the decays.
    initial_BHKV: S before these tokens; None: no tokens were read before.
    context: documents of the tokens.
    scale, implementation: see `kernels_pallas.linear_attention`.

  Returns:
    (output [B, T, H, V], S after the last real token, float32 [B, H, K, V]).
  """
  if initial_BHKV is not None and context.continues is not None:
    initial_BHKV = jnp.where(context.continues[:, None, None, None], initial_BHKV, 0)
  if q_BTHK.shape[1] == 1 and initial_BHKV is not None and context.lengths is None:
    q, k, v = (x[:, 0] for x in (q_BTHK, k_BTGK, v_BTGV))
    out, s = linear_attention_step(q, k, v, slopes_H, initial_BHKV, scale=scale)
    return out[:, None], s
  sequence = functools.partial(_sequence, scale=scale, implementation=implementation)
  op = per_device(sequence, (HEADS, HEADS, HEADS, ("heads",), STATE, ("batch", "time"), ("batch",)), (HEADS, STATE))
  read: tuple[jax.Array, jax.Array] = op(
    q_BTHK, k_BTGK, v_BTGV, slopes_H, initial_BHKV, context.segment_ids, context.lengths
  )
  return read


def identity_map(tree: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
  """Returns the parameters of a feature map with W = I, and b = 0 if it has a bias."""
  kernel = jnp.broadcast_to(jnp.eye(tree["kernel"].shape[-1]), tree["kernel"].shape)
  return {**jax.tree.map(jnp.zeros_like, tree), "kernel": kernel}


def phi_in_projections(config: ModelConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
  """Multiplies phi's matrices into the projections of q and k, if neither a norm nor adapters are between."""
  is_bare = config.qk_norm == "none" and not any(
    set(params[name]) - {"kernel", "bias"} for name in ("q_proj", "k_proj")
  )
  if not is_bare or "kernel" not in params["feature_map"]:
    return params
  maps = {name: tree for name, tree in params.items() if name.startswith("feature_map")}
  q_map, k_map = maps["feature_map"], maps.get("feature_map_kv", maps["feature_map"])
  projections = {
    "q_proj": into_projection(params["q_proj"], q_map),
    "k_proj": into_projection(params["k_proj"], k_map),
  }
  return {**params, **projections, **{name: {"bias": tree["bias"]} for name, tree in maps.items()}}


def _sequence(q, k, v, slopes, initial_state, segment_ids, lengths, *, scale, implementation):
  """Runs the linear attention op on one device's own rows, heads and tokens."""
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


@register("supra")
class LinearAttention(LinearProjections):
  """SUPRA's linear attention in place of softmax attention."""

  Config = SupraConfig
  PARTS = {"linear": ("s",)}
  STATE_AXES = {"s": STATE}

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> LinearState:
    del capacity  # not used: the state does not grow
    return LinearState(self.init_linear_state(batch))

  def outputs(
    self, x_BTD: jax.Array, state: LinearState | None, context: Context
  ) -> tuple[dict[str, jax.Array], LinearState]:
    out, s = self.attend_linearly(*self.project(x_BTD), state, context)
    return {"o_proj": side_by_side(out)}, LinearState(s)

  @classmethod
  def for_inference(cls, config: ModelConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `phi_in_projections`; what a derived mixer does between the two products is not known."""
    return phi_in_projections(config, params) if cls is LinearAttention else params
