"""Layers that all models and mixers share: dense projections, embedding, norms, SwiGLU.

Shape suffixes, in this and all other modules: B batch, T time, L layers, D model width, H query heads, G key/value
heads, R = H / G query heads per key/value head, K width of a key head, V width of a value head, S slots of a key/value
cache, F width of the feed-forward layer. In BTNK, N is H or G.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import constrain
from supra_jax.core.xla_cpu import (
  decoding_product,
  kernel_gradient,
  narrow_rows,
  needs_decoding_product,
  without_leading_ones,
)
from supra_jax.model.config import ModelConfig, NormKind
from supra_jax.model.int8 import Int8

GROUP_NORM_EPS = 1e-5  # the reference's GroupNorm keeps torch's default, whatever the model's norm_eps is


def at_least_float32(x: jax.Array) -> jax.Array:
  """Returns `x` in float32, or unchanged if its dtype is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def product(equation: str, dtype: Any, out_dtype: Any, x: jax.Array, kernel: jax.Array | Int8) -> jax.Array:
  """Returns an einsum of activations and a parameter; the gradient of the parameter is computed in float32 at least.

  Plain autodiff would round a kernel's gradient to the dtype of the computation before the gradient is summed over
  microbatches and devices. This function's backward pass sums products of bfloat16 in float32, and rounds the sum only
  to the dtype of the stored kernel.

  Args:
    equation: einsum equation with two inputs, `x` and `kernel`, and without ellipses.
    dtype: dtype that both factors are cast to.
    out_dtype: dtype of the result.
    x: activations.
    kernel: the parameter, in the dtype in which it is stored; one in 8 bits has no gradient.
  """
  if isinstance(kernel, Int8):
    return kernel.product(equation, dtype, out_dtype, x)
  return _product(equation, dtype, out_dtype, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation: str, dtype: Any, out_dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  # Not differentiated: `_product_forward` is called in this function's place where a gradient is taken.
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  einsum = functools.partial(jnp.einsum, equation, preferred_element_type=out_dtype)
  if not needs_decoding_product(equation, x):
    return einsum(x, kernel)
  on_cpu = functools.partial(decoding_product, equation, out_dtype)
  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=einsum)


def _product_forward(equation, dtype, out_dtype, x, kernel):
  # Cast once: the backward pass, and what it recomputes, then share one copy of a kernel that is gathered from shards.
  # A plain einsum, not a call of `product`: only then does a checkpoint policy (remat) see a matrix product to save.
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


_product.defvjp(_product_forward, _product_backward)


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any, out_dtype: Any = None) -> jax.Array:
  """Returns x @ kernel [..., O] of x [..., I] and a kernel [I, O], with the gradient of `product`.

  Args:
    x: activations.
    kernel: the parameter, in the dtype in which it is stored.
    dtype: dtype that both factors are cast to.
    out_dtype: dtype of the result; None means `dtype`.
  """
  lead = "abcdefgh"[: x.ndim - 1]
  return product(f"{lead}i,io->{lead}o", dtype, out_dtype or dtype, x, kernel)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns `x + bias` in the dtype of `x`; the gradient of the bias is summed in the wider of the two dtypes."""
  return (x.astype(jnp.promote_types(x.dtype, bias.dtype)) + bias).astype(x.dtype)


def uniform_fan_in(fan_in: float) -> nn.initializers.Initializer:
  """Returns an initializer from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch's linear layer."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


ADAPTERS = ("lora_a", "lora_b")  # names of the adapters A and B beside a kernel


class Dense(nn.Module):
  """Dense layer `x W + b`, like Flax's, but with the gradient of `product`.

  With low-rank adapters A and B (ADAPTERS) among the parameters, the layer computes `x (W + A B) + b`.

  Attributes:
    features: width of the result.
    use_bias: whether the layer has a bias b.
    dtype: dtype of the computation.
    out_dtype: dtype of the result; None means `dtype`.
    kernel_init, bias_init: initializers of W and b.
  """

  features: int
  use_bias: bool = False
  dtype: Any = jnp.float32
  out_dtype: Any = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    y = matmul(x, kernel, self.dtype, self.out_dtype)
    if self.has_variable("params", ADAPTERS[0]):
      a, b = (jnp.asarray(self.get_variable("params", name)) for name in ADAPTERS)
      y = y + matmul(matmul(x, a, self.dtype), b, self.dtype, self.out_dtype)
    return add_bias(y, self.param("bias", self.bias_init, (self.features,))) if self.use_bias else y


class Weight(nn.Module):
  """Returns a parameter `weight` of a shape, in float32 at least.

  Attributes:
    drawn: the parameter's initializer.
    shape: the parameter's shape.
  """

  drawn: nn.initializers.Initializer
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    return at_least_float32(self.param("weight", self.drawn, self.shape))


@jax.custom_vjp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns rows of a table."""
  if table.dtype.itemsize != 2:
    return table[ids]
  return jax.lax.platform_dependent(table, ids, cpu=narrow_rows, default=lambda table, ids: table[ids])


def _rows_forward(table, ids):
  return jax.vjp(lambda table: table[ids], table)


def _rows_backward(pull, grad):
  return (*pull(grad), None)


_rows.defvjp(_rows_forward, _rows_backward)


class Embed(nn.Module):
  """Embedding table with one row per token id; its transpose serves as unembedding (`attend`).

  Attributes:
    rows: number of rows, the size of the vocabulary.
    features: D, width of a row.
    dtype: dtype of the computation.
  """

  rows: int
  features: int
  dtype: Any = jnp.float32

  def setup(self):
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    self.embedding = self.param("embedding", init, (self.rows, self.features))

  def __call__(self, ids: jax.Array) -> jax.Array:
    # Cast after the lookup, so that the gradient of a row, a sum over all positions of its token, is float32. The table
    # is gathered over fsdp, as other parameters are; otherwise the compiler moves activations instead.
    if isinstance(self.embedding, Int8):
      return self.embedding.rows(ids).astype(self.dtype)
    return _rows(constrain(jnp.asarray(self.embedding), "vocabulary", "gathered"), ids).astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Returns the logits [..., rows], float32 at least, of x [..., D]."""
    lead = "abcdefgh"[: x.ndim - 1]
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return product(f"{lead}i,oi->{lead}o", self.dtype, wide, x, self.embedding)


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32 at least.

  Attributes:
    kind: `rms_norm`, `layer_norm` (gain and bias) or `layer_norm_gain`.
    eps: added to the mean square or the variance.
    dtype: dtype of the result.
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
  """Normalises each head of each token to mean 0 and variance 1: GroupNorm with one group per head, without parameters.

  The paper's replacement for the softmax normaliser (eq. 9). Mean and (biased) variance are float32 at least.
  """
  x = without_leading_ones(at_least_float32(x_BTHV))
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + GROUP_NORM_EPS)
  return x.astype(x_BTHV.dtype).reshape(x_BTHV.shape)


class SwiGLU(nn.Module):
  """Feed-forward layer `down(silu(gate x) * up x)` (Shazeer 2020)."""

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self):
    dense = functools.partial(Dense, use_bias=self.config.mlp_bias, dtype=self.dtype)
    self.gate_proj, self.up_proj = (dense(self.config.intermediate_size) for _ in range(2))
    self.down_proj = dense(self.config.hidden_size)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return self.down_proj(self.hidden(x_BTD))

  def hidden(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the input of `down_proj`, [B, T, F]."""
    return constrain(nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD), "batch", "time", "ffn")
