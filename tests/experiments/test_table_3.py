"""Table 3 at a size that trains in seconds: ten steps of every row."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import runs
from supra_jax.evaluation.paper import TABLE_3
from supra_jax.experiments import full_scale, table_3
from supra_jax.experiments.small_scale import Size, repeated_spans, small_scale
from supra_jax.experiments.table_3 import best_rate, order, reproduce
from supra_jax.experiments.table_3_rows import ROWS, Cell, cells
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Random
from supra_jax.storage.model_directory import load_model, load_model_without_params
from supra_jax.training.metrics import read_metrics
from tests.support import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, TOKENS_A_STEP = 10, 2 * 32
TOKENS = dict.fromkeys(("teacher", "heads", "scratch", "uptrained"), STEPS * TOKENS_A_STEP)
SIZE = Size("tiny", vocab_size=320, length=32, rows=2, repeated=40, heldout_every=6, heldout_rows=4, **TOKENS)
ONE = {"rates": {"scratch": (1e-3,), "uptrained": (1e-3,)}, "seeds": {"scratch": (0,), "uptrained": (0,)}}


@pytest.fixture(scope="module")
def scale(text, tmp_path_factory):
  return small_scale(str(text), tmp_path_factory.mktemp("small"), SIZE)


@pytest.fixture(scope="module")
def found(scale):
  return reproduce(scale, list(ROWS), **ONE, say=lambda line: None)


def test_every_row_trains(scale, found):
  assert found.not_reached == [] and list(found.rows) == list(ROWS)
  for row, made in found.rows.items():
    (run,) = made.runs
    steps = 2 * STEPS if ROWS[row].trains == "new_then_all" else STEPS
    assert run.points[0][0] == 0 and run.points[-1][0] == steps * TOKENS_A_STEP
    losses = [loss for _, loss in run.points]
    # The paper's form of T2R divides by 1e-6 where RoPE makes a sum of weights negative, and may get worse at first.
    listing = ROWS[row].mixer.mixer == "t2r" and ROWS[row].mixer.rope
    assert np.isfinite(losses).all() and run.cpu_seconds > 0
    assert losses[-1] < losses[0] or listing, row
    model = load_model_without_params(scale.workdir / "runs" / f"{row}-0" / "run" / "checkpoint")
    assert model.config.layers == (ROWS[row].mixer,) * 2 * ROWS[row].depth
  assert found.rows["mamba"].runs[0].points[0][1] != found.rows["supra_scratch"].runs[0].points[0][1]


def test_what_trains(scale, found):
  """Only new weights; and new ones first."""
  start = load_model(scale.teacher()).params
  trained = {
    row: load_model(scale.workdir / "runs" / f"{row}-0/run/checkpoint").params for row in ("new_weights", "supra")
  }
  for name in ("q_proj", "o_proj"):
    kept, moved = (trained[row]["layers_0"]["self_attn"][name]["kernel"] for row in ("new_weights", "supra"))
    before = start["layers_0"]["self_attn"][name]["kernel"]
    np.testing.assert_array_equal(kept, before)
    assert np.abs(moved - before).max() > 1e-4
  recipe = json.loads((scale.workdir / "runs/two_steps-0/run/train_config.json").read_text())
  assert recipe["new_weights_steps"] == STEPS and recipe["num_steps"] == 2 * STEPS
  weak = load_model_without_params(scale.workdir / "runs/supra_weak-0/run/checkpoint").source
  assert "transformer-0" in json.dumps(weak)


def test_the_table(scale, found, text, tmp_path):
  how = {**ONE, "say": lambda line: None}
  said = table_3.report(str(text), scale.workdir, SIZE, list(ROWS), tmp_path / "table.json", **how)
  assert all(row.title in said for row in ROWS.values()) and "| 57.0, 62.4, 31.6 |" in said
  assert (tmp_path / "table.png").stat().st_size > 10_000
  stored = json.loads((tmp_path / "table.json").read_text())
  # Made before: read, and not made again.
  assert stored["rows"] == json.loads(json.dumps(dataclasses.asdict(found)["rows"]))
  assert {"commit", "device_kind", "command"} <= stored["made_by"].keys() and stored["size"]["length"] == 32
  every = stored["teacher_cpu_seconds"] + sum(said["runs"][0]["cpu_seconds"] for said in stored["rows"].values())
  assert stored["teacher_cpu_seconds"] > 0 and f"{every / 3600:.2f} CPU hours in all, the teacher's among them." in said


def test_order():
  pairs, other = order({"supra": 3.0, "t2r": 2.0, "mamba": 2.5, "supra_no_rope": 1.0})
  assert pairs == 3  # the last one is not in the paper
  supra, t2r, mamba = (ROWS[row].title for row in ("supra", "t2r", "mamba"))
  assert other == [(t2r, supra), (mamba, supra), (t2r, mamba)]  # here T2R is best, in the paper SUPRA, then Mamba
  assert all(row.paper in TABLE_3 for row in ROWS.values() if row.paper)


def test_cells_are_in_order_of_worth():
  made = list(cells(["supra", "mamba"], {"uptrained": (1, 2), "scratch": (1,)}, {"uptrained": (0, 1), "scratch": (0,)}))
  wanted = [Cell("supra", 0, 1), Cell("supra", 0, 2), Cell("supra", 0), Cell("mamba", 0), Cell("supra", 1)]
  assert made == wanted
  assert len({cell.name for cell in made}) == 5
  assert best_rate({1e-3: 3.0, 3e-3: 2.0, 1e-2: float("nan")}) == 3e-3


def test_the_rate_is_the_best_in_a_tenth(scale, tmp_path):
  quick = dataclasses.replace(scale, workdir=tmp_path)
  told = {"rates": {"uptrained": (1e-9, 1e-2)}, "seeds": {"uptrained": (0, 1)}, "say": lambda line: None}
  given = dataclasses.replace(quick, given=scale.teacher())
  made = reproduce(given, ["supra"], **told).rows["supra"]
  tried = {run.learning_rate: run.nll for run in made.tried}
  assert tried.keys() == {1e-9, 1e-2} and tried[1e-2] < tried[1e-9]
  assert [run.learning_rate for run in made.runs] == [1e-2, 1e-2]
  first, second = (run.points for run in made.runs)
  assert first != second
  assert len(read_metrics(tmp_path / "runs/supra-rate-0.01/run/metrics.jsonl")) < STEPS
  # The same call with no hours left reads what is there; another row is not reached.
  again = reproduce(given, ["supra", "t2r"], cpu_hours=0, **told)
  assert again.rows["supra"] == made
  assert again.not_reached == ["t2r-rate-1e-09", "t2r-rate-0.01", "t2r-0", "t2r-1"]


def test_what_is_wrong(scale, tmp_path):
  with pytest.raises(ValueError, match="rows=nope: wanted some of supra, t2r"):
    reproduce(scale, ["nope"])
  with pytest.raises(ValueError, match="mamba: a given teacher has uptrained rows alone"):
    reproduce(dataclasses.replace(scale, given=scale.workdir), ["supra", "mamba"])
  with pytest.raises(ValueError, match="rows=supra,supra: wanted each row once"):
    reproduce(scale, ["supra", "supra"])
  with pytest.raises(ValueError, match="supra_weak begins from the row transformer: name that before it"):
    reproduce(dataclasses.replace(scale, workdir=tmp_path), ["supra_weak", "transformer"])
  with pytest.raises(ValueError, match="rows=nope: wanted some of"):
    full_scale.plan(["nope"])


def test_another_size_wants_another_directory(scale, found, text):
  """What was made at one size is not taken for what another asks for, nor what one teacher made for another's."""
  for changes, teacher in (({"uptrained": 64}, None), ({"preset": "two_cores"}, None), ({}, scale.teacher())):
    with pytest.raises(ValueError, match=r"about\.json holds results for .* take another --workdir"):
      small_scale(str(text), scale.workdir, dataclasses.replace(SIZE, **changes), teacher)
  moved = scale.workdir.with_name("moved")
  scale.workdir.rename(moved)
  try:
    assert reproduce(small_scale(str(text), moved, SIZE), ["supra"], **ONE, say=lambda line: None).not_reached == []
  finally:
    moved.rename(scale.workdir)


