"""Makes a verdict, and a table to read, of what `checkup` found."""

import itertools
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kernels_pallas import verdict
from kernels_pallas.api import FALLBACK
from kernels_pallas.checkup import WIDTHS

# Of `checkup.errors`. Kernels that are right have up to 3.5e-3, by rounding to bfloat16 a few times, and 1e-6.
TOLERANCES = {"bfloat16": 5e-3, "float32": 1e-5}
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # what XLA's error begins with: others may use the device, and nothing is wrong
# A kernel is chosen if it takes at most so many times as long as FALLBACK does.
SLOWEST = 1.05


def title(about: Mapping[str, Any]) -> str:
  """Returns a line that says what was tried: devices and their memory, driver, versions. `about`: of `described`."""
  memory = f" of {about['memory'] / 2**30:.1f} GiB" if about["memory"] else ""
  devices = f"{about['devices']} x {about['device']}{memory}, {about['driver']}"
  versions = ", ".join(f"{name} {version}" for name, version in verdict.versions().items())
  plugins = [name for name in verdict.versions() if "plugin" in name or name == "libtpu"]
  idle = (
    f"\nNOTE: {', '.join(plugins)} is installed, and jax uses the CPU."
    if plugins and about["platform"] == "cpu"
    else ""
  )
  return f"{devices}; {platform.platform()}; Python {platform.python_version()}, {versions}{idle}"


def wrong(found: Mapping[str, Any]) -> str:
  """Returns what is wrong with a result of `checkup.examine`, as an English clause; empty if nothing is."""
  if "failed" in found:
    return "" if _NO_MEMORY in found["failed"] else found["failed"]
  # Beside FALLBACK both are rounded.
  allowed = TOLERANCES[found["dtype"]] * (2 if "long_errors" in found else 1)
  errors = found.get("errors", found.get("long_errors", {}))
  beyond = {k: np.inf if x is None else x for k, x in errors.items() if x is None or x > allowed}
  if not beyond:
    return ""
  where = f" at {found['tokens']:,} tokens" if "long_errors" in found else ""
  return f"{', '.join(beyond)} wrong{where}: off by up to {max(beyond.values()):.1g} where {allowed:.0e} is allowed"


def judge(found: Sequence[Mapping[str, Any]], candidates: verdict.Choices = verdict.CANDIDATES) -> verdict.Choices:
  """Selects the kernels that "auto" may choose, the fastest first: those that are right and not slower than FALLBACK.

  A candidate is judged separately at each of WIDTHS, and what is found at a width holds for all widths above the next
  smaller one too. `Choice.tokens` is the shortest row from which on the candidate is not slower. Where FALLBACK has no
  time, every candidate that is right is selected.

  Args:
    found: what `checkup.examine` yielded for FALLBACK and for kernels.
    candidates: what may be chosen; those whose implementation was not examined are left out.
  """

  def times(name: str, dtype: str, width: int) -> dict[int, dict[str, float]]:
    mine = [x for x in found if (x["implementation"], x["dtype"], x["width"]) == (name, dtype, width)]
    return {} if any(map(wrong, mine)) else {x["tokens"]: x["seconds"] for x in mine if "seconds" in x}

  speeds: dict[verdict.Choice, float] = {}
  for row in candidates:
    for below, width in itertools.pairwise((0, *WIDTHS)):
      least, most = max(below + 1, row.widths[0]), min(width, row.widths[1])
      mine, base = times(row.implementation, row.dtype, width), times(FALLBACK, row.dtype, width)
      if least > most or not mine:
        continue
      lengths = sorted(mine, reverse=True)
      fast = list(itertools.takewhile(lambda length: _is_fast(mine[length], base.get(length)), lengths))  # noqa: B023
      if fast:
        tokens = row.tokens if len(fast) == len(lengths) else fast[-1]
        speeds[row._replace(widths=(least, most), tokens=tokens)] = mine[lengths[0]]["forward+backward"]
  return tuple(sorted(speeds, key=speeds.__getitem__))


def _is_fast(mine: Mapping[str, float], base: Mapping[str, float] | None) -> bool:
  return base is None or all(mine[mode] <= SLOWEST * base[mode] for mode in base)


def table(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table, in plain text, of what `checkup.examine` yielded: what is right, and what is fast.

  Of FALLBACK the times of forward and backward pass are in milliseconds, of the others in parts of these.
  """
  cells: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
  for x in found:
    cells.setdefault((x["implementation"], x["dtype"], x["width"]), []).append(x)
  lengths = sorted({x["tokens"] for x in found if "seconds" in x})

  def seconds(key: tuple[str, str, int], length: int) -> float | None:
    timed = [x for x in cells.get(key, ()) if "seconds" in x and x["tokens"] == length]
    return timed[0]["seconds"]["forward+backward"] if timed else None

  columns = f"{'implementation':15}{'dtype':10}{'width':>5}  {'largest error':15}"
  lines = [columns + "".join(f"{length:>13,}" for length in lengths) + " tokens"]
  for key, mine in cells.items():
    row = f"{key[0]:15}{key[1]:10}{key[2]:5}  "
    said = next((f"no: {x['refused']}" for x in mine if "refused" in x), "")
    said = next((f"no memory: {x['failed']}" for x in mine if _NO_MEMORY in x.get("failed", "")), said)
    said = next((f"WRONG: {wrong(x)}" for x in mine if wrong(x)), said)
    checked: Mapping[str, float | None] = next((x["errors"] for x in mine if "errors" in x), {})
    if said or not checked:
      lines.append(row + (said or "not tried"))
      continue
    row += f"{max(x or 0.0 for x in checked.values()):<15.0e}"
    for length in lengths:
      mine_s, base = seconds(key, length), seconds((FALLBACK, *key[1:]), length)
      if mine_s is None:
        row += f"{'':13}"
      else:
        row += f"{mine_s * 1e3:>10.2f} ms" if key[0] == FALLBACK or base is None else f"{mine_s / base:>12.2f}x"
    lines.append(row.rstrip())
  return "\n".join(lines)
