"""Shapes in which pieces of many lengths are read together: little padding, and few programs to compile."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Sequence

from supra_jax.inference.decode import round_up_length

SHORTEST = 4
CALL = 40  # what reading the parameters costs once more, in tokens that could be read in that time

Shape = tuple[int, int]  # (rows, width)


def width_for(tokens: int) -> int:
  """Rounds a length up to 4, 8, 12, ..., 32, 40, ..., 64, 80, ..."""
  return -(-round_up_length(tokens) // SHORTEST) * SHORTEST


def room_for(tokens: int) -> int:
  """Rounds the tokens that a cache has room for up to 64, 96, 128, 192, 256, ..."""
  power = 1 << max(tokens - 1, 63).bit_length()
  return power * 3 // 4 if tokens <= power * 3 // 4 and power > 64 else power


@dataclasses.dataclass(frozen=True)
class _Plan:
  cost: float
  shapes: tuple[Shape, ...]


def batches(
  lengths: Sequence[int], rows_for: Callable[[int], int], known: Collection[Shape], new_shape: float
) -> list[tuple[list[int], Shape]]:
  """Divides pieces into batches at the least cost, in tokens: padded tokens, calls, and shapes that are not known yet.

  The widths that occur are divided into runs. The pieces of a run share the largest width, in batches of `rows_for`
  rows or a quarter of them. More pieces make more shapes worth their compilation.

  Args:
    lengths: number of tokens of each piece.
    rows_for: width -> most rows that are read together.
    known: shapes that cost no compilation.
    new_shape: what a shape that is not known costs.

  Returns:
    (numbers of the pieces, (rows, width)) of each batch, the widest first.
  """
  counts = collections.Counter(map(width_for, lengths))
  widths = sorted(counts)
  best = [_Plan(0.0, ())]  # for the pieces of the first widths
  for high in range(len(widths)):
    plans, number, most = [], 0, rows_for(widths[high])
    for low in range(high, -1, -1):
      number += counts[widths[low]]
      more = _run(number, widths[high], most, known, new_shape)
      plans.append(_Plan(best[low].cost + more.cost, best[low].shapes + more.shapes))
    best.append(min(plans, key=lambda plan: plan.cost))
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  made = []
  for rows, width in sorted(best[-1].shapes, key=lambda shape: (-shape[1], -shape[0])):
    taken, order = order[:rows], order[rows:]
    if taken:
      made.append((taken, (rows, width)))
  return made


def _run(number: int, width: int, most: int, known: Collection[Shape], new_shape: float) -> _Plan:
  """Returns the cheapest way to read pieces at one width: full batches, and the rest in quarters or in one more."""
  full, rest = divmod(number, most)
  quarter = max(most // 4, 1)
  plans = []
  for whole, parts in {(full, -(-rest // quarter)), (full + (rest > 0), 0)}:
    shapes = ((most, width),) * whole + ((quarter, width),) * parts
    cost = sum(rows * wide + CALL for rows, wide in shapes)
    plans.append(_Plan(cost + new_shape * len(set(shapes).difference(known)), shapes))
  return min(plans, key=lambda plan: (plan.cost, len(plan.shapes)))
