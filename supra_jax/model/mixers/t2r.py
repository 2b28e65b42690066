"""T2R's linear attention, divided by a sum of weights in place of SUPRA's GroupNorm (Kasai et al. 2021).

T2R, arXiv 2103.13076, is what the paper's ablation compares SUPRA with, in two forms: that of the paper's listing, the
default, and T2R's own, `T2R`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.schema import POSITIVE
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import at_least_float32
from supra_jax.model.mixers.base import Context, Mixer, side_by_side
from supra_jax.model.mixers.supra import (
  STATE,
  LinearConfig,
  LinearProjections,
  LinearState,
  SupraConfig,
  head_slopes,
  phi_in_projections,
  read_linearly,
)
from supra_jax.model.registry import register


@dataclasses.dataclass(frozen=True)
class NormalisedConfig(LinearConfig):
  """What the configs of linear attention with a normaliser say: the output is divided by z, the sum of the weights.

  Attributes:
    normaliser: `clamp` divides by max(z, epsilon), `epsilon` by z + epsilon.
    epsilon: see `normaliser`.
  """

  normaliser: Literal["clamp", "epsilon"] = "clamp"
  epsilon: Annotated[float, POSITIVE] = 1e-6


@dataclasses.dataclass(frozen=True)
class T2RConfig(NormalisedConfig, SupraConfig):
  """Config of T2R's linear attention; the defaults are those of the paper's listing.

  Attributes:
    scale_queries: whether q is divided by sqrt(K) before phi. False: k is, after phi and RoPE.
  """

  scale_queries: bool = False


# T2R's own form, as fields of a config. T2R chooses the number of features of phi; here it is K.
T2R = {"feature_map": "per_head", "decay": "none", "rope": False, "epsilon": 1e-2, "scale_queries": True}


@flax.struct.dataclass
class NormalisedState(LinearState):
  """S of `LinearState`; and z, the sum of the T tokens' keys, float32 [B, H, K], which never decays."""

  z: jax.Array


def read_normalised(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGV: jax.Array,
  state: NormalisedState | None,
  context: Context,
  layer: NormalisedConfig,
  *,
  scale: float,
  implementation: str,
  weighed: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, NormalisedState]:
  """Computes `o_i = sum_{j<=i} gamma^(i-j) (q_i . k_j) v_j / normaliser(sum_{j<=i} q_i . k_j)`, in float32 at least.

  With RoPE some q_i . k_j are negative, and the sum may be: `clamp` then divides by `epsilon`. With `weighed` it is the
  sum of other products, those before RoPE.

  Args:
    q_BTHK, k_BTGK, v_BTGV: queries, keys and values after phi and RoPE.
    state: the state before these tokens; None: no tokens were read before.
    context: documents of the tokens.
    layer: decay and normaliser.
    scale: factor on q_i . k_j, above and below.
    implementation: see `kernels_pallas.linear_attention`.
    weighed: queries and keys, shaped as q and k, whose products are summed in the normaliser; None: q and k.

  Returns:
    (o [B, T, H, V], the state after the last real token).
  """
  q, k, v = (at_least_float32(x) for x in (q_BTHK, k_BTGK, v_BTGV))
  slopes, one = head_slopes(layer, q.shape[2]), jnp.ones_like(v[..., :1])
  how: dict[str, Any] = {"scale": scale, "implementation": implementation}

  def read(
    v: jax.Array, slopes: np.ndarray, initial: jax.Array | None, q: jax.Array = q, k: jax.Array = k
  ) -> tuple[jax.Array, jax.Array]:
    return read_linearly(q, k, v, jnp.asarray(slopes), initial, context, **how)

  s, z = (None, None) if state is None else (state.s, state.z[..., None])
  if slopes.any() or weighed is not None:
    out, s = read(v, slopes, s)
    total, z = read(one, np.zeros_like(slopes), z, *map(at_least_float32, weighed or (q, k)))
  else:  # the sum of the weights is one more feature of the values
    both = None if state is None else jnp.concatenate([state.s, state.z[..., None]], -1)
    out, both = read(jnp.concatenate([v, one], -1), slopes, both)
    (out, total), (s, z) = (jnp.split(x, [v.shape[-1]], -1) for x in (out, both))
  total = jnp.maximum(total, layer.epsilon) if layer.normaliser == "clamp" else total + layer.epsilon
  return out / total, NormalisedState(s, z[..., 0])


class Normalised(Mixer):
  """A mixer whose output is that of `read_normalised`, with the projections of softmax attention."""

  PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("s", "z")}
  STATE_AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"s": STATE, "z": STATE[:-1]}

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> NormalisedState:
    del capacity  # not used: the state does not grow
    c = self.config
    s = jnp.zeros((batch, c.num_heads, c.head_dim, c.value_width), jnp.float32)
    return NormalisedState(s, jnp.zeros(s.shape[:-1], jnp.float32))

  @nn.nowrap
  def normalised(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: NormalisedState | None,
    context: Context,
    scale: float,
    weighed: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[dict[str, jax.Array], NormalisedState]:
    """Returns what `outputs` does, of queries and keys after phi and RoPE; for `weighed` see `read_normalised`."""
    how: dict[str, Any] = {"scale": scale, "implementation": self.implementation, "weighed": weighed}
    out, state = read_normalised(q, k, v, state, context, self.layer, **how)
    return {"o_proj": side_by_side(out.astype(self.dtype))}, state


@register("t2r")
class T2RAttention(Normalised, LinearProjections):
  """T2R's linear attention in place of softmax attention."""

  Config = T2RConfig

  def outputs(
    self, x_BTD: jax.Array, state: NormalisedState | None, context: Context
  ) -> tuple[dict[str, jax.Array], NormalisedState]:
    q, k, v = self.project(x_BTD)
    scale = self.config.head_dim**-0.5
    if self.layer.scale_queries:
      q, scale = q * scale, 1.0
    return self.normalised(*self.features(q, k, context), v, state, context, scale)

  @classmethod
  def for_inference(cls, config: ModelConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    return phi_in_projections(config, params)  # that q is scaled in between changes nothing

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Adds 2 H K for z to SUPRA's multiply-adds per token."""
    return super().flops(config, layer, tokens) + 2 * config.num_heads * config.head_dim
