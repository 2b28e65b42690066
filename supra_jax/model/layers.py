"""The parts of a block that all mixers share: norms, rotary positions, SwiGLU.

Shape suffixes, here and everywhere: B batch, T time, L layers, D width, H query heads, G key/value heads, R = H / G
query heads a group, K key width, V value width, S slots of a key/value cache, F ffn.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import constrain
from supra_jax.core.xla_cpu import kernel_gradient, without_leading_ones
from supra_jax.model.config import ModelConfig, NormKind

GROUP_NORM_EPS = 1e-5  # the reference's GroupNorm keeps torch's default, whatever the model's norm_eps is


def at_least_float32(x: jax.Array) -> jax.Array:
  """X in float32, or as it is where it is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(equation: str, dtype: Any, out_dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """An einsum of activations and a parameter, whose gradient reaches the parameter in float32 at least.

  Left to itself, autodiff rounds a kernel's gradient to the dtype of the computation before it is summed over
  microbatches and devices; here products of bfloat16 are summed, and leave, as float32.

  Args:
    equation: "...,...->..." without ellipses.
    dtype: both factors are cast to it.
    out_dtype: of the result.
    x: activations.
    kernel: the parameter, in the dtype that it is stored in.
  """
  return _product_forward(equation, dtype, out_dtype, x, kernel)[0]


def _product_forward(equation, dtype, out_dtype, x, kernel):
  # Cast once: the backward pass, and what it recomputes, then share one copy of a kernel that is gathered from shards.
  # An einsum in sight, not a call of `product`: a policy of what to save knows it as a product.
  cast = kernel.astype(dtype)
  return jnp.einsum(equation, x.astype(dtype), cast, preferred_element_type=out_dtype), (x, cast, kernel)


def _product_backward(equation, dtype, out_dtype, residuals, grad):
  del out_dtype
  x, cast, kernel = residuals
  inputs, output = equation.split("->")
  of_x, of_kernel = inputs.split(",")
  grad = grad.astype(dtype)
  x_grad = jnp.einsum(f"{output},{of_kernel}->{of_x}", grad, cast).astype(x.dtype)
  kernel_grad = kernel_gradient(of_x, output, of_kernel, x, grad, dtype)
  return x_grad, kernel_grad.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any, out_dtype: Any = None) -> jax.Array:
  """`x @ kernel` over the last axis of x [..., I] and the first of the kernel [I, O], by `product`."""
  lead = "abcdefgh"[: x.ndim - 1]
  return product(f"{lead}i,io->{lead}o", dtype, out_dtype or dtype, x, kernel)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """`x + bias` in x's dtype; the bias's gradient is summed in its own."""
  return (x.astype(jnp.promote_types(x.dtype, bias.dtype)) + bias).astype(x.dtype)


ADAPTERS = ("lora_a", "lora_b")  # beside a kernel


class Dense(nn.Module):
  """`x W + b`; flax's, but for the gradient that `product` has. With ADAPTERS A and B it is `x (W + A B) + b`.

  Attributes:
    features: width of the result.
    use_bias: whether there is a b.
    dtype: of the computation and the result.
    out_dtype: of the result, where it is another.
  """

  features: int
  use_bias: bool = False
  dtype: Any = jnp.float32
  out_dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
    y = matmul(x, kernel, self.dtype, self.out_dtype)
    if self.has_variable("params", ADAPTERS[0]):
      a, b = (jnp.asarray(self.get_variable("params", name)) for name in ADAPTERS)
      y = y + matmul(matmul(x, a, self.dtype), b, self.dtype, self.out_dtype)
    return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,))) if self.use_bias else y


class Embed(nn.Module):
  """A table of one row a token id, and its transpose as unembedding.

  Attributes:
    rows: vocabulary.
    features: D.
    dtype: of the computation.
  """

  rows: int
  features: int
  dtype: Any = jnp.float32

  def setup(self):
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    self.embedding = self.param("embedding", init, (self.rows, self.features))

  def __call__(self, ids: jax.Array) -> jax.Array:
    # Cast after the lookup, so that its gradient, a sum over all places of a token, is float32. The table is gathered
    # whole as other parameters are; else the compiler moves activations instead.
    return constrain(jnp.asarray(self.embedding), "vocabulary", None)[ids].astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits [..., rows], float32 at least, of x [..., D]."""
    lead = "abcdefgh"[: x.ndim - 1]
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return product(f"{lead}i,oi->{lead}o", self.dtype, wide, x, self.embedding)


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32.

  Attributes:
    kind: `rms_norm`, `layer_norm` (gain and bias) or `layer_norm_gain`.
    eps: added to the mean square or the variance.
    dtype: of the result.
  """

  kind: NormKind
  eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.kind == "layer_norm" else None
    shape = x.shape
    x = without_leading_ones(at_least_float32(x))
    if self.kind != "rms_norm":
      x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
    x = x * weight.astype(x.dtype)
    if bias is not None:
      x = x + bias.astype(x.dtype)
    return x.astype(self.dtype).reshape(shape)


def group_norm(x_BTHV: jax.Array) -> jax.Array:
  """GroupNorm with one group a head and no parameters: each head of each token to mean 0 and variance 1.

  The paper's replacement for the softmax normaliser (eq. 9). Statistics are float32, the variance is the biased one.
  """
  x = without_leading_ones(at_least_float32(x_BTHV))
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + GROUP_NORM_EPS)
  return x.astype(x_BTHV.dtype).reshape(x_BTHV.shape)


class SwiGLU(nn.Module):
  """`down(silu(gate x) * up x)` (Shazeer 2020)."""

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self):
    dense = functools.partial(Dense, use_bias=self.config.mlp_bias, dtype=self.dtype)
    self.gate_proj, self.up_proj = (dense(self.config.intermediate_size) for _ in range(2))
    self.down_proj = dense(self.config.hidden_size)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.down_proj(self.hidden(x_BTD))

  def hidden(self, x_BTD: jax.Array) -> jax.Array:
    """What `down_proj` reads, [B, T, F]."""
    return constrain(nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD), "batch", "time", "ffn")
