import io
import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from supra_jax.training import metrics


def train_record(step, loss=3.0):
  return {
    "step": step,
    "tokens": step * 100,
    "loss": loss,
    "grad_norm": 1.0,
    "learning_rate": 1e-4,
    "tokens_per_second": 5.0,
    "mfu": None,
  }


def board(directory):
  """{tag: {step: value}} as TensorBoard shows it: a start of a session hides what came before from its step on."""
  events = []
  for path in sorted(directory.iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (length,) = struct.unpack_from("<Q", content, at)
      event = Event.FromString(content[at + 12 : at + 12 + length])
      at += length + 16
      if event.session_log.status == SessionLog.START:
        events = [earlier for earlier in events if earlier.step < event.step]
      events.append(event)
  shown = {}
  for event in events:
    for value in event.summary.value:
      points = shown.setdefault(value.tag, {})
      assert event.step not in points, f"{value.tag} has step {event.step} twice"
      points[event.step] = value.simple_value
  return shown


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

  def test_tensorboard(self, tmp_path):
    with metrics.MetricsWriter(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "board") as writer:
      writer.write({"step": 0, "tokens": 0, "heldout_nll": 4.0, "heldout_perplexity": 54.5})
      writer.write(train_record(1, loss=math.nan) | {"skipped": 1})
      writer.write(train_record(2, loss=2.5))
      shown = board(tmp_path / "board")  # all of it is there before the file is closed
    assert shown["train/loss"] == {2: 2.5}
    assert shown["train/grad_norm"] == {1: 1.0, 2: 1.0}
    assert shown["train/skipped"] == {1: 1.0}
    assert (shown["heldout/nll"], shown["heldout/perplexity"]) == ({0: 4.0}, {0: 54.5})
    assert not {"train/step", "train/tokens", "train/mfu"} & shown.keys()

  def test_tensorboard_after_a_resume_and_a_new_start(self, tmp_path):
    def run(steps, loss, restored=None):
      path = tmp_path / "metrics.jsonl"
      with metrics.MetricsWriter(path, restored, tensorboard=tmp_path / "board") as writer:
        for step in steps:
          writer.write(train_record(step, loss))
      recorded = {record["step"]: record["loss"] for record in metrics.read_metrics(path)}
      assert board(tmp_path / "board")["train/loss"] == recorded
      return recorded

    run(range(1, 8), 3.0)
    assert run(range(6, 9), 2.0, restored=5) == dict.fromkeys(range(1, 6), 3.0) | dict.fromkeys(range(6, 9), 2.0)
    assert run(range(1, 3), 1.0) == {1: 1.0, 2: 1.0}

  def test_other_processes_touch_nothing(self, tmp_path):
    with metrics.MetricsWriter(tmp_path / "run" / "m.jsonl", tensorboard=tmp_path / "board", enabled=False) as writer:
      writer.write(train_record(1))
    assert list(tmp_path.iterdir()) == []

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
    with metrics.progress_of_steps(20, 10, seconds=0, stream=stream) as progress:
      progress.advance_to(11, loss=3.25, tokens_per_second=12_345)
      progress.message("saved")
      progress.advance_to(20)
    first, saved, last = stream.getvalue().splitlines()
    assert first.startswith("step 11/20, loss 3.2500, 12.3k tokens/s, ")
    assert saved == "saved"
    assert last == "step 20/20, loss 3.2500, 12.3k tokens/s, 00:00 left"

  def test_shows_what_it_knows_of_a_record(self):
    stream = io.StringIO()
    with metrics.progress_of_steps(20, seconds=0, stream=stream) as progress:
      progress.advance_to(1, **train_record(1))
      progress.advance_to(3, mfu=0.4567, skipped=0)
      progress.advance_to(4, loss=2.0, skipped=2)
    lines = [line.rpartition(", ")[0] for line in stream.getvalue().splitlines()]
    assert lines == [
      "step 1/20, loss 3.0000, 5 tokens/s",
      "step 3/20, loss 3.0000, 5 tokens/s, MFU 45.7%",
      "step 4/20, loss 2.0000, 5 tokens/s, MFU 45.7%, 2 skipped",
    ]

  @pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
  def test_other_processes_say_nothing(self, stream):
    with metrics.progress_of_steps(4, seconds=0, stream=stream, enabled=False) as progress:
      progress.advance_to(1, loss=2.0)
      progress.message("saved")
    assert stream.getvalue() == ""

  def test_seldom_but_always_the_last(self):
    stream = io.StringIO()
    with metrics.progress_of_steps(1000, stream=stream) as progress:
      for step in range(1, 1001):
        progress.advance_to(step)
    assert len(stream.getvalue().splitlines()) == 1

  def test_bar(self):
    stream = Terminal()
    with metrics.progress_of_steps(4, stream=stream) as progress:
      for step in range(1, 5):
        progress.advance_to(step, loss=2.0, tokens_per_second=1e6)
      progress.message("saved")
    assert "4/4" in stream.getvalue()
    assert "loss 2.0000, 1M tokens/s" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
