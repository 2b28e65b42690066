"""Kernel feature maps that replace the softmax: phi(x) = relu(W x + b) (paper eq. 8; Kasai et al. 2021); Hedgehog's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import constrain
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import add_bias, at_least_float32, matmul, product, uniform_fan_in

FeatureMapKind = Literal["dense", "per_head", "per_head_separate"]


def _in_projection(phi: nn.Module) -> bool:
  """Whether the parameters are those of `into_projection`, without W."""
  return phi.has_variable("params", "bias") and not phi.has_variable("params", "kernel")


@jax.jit
def into_projection(projection: Mapping[str, jax.Array], phi: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the parameters of a projection with phi's W in it: W (P x + p) + b = (W P) x + W p + b.

  One product in place of two, so fewer bytes to read: for inference, where nothing else needs P x.

  Args:
    projection: kernel P [D, N*K], and bias p [N*K] if the projection has one.
    phi: parameters of a feature map, which from then on has the bias alone.
  """
  w_MKJ = phi["kernel"].reshape(-1, *phi["kernel"].shape[-2:])

  def times_w(p: jax.Array) -> jax.Array:
    heads = p.reshape(*p.shape[:-1], w_MKJ.shape[0], -1, w_MKJ.shape[-1])
    y = jnp.einsum("...mrk,mkj->...mrj", at_least_float32(heads), at_least_float32(w_MKJ), precision="highest")
    return y.reshape(p.shape).astype(p.dtype)

  return {name: times_w(p) for name, p in projection.items()}


class DenseFeatureMap(nn.Module):
  """phi with one W [N*K, N*K] over all N heads together, as in released checkpoints."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BTNK: jax.Array) -> jax.Array:
    *lead, heads, width = x_BTNK.shape
    init = uniform_fan_in(heads * width)
    y = x_BTNK.reshape(*lead, heads * width)
    if not _in_projection(self):
      kernel = self.param("kernel", init, (heads * width, heads * width))
      # W mixes all heads, so every device needs x with all heads: gathered once, for the product and W's gradient.
      y = matmul(constrain(y, "batch", "time", None), kernel, self.dtype)
    bias = self.param("bias", init, (heads * width,))
    return nn.relu(add_bias(y, bias)).reshape(x_BTNK.shape)


class PerHeadFeatureMap(nn.Module):
  """phi with `maps` matrices W [K, K], as the paper writes it; head h uses matrix h // (heads / maps).

  Attributes:
    maps: number of matrices; divides the number of heads.
    width: K.
    dtype: dtype of the computation.
  """

  maps: int
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BTNK: jax.Array) -> jax.Array:
    init = uniform_fan_in(self.width)
    batch, time, heads, width = x_BTNK.shape
    y = x_BTNK.reshape(batch, time, self.maps, heads // self.maps, width)
    if not _in_projection(self):
      kernel = self.param("kernel", init, (self.maps, self.width, self.width))
      y = product("btmrk,mkj->btmrj", self.dtype, self.dtype, y, kernel)
    bias = self.param("bias", init, (self.maps, self.width))
    return nn.relu(add_bias(y, bias[:, None])).reshape(x_BTNK.shape)


class Hedgehog(nn.Module):
  """phi(x) = [softmax(W x), softmax(-W x)] with a matrix W [K, K] for each head (Zhang et al. 2024, arXiv 2402.04347).

  Attributes:
    dtype: dtype of the product; the softmax is computed in float32 at least.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BTNK: jax.Array) -> jax.Array:
    """Returns features [B, T, N, 2K], all positive, whose sum is 2, in float32 at least."""
    heads, width = x_BTNK.shape[2:]
    kernel = self.param("kernel", uniform_fan_in(width), (heads, width, width))
    y = product("btnk,nkj->btnj", self.dtype, jnp.promote_types(self.dtype, jnp.float32), x_BTNK, kernel)
    return jnp.concatenate([nn.softmax(y), nn.softmax(-y)], axis=-1)


def make_feature_maps(config: ModelConfig, kind: FeatureMapKind, dtype: Any) -> tuple[nn.Module, nn.Module | None]:
  """Returns (feature map of q, feature map of k); the second is None where the map of q is also applied to k."""
  heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
  if kind == "dense":
    return DenseFeatureMap(dtype), None if groups == heads else DenseFeatureMap(dtype)
  if kind == "per_head":
    return PerHeadFeatureMap(groups, width, dtype), None
  return PerHeadFeatureMap(heads, width, dtype), PerHeadFeatureMap(groups, width, dtype)


def feature_map_flops(config: ModelConfig, kind: FeatureMapKind) -> float:
  """Returns the multiply-adds per token of both maps: (H K)^2 + (G K)^2 if dense, (H + G) K^2 if per head."""
  heads, groups, key = config.num_heads, config.num_kv_heads, config.head_dim
  return (heads * key) ** 2 + (groups * key) ** 2 if kind == "dense" else (heads + groups) * key**2
