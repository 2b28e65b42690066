"""Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927): pairs, filler and queries in a row.

A row begins with key-value pairs between filler tokens. At least `gap` filler tokens follow, and then the queries:
each key once more, in another order, followed by its value, which a model has to recall:

  filler K1 V1 filler K2 V2 filler ... filler K2 V2 filler K1 V1 filler
                                              ^^           ^^            targets, all other tokens have weight 0
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from supra_jax.core.schema import POSITIVE, AtLeast, check


@dataclasses.dataclass(frozen=True)
class Recall:
  """The task of multi-query associative recall.

  Filler, keys and values are different ids, so that a key stands in two places of a row alone: in its pair and in its
  query. Within a row all keys differ, and so do all values.

  Attributes:
    length: T, number of input tokens of a row; a row has T + 1 tokens.
    gap: every query is more than `gap` tokens behind both tokens of its pair. A model of L layers, each of which sees
      the last W tokens, can recall nothing if gap >= L W.
    vocab_size: number of ids; see `filler`, `keys` and `values`.
  """

  length: Annotated[int, POSITIVE] = 512
  gap: Annotated[int, AtLeast(0)] = 192
  vocab_size: Annotated[int, AtLeast(16)] = 1024

  def __post_init__(self):
    check(self, type(self).__name__)

  @property
  def filler(self) -> range:
    """The ids of filler tokens, the first three quarters."""
    return range(self.vocab_size - self.vocab_size // 4)

  @property
  def keys(self) -> range:
    """The ids of keys, half of the ids that are no filler."""
    return range(self.filler.stop, (self.filler.stop + self.vocab_size) // 2)

  @property
  def values(self) -> range:
    """The ids of values, the other half."""
    return range(self.keys.stop, self.vocab_size)

  @property
  def width(self) -> int:
    """Number of tokens at a row's beginning, among which its pairs are, and at its end, among which its queries are."""
    return (self.length + 1 - self.gap) // 2

  def rows(self, rng: np.random.Generator, rows: int, pairs: int) -> dict[str, np.ndarray]:
    """Draws rows, as `objectives.losses.language_model_loss` takes them.

    Args:
      rng: the source of all draws.
      rows: R, number of rows.
      pairs: number of key-value pairs, and of queries, in each row.

    Returns:
      {"tokens": int32 [R, T + 1], "target_weights": float32 [R, T + 1], 1 for the values behind queries and 0 for all
      other tokens}.

    Raises:
      ValueError: the pairs do not fit into a row, or there are too few keys or values.
    """
    most = min(self.width // 2, len(self.keys), len(self.values))
    if not 0 < pairs <= most:
      raise ValueError(f"pairs={pairs}: {self} has room for 1 to {most}.")
    tokens = rng.integers(self.filler.start, self.filler.stop, (rows, self.length + 1), np.int32)
    held = np.stack([_distinct(rng, ids, rows, pairs) for ids in (self.keys, self.values)], axis=-1)  # [R, pairs, 2]
    _put(tokens, _places(rng, rows, pairs, self.width), held)
    asked = self.length + 1 - self.width + _places(rng, rows, pairs, self.width)
    order = rng.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1)
    _put(tokens, asked, np.take_along_axis(held, order[..., None], axis=1))
    weights = np.zeros(tokens.shape, np.float32)
    np.put_along_axis(weights, asked + 1, 1.0, axis=1)
    return {"tokens": tokens, "target_weights": weights}


def _distinct(rng: np.random.Generator, ids: range, rows: int, count: int) -> np.ndarray:
  """Draws `count` different ids for each row, int32 [rows, count]."""
  every = np.arange(ids.start, ids.stop, dtype=np.int32)
  return rng.permuted(np.tile(every, (rows, 1)), axis=1)[:, :count]


def _places(rng: np.random.Generator, rows: int, count: int, width: int) -> np.ndarray:
  """Draws where `count` pairs of tokens begin among `width` tokens, int64 [rows, count]; none overlaps with another.

  Taking one token out of each pair leaves `width - count` tokens, among which any `count` different places will do.
  """
  chosen = rng.random((rows, width - count)).argsort(axis=1)[:, :count]
  return np.sort(chosen, axis=1) + np.arange(count)


def _put(tokens: np.ndarray, places: np.ndarray, pairs: np.ndarray) -> None:
  """Writes pairs of tokens [R, n, 2] into rows, beginning at `places` [R, n]."""
  for which in range(2):
    np.put_along_axis(tokens, places + which, pairs[..., which], axis=1)
