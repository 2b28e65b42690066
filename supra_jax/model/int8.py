"""Parameters in 8 bits: one byte an entry, and one scale per output channel of each matrix.

The matrices of a model are most of its bytes, and reading them is most of the time of a decoding step. W is replaced by
s * round(W / s) with s = max |W| / 127 over the inputs of each output; activations are not rounded. For inference only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.xla_cpu import int8_product

LARGEST = 127


@flax.struct.dataclass
class Int8:
  """A matrix in 8 bits.

  Attributes:
    values: int8, as the matrix.
    scale: float32, as the matrix without its axis of inputs; an entry of the matrix is `values * scale`.
    inputs: the axis of inputs, -1 of an embedding table, else -2.
  """

  values: jax.Array
  scale: jax.Array
  inputs: int = flax.struct.field(pytree_node=False)

  def product(self, equation: str, dtype: Any, out_dtype: Any, x: jax.Array) -> jax.Array:
    """Returns what `layers.product` returns for the matrix; sums are float32 at least, and are then scaled."""
    inputs, output = equation.split("->")
    of_scale = "".join(letter for letter in inputs.partition(",")[2] if letter in output)

    def elsewhere(x, values):
      # Or the cast of the matrix, as invariant, would move out of a decoding loop, where it takes memory.
      x, values = jax.lax.optimization_barrier((x, values))
      return jnp.einsum(equation, x.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32)

    on_cpu = functools.partial(int8_product, dtype, table=self.inputs == -1)
    ways = {"cpu": on_cpu} if self.values.ndim == 2 else {}
    y = jax.lax.platform_dependent(x, self.values, default=elsewhere, **ways)
    return jnp.einsum(f"{output},{of_scale}->{output}", y, self.scale).astype(out_dtype)

  def rows(self, index: jax.Array) -> jax.Array:
    """Returns rows of an embedding table, float32."""
    return self.values[index] * self.scale[index][..., None]


def in_int8(params: Mapping[str, Any], dtype: Any = None) -> dict[str, Any]:
  """Returns parameters with `Int8` of numpy arrays in place of all kernels and embedding tables.

  Args:
    params: nested dict of numpy or jax arrays.
    dtype: dtype of the other parameters; None leaves them as they are.
  """

  def of(name: str, held: Any) -> Any:
    if isinstance(held, Mapping):
      return {key: of(key, value) for key, value in held.items()}
    if name not in ("kernel", "embedding"):
      return np.asarray(held, dtype)
    inputs = -1 if name == "embedding" else -2
    wide = np.asarray(held).astype(np.float32)
    scale = np.maximum(np.abs(wide).max(inputs), np.finfo(np.float32).tiny) / LARGEST
    with np.errstate(invalid="ignore"):  # parameters that are not finite have an error of their own
      values = np.rint(wide / np.expand_dims(scale, inputs)).astype(np.int8)
    return Int8(values, scale, inputs)

  return of("", params)
