"""Table 3 of the paper at a small scale: SUPRA beside T2R, the linear transformer, Mamba and the transformer.

Every row of `table_3_rows` reads the same text in the same order. A row's learning rate is the best of three in a tenth
of its length. Runs are made in order of worth: the first seed of all rows, then further seeds of the uptrained rows. A
killed call resumes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from supra_jax.core.files import local
from supra_jax.core.plain_json import check_output, write_json
from supra_jax.core.run_record import run_record
from supra_jax.evaluation.paper import TABLE_3
from supra_jax.experiments.small_scale import TIME_FILE, Size, SmallScale, processor_time, small_scale
from supra_jax.experiments.table_3_rows import RATES, RESULT_FILE, ROWS, SEEDS, Cell, Rates, cells, check_rows
from supra_jax.inference.lm import load
from supra_jax.linearization.linearize import linearize_checkpoint
from supra_jax.linearization.starts import Random
from supra_jax.model.registry import new_parameters
from supra_jax.training.config import TrainConfig
from supra_jax.training.loop import train
from supra_jax.training.metrics import read_metrics
from supra_jax.training.pictures import plot_curves
from supra_jax.training.setup import heldout_nll
from supra_jax.training.workdir import METRICS_FILE


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
    """Held-out loss at the end."""
    return self.points[-1][1]


@dataclasses.dataclass(frozen=True)
class Runs:
  """The runs of a row: those of the rates that were tried, and those of its seeds."""

  tried: list[Result] = dataclasses.field(default_factory=list)
  runs: list[Result] = dataclasses.field(default_factory=list)

  @property
  def nll(self) -> float:
    """Held-out loss at the end, mean over seeds."""
    return statistics.fmean(run.nll for run in self.runs)

  @property
  def cpu_seconds(self) -> float:
    return sum(run.cpu_seconds for run in [*self.tried, *self.runs])


@dataclasses.dataclass(frozen=True)
class Found:
  """What `reproduce` found; JSON as `dataclasses.asdict` has it.

  Attributes:
    teacher_nll: held-out loss of the teacher.
    teacher_cpu_seconds: as `SmallScale.teacher_seconds`.
    rows: key of ROWS -> its runs.
    not_reached: names of the cells that were not made.
  """

  teacher_nll: float
  teacher_cpu_seconds: float | None
  rows: Mapping[str, Runs]
  not_reached: Sequence[str]

  @property
  def made(self) -> dict[str, Runs]:
    """The rows that have a run of a seed."""
    return {row: runs for row, runs in self.rows.items() if runs.runs}


def reproduce(
  scale: SmallScale,
  rows: Sequence[str],
  *,
  cpu_hours: float = 24.0,
  rates: Rates = RATES,
  seeds: Mapping[str, Sequence[int]] = SEEDS,
  say: Callable[[str], None] = print,
) -> Found:
  """Makes the runs of some rows that are not made yet, until they have taken `cpu_hours`.

  Args:
    scale: text, tokenizer, teacher and lengths.
    rows: keys of ROWS.
    cpu_hours: hours of processor time of all runs in the directory together, those of earlier calls and the teacher's
      included, as far as they are known; no run begins after them.
    rates, seeds: as for `cells`.
    say: called with each line of progress.

  Raises:
    ValueError: as `check_rows`, or a result of an earlier call is damaged.
    core.preemption.Preempted: a signal ended a run after its state was saved.
  """
  check_rows(rows, scale.workdir, given=scale.given is not None)
  teacher = scale.teacher()
  lm = load(teacher)
  rows_a_batch, most = scale.size.rows, scale.size.heldout_rows
  teacher_nll = heldout_nll(lm.model, lm.params, scale.data.heldout, batch_size=rows_a_batch, max_rows=most)
  del lm
  say(f"Teacher: held-out loss {teacher_nll:.4f} nats a token.")
  made = {row: Runs() for row in rows}
  seconds, read, left, everything = 0.0, 0, [], list(cells(rows, rates, seeds))
  for number, cell in enumerate(everything, 1):
    if not (_directory(scale, cell) / RESULT_FILE).exists() and _spent(scale) >= cpu_hours * 3600:
      left.append(cell.name)
      continue
    rate = cell.rate
    if rate is None:
      tried = {run.learning_rate: run.nll for run in made[cell.row].tried}
      rate = best_rate(tried or dict.fromkeys(rates[ROWS[cell.row].kind], 0.0))
    result = one_run(scale, teacher, cell, rate)
    seconds, read = seconds + result.cpu_seconds, read + result.points[-1][0]
    (made[cell.row].runs if cell.rate is None else made[cell.row].tried).append(result)
    further = sum(_tokens(scale, other) for other in everything[number:]) * seconds / read / 3600
    say(
      f"{number} of {len(everything)} runs, {seconds / 3600:.2f} CPU hours, about {further:.2f} left: {cell.name}, "
      f"rate {rate:g}: {result.nll:.4f}"
    )
  return Found(teacher_nll, scale.teacher_seconds(), made, left)


def _spent(scale: SmallScale) -> float:
  """Returns the processor time of all runs in the directory, seconds, as far as it is known."""
  times = [json.loads(file.read_text()) for file in (scale.workdir / "runs").glob(f"*/{TIME_FILE}")]
  return sum(times) + (scale.teacher_seconds() or 0.0)


def best_rate(rates: Mapping[float, float]) -> float:
  """Returns the rate with the lowest loss, of {rate: loss}; a loss that is not finite is the highest."""
  return min(rates, key=lambda rate: (rates[rate] != rates[rate], rates[rate]))


def one_run(scale: SmallScale, teacher: Path, cell: Cell, rate: float) -> Result:
  """Makes a run, unless an earlier call did, and keeps its result in `runs/CELL/result.json`."""
  directory = _directory(scale, cell)
  done, times = directory / RESULT_FILE, directory / TIME_FILE
  if done.exists():
    try:
      stored = json.loads(done.read_text())
      points = tuple((tokens, math.nan if nll is None else nll) for tokens, nll in stored["points"])
      return Result(**stored | {"points": points})
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f"{done} is damaged. Remove {directory}, and the run is made again.") from error
  with processor_time(times):
    try:
      train(recipe(scale, teacher, cell, rate), directory / "run")
    finally:
      jax.clear_caches()  # what a run compiled is no use to the next, and a hundred runs would fill the memory
  records = read_metrics(directory / "run" / METRICS_FILE)
  points = tuple((record["tokens"], record["heldout_nll"]) for record in records if "heldout_nll" in record)
  result = Result(rate, cell.seed, json.loads(times.read_text()), points)
  write_json(done, dataclasses.asdict(result))
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


def report(
  input: str,
  workdir: Path,
  size: Size,
  rows: Sequence[str],
  output: str | os.PathLike[str],
  *,
  teacher: Path | None = None,
  **how: Any,
) -> str:
  """Makes the runs of some rows (`small_scale`, `reproduce`), and returns a text of the table.

  Writes `output`, JSON of all that was found, how, and on what; and a plot of held-out loss against tokens beside it.

  Raises:
    ValueError: as `check_rows`, `check_output`, `small_scale` and `reproduce`, of which the first two come first.
  """
  check_output(output, (".png",))
  check_rows(rows, workdir, given=teacher is not None)
  found = reproduce(small_scale(input, workdir, size, teacher), rows, **how)
  pairs, other = order({row: made.nll for row, made in found.made.items()})
  lines = [table(found), f"\nOf {pairs} pairs of rows, {pairs - len(other)} are in the paper's order."]
  lines += [f"Here {ours} is better than {theirs}; in the paper it is not." for ours, theirs in other]
  if found.not_reached:
    lines.append(f"Not reached in the hours given: {', '.join(found.not_reached)}.")
  about = {"table": 3, "size": dataclasses.asdict(size), "made_by": run_record()}
  write_json(output, about | dataclasses.asdict(found))
  if drawn := curves(found):
    plot_curves(drawn, local(output).with_suffix(".png"), teacher_nll=found.teacher_nll)
  return "\n".join(lines)


def table(found: Found) -> str:
  """Returns the table of what `reproduce` found in Markdown, with the paper's numbers beside, best rows first.

  Hours are those of all seeds of a row and of the rates that were tried.
  """

  def line(title: str, tokens: str, loss: str, rate: str, seconds: float | None, paper: str) -> str:
    numbers = ", ".join(map(str, TABLE_3.get(paper, ())))
    return f"| {title} | {tokens} | {loss} | {rate} | {_hours(seconds)} | {numbers} |"

  lines = [
    "| | tokens | held-out loss, nats a token | rate | CPU hours | paper: HellaSwag, ARC-E, ARC-C |",
    "| --- | --- | --- | --- | --- | --- |",
    line("Teacher, a transformer", "", f"{found.teacher_nll:.3f}", "", found.teacher_cpu_seconds, "Transformer (1.6T)"),
  ]
  for row, made in sorted(found.made.items(), key=lambda of: of[1].nll):
    losses = [run.nll for run in made.runs]
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    tokens, rate = f"{made.runs[0].points[-1][0]:,}", f"{made.runs[0].learning_rate:g}"
    lines.append(line(ROWS[row].title, tokens, f"{made.nll:.3f}{spread}", rate, made.cpu_seconds, ROWS[row].paper))
  every = sum(made.cpu_seconds for made in found.rows.values()) + (found.teacher_cpu_seconds or 0.0)
  whose = "without the teacher's" if found.teacher_cpu_seconds is None else "the teacher's among them"
  return "\n".join([*lines, f"\n{_hours(every)} CPU hours in all, {whose}."])


def _hours(seconds: float | None) -> str:
  return "not known" if seconds is None else f"{seconds / 3600:.2f}"


def order(made: Mapping[str, float]) -> tuple[int, list[tuple[str, str]]]:
  """Compares an order of rows with the paper's, where a row's mean of three tasks is its place.

  Args:
    made: key of ROWS -> held-out loss; rows that the paper does not have are left out.

  Returns:
    (number of pairs of rows that both have, those in which `made` has the other one first, as titles, that which is
    better here first).
  """
  pairs = list(itertools.combinations((row for row in made if ROWS[row].paper), 2))
  other = []
  for pair in pairs:
    ours, papers = min(pair, key=made.__getitem__), max(pair, key=lambda row: sum(TABLE_3[ROWS[row].paper]))
    if ours != papers:
      other.append((ROWS[ours].title, ROWS[papers].title))
  return len(pairs), other


def curves(found: Found) -> dict[str, list[Sequence[tuple[int, float]]]]:
  """Returns {title: points of each run} of the rows that have the paper's names, for `plot_curves`."""
  return {ROWS[row].title: [run.points for run in made.runs] for row, made in found.made.items() if ROWS[row].paper}
