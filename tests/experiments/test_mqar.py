"""The study of recall, small: what is counted, what a window cannot see, and cells that run once."""

import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks import mqar
from benchmarks.mqar_models import (
  METHODS,
  TEST_SEED,
  Setting,
  Stage,
  accuracies,
  batches,
  measure,
  student,
  teacher_config,
)
from supra_jax.data.mqar import Recall
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS, WIDTH = 2, 8
TASK = Recall(length=72, gap=40, vocab_size=32)
SETTING = Setting(
  task=TASK,
  pairs=(1, 3),
  rows=2,
  test_rows=32,
  stages=(Stage(TASK, (1, 3), 2, 2, 1e-3),),
  short_stages=1,
  teacher_accuracy=0.0,
)


@pytest.fixture(scope="module")
def teacher(random_params):
  config = teacher_config(HEADS, WIDTH, TASK)
  return random_params(config), config


def test_accuracy_is_the_share_of_values_with_the_largest_logit(teacher):
  params, config = teacher
  # Large logits of values make the model right about once in twelve, so that 0 is not the answer.
  table = params["embed_tokens"]["embedding"]
  params = {**params, "embed_tokens": {"embedding": table.at[np.array(TASK.values)].multiply(4)}}
  found = accuracies((params, config), SETTING, rows=16)
  logits = jax.jit(lambda tokens: Transformer(config).apply({"params": params}, tokens, method="logits")[0])
  for pairs in SETTING.pairs:
    right = asked = 0
    for batch in itertools.islice(batches(TASK, [pairs], 16, (TEST_SEED, pairs)), 2):
      likeliest = np.asarray(logits(batch["tokens"][:, :-1])).argmax(-1)
      for row, weights in enumerate(batch["target_weights"]):
        for at in np.flatnonzero(weights):
          right, asked = right + (likeliest[row, at - 1] == batch["tokens"][row, at]), asked + 1
    assert asked == SETTING.test_rows * pairs
    assert found[str(pairs)] == pytest.approx(right / asked)
  assert 0 < max(found.values()) < 1


def test_a_window_of_equal_bytes_sees_no_pair(teacher):
  """Other values in the pairs change what the transformer says behind a query, and nothing of what a window says."""
  (batch,) = itertools.islice(batches(TASK, [3], 8, (0,)), 1)
  asked = np.nonzero(batch["target_weights"][:, 1:])
  other = batch["tokens"].copy()
  told = other[:, : TASK.width]
  is_value = np.isin(told, TASK.values)
  told[is_value] = TASK.values.start + (told[is_value] - TASK.values.start + 1) % len(TASK.values)
  # In the row as it is, only the tokens of the pairs differ: answers behind the queries stay.
  assert (other != batch["tokens"]).sum() == 8 * 3
  for name, sees in (("window_only", False), ("identity_no_decay", True)):
    params, config = student(METHODS[name], teacher, SETTING, 0)
    apply = jax.jit(lambda p, tokens, c=config: Transformer(c).apply({"params": p}, tokens, method="logits")[0])
    one, two = (np.asarray(apply(params, tokens[:, :-1]))[asked] for tokens in (batch["tokens"], other))
    assert (np.abs(one - two).max() > 1e-3) == sees
    assert sees or (one == two).all()


def test_a_gap_that_a_window_reaches_over_is_refused(teacher):
  near = Setting(task=Recall(length=72, gap=2 * WIDTH - 1, vocab_size=32), pairs=(1,))
  with pytest.raises(ValueError, match=f"gap={2 * WIDTH - 1}: wanted 2 layers times {WIDTH} tokens"):
    measure(METHODS["window_only"], teacher, near, "long", 0, 0)


@pytest.mark.slow
def test_cells_run_once_and_in_order(tmp_path, monkeypatch):
  monkeypatch.setitem(mqar.TEACHERS, "small", (HEADS, WIDTH))
  cells = [
    ("small", name, tuning, tokens, 0)
    for name, tuning, tokens in (
      ("window_only", "long", 0),
      ("calibrated_no_decay", "long", 0),
      ("transfer_no_decay", "short_first", 1500),
    )
  ]
  (tmp_path / "teachers").mkdir()
  stem = tmp_path / "mqar"

  def run(hours=1.0, setting=SETTING):
    return mqar.study(setting, tmp_path / "teachers", stem, cells, hours)

  first = run(hours=0.0)
  assert [cell["method"] for cell in first["cells"]] == ["window_only"]
  report = run()
  assert report["cells"][0] == first["cells"][0]
  assert [(c["teacher"], c["method"], c["tuning"], c["tokens"], c["seed"]) for c in report["cells"]] == cells
  assert json.loads(stem.with_suffix(".json").read_text()) == report == run()
  linear = 2 * HEADS * WIDTH * WIDTH * 4
  assert {cell["state_bytes"] for cell in report["cells"]} == {linear}
  assert {cell["equal_window"] for cell in report["cells"]} == {WIDTH}
  assert [cell["loss"] is None for cell in report["cells"]] == [True, True, False]
  assert np.isfinite(report["cells"][2]["loss"])
  assert all(set(cell["accuracy"]) == {"1", "3"} for cell in report["cells"])
  assert report["teachers"]["small"]["tokens"] == 2 * 4 * 72

  mqar.plot(report, stem.with_suffix(".png"))
  assert stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
  lines = mqar.table(report, "small", "long").splitlines()
  assert len(lines) == 2 + 2 and lines[3].startswith(f"| window_only | {linear:,} | 0 | 1 |")
  with pytest.raises(ValueError, match="another setting"):
    run(setting=Setting())
