import io
import json
import math

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from supra_jax import metrics


def train_record(step, loss=3.0):
  return {
    "step": step,
    "tokens": step * 100,
    "loss": loss,
    "grad_norm": 1.0,
    "learning_rate": 1e-4,
    "tokens_per_second": 5.0,
  }


class TestWriter:
  def test_each_line_is_on_disk_at_once(self, tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
      for step in (1, 2):
        writer.write(train_record(step))
        assert metrics.read_metrics(path)[-1] == train_record(step)

  def test_scalars_and_what_json_lacks(self, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
      writer.write(
        {"step": np.int64(3), "loss": jnp.float32(0.5), "a": math.nan, "b": jnp.inf, "c": np.float32("-inf")}
      )

    def refuse(constant):
      raise AssertionError(constant)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 3, "loss": 0.5, "a": None, "b": None, "c": None}

  def test_resume_takes_out_later_steps_and_a_cut_line(self, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
      for step in range(1, 8):
        writer.write(train_record(step))
    with path.open("a") as file:
      file.write('{"step": 8, "lo')
    assert [r["step"] for r in metrics.read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    with metrics.MetricsWriter(path, restored_step=5) as writer:
      writer.write(train_record(6, loss=2.0))
    assert metrics.read_metrics(path) == [train_record(step) for step in range(1, 6)] + [train_record(6, loss=2.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

  def test_run_from_the_start_empties_the_file(self, tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
      with metrics.MetricsWriter(path) as writer:
        writer.write(train_record(1))
    assert metrics.read_metrics(path) == [train_record(1)]

  @pytest.mark.parametrize("record", [{}, {"step": 1.5}, {"step": None}])
  def test_record_without_step(self, tmp_path, record):
    with (
      metrics.MetricsWriter(tmp_path / "metrics.jsonl") as writer,
      pytest.raises(ValueError, match="whole number under 'step'"),
    ):
      writer.write(record)

  @pytest.mark.parametrize("line", ["{", "[]", '{"step": "x"}', ""])
  def test_bad_line_is_named(self, tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
      metrics.read_metrics(path)


class Terminal(io.StringIO):
  def isatty(self):
    return True


class TestProgress:
  def test_lines_where_there_is_no_terminal(self):
    stream = io.StringIO()
    with metrics.Progress(20, first_step=10, seconds=0, stream=stream) as progress:
      progress.update(11, loss=3.25, tokens_per_second=12_345)
      progress.message("saved")
      progress.update(20)
    first, saved, last = stream.getvalue().splitlines()
    assert first.startswith("step 11/20, loss 3.2500, 12.3k tokens/s, ")
    assert saved == "saved"
    assert last == "step 20/20, loss 3.2500, 12.3k tokens/s, 00:00 left"

  def test_seldom_but_always_the_last(self):
    stream = io.StringIO()
    with metrics.Progress(1000, stream=stream) as progress:
      for step in range(1, 1001):
        progress.update(step)
    assert len(stream.getvalue().splitlines()) == 1

  def test_bar(self):
    stream = Terminal()
    with metrics.Progress(4, stream=stream) as progress:
      for step in range(1, 5):
        progress.update(step, loss=2.0, tokens_per_second=1e6)
      progress.message("saved")
    assert "4/4" in stream.getvalue()
    assert "loss 2.0000, 1M tokens/s" in stream.getvalue()
    assert "saved\n" in stream.getvalue()


class TestPlot:
  def test_picture(self, tmp_path):
    path, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    with metrics.MetricsWriter(path) as writer:
      for step in range(1, 60):
        writer.write(train_record(step, loss=math.nan if step == 9 else 3 + 5 / step))
        if step % 20 == 0:
          writer.write({"step": step, "tokens": step * 100, "heldout_nll": 3.2 + 5 / step})
    metrics.plot_losses(path, png, teacher_nll=2.9, title="A title")
    picture = matplotlib.image.imread(png)
    assert picture.shape == (800, 1440, 4)
    # White paper, with something drawn in the colour of each series.
    assert (picture[..., :3] == 1).all(-1).mean() > 0.8
    for colour in (metrics.TRAIN, metrics.HELDOUT, metrics.INK):
      wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
      assert (np.abs(picture[..., :3] - wanted) < 0.01).all(-1).sum() > 100, colour
    assert pyplot.get_fignums() == []

  @pytest.mark.parametrize("record", [train_record(1), {"step": 0, "tokens": 0, "heldout_nll": 4.0}])
  def test_one_point(self, tmp_path, record):
    with metrics.MetricsWriter(tmp_path / "m.jsonl") as writer:
      writer.write(record)
    metrics.plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000

  def test_nothing_to_draw(self, tmp_path):
    with metrics.MetricsWriter(tmp_path / "m.jsonl") as writer:
      writer.write({"step": 1, "tokens": 2})
    with pytest.raises(ValueError, match=r"m\.jsonl: no loss"):
      metrics.plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
