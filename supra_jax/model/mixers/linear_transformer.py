"""The linear transformer's attention (Katharopoulos et al. 2020, arXiv 2006.16236): phi(x) = elu(x) + 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax

from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import at_least_float32
from supra_jax.model.mixers.base import Context, Projections
from supra_jax.model.mixers.supra import Decay
from supra_jax.model.mixers.t2r import Normalised, NormalisedConfig, NormalisedState
from supra_jax.model.registry import register


@dataclasses.dataclass(frozen=True)
class LinearTransformerConfig(NormalisedConfig):
  """Config of the linear transformer's attention: as published, without decay and RoPE, and with z + 1e-6 below.

  With RoPE z is that of queries and keys before it, so that it is positive (RoFormer, arXiv 2104.09864, eq. 19).
  """

  decay: Decay = "none"
  rope: bool = False
  normaliser: Literal["clamp", "epsilon"] = "epsilon"


@register("linear_transformer")
class LinearTransformerAttention(Normalised, Projections):
  """The linear transformer's attention; it has the parameters of softmax attention."""

  Config = LinearTransformerConfig

  def outputs(
    self, x_BTD: jax.Array, state: NormalisedState | None, context: Context
  ) -> tuple[dict[str, jax.Array], NormalisedState]:
    q, k, v = self.project(x_BTD)
    q, k = (nn.elu(at_least_float32(x)) + 1 for x in (q, k))
    if not self.layer.rope:
      return self.normalised(q, k, v, state, context, scale=1.0)
    turned_q, turned_k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)
    return self.normalised(turned_q, turned_k, v, state, context, scale=1.0, weighed=(q, k))

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Adds to the projections 2 H K (V + 1) for S, z, q S and q z; returns multiply-adds per token."""
    return super().flops(config, layer, tokens) + 2 * config.num_heads * config.head_dim * (config.value_width + 1)

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    """Returns `drawn`, which is empty: there are no new parameters."""
    del start
    return drawn
