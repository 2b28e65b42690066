"""Table 3 of the paper at a small scale: SUPRA beside T2R, the linear transformer, Mamba and the transformer.

Every row reads the same text in the same order. A row's learning rate is the best of three in a tenth of its length.
Runs are made in order of worth: the first seed of all rows, then further seeds of the uptrained rows. A killed call
resumes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from supra_jax.core.plain_json import to_json
from supra_jax.core.run_record import run_record
from supra_jax.evaluation.paper import TABLE_3
from supra_jax.experiments.small_scale import SmallScale
from supra_jax.inference.lm import load
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Random
from supra_jax.model.mixers.t2r import T2R
from supra_jax.model.registry import MixerConfig, layer, new_parameters
from supra_jax.training.config import TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics
from supra_jax.training.pictures import plot_curves
from supra_jax.training.setup import heldout_nll
from supra_jax.training.workdir import METRICS_FILE

Begins = Literal["scratch", "teacher", "transformer"]
Rates = Mapping[str, Sequence[float]]
RATES: Rates = {"scratch": (1e-3, 3e-3, 1e-2), "uptrained": (3e-4, 1e-3, 3e-3)}
SEEDS: Mapping[str, Sequence[int]] = {"scratch": (0,), "uptrained": (0, 1, 2)}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table.

  Attributes:
    title: what the table calls it.
    mixer: mixer of all layers.
    begins: from `scratch`; from the `teacher`; or from the row `transformer`, a weaker teacher.
    trains: `all` weights; the `new` ones alone; or `new_then_all`, the new ones in as many steps before.
    paper: name of the row in `paper.TABLE_3`; "": the paper has none.
    depth: number of layers by that of the preset, for rows from scratch.
  """

  title: str
  mixer: MixerConfig
  begins: Begins
  trains: Literal["all", "new", "new_then_all"] = "all"
  paper: str = ""
  depth: int = 1

  @property
  def kind(self) -> str:
    """Key of RATES and SEEDS."""
    return "scratch" if self.begins == "scratch" else "uptrained"

  @property
  def passes(self) -> int:
    """How many times the tokens of its kind the row trains on."""
    return 2 if self.trains == "new_then_all" else 1


def _switched(mixer: str, says: str, **fields: Any) -> Row:
  return Row(f"{mixer.upper()}, uptrained, {says}", layer(mixer, **fields), "teacher")


# In order of worth. A layer of Mamba has no MLP, and two are as large as one of the others.
ROWS: Mapping[str, Row] = {
  "supra": Row("SUPRA, uptrained", layer("supra"), "teacher", paper="SUPRA"),
  "t2r": Row("T2R, uptrained, as in the paper's listing", layer("t2r"), "teacher", paper="T2R"),
  "transformer": Row("Transformer", layer("softmax"), "scratch", paper="Transformer (100B)"),
  "supra_scratch": Row("SUPRA, from scratch", layer("supra"), "scratch", paper="SUPRA from scratch"),
  "mamba": Row("Mamba", layer("mamba"), "scratch", paper="Mamba", depth=2),
  "supra_weak": Row("SUPRA, from the transformer above", layer("supra"), "transformer", paper="SUPRA (100B)"),
  "new_weights": Row("SUPRA, only new weights", layer("supra"), "teacher", "new", paper="only new weights"),
  "two_steps": Row("SUPRA, 2-step", layer("supra"), "teacher", "new_then_all", paper="2-step"),
  "t2r_scratch": Row("T2R, from scratch", layer("t2r"), "scratch", paper="T2R from scratch"),
  "linear_transformer": Row("Linear transformer", layer("linear_transformer"), "scratch"),
  "t2r_own": Row("T2R, uptrained, its own form", layer("t2r", **T2R), "teacher"),
  "supra_per_head": _switched("supra", "phi per head", feature_map="per_head"),
  "supra_no_rope": _switched("supra", "no RoPE", rope=False),
  "supra_no_decay": _switched("supra", "no decay", decay="none"),
  "supra_retnet": _switched("supra", "RetNet's decay", decay="retnet"),
  "t2r_no_rope": _switched("t2r", "no RoPE", rope=False),
  "t2r_epsilon": _switched("t2r", "no RoPE, normaliser + 1e-6", rope=False, normaliser="epsilon"),
  "t2r_no_decay": _switched("t2r", "no RoPE, no decay", rope=False, decay="none"),
  "linear_rope": Row(
    "Linear transformer with RoPE and RetNet's decay",
    layer("linear_transformer", rope=True, decay="retnet"),
    "scratch",
  ),
}


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run of a row came to.

  Attributes:
    learning_rate: its peak learning rate.
    seed: its seed.
    cpu_seconds: processor time of all cores, evaluations and compilation included.
    points: (tokens trained on, held-out loss in nats per token) of each evaluation.
  """

  learning_rate: float
  seed: int
  cpu_seconds: float
  points: tuple[tuple[int, float], ...]

  @property
  def nll(self) -> float:
    return self.points[-1][1]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A run to make: a row with a seed, or with a rate that is tried in a tenth of its length."""

  row: str
  seed: int
  rate: float | None = None

  @property
  def name(self) -> str:
    return f"{self.row}-{self.seed}" if self.rate is None else f"{self.row}-rate-{self.rate:g}"


