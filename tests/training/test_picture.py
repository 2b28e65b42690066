import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from supra_jax.training import pictures as picture
from supra_jax.training.metrics import MetricsWriter
from tests.training.test_metrics import train_record


def _drawn_in(drawn, colour):
  """How many pixels of a picture have a colour."""
  wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
  return (np.abs(drawn[..., :3] - wanted) < 0.01).all(-1).sum()


def test_picture(tmp_path):
  path, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
  with MetricsWriter(path) as writer:
    for step in range(1, 60):
      writer.write(train_record(step, loss=math.nan if step == 9 else 3 + 5 / step))
      if step % 20 == 0:
        writer.write({"step": step, "tokens": step * 100, "heldout_nll": 3.2 + 5 / step})
  picture.plot_losses(path, png, teacher_nll=2.9, title="A title")
  drawn = matplotlib.image.imread(png)
  assert drawn.shape == (800, 1440, 4)
  # White paper, with something drawn in the colour of each series.
  assert (drawn[..., :3] == 1).all(-1).mean() > 0.8
  for colour in (picture.TRAIN, picture.HELDOUT, picture.INK):
    assert _drawn_in(drawn, colour) > 100, colour
  assert pyplot.get_fignums() == []


@pytest.mark.parametrize("record", [train_record(1), {"step": 0, "tokens": 0, "heldout_nll": 4.0}])
def test_one_point(tmp_path, record):
  with MetricsWriter(tmp_path / "m.jsonl") as writer:
    writer.write(record)
  picture.plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
  drawn = matplotlib.image.imread(tmp_path / "loss.png")
  there = {colour: _drawn_in(drawn, colour) for colour in (picture.TRAIN, picture.HELDOUT)}
  of_the_record, other = picture.TRAIN, picture.HELDOUT
  if "heldout_nll" in record:
    of_the_record, other = other, of_the_record
  assert there[of_the_record] > 10 and there[other] == 0, there


@pytest.mark.parametrize("tenth_of", ["", "random"])
def test_curves(tmp_path, tenth_of):
  png = tmp_path / "curves.png"
  runs = {"random": [[(0, 10), (10, 8), (20, 7)], [(0, 10.5), (10, 8.5), (20, 7.2)]], "calibrated": [[(5, 6), (20, 5)]]}
  picture.plot_curves(runs, png, teacher_nll=3, x="minutes", tenth_of=tenth_of)
  drawn = matplotlib.image.imread(png)
  for colour in picture.CURVES[:2]:
    assert _drawn_in(drawn, colour) > 100, colour


def test_nothing_to_draw(tmp_path):
  with MetricsWriter(tmp_path / "m.jsonl") as writer:
    writer.write({"step": 1, "tokens": 2})
  with pytest.raises(ValueError, match=r"m\.jsonl: no loss"):
    picture.plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
