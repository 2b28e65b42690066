"""What tries the kernels on a device: planted faults are found, and what is slow is not chosen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.runs import ROOT
from kernels_pallas import checkup, judgement, verdict
from kernels_pallas.checkup import FALLBACK, WIDTHS, Size

KERNEL = verdict.Choice("cuda", "float32", (16, 128), 64, "triton")


def _cell(name, seconds, width=64, error=1e-6, dtype="float32"):
  """What `examine` yields of a cell, when each length takes so many seconds."""
  what = {"implementation": name, "dtype": dtype, "width": width}
  timed = [{**what, "tokens": t, "seconds": {"forward": s, "forward+backward": 3 * s}} for t, s in seconds.items()]
  long = [{**what, "tokens": t, "long_errors": {"output": 1e-6}} for t in seconds]
  return [what, {**what, "errors": {"output": error, "d_q": 1e-7}}, *long, *timed]


BASE = _cell(FALLBACK, {256: 1.0, 2048: 2.0, 16384: 8.0})
FAST, AT_LENGTH, SLOW = (
  {256: 0.9, 2048: 1.0, 16384: 2.0},
  {256: 3.0, 2048: 1.0, 16384: 2.0},
  {256: 0.9, 2048: 1.0, 16384: 9.0},
)


@pytest.mark.parametrize(
  ("found", "chosen"),
  [
    (_cell("triton", FAST), [(16, 64, 64)]),
    (_cell("triton", AT_LENGTH), [(16, 64, 2048)]),
    (_cell("triton", SLOW), []),
    (_cell("triton", FAST, error=2e-5), []),
    (_cell("triton", FAST, error=None), []),
    (_cell("triton", {}), []),
    ([*_cell("triton", FAST), {"implementation": "triton", "dtype": "float32", "width": 64, "failed": "crashed"}], []),
    (_cell("triton", FAST, dtype="bfloat16"), []),
    (_cell("triton", FAST, width=128) + _cell(FALLBACK, SLOW, width=128), [(65, 128, 64)]),
    (_cell("triton", FAST, width=256) + _cell(FALLBACK, SLOW, width=256), []),
    (
      [{"implementation": FALLBACK, "dtype": "float32", "width": 64, "failed": "crashed"}, *_cell("triton", SLOW)],
      [(16, 64, 64)],
    ),
  ],
)
def test_what_is_right_and_fast_is_chosen(found, chosen):
  choices = judgement.judge([*BASE, *found], (KERNEL,))
  assert [(*x.widths, x.tokens) for x in choices] == chosen
  assert all(x.implementation == "triton" for x in choices)


def test_the_fastest_goes_first():
  rows = tuple(KERNEL._replace(implementation=name) for name in ("triton", "mosaic_gpu"))
  quicker = {length: seconds / 2 for length, seconds in FAST.items()}
  found = [*BASE, *_cell("triton", FAST), *_cell("mosaic_gpu", quicker)]
  assert [x.implementation for x in judgement.judge(found, rows)] == ["mosaic_gpu", "triton"]


def test_the_table_says_what_is_right_and_fast():
  refused = {"implementation": "tpu", "dtype": "float32", "width": 64, "refused": "not here"}
  no_memory = {"implementation": "tpu", "dtype": "float32", "width": 128, "failed": "RESOURCE_EXHAUSTED: 9 GB"}
  wrong = _cell("mosaic_gpu", {}, error=0.5)
  found = [*BASE, *_cell("triton", FAST), *wrong, refused, no_memory]
  base, triton, mosaic, no, memory = judgement.table(found).splitlines()[1:]
  assert base.split() == [FALLBACK, "float32", "64", "1e-06", "3000.00", "ms", "6000.00", "ms", "24000.00", "ms"]
  assert triton.split()[-3:] == ["0.90x", "0.50x", "0.25x"]
  assert "WRONG: output wrong: off by up to 0.5 where 1e-05 is allowed" in mosaic
  assert "no: not here" in no and "no memory: RESOURCE_EXHAUSTED" in memory
  assert not judgement.wrong(no_memory) and not judgement.wrong(refused)


def test_what_is_really_slow_is_not_chosen(monkeypatch):
  """The recurrence takes many times as long as the chunked scan, and the chunked scan is no slower than it."""

  def examined(name):
    what = {"implementation": name, "dtype": "float32", "width": 64}
    yield {**what, "errors": checkup.errors(name, "float32", 64)}
    yield {**what, "tokens": 256, "seconds": checkup.time_op(name, "float32", 64, Size(1, 256, 1))}

  found = [x for name in (FALLBACK, "recurrent") for x in examined(name)]
  assert judgement.judge(found, (KERNEL._replace(implementation="recurrent"),)) == ()
  monkeypatch.setattr(judgement, "FALLBACK", "recurrent")
  (choice,) = judgement.judge(found, (KERNEL._replace(implementation=FALLBACK),))
  assert choice.widths == (16, 64)
  lines = judgement.table(found).splitlines()
  assert len(lines) == 3 and lines[1].startswith(FALLBACK) and lines[1].endswith("x")  # of the recurrence's time


def _planted(directory: Path, *changes: tuple[str, str, str]) -> Path:
  """A copy of the package with faults: (file, what stands there, what is to)."""
  package = shutil.copytree(ROOT / "kernels_pallas", directory / "kernels_pallas")
  for name, old, new in changes:
    text = (package / name).read_text()
    assert old in text, (name, old)
    (package / name).write_text(text.replace(old, new))
  return directory


WRONG_DECAY = ("triton.py", "* math.log2(math.e)", "* math.log2(math.e) * 1.02")
# What a chunk leaves is forgotten from the second one on: rows of a chunk or two are right.
WRONG_LOOP = ("triton.py", "carry * state + dot", "jnp.where(i == 0, carry, 0.0) * state + dot")
CRASHES = ("api.py", '"tpu": mosaic_tpu.attend', '"tpu": lambda *_, **__: __import__("os").abort()')


def _examined(directory: Path, *arguments: str) -> list[dict]:
  command = [sys.executable, "-m", "kernels_pallas.checkup", *arguments]
  ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
  return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("fault", [WRONG_DECAY, WRONG_LOOP])
def test_a_wrong_kernel_is_found(tmp_path, fault):
  about, begun, checked, long, _ = _examined(_planted(tmp_path, fault), "triton", "1")
  assert about["platform"] == "cpu" and begun == {"implementation": "triton", "dtype": "float32", "width": 64}
  everything = "output, state, d_q, d_k, d_v, d_initial_state wrong: off by up to 0.02 "
  assert judgement.wrong(checked).startswith(everything if fault is WRONG_DECAY else "")
  assert judgement.wrong(long).startswith("output, d_q, d_k, d_v wrong at 1,024 tokens")


@pytest.mark.slow
def test_a_process_that_fails_or_hangs_is_left_behind(tmp_path, monkeypatch):
  """Of two cells the first raises, and the process ends; of another implementation all hang."""
  hangs = ("api.py", '"tpu": mosaic_tpu.attend', '"tpu": lambda *_, **__: __import__("time").sleep(1e6)')
  raises = (
    "api.py",
    '"triton": triton.attend',
    '"triton": lambda q, *a, **k: triton.attend(q, *a, **k) if q.dtype == "float32" else [][1]',
  )
  monkeypatch.chdir(_planted(tmp_path, hangs, raises))
  monkeypatch.setattr(checkup, "names_for", lambda platform: (FALLBACK, "triton", "tpu"))
  found = list(checkup.examine_apart(cell_seconds=40))[1:]
  failed = [(x["implementation"], x["dtype"], x["failed"][:16]) for x in found if "failed" in x]
  no_answer = [("tpu", dtype, "no answer for 40") for dtype in checkup.DTYPES]
  assert failed == [("triton", "bfloat16", "list index out o"), *no_answer]
  assert [x["dtype"] for x in found if x["implementation"] == "triton" and "long_errors" in x] == ["float32"]


@pytest.mark.slow
def test_doctor_finds_what_is_planted(tmp_path, monkeypatch):
  """A wrong kernel, and one that crashes its process; all else is right."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("PYTHONPATH", str(_planted(tmp_path, WRONG_DECAY, CRASHES)))
  command = [sys.executable, "-m", "supra_jax.bin.doctor", f"--output={tmp_path}/report.json"]
  ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert ran.returncode == 1 and "Something is wrong" in ran.stderr, ran.stderr
  wrong = [line.split()[:2] for line in ran.stdout.splitlines() if "WRONG" in line]
  assert wrong == [[name, dtype] for name in ("triton", "tpu") for dtype in checkup.DTYPES]
  assert ran.stdout.count("its process ended with status -6") == 2
  assert "auto: always chunked_xla" in ran.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["choices"] == [] and report["versions"].keys() == verdict.versions().keys()
  assert [path.read_text() for path in (tmp_path / "cache/supra_jax/verdicts").iterdir()] == [
    json.dumps(report, indent=1) + "\n"
  ]


def test_names_are_those_of_the_platform():
  assert checkup.names_for("cuda") == (FALLBACK, "mosaic_gpu", "triton")
  assert checkup.names_for("tpu") == (FALLBACK, "tpu")
  assert checkup.names_for("cpu")[0] == FALLBACK and len(checkup.names_for("cpu")) == 6
  assert checkup.cells_of("triton", "cuda") == [
    *(("bfloat16", w) for w in WIDTHS),
    *(("float32", w) for w in WIDTHS[:2]),
  ]
  assert checkup.cells_of("triton", "cpu") == [("bfloat16", 64), ("float32", 64)]
