"""Tries the kernels on this device; `auto` uses those that are right and fast: `python -m supra_jax.bin.doctor`.

Exit status 1 if something is wrong.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from absl import flags

from kernels_pallas import checkup, judgement, verdict
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.core.progress import Progress

_OUTPUT = flags.DEFINE_string("output", "", "File to write the report to as well, as JSON; for a bug report, say.")


def _examined() -> list[dict[str, Any]]:
  """Returns all that `examine_apart` yields; shows the progress."""
  records = checkup.examine_apart()
  found = [about := next(records)]
  names = checkup.names_for(about["platform"])
  total = sum(len(checkup.cells_of(name, about["platform"])) for name in names)
  with Progress(total, f"{about['device']}: {{done}} of {{total}} tried", {"now": str}) as progress:
    for record in records:
      found.append(record)
      cells = {(x["implementation"], x["dtype"], x["width"]) for x in found[1:]}
      progress.advance_to(len(cells), now=f"{record['implementation']} {record['dtype']} {record['width']}")
      if record.keys() == {"implementation", "dtype", "width"}:  # the cell before it is done: should this end early
        verdict.write(about["device"], judgement.judge(found[1:]), {**about, "found": found[1:]})
      if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(to_json({**about, "found": found[1:]}, indent=1) + "\n")
  return found


def main() -> None:
  about, *found = _examined()
  choices = judgement.judge(found)
  print(f"{judgement.title(about)}\n\n{judgement.table(found)}\n")
  path = verdict.write(about["device"], choices, {"python": platform.python_version(), **about, "found": found})
  if _OUTPUT.value:
    Path(_OUTPUT.value).write_text(path.read_text())
  for row in choices:
    print(
      f"auto: {row.dtype}, widths {row.widths[0]} to {row.widths[1]}, {row.tokens} tokens or more: {row.implementation}"
    )
  print(
    f"auto: {'all else' if choices else 'always'} {checkup.FALLBACK}\nThe verdict, with all that was measured: {path}"
  )
  if any(map(judgement.wrong, found)):
    sys.exit("Something is wrong. auto takes no kernel that is wrong. Please report it, with the file above.")


if __name__ == "__main__":
  run(main)
