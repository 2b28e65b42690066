"""The small scale's teacher looks up what stands in a row a second time."""

from pathlib import Path

import jax
import pytest

import supra_jax
from supra_jax.experiments.small_scale import induction
from supra_jax.experiments.tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_random_model_looks_nothing_up(tmp_path):
  first, second = induction(supra_jax.load(write_checkpoint(tmp_path / "model", "softmax")), length=32, rows=4)
  assert abs(first - second) < 0.1 and first > 4


@pytest.mark.slow
def test_the_teacher_has_induction_heads():
  """By hand, after `python -m benchmarks.small_teacher --workdir=runs/small`, two hours of two cores."""
  directory = Path("runs/small/teacher_text/checkpoint")
  if not directory.exists():
    pytest.skip(f"{directory} is not there")
  lm = supra_jax.load(directory)
  first, second = induction(lm)
  assert second < first - 2
  assert sum(leaf.size for leaf in jax.tree.leaves(lm.params)) <= 3_000_000
