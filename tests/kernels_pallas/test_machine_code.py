"""The kernels compiled for GPUs and TPUs that are not here; wants the wheels of the extra `machine_code`.

pip install -e '.[dev,machine_code]' && python -m pytest -m slow tests/kernels_pallas/test_machine_code.py
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _table(module: str, *flags: str) -> list[list[str]]:
  ran = subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr[-2000:]
  rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.skipif(not _installed("libtpu"), reason="libtpu is not installed")
def test_tpu_programs_need_little_beyond_their_operands():
  rows = _table("benchmarks.tpu_programs")
  assert len({row[0] for row in rows}) == 5
  # States, but no copy of an operand in another layout; v5p makes some of other widths.
  whole = [row for row in rows if int(row[1].split(",")[-1]) % 128 == 0]
  assert len(whole) == 10 and all(float(row[-1].rstrip("x")) < 0.3 for row in whole)


@pytest.mark.skipif(not _installed("jax_plugins.xla_cuda12"), reason="jax-cuda12-plugin is not installed")
def test_h100_kernels_spill_nothing():
  rows = _table("benchmarks.kernel_registers", "--gpus=h100")
  spilled = {(row[2], row[3]): row[6] for row in rows if row[1] == "triton"}
  assert len(spilled) == 8
  assert {key for key, value in spilled.items() if value != "0"} <= {("float32", "256")}
