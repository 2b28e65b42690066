"""The study of what RNNs remember, small: its report is `recall.report`'s, and a cell is measured once."""

import json

import pytest

import supra_jax
from supra_jax.data.text import read_documents
from supra_jax.evaluation import recall
from supra_jax.experiments import tiny
from tests.support import programs

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

LENGTH, DISTANCES = 96, [80, 120]


def test_cells_run_once_and_give_the_report_of_the_library(tmp_path):
  teacher, workdir, output = tmp_path / "teacher", tmp_path / "study", tmp_path / "recall.json"
  tiny.write_checkpoint(teacher, "softmax")

  def study(*more):
    how = [f"--length={LENGTH}", "--documents=3", f"--distances={DISTANCES[0]},{DISTANCES[1]}", "--kind=repeat"]
    names = ["--model=window of 64", "--model=transformer", "--items=2", f"--output={output}"]
    ran = programs.run("benchmarks.recall", f"--teacher={teacher}", f"--workdir={workdir}", *how, *names, *more)
    return ran, [line.partition(":")[0] for line in ran.stdout.splitlines() if line.endswith(" s")]

  _, measured = study()
  cells = {path.stem for path in (workdir / "cells").iterdir()}
  assert set(measured) == cells and len(measured) == len(cells)
  # Losses come first, then parts, then one distance after the other.
  order = [
    next(i for i, start in enumerate(("losses", "parts", "repeat-80", "repeat-120")) if name.startswith(start))
    for name in measured
  ]
  assert order == sorted(order) and set(order) == {0, 1, 2, 3}
  report = json.loads(output.read_text())["reports"]["window of 64"]
  assert output.with_suffix(".png").stat().st_size > 5000

  # Killed before its last cells: they alone are measured, and all is as before.
  for name in measured[-2:]:
    (workdir / "cells" / f"{name}.json").unlink()
  again, measured_again = study()
  assert measured_again == measured[-2:]
  assert json.loads(output.read_text())["reports"]["window of 64"] == report
  assert "# window of 64" in again.stdout and "Recall of repeat" in again.stdout

  lm, original = supra_jax.load(workdir / "window_of_64"), supra_jax.load(teacher)
  documents = map(lm.tokenizer.encode, read_documents("pydoc:topics"))
  how = {"length": LENGTH, "max_documents": 3, "distances": DISTANCES, "kinds": ["repeat"], "items": 2}
  want = recall.report(lm, original, documents, **how)
  assert report["recall"] == json.loads(json.dumps(want["recall"]))
  assert report["models"] == json.loads(json.dumps(want["models"]))
  for name, loss in want["loss"]["all"]["loss"].items():
    assert report["loss"]["all"]["loss"][name] == pytest.approx(loss, abs=1e-5)
  assert report["parts"]["linear"]["another"]["added"] == pytest.approx(want["parts"]["linear"]["another"]["added"])

  refused, _ = study("--length=100")
  assert refused.returncode == 1 and "another recipe" in refused.stderr
