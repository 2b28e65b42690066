"""Ridge regression in float64, of sums that were taken over batches and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# The best of the ridges tried with SmolLM2 on 8k tokens; see benchmarks/RESULTS.md.
RIDGE = 4000.0
# Fraction of RIDGE used for projections that are regularised towards the teacher's.
PRIOR_RIDGE = 0.25


class Moments(NamedTuple):
  """Sums over tokens for a regression of y [D] on features a [F]; the last feature is a constant 1.

  Attributes:
    gram: [F + 1, F + 1], sum of w a a^T, w being a token's weight.
    cross: [F + 1, D], sum of w a y^T.
    energy: sum of w |y|^2.
    tokens: number of tokens.
  """

  gram: Any
  cross: Any
  energy: Any
  tokens: Any


NOTHING = Moments(0.0, 0.0, 0.0, 0.0)


def solve(
  moments: Moments,
  *,
  ridge: float | Sequence[float],
  widths: Sequence[int] | None = None,
  bias: bool,
  prior: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray | None, float]:
  """The W [F, D] and b [D] that make a W + b closest to y in the weighted mean square, W kept near a prior.

  Minimises sum w |a W + b - y|^2 + ridge / tokens * mean(diag(gram)) * |W - prior|^2; b is free. With several
  ridges the features are parts of the given widths (None: equal ones), each with a ridge and a mean of its own.

  Returns:
    (W, b, the share of w |y|^2 that is left), float64; b is None without `bias`.
  """
  gram, cross = (np.asarray(x, np.float64) for x in (moments.gram, moments.cross))
  count, sums, targets = gram[-1, -1], gram[-1, :-1], cross[-1]
  inner, outer = gram[:-1, :-1], cross[:-1]
  if bias:
    inner, outer = inner - np.outer(sums, sums) / count, outer - np.outer(sums, targets) / count
  ridges = np.atleast_1d(np.asarray(ridge, np.float64))
  widths = [len(inner) // len(ridges)] * len(ridges) if widths is None else list(widths)
  means = np.array([part.mean() for part in np.split(np.diag(inner), np.cumsum(widths)[:-1])])
  # Features that are all 0 get the prior's weights.
  sizes = np.maximum(ridges / float(moments.tokens) * means, np.finfo(float).tiny)
  sizes_F1 = np.repeat(sizes, widths)[:, None]
  kernel = np.linalg.solve(inner + np.diagflat(sizes_F1), outer + sizes_F1 * prior)
  offset = (targets - sums @ kernel) / count if bias else None
  whole = kernel if offset is None else np.vstack([kernel, offset])
  a_a, a_y = (gram, cross) if bias else (gram[:-1, :-1], cross[:-1])
  left = float(moments.energy) - 2 * np.sum(whole * a_y) + np.sum(whole * (a_a @ whole))
  return kernel, offset, left / max(float(moments.energy), 1e-30)
