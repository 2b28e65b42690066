"""One progress for all long jobs: a bar on a terminal, a line every half minute in a log file."""

import io
import threading

from supra_jax.core import progress
from supra_jax.data import encoding
from supra_jax.linearization import calibrate
from supra_jax.training import metrics


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_log_file_gets_few_lines(capsys):
  with calibrate.shown() as report:
    for _ in range(2):  # rounds
      for layer in range(30):
        report(layer, 30, 0.5, "error 0.5")
  with progress.of_bytes("Converting", 4096, enabled=True) as shown:
    for _ in range(64):
      shown.advance(64)
  with encoding.packing_progress(1000) as packing:
    for byte in range(1, 1001):
      packing.advance_to(byte, tokens=3 * byte, tokens_per_second=3 * byte / packing.elapsed)
  with metrics.progress_of_steps(1000) as training:
    for step in range(1, 1001):
      training.advance_to(step, loss=2.0)
  calibrating, converting, packed, trained = capsys.readouterr().err.splitlines()
  assert calibrating == "Calibrating, 30 of 30, error 0.5, 00:00 left"
  assert converting == "Converting, 100% of 4.00kB, 00:00 left"
  assert packed.startswith("packing, 100% of the input, 3.00k tokens, ")
  assert trained == "step 1000/1000, loss 2.0000, 00:00 left"
  assert progress.SECONDS == 30


def test_a_line_every_so_many_seconds(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  with progress.Progress(100, "{done}/{total}", stream=stream) as shown:
    for second in range(1, 81):
      now[0] = float(second)
      shown.advance(1)
    shown.message("a word")
  assert stream.getvalue().splitlines() == [
    "30/100, 01:10 left", "60/100, 00:40 left", "a word", "80/100, 00:20 left"
  ]  # fmt: skip


def test_a_round_begins_with_what_is_done(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  with progress.Progress(0, "{done}/{total}", seconds=0, stream=stream) as shown:
    for total, seconds in ((2, 10), (4, 1)):
      for done in range(1, total + 1):
        now[0] += seconds
        if done == 1:
          shown.begin(total, first=1)
        shown.advance_to(done)
  assert stream.getvalue().splitlines() == [
    "1/2, ? left", "2/2, 00:00 left", "1/4, ? left", "2/4, 00:02 left", "3/4, 00:01 left", "4/4, 00:00 left"
  ]  # fmt: skip


def test_threads_and_a_bar():
  stream = Terminal()
  with progress.Progress(4000, "", {"said": str}, stream=stream, unit="B") as shown:
    threads = [threading.Thread(target=lambda: [shown.advance(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert shown.done == 4000
    shown.begin(7)
    shown.advance_to(7, said="all done")
  assert "7/7" in stream.getvalue() and "all done" in stream.getvalue()


def test_a_name_may_have_braces(capsys):
  with progress.of_bytes("Writing {output}", 2048, enabled=True) as shown:
    shown.advance(2048)
  assert capsys.readouterr().err == "Writing {output}, 100% of 2.00kB, 00:00 left\n"
