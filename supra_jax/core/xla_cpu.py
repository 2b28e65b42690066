"""Work-arounds for XLA's CPU backend: without them programs compute the same, but run more slowly on a CPU.

Each work-around was measured with `python -m benchmarks.train_step` (SmolLM2-135M, float32, two cores of an AMD EPYC)
on jax 0.10.2; the figures are in benchmarks/RESULTS.md. When jax is updated, run that benchmark without the
work-arounds to see whether they are still needed.

The linear attention op has work-arounds of its own, which stay in `kernels_pallas/chunked_xla.py`, since nothing there
imports supra_jax: `_backward_block` puts summed axes last, and `_backward` copies where it could write zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def without_leading_ones(x: jax.Array) -> jax.Array:
  """Returns `x` without its leading axes of length 1, but with two axes at least.

  With a leading axis of length 1 the gradient of a norm takes ten times as long. Longer axes are not merged, since a
  mesh may shard each of them.
  """
  while x.ndim > 2 and x.shape[0] == 1:
    x = x.reshape(x.shape[1:])
  return x


def one_row_a_token(x: jax.Array, features: int) -> jax.Array:
  """Returns `x` with all axes before the last `features` axes merged into one, the tokens.

  With a leading axis of length 1, as in a batch of one row, a chunk of the loss takes a tenth longer.
  """
  return x.reshape(-1, *x.shape[x.ndim - features :])


def kernel_gradient(of_x: str, output: str, of_kernel: str, x: jax.Array, grad: jax.Array, dtype: Any) -> jax.Array:
  """Returns the gradient of the kernel of a product: the einsum `of_x,output->of_kernel` of `x` and `grad`.

  The CPU backend transposes the left factor of such an einsum in memory. In float32 the narrower factor is therefore
  put on the left. In bfloat16 the order is left as it is, since the backend has no bfloat16 product of this kind.

  Args:
    of_x, output, of_kernel: axes of `x`, `grad` and the result, as letters of einsum.
    x: activations, the input of the product.
    grad: gradient of the product's output, in `dtype`.
    dtype: dtype of the computation.

  Returns:
    The gradient of the kernel, in `dtype` or float32, whichever is wider.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  einsum = functools.partial(jnp.einsum, preferred_element_type=wide)
  if x.shape[-1] > grad.shape[-1] and dtype == wide:
    flipped = of_kernel[:-2] + of_kernel[-1] + of_kernel[-2]
    return einsum(f"{output},{of_x}->{flipped}", grad, x.astype(dtype)).swapaxes(-1, -2)
  return einsum(f"{of_x},{output}->{of_kernel}", x.astype(dtype), grad)
