"""Work-arounds for XLA's CPU backend: without them programs compute the same, but run more slowly on a CPU.

Each work-around was measured with `python -m benchmarks.train_step` (SmolLM2-135M, float32, two cores of an AMD EPYC)
on jax 0.10.2; the figures are in benchmarks/RESULTS.md. When jax is updated, run that benchmark without the
work-arounds to see whether they are still needed.

The linear attention op has work-arounds of its own, which stay in `kernels_pallas/chunked_xla.py`, since nothing there
imports supra_jax: `_backward_block` puts summed axes last, and `_backward` copies where it could write zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def _two_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Returns `product(x)`, of two copies if x is a single row: one row's product would write the matrix in float32."""
  return product(x) if x.size > x.shape[-1] else product(jnp.concatenate([x, x]))[:1]


_FEW_TABLE_ROWS = 32  # most rows for which an embedding table is better on the left of a product in float32


def needs_decoding_product(equation: str, x: jax.Array) -> bool:
  """Returns whether `decoding_product` is better than a plain einsum of x and a matrix in the dtype of x."""
  rows = x.size // x.shape[-1]
  return x.dtype.itemsize < 4 or (_is_table(equation) and 1 < rows <= _FEW_TABLE_ROWS)


def _is_table(equation: str) -> bool:
  of_x, of_kernel = equation.partition("->")[0].split(",")
  return of_kernel[-1] == of_x[-1]


def decoding_product(equation: str, out_dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the einsum of activations and a matrix, of which no gradient is taken.

  A matrix in 16 bits is not copied. The backend writes the matrix in float32 unless the result is float32 and there are
  two rows at least: a token would take ten times as long to decode. For a matrix [O, I], an embedding table, the table
  is put on the left: in 16 bits the backend would transpose it, and 2 to 32 rows in float32 take a third longer.

  Args:
    equation: einsum equation whose first input, x, ends in the one axis that is summed.
    out_dtype: dtype of the result.
    x: activations.
    kernel: the matrix, in the dtype of x.
  """
  of_x, of_kernel = equation.partition("->")[0].split(",")
  narrow = kernel.dtype.itemsize < 4
  wide = jnp.promote_types(kernel.dtype, jnp.float32) if narrow else out_dtype
  einsum = functools.partial(jnp.einsum, preferred_element_type=wide)

  def product(rows):
    if not _is_table(equation):
      return einsum(equation, rows, kernel)
    outputs = einsum(f"{of_kernel},{of_x}->{of_kernel[0]}{of_x[:-1]}", kernel, rows)
    # Without the barrier the transpose goes into the product, which is turned round again.
    return jnp.moveaxis(jax.lax.optimization_barrier(outputs), 0, -1)

  return (_two_rows(product, x) if narrow else product(x)).astype(out_dtype)


def narrow_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns rows of an embedding table in 16 bits.

  The backend would write all of the table in float32 to look rows up, but not to look up their bits. The barrier keeps
  the table's bits, a copy of it, from being computed ahead of a loop around the lookup.
  """
  ids, table = jax.lax.optimization_barrier((ids, table))
  bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[ids]
  return jax.lax.bitcast_convert_type(bits, table.dtype)


_BLOCK_BYTES = 2**20  # of a matrix at a time, so that what is cast stays in the cache
_FEW = 4  # most rows that are split into two of int8


def int8_product(dtype: Any, x: jax.Array, values: jax.Array, *, table: bool) -> jax.Array:
  """Returns the product of activations and an int8 matrix, float32 [..., O].

  The backend writes an int8 matrix in the dtype of the activations before it multiplies, which takes ten times as long
  as the product. It multiplies int8 by int8 as it is: few rows are written in int8. For more rows the matrix is cast in
  blocks that stay in the cache.

  Args:
    dtype: dtype of the products' factors; sums are float32.
    x: activations [..., I].
    values: int8 [I, O], or [O, I] if `table`.
    table: whether the matrix is an embedding table.
  """
  rows = x.reshape(-1, x.shape[-1])
  outputs = (_product_of_few if len(rows) <= _FEW else _product_in_blocks)(rows.astype(dtype), values, table)
  return outputs.reshape(*x.shape[:-1], -1)


def _product_of_few(rows: jax.Array, values: jax.Array, table: bool) -> jax.Array:
  # A row is s (a + b / 254 + c / 254^2), with a, b and c in int8 and s = max |row| / 127: as exact as float32. With a
  # alone SmolLM2's loss would be 0.037 nats higher. With a and b log-likelihoods would differ by hundredths from those
  # of more rows, since one entry of a row may be a thousand times the others.
  rows = rows.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
  a = jnp.rint(rows / scale)
  b = jnp.rint((rows / scale - a) * 254)
  c = jnp.rint(((rows / scale - a) * 254 - b) * 254)
  parts = jnp.concatenate([a, b, c]).astype(jnp.int8)
  product = jnp.einsum("bi,oi->bo" if table else "bi,io->bo", parts, values, preferred_element_type=jnp.int32)
  high, low, least = jnp.split(product.astype(jnp.float32), 3)
  return (high + (low + least / 254) / 254) * scale


def _product_in_blocks(rows: jax.Array, values: jax.Array, table: bool) -> jax.Array:
  length, width = values.shape
  fewest = max(-(-length * width * rows.dtype.itemsize // _BLOCK_BYTES), 2)  # one would be cast ahead of a loop
  count = next((n for n in range(fewest, min(8 * fewest, length) + 1) if length % n == 0), 1)
  blocks = values.reshape(count, length // count, width)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  if table:
    return jax.lax.map(lambda block: einsum("oi,bi->ob", block.astype(rows.dtype), rows), blocks).reshape(length, -1).T
  parts = rows.reshape(len(rows), count, -1).swapaxes(0, 1)

  def add(total, part):
    return total + einsum("bi,io->bo", part[0], part[1].astype(rows.dtype)), None

  return jax.lax.scan(add, jnp.zeros((len(rows), width), jnp.float32), (parts, blocks))[0]
