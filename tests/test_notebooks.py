"""The notebooks run, and what they print is what is kept in them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "supra_jax" / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path):
  if "import torch" in notebook.read_text():
    pytest.importorskip("torch")
  copy = shutil.copy(notebook, tmp_path)
  settings = {
    "PYTHONPATH": str(ROOT),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "HF_MODULES_CACHE": str(tmp_path / "modules"),
  }
  done = subprocess.run(
    [sys.executable, "-m", "tests.support.notebooks", copy],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | settings | {"TMPDIR": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  fresh, kept = (json.loads(path.read_text())["cells"] for path in (Path(copy), notebook))
  for ours, theirs in zip(fresh, kept, strict=True):
    assert ours == theirs
  assert "/tmp" not in notebook.read_text() and str(Path.home()) not in notebook.read_text()
