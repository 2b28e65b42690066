"""Rotary position embedding (Su et al. 2021): frequencies, tables and the rotation itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.model.config import RopeConfig
from supra_jax.model.layers import at_least_float32


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns the angle per position of each feature pair i, float64 [K/2]: `base^(-2i/K)`, scaled as the config says."""
  frequency = rope.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if rope.scaling == "none":
    return frequency
  slow = frequency / rope.factor
  if rope.scaling == "linear":
    return slow
  # A frequency with few turns within the original context is divided, one with many is kept; between, both are blended.
  if rope.scaling == "llama3":
    turns = rope.original_max_positions * frequency / (2 * np.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
  else:
    keep = _yarn_keep(rope, head_dim)
  return (1 - keep) * slow + keep * frequency


def _yarn_keep(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns YaRN's weight of each unscaled frequency, [K/2]: a ramp over the feature pairs from 1 down to 0.

  The ramp begins at the pair with `beta_fast` turns within the original context and ends at that with `beta_slow`.
  """

  def pair(turns: float) -> float:
    """Returns the index, maybe fractional, of the pair that makes `turns` turns within the original context."""
    return head_dim * np.log(rope.original_max_positions / (turns * 2 * np.pi)) / (2 * np.log(rope.base))

  first, last = pair(rope.beta_fast), pair(rope.beta_slow)
  if rope.truncate:
    first, last = np.floor(first), np.ceil(last)
  # `last` is limited by the width and not by the number of pairs, as in transformers and in YaRN's own code.
  first, last = max(first, 0), min(last, head_dim - 1)
  width = last - first or 0.001
  return 1 - np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)


_DIGIT_BITS = (11, 10, 10)  # bits of each digit of a position, lowest first: 2^31 positions from three small tables


@functools.lru_cache(maxsize=16)
def _rope_digits(rope: RopeConfig, head_dim: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (cos, sin), float32 [2^bits, K/2], of the angles of all values of a digit, for each digit of a position."""
  tables, shift = [], 0
  for bits in _DIGIT_BITS:
    angle = np.outer(np.arange(2**bits, dtype=np.float64) * 2**shift, rope_frequencies(rope, head_dim))
    tables.append((np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)))
    shift += bits
  return tables


def rope_table(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the cosine and sine of the rotary angles.

  A float32 product position * frequency is off by 0.03 rad at position one million. Here each digit of a position looks
  up a unit complex number that was computed in float64. The angle of the product of these numbers is the sum of their
  angles: exact to float32 at any position.

  Args:
    rope: the model's RoPE config.
    head_dim: K, even.
    positions: int32 [...], each in [0, 2^31).

  Returns:
    (cos, sin), float32 [..., K/2], both multiplied by `rope.attention_factor`.
  """
  factors, shift = [], 0
  for bits, (cos_table, sin_table) in zip(_DIGIT_BITS, _rope_digits(rope, head_dim), strict=True):
    digit = (positions >> shift) & (2**bits - 1)
    factors.append((jnp.asarray(cos_table)[digit], jnp.asarray(sin_table)[digit]))
    shift += bits
  cos, sin = functools.reduce(lambda a, b: (a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]), factors)
  return cos * rope.attention_factor, sin * rope.attention_factor


def apply_rope(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
  """Rotates pairs of features by the angles of `rope_table`.

  Args:
    x_BTHK: q or k.
    cos, sin: of the angles, with shapes that broadcast to [B, T, H, K/2].
    interleaved: whether the pairs of features are (2i, 2i + 1) in place of (i, i + K/2).

  Returns:
    The rotated `x_BTHK`, in its dtype; computed in float32 at least.
  """
  x = at_least_float32(x_BTHK)
  first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
  cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
  turned = (first * cos - second * sin, second * cos + first * sin)
  joined = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
  return joined.astype(x_BTHK.dtype)
