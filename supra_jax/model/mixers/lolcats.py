"""LoLCATs' layer (Zhang et al. 2024, arXiv 2410.10254): softmax over a window and linear attention, in one denominator.

It is here for comparison with the other mixers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.schema import POSITIVE, check
from supra_jax.model.config import ModelConfig
from supra_jax.model.feature_maps import Hedgehog
from supra_jax.model.layers import Weight, at_least_float32
from supra_jax.model.mixers.base import Axes, Context, MixerState, Projections, side_by_side
from supra_jax.model.mixers.softmax import UNSEEN, attention_flops
from supra_jax.model.mixers.supra import STATE, identity_map, read_linearly
from supra_jax.model.mixers.supra_window import (
  WindowAttention,
  nothing_held,
  taken,
  window_places,
  window_softmax_attention,
)
from supra_jax.model.registry import MixerConfig, register

FACTOR = 0.1  # gamma before training, as in LoLCATs' recipes for Llama 3 and Mistral


@dataclasses.dataclass(frozen=True)
class LolcatsConfig(MixerConfig):
  """Config of LoLCATs' layer.

  Attributes:
    window: W, number of last tokens, the token itself included, that the softmax attention sees.
  """

  window: Annotated[int, POSITIVE] = 64

  def __post_init__(self):
    check(self, type(self).__name__)


@flax.struct.dataclass
class LolcatsState(MixerState):
  """S of the tokens that have left the window; and keys k [B, W, G, K], after RoPE, and values v of those in it.

  S is sum_i phi_k(k_i) [v_i, 1]^T, float32 [B, G, 2K, V + 1]: its last column adds up to the denominator. Values are
  [B, W, G, V]. The W slots are a ring: the token with index i is in slot i % W.
  """

  s: jax.Array
  k: jax.Array
  v: jax.Array


@register("lolcats")
class LolcatsAttention(Projections):
  """Softmax attention over the last W tokens and linear attention over all earlier ones, divided by one sum of weights.

  `o_t = sum_i a_ti v_i / sum_i a_ti`, with the weights
  `a_ti = gamma e^(q_t.k_i / sqrt(K) - c_t)` of t-W < i <= t, and
  `a_ti = phi_q(q_t).phi_k(k_i)` of i <= t-W.

  q and k are those after RoPE. c_t is the largest logit of the window. gamma = sigmoid(weight) is learned, one for each
  head. phi(x) = [softmax(W x), softmax(-W x)] is Hedgehog's feature map.

  A text of at most W tokens is read as by the teacher, whatever the new parameters are. The denominator is at least
  gamma, since the largest exponential in the window is 1. c_t is not undone elsewhere, so that it has a gradient.

  Departures from LoLCATs' code:
    Keys and values are not repeated to H heads: phi_k has one W, and the state one S, for each of G key/value heads.
      LoLCATs has H of each.
    W is [K, K], so that there are 2K features. LoLCATs' recipes have 2 * 64, also where K is 128.
    W begins as the identity, as in Hedgehog's paper. LoLCATs' recipes draw W.
    The window slides, as in LoLCATs' equation and `sw` recipes. The window of its `tk` recipes, which suits a kernel,
      has W to 2W tokens and moves by W.
    Features have no lower limit. LoLCATs' are at least 1e-12.
    S and the window begin anew with each document of a row.
  """

  Config = LolcatsConfig
  NEW = "hedgehog|window_factor"
  NO_ADAPTERS = "hedgehog"
  AXES: ClassVar[Axes] = (*Projections.AXES, ("hedgehog_[qk]/kernel", ("heads", "embed", None)))
  PARTS = {"linear": ("s",), "window": ("k", "v")}
  STATE_AXES = {"s": STATE, "k": ("batch", None, "heads", None), "v": ("batch", None, "heads", None)}

  def setup(self):
    super().setup()
    self.hedgehog_q = Hedgehog(self.dtype)
    self.hedgehog_k = Hedgehog(self.dtype)
    log_odds = math.log(FACTOR / (1 - FACTOR))
    self.window_factor = Weight(nn.initializers.constant(log_odds), (self.config.num_heads,))

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> LolcatsState:
    del capacity
    c = self.config
    s = jnp.zeros((batch, c.num_kv_heads, 2 * c.head_dim, c.value_width + 1), jnp.float32)
    return LolcatsState(s, *nothing_held(self, batch, self.layer.window))

  def outputs(
    self, x_BTD: jax.Array, state: LolcatsState | None, context: Context
  ) -> tuple[dict[str, jax.Array], LolcatsState]:
    q, k, v = self.project(x_BTD)
    q, k = (self.rotate(self.rotate_by_head(x), context.rotation) for x in (q, k))
    k, v = self.held(k), self.held(v)
    state = self.init_state(len(x_BTD), 0) if state is None else state
    linear, s = self._attend_linearly(q, k, v, state, context)
    how = {**window_places(context), "weigh": exponential_sum}
    window, held = window_softmax_attention(q, k, v, (state.k, state.v), **how)
    sums = nn.sigmoid(self.window_factor())[:, None] * window + linear
    out = sums[..., :-1] / sums[..., -1:]
    return {"o_proj": side_by_side(out.astype(self.dtype))}, LolcatsState(s, *held)

  def _attend_linearly(
    self, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, state: LolcatsState, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Returns (sum_{i <= t-W} a_ti [v_i, 1], [B, T, H, V + 1]; S after the last real token).

    This is causal linear attention in which token t brings the key and value of token t-W.
    """
    c, cached = self.config, context.index[:, 0]
    late_k, late_v = leaving(k_BTGK, state.k, cached), leaving(v_BTGV, state.v, cached)
    same_document = context.index - self.layer.window >= context.first
    features = jnp.where(same_document[..., None, None], self.hedgehog_k(late_k), 0)
    # The op has a state for each query head.
    repeats = c.num_heads // c.num_kv_heads
    initial, slopes = jnp.repeat(state.s, repeats, axis=1), jnp.zeros(c.num_heads)
    how: dict[str, Any] = {"scale": 1.0, "implementation": self.implementation}
    out, s = read_linearly(self.hedgehog_q(q_BTHK), features, with_one(late_v), slopes, initial, context, **how)
    return out, s.reshape(s.shape[0], c.num_kv_heads, repeats, *s.shape[2:])[:, :, 0]

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Adds to the projections phi, softmax attention over W keys, and 4 H K (V + 1) for S; multiply-adds per token."""
    c = config
    maps = (c.num_heads + c.num_kv_heads) * c.head_dim**2
    linear = 4 * c.num_heads * c.head_dim * (c.value_width + 1)
    return super().flops(c, layer, tokens) + maps + attention_flops(c, tokens, layer.window) + linear

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    return WindowAttention.refusal(config, layer)

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    """Returns the new parameters as drawn, but if `start.phi` is "identity", feature maps with W = I."""
    if start.phi == "random":
      return drawn
    return {name: identity_map(tree) if name.startswith("hedgehog") else tree for name, tree in drawn.items()}


def exponential_sum(logits_BGTRS: jax.Array, v_BSGV: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Returns sum_i e^(l_i - c) [v_i, 1] over the slots where the mask is true, [B, T, H, V + 1]; c = max_i l_i."""
  logits = jnp.where(mask_BTS[:, None, :, None], logits_BGTRS, UNSEEN)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  out = jnp.einsum("bgtrs,bsgv->btgrv", weights, with_one(v_BSGV))
  return out.reshape(*out.shape[:2], -1, out.shape[-1])


def with_one(v_BTGV: jax.Array) -> jax.Array:
  """Returns [v, 1], [B, T, G, V + 1], in float32 at least: the weighted sum of the 1 is the sum of the weights."""
  return jnp.pad(at_least_float32(v_BTGV), ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)


def leaving(new_BT: jax.Array, ring_BW: jax.Array, cached_B: jax.Array) -> jax.Array:
  """Returns x of the token that leaves the window as each new one enters it, W tokens after it: [B, T, ...].

  Args:
    new_BT: x of T tokens, [B, T, ...].
    ring_BW: x of the W tokens before, [B, W, ...], of the token with index i in slot i % W.
    cached_B: int32, index of the first new token.
  """
  window, number = ring_BW.shape[1], jnp.arange(new_BT.shape[1])
  # Not a slice of the new tokens: with jax 0.10.2 its gradient is wrong on a mesh that cuts both tokens and heads.
  slot = jnp.where(number < window, (cached_B[:, None] + number) % window, number)
  return taken(jnp.concatenate([ring_BW, new_BT], axis=1), slot)
