"""Confidence intervals: of statistics over documents, by bootstrap, and of shares of independent items (Wilson)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def interval(
  statistic: Callable[[np.ndarray], np.ndarray], sums_DN: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float] | None:
  """Returns the 95 % percentile interval of a statistic of sums over documents.

  A document is drawn with all of its sums, so that models are compared on the same documents (paired bootstrap).

  Args:
    statistic: returns the statistic, [...], of the sums [..., N] over the drawn documents.
    sums_DN: the N sums of each document, such as the losses of several models on the same tokens.
    draws: number of samples of D documents, drawn with replacement.
    seed: determines the draws.

  Returns:
    (low, high); None if there are fewer than two documents, or if so many samples have no finite statistic that the
    ends of the interval are among them.
  """
  count = len(sums_DN)
  if count < 2:
    return None
  rng = np.random.default_rng(seed)
  times = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # how often each document is in a sample
  values = statistic(times @ np.asarray(sums_DN, np.float64))
  tail = (1 - LEVEL) / 2
  if np.isfinite(values).mean() < 1 - tail:
    return None
  low, high = np.quantile(values[np.isfinite(values)], [tail, 1 - tail])
  return float(low), float(high)


def share_interval(right: int, count: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a share `right` / `count` of independent items."""
  z = 1.959964
  middle, spread = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
  return (middle - spread) / (count + z * z), (middle + spread) / (count + z * z)
