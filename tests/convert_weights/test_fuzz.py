"""Damaged sources: a hundred or two here, thousands with `-m slow`; see fuzz.py."""

import os
import subprocess
import sys

import pytest

from tests.convert_weights.fuzz import KINDS, NEED_TORCH


def fuzz(examples: int, *kinds: str) -> None:
  """Of all kinds in one process, whose start takes longer than its thirty examples of a kind."""
  command = [sys.executable, "-m", "tests.convert_weights.fuzz", "--kind", *kinds, f"--examples={examples}"]
  # Each thread would reserve memory for its own heap, which counts.
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=3600, env=os.environ | {"MALLOC_ARENA_MAX": "2"}
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
  assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(kinds)
  print(done.stdout)


@pytest.mark.parametrize("needs_torch", [False, True])
def test_some(needs_torch):
  if needs_torch:
    pytest.importorskip("torch")
  fuzz(30, *(kind for kind in KINDS if (kind in NEED_TORCH) == needs_torch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands(kind):
  if kind in NEED_TORCH:
    pytest.importorskip("torch")
  fuzz(2000, kind)
