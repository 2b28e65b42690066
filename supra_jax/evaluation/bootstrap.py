"""Confidence intervals by drawing documents again, since the tokens of one document depend on each other."""

from __future__ import annotations

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
    (low, high); None if there are fewer than two documents or the statistic is not finite in most of the samples.
  """
  count = len(sums_DN)
  if count < 2:
    return None
  rng = np.random.default_rng(seed)
  times = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # how often each document is in a sample
  values = statistic(times @ np.asarray(sums_DN, np.float64))
  values = values[np.isfinite(values)]
  if len(values) < draws / 2:
    return None
  tail = 100 * (1 - LEVEL) / 2
  low, high = np.percentile(values, [tail, 100 - tail])
  return float(low), float(high)
