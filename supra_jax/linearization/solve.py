"""Solves a ridge regression in float64 from sums over tokens, which were taken over batches and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# The best of the ridges (in tokens, see `calibrate`) tried with SmolLM2 on 8k tokens; see benchmarks/RESULTS.md.
RIDGE = 4000.0
# Fraction of the ridge used for projections that are regularised towards the teacher's.
PRIOR_RIDGE = 0.25


class Moments(NamedTuple):
  """Sums over tokens for a regression of targets y [D] on features a [F], to which a constant feature 1 is appended.

  Attributes:
    gram: [F + 1, F + 1], sum of w a a^T, w being a token's weight; a has the 1 as its last feature.
    cross: [F + 1, D], sum of w a y^T.
    energy: sum of w |y|^2.
    tokens: number of tokens, not weighted.
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
  """Solves the ridge regression of y on a, with W kept near a prior: y = a W + b.

  Minimises sum w |a W + b - y|^2 + ridge / tokens * mean(diag(G)) * |W - prior|^2 over W and b, where G is the F x F
  part of `gram`, centred if there is a bias. b is not regularised.

  Args:
    moments: the sums over tokens.
    ridge: strength of the regularisation, in tokens; or one per part of the features. Each part has its own mean of
      diag(G).
    widths: number of features of each part, which add up to F; None: parts of equal width.
    bias: whether to solve for b; without it b = 0.
    prior: [F, D], or a scalar.

  Returns:
    (W [F, D], b [D] or None without `bias`, the share of sum w |y|^2 that is left), float64.
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