def cells(rows: Sequence[str], rates: Rates, seeds: Mapping[str, Sequence[int]]) -> Iterator[Cell]:
  """Yields the runs of some rows in order of worth: for each row its rates and its first seed, then further seeds.

  Args:
    rows: keys of ROWS.
    rates: learning rates that are tried, for each kind of row; one alone is not tried.
    seeds: seeds of each kind of row, of which the first is 0.
  """
  for row in rows:
    tried = rates[ROWS[row].kind]
    yield from (Cell(row, 0, rate) for rate in tried if len(tried) > 1)
    yield Cell(row, 0)
  for number, row in itertools.product(range(1, max(map(len, seeds.values()))), rows):
    yield from (Cell(row, seed) for seed in seeds[ROWS[row].kind][number : number + 1])


def reproduce(
  scale: SmallScale,
  rows: Sequence[str],
  *,
  cpu_hours: float = 24.0,
  rates: Rates = RATES,
  seeds: Mapping[str, Sequence[int]] = SEEDS,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Makes the runs of some rows that are not made yet, until they have taken `cpu_hours`.

  Args:
    scale: text, tokenizer, teacher and lengths.
    rows: keys of ROWS.
    cpu_hours: hours of processor time of all runs together, those of earlier calls included; no run begins after them.
    rates, seeds: as for `cells`.
    say: called with each line of progress.

  Returns:
    {"teacher_nll": held-out loss of the teacher, "rows": {row: {"rates": {rate: loss}, "runs": Results as dicts}},
    "not_reached": names of the cells that were not made}.

  Raises:
    ValueError: a row is unknown, or begins from scratch although the teacher is given.
    core.preemption.Preempted: a signal ended a run after its state was saved.
  """
  if unknown := [row for row in rows if row not in ROWS]:
    raise ValueError(f"rows={','.join(unknown)}: wanted some of {', '.join(ROWS)}.")
  if scale.given is not None and (scratch := [row for row in rows if ROWS[row].begins != "teacher"]):
    raise ValueError(f"{', '.join(scratch)}: a given teacher has uptrained rows alone.")
  teacher = scale.teacher()
  lm = load(teacher)
  rows_a_batch, most = scale.size.rows, scale.size.heldout_rows
  teacher_nll = heldout_nll(lm.model, lm.params, scale.data.heldout, batch_size=rows_a_batch, max_rows=most)
  del lm
  say(f"Teacher: held-out loss {teacher_nll:.4f} nats a token.")
  found: dict[str, Any] = {row: {"rates": {}, "runs": []} for row in rows}
  spent, read, left, everything = 0.0, 0, [], list(cells(rows, rates, seeds))
  for number, cell in enumerate(everything, 1):
    done = _directory(scale, cell) / "result.json"
    if not done.exists() and spent >= cpu_hours * 3600:
      left.append(cell.name)
      continue
    tried = found[cell.row]["rates"] or dict.fromkeys(rates[ROWS[cell.row].kind], 0.0)
    rate = cell.rate if cell.rate is not None else best_rate(tried)
    result = one_run(scale, teacher, cell, rate)
    spent, read = spent + result.cpu_seconds, read + result.points[-1][0]
    if cell.rate is None:
      found[cell.row]["runs"].append(dataclasses.asdict(result))
    else:
      found[cell.row]["rates"][cell.rate] = result.nll
    further = sum(_tokens(scale, other) for other in everything[number:]) * spent / read / 3600
    say(
      f"{number} of {len(everything)} runs, {spent / 3600:.2f} CPU hours, about {further:.2f} left: {cell.name}, rate "
      f"{rate:g}: {result.nll:.4f}"
    )
  return {"teacher_nll": teacher_nll, "rows": found, "not_reached": left}


def best_rate(rates: Mapping[float, float]) -> float:
  """Returns the rate with the lowest loss, of {rate: loss}; a loss that is not finite is the highest."""
  return min(rates, key=lambda rate: (rates[rate] != rates[rate], rates[rate]))


def one_run(scale: SmallScale, teacher: Path, cell: Cell, rate: float) -> Result:
  """Makes a run, unless an earlier call did, and keeps its result in `runs/CELL/result.json`."""
  directory = _directory(scale, cell)
  done, times = directory / "result.json", directory / "cpu_seconds.json"
  if done.exists():
    stored = json.loads(done.read_text())
    return Result(**stored | {"points": tuple(map(tuple, stored["points"]))})
  directory.mkdir(parents=True, exist_ok=True)
  began, before = time.process_time(), json.loads(times.read_text()) if times.exists() else 0.0
  try:
    config = recipe(scale, teacher, cell, rate)
    train(config, directory / "run")
  finally:
    jax.clear_caches()  # what a run compiled is no use to the next, and a hundred runs would fill the memory
    times.write_text(to_json(before + time.process_time() - began))
  records = read_metrics(directory / "run" / METRICS_FILE)
  points = tuple((record["tokens"], record["heldout_nll"]) for record in records if "heldout_nll" in record)
  result = Result(rate, cell.seed, json.loads(times.read_text()), points)
  done.write_text(to_json(dataclasses.asdict(result)) + "\n")
  kept = () if cell.rate is None and cell.seed == 0 else ("run/checkpoint",)
  for name in ("linearized", "run/training", *kept):
    shutil.rmtree(directory / name, ignore_errors=True)
  return result


def recipe(scale: SmallScale, teacher: Path, cell: Cell, rate: float) -> TrainConfig:
  """Makes the model that a run starts from, unless an earlier call did, and returns the run's recipe."""
  row = ROWS[cell.row]
  if row.begins == "scratch":
    start = scale.drawn(f"{cell.row}-{cell.seed}", row.mixer, cell.seed, depth=row.depth)
  else:
    start = _directory(scale, cell) / "linearized"
    if row.begins == "transformer":
      teacher = _directory(scale, Cell("transformer", 0)) / "run" / "checkpoint"
    if not start.exists():
      linearize_checkpoint(teacher, start, Random(cell.seed), mixer=row.mixer)
  tokens = _tokens(scale, cell) // row.passes
  evaluations = 5 if cell.rate is None else 0
  config = scale.recipe(start, tokens, rate, cell.seed, evaluations=evaluations)
  if row.trains == "new":
    return dataclasses.replace(config, trainable=new_parameters([row.mixer.mixer]))
  if row.trains == "new_then_all":
    return dataclasses.replace(config, new_weights_steps=config.num_steps, num_steps=row.passes * config.num_steps)
  return config


def _tokens(scale: SmallScale, cell: Cell) -> int:
  """Returns the number of tokens that a run trains on, about."""
  row = ROWS[cell.row]
  tokens: int = getattr(scale.size, row.kind) * row.passes
  return tokens if cell.rate is None else tokens // 10


def _directory(scale: SmallScale, cell: Cell) -> Path:
  return scale.workdir / "runs" / cell.name


def report(scale: SmallScale, rows: Sequence[str], output: Path, **how: Any) -> str:
  """Makes the runs of some rows (`reproduce`), and returns a text of the table.

  Writes `output`, JSON of all that was found, how, and on what; and a plot of held-out loss against tokens beside it.
  """
  found = reproduce(scale, rows, **how)
  pairs, other = order(found)
  lines = [table(found), f"\nOf {pairs} pairs of rows, {pairs - len(other)} are in the paper's order."]
  lines += [f"Here {ours} is better than {theirs}; in the paper it is not." for ours, theirs in other]
  if found["not_reached"]:
    lines.append(f"Not reached in the hours given: {', '.join(found['not_reached'])}.")
  sizes = dataclasses.asdict(scale.size)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(to_json({"table": 3, "size": sizes, "made_by": run_record(), **found}, indent=1) + "\n")
  if drawn := curves(found):
    plot_curves(drawn, output.with_suffix(".png"), teacher_nll=found["teacher_nll"])
  return "\n".join(lines)


def table(found: Mapping[str, Any]) -> str:
  """Returns the table of what `reproduce` found in Markdown, with the paper's numbers beside, best rows first."""
  lines = [
    "| | tokens | held-out loss, nats a token | rate | CPU hours | paper: HellaSwag, ARC-E, ARC-C |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  made = {row: said["runs"] for row, said in found["rows"].items() if said["runs"]}
  paper = ", ".join(map(str, TABLE_3["Transformer (1.6T)"]))
  lines.append(f"| Teacher, a transformer | | {found['teacher_nll']:.3f} | | | {paper} |")
  for row in sorted(made, key=lambda row: mean_nll(made[row])):
    losses = [run["points"][-1][1] for run in made[row]]
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    hours = sum(run["cpu_seconds"] for run in made[row]) / 3600
    paper = ", ".join(map(str, TABLE_3.get(ROWS[row].paper, ())))
    first = made[row][0]
    lines.append(
      f"| {ROWS[row].title} | {first['points'][-1][0]:,} | {mean_nll(made[row]):.3f}{spread} | "
      f"{first['learning_rate']:g} | {hours:.2f} | {paper} |"
    )
  return "\n".join(lines)


def mean_nll(runs: Sequence[Mapping[str, Any]]) -> float:
  """Returns the held-out loss at the end, mean over seeds."""
  return statistics.fmean(run["points"][-1][1] for run in runs)


def order(found: Mapping[str, Any]) -> tuple[int, list[tuple[str, str]]]:
  """Compares the order of the rows with the paper's, where a row's mean of three tasks is its place.

  Returns:
    (number of pairs of rows that the paper and `found` both have, those in which `found` has the other one first, as
    titles, that which is better here first).
  """
  made = {row: mean_nll(said["runs"]) for row, said in found["rows"].items() if said["runs"] and ROWS[row].paper}
  pairs = list(itertools.combinations(made, 2))
  other = []
  for pair in pairs:
    ours, papers = min(pair, key=made.__getitem__), max(pair, key=lambda row: sum(TABLE_3[ROWS[row].paper]))
    if ours != papers:
      other.append((ROWS[ours].title, ROWS[papers].title))
  return len(pairs), other


def curves(found: Mapping[str, Any]) -> dict[str, list[list[tuple[int, float]]]]:
  """Returns {title: points of each run} of the rows that have the paper's names, for `plot_curves`."""
  return {
    ROWS[row].title: [[tuple(point) for point in run["points"]] for run in said["runs"]]
    for row, said in found["rows"].items()
    if said["runs"] and ROWS[row].paper
  }
