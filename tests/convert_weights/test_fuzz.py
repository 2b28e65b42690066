"""Damaged sources: a hundred or two here, thousands with `-m slow`; see fuzz.py."""

import os
import subprocess
import sys

import pytest

from tests.convert_weights.fuzz import KINDS, NEED_TORCH


def fuzz(kind: str, examples: int) -> None:
  if kind in NEED_TORCH:
    pytest.importorskip("torch")
  command = [sys.executable, "-m", "tests.convert_weights.fuzz", f"--kind={kind}", f"--examples={examples}"]
  # Each thread would reserve memory for its own heap, which counts.
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=3600, env=os.environ | {"MALLOC_ARENA_MAX": "2"}
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
  print(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind):
  fuzz(kind, 30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands(kind):
  fuzz(kind, 2000)