@pytest.mark.parametrize(
  "told, said",
  [
    ({"preset": "bar"}, "size.preset='bar': wanted one of smollm2_135m"),
    ({"rows": 0}, "size.rows=0: wanted a positive whole number"),
    ({"teacher": -5}, "size.teacher=-5: wanted a positive whole number"),
    ({"heldout_every": 1}, "size.heldout_every=1: wanted a whole number, 2 or more"),
  ],
)
def test_wrong_sizes(told, said):
  with pytest.raises(ValueError, match=said):
    Size(**told)


def test_a_damaged_result(scale, found):
  """The file is named, and what to do."""
  damaged = scale.workdir / "runs/mamba-0/result.json"
  whole = damaged.read_text()
  damaged.write_text(whole[:30])
  try:
    with pytest.raises(
      ValueError, match=r"mamba-0/result\.json is damaged\. Remove .*mamba-0, and the run is made again"
    ):
      reproduce(scale, ["mamba"], **ONE, say=lambda line: None)
  finally:
    damaged.write_text(whole)


def test_repeated_spans(text, tmp_path):
  made = list(itertools.islice(repeated_spans(str(text)), 20))
  for document in made:
    first, *_, last = document.split("\n")
    assert first == last and 20 <= len(first.split()) <= 60
  assert len(set(made)) == 20
  for document in itertools.islice(repeated_spans(str(text), period=True), 20):
    words = document.split()
    periods = [n for n in range(8, 41) if words[n:] == words[:-n]]
    assert periods and len(words) >= 300
  (short := tmp_path / "short.txt").write_text("Nothing to draw from.")
  with pytest.raises(ValueError, match="no document has 1,000 words"):
    next(repeated_spans(str(short)))


