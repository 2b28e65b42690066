"""The rows of table 3 at a small scale, and their runs in order of worth."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from supra_jax.model.mixers.t2r import T2R
from supra_jax.model.registry import MixerConfig, layer

Begins = Literal["scratch", "teacher", "transformer"]
Rates = Mapping[str, Sequence[float]]
RATES: Rates = {"scratch": (1e-3, 3e-3, 1e-2), "uptrained": (3e-4, 1e-3, 3e-3)}
SEEDS: Mapping[str, Sequence[int]] = {"scratch": (0,), "uptrained": (0, 1, 2)}
RESULT_FILE = "result.json"


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
    "Linear transformer, RoPE above the sum of weights alone, RetNet's decay",
    layer("linear_transformer", rope=True, decay="retnet"),
    "scratch",
  ),
}


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


def check_rows(rows: Sequence[str], workdir: Path | None = None, *, given: bool = False) -> None:
  """Checks names of rows.

  Args:
    rows: keys of ROWS.
    workdir: directory of the runs, if they are made.
    given: whether the teacher is given.

  Raises:
    ValueError: a row is unknown or named twice; begins from scratch although the teacher is given; or begins from the
      row `transformer`, which is neither made nor named before.
  """
  if unknown := [row for row in rows if row not in ROWS]:
    raise ValueError(f"rows={','.join(unknown)}: wanted some of {', '.join(ROWS)}.")
  if len(set(rows)) < len(rows):
    raise ValueError(f"rows={','.join(rows)}: wanted each row once.")
  if given and (scratch := [row for row in rows if ROWS[row].begins != "teacher"]):
    raise ValueError(f"{', '.join(scratch)}: a given teacher has uptrained rows alone.")
  if workdir is None or (workdir / "runs" / Cell("transformer", 0).name / RESULT_FILE).exists():
    return
  for number, row in enumerate(rows):
    if ROWS[row].begins == "transformer" and "transformer" not in rows[:number]:
      raise ValueError(f"{row} begins from the row transformer: name that before it, as in --rows=transformer,{row}.")
