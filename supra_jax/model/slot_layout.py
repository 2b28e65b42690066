"""Where the retained tokens of heads lie that retain different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
  """Where the retained tokens of the P heads of a pattern lie: those of heads with the smallest M first.

  Attributes:
    sizes: M of each of the P heads.
  """

  sizes: tuple[int, ...]

  @property
  def slots(self) -> int:
    """S, the number of retained tokens of all heads of a pattern."""
    return sum(self.sizes)

  @property
  def order(self) -> list[int]:
    """The heads in the order of their slots."""
    return sorted(range(len(self.sizes)), key=self.sizes.__getitem__)

  @property
  def begins(self) -> np.ndarray:
    """The first slot of each head, [P]."""
    return np.array([sum(self.sizes[other] for other in self.order[: self.order.index(h)]) for h in self._heads])

  @property
  def groups(self) -> list[tuple[int, list[int], int]]:
    """(M, heads, first slot) of the heads of each size."""
    return [
      (size, heads, int(self.begins[heads[0]]))
      for size in sorted(set(self.sizes))
      for heads in [[head for head in self.order if self.sizes[head] == size]]
    ]

  @property
  def _heads(self) -> range:
    return range(len(self.sizes))

  def by_head(self, x_BAS: jax.Array, fill: float, at_least: int = 0) -> jax.Array:
    """Returns the values of each head's slots, [B, A, P, max(M, at_least)]; `fill` where a head has fewer."""
    most = max(*self.sizes, at_least)
    pads = [[(0, 0)] * 3 + [(0, most - size)] for size, _, _ in self.groups]
    return self.joined([jnp.pad(x, pad, constant_values=fill) for x, pad in zip(self.split(x_BAS), pads, strict=True)])

  def split(self, x_BAS: jax.Array) -> list[jax.Array]:
    """Returns [B, A, h, M, ...] for the h heads of each size, of x [B, A, S, ...]."""
    return [
      x_BAS[:, :, begin : begin + size * len(heads)].reshape(*x_BAS.shape[:2], len(heads), size, *x_BAS.shape[3:])
      for size, heads, begin in self.groups
    ]

  def heads_of(self, x_BAP: jax.Array) -> list[jax.Array]:
    """Returns [B, A, h, ...] for the h heads of each size, of x [B, A, P, ...]."""
    return [x_BAP if len(self.groups) == 1 else x_BAP[:, :, np.array(heads)] for _, heads, _ in self.groups]

  def joined(self, parts: Sequence[jax.Array]) -> jax.Array:
    """Returns [B, A, P, ...] of arrays [B, A, h, ...] for the h heads of each size."""
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    return whole if self.order == list(self._heads) else whole[:, :, np.argsort(self.order)]