def test_all_commands_of_the_paper_s_size():
  """Each one is a program's, with flags that it has."""
  made = full_scale.plan(list(ROWS), compiled=False)
  commands = [line.split() for line in made.splitlines() if line.startswith("python -m")]
  assert {command[2] for command in commands} == {
    f"supra_jax.bin.{name}" for name in ("init", "prepare_data", "linearize", "train", "evaluate")
  }
  assert "t2r:decay=none,rope=false,feature_map=per_head" in made and "num_layers=48" in made


def test_what_a_device_has_to_hold():
  """In a process of its own, which pretends to have the devices."""
  command = [sys.executable, "-m", "supra_jax.bin.reproduce", "--table=3", "--scale=full", "--rows=supra,new_weights"]
  ran = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True)
  held = re.findall(r"# ([\d,]+) parameters, ([\d,]+) train; a device of 8 holds ([\d.]+) GB", ran.stdout)
  (every, trained, peak), (again, new, less) = ([float(x.replace(",", "")) for x in row] for row in held)
  assert every == again == trained > new > 50e6 and 10 < less < peak < 40


def test_the_program(text, tmp_path):
  size = ",".join(f"{name}={value}" for name, value in dataclasses.asdict(SIZE).items())
  flags = ["--table=3", f"--input={text}", f"--workdir={tmp_path / 'w'}", "--rows=supra", f"--size={size}"]
  flags.append("--cpu_hours=0")
  ran = programs.run("supra_jax.bin.reproduce", *flags)
  assert ran.returncode == 0, ran.stderr
  assert "Not reached in the hours given: supra-rate-0.0003" in ran.stdout
  assert programs.run("supra_jax.bin.reproduce", "--table=3").returncode != 0


@pytest.mark.parametrize(
  "flags, said",
  [
    ([], "Wanted one of --table and --figure"),
    (["--table=1", "--figure=1"], "Wanted one of --table and --figure"),
    (["--table=3"], "--table=3 trains models: it wants --input, a text, and --workdir"),
    (["--table=2", "--models=a=b"], "--table=2 wants --output too"),
    (["--figure=4", "--input=x"], "--figure=4 wants --teacher, --models, --output too"),
    (["--table=2"], "Mistral-SUPRA"),
  ],
)
def test_what_the_program_wants(flags, said):
  ran = programs.run("supra_jax.bin.reproduce", *flags)
  assert said in ran.stdout + ran.stderr and "Traceback" not in ran.stderr


def test_figures_3_and_4(scale, found, text, tmp_path):
  start = scale.workdir / "runs/supra-0/linearized"
  linearize_checkpoint(scale.teacher(), tmp_path / "before", Random())
  models = f"--models=before={tmp_path / 'before'},after={scale.workdir / 'runs/supra-0/run/checkpoint'}"
  output = tmp_path / "figures.json"
  ran = programs.run(
    "supra_jax.bin.reproduce",
    "--figure=3",
    f"--teacher={scale.teacher()}",
    models,
    f"--input={text}",
    f"--output={output}",
  )
  assert ran.returncode == 0, ran.stderr
  assert "| teacher itself | raw | 1.000 (1.000) | 0.000 (0.000) |" in ran.stdout and "| after | row |" in ran.stdout
  assert not start.exists()  # runs leave what they trained
  assert json.loads(output.read_text())["num_texts"] == 4
  assert {path.name for path in tmp_path.glob("*.png")} == {
    f"figures_{measure}_{form}.png" for measure in ("cosine", "singular") for form in ("raw", "row")
  }
