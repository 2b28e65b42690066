"""Runs the cells of a notebook, as Jupyter would those that print and do no more.

python -m tests.support.notebooks NOTEBOOK   runs it and keeps its outputs
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path


def run(path: Path) -> dict:
  """The notebook with the outputs of a fresh run, all of whose cells share one namespace."""
  notebook, namespace = json.loads(path.read_text()), {"__name__": "__main__"}
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  for count, cell in enumerate(cells, 1):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile("".join(cell["source"]), f"<{cell['id']}>", "exec"), namespace)
    lines = printed.getvalue().splitlines(keepends=True)
    cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    cell["execution_count"] = count
  return notebook


if __name__ == "__main__":
  notebook = Path(sys.argv[1])
  notebook.write_text(json.dumps(run(notebook), indent=1, ensure_ascii=False) + "\n")
