"""Figure 1 of the paper: accuracy against training tokens, left and right, and between them the cost of decoding.

Left and right are columns of table 1. The centre is measured here (`decoding_cost`), for an RNN beside a transformer
with its key/value cache.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from supra_jax.core.files import local
from supra_jax.core.plain_json import check_output
from supra_jax.evaluation import paper
from supra_jax.experiments.decoding_cost import LENGTHS, measure
from supra_jax.experiments.paper_models import MODELS
from supra_jax.experiments.pictures import Accuracy, Kind, plot_figure_1

__all__ = ["LENGTHS", "accuracies", "figure_1", "measure", "plot", "table"]

_RNNS = ("Mamba", "RWKV", "RetNet")  # how the names of the paper's other linear models begin


def figure_1(
  models: Mapping[str, str | os.PathLike[str]],
  output: str | os.PathLike[str],
  *,
  lengths: Sequence[int] = LENGTHS,
  table_1: str | os.PathLike[str] | None = None,
  **how: Any,
) -> str:
  """Measures the centre of the figure and draws all of it.

  Args:
    models: name -> model directory.
    output: JSON file of what was measured; the picture is written beside it.
    lengths: numbers of tokens that were read.
    table_1: JSON file that `tables_1_2.table_1` wrote, whose models are drawn beside the paper's. None: the paper's.
    **how: further arguments of `measure`.

  Returns:
    What was measured, as a table in Markdown.

  Raises:
    FileNotFoundError, ValueError: as `measure`; or `table_1` is not there, or is something else.
  """
  check_output(output, (".png",))
  if table_1 is not None:
    accuracies("HellaSwag", table_1)  # what is wrong with the file is said before the long work
  rows = measure(models, lengths, output=output, **how)
  plot(rows, local(output).with_suffix(".png"), table_1=table_1)
  return table(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns what `measure` found as a table in Markdown: a row a length, and for each model bytes and milliseconds."""
  models = list(dict.fromkeys(row["model"] for row in rows))
  found = {(row["model"], row["tokens"]): row for row in rows}
  head = ["tokens read", *(f"{name}, {unit}" for name in models for unit in ("bytes", "ms a token"))]
  lines = [head, ["---:"] * len(head)]
  for tokens in sorted({row["tokens"] for row in rows}):
    line = [f"{tokens:,}"]
    for name in models:
      row = found.get((name, tokens), {})
      known = "seconds" in row
      line += [f"{row['state_bytes']:,}", f"{1e3 * row['seconds']:.1f}"] if known else [row.get("skipped", ""), ""]
    lines.append(line)
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracies(column: str, table_1: str | os.PathLike[str] | None = None) -> list[Accuracy]:
  """Returns a column of table 1: the paper's rows, then those of a JSON file that `tables_1_2.table_1` wrote.

  A model of that file whose name is a `PaperModel.label` has this model's tokens, any other has none.

  Args:
    column: a key of `paper.COLUMNS`, or "Average".
    table_1: the file; None: the paper's rows alone.

  Raises:
    FileNotFoundError: the file is not there.
    ValueError: the file is something else, or there is no such column.
  """
  if column not in (*paper.COLUMNS, "Average"):
    raise ValueError(f"column={column!r}: wanted one of {', '.join(paper.COLUMNS)}, Average.")

  def percent_of(scores: Sequence[float | None]) -> float | None:
    return dict(zip([*paper.COLUMNS, "Average"], [*scores, paper.average(scores)], strict=True))[column]

  found = []
  for name, size, tokens, scores in paper.TABLE_1:
    percent = percent_of(scores)
    if percent is not None:
      kind: Kind = "supra" if "SUPRA" in name else "rnn" if name.startswith(_RNNS) else "transformer"
      found.append(Accuracy(f"{name} {size}", _billions(tokens), percent, kind))
  if table_1 is None:
    return found
  known = {model.label: model.table_1 for model in MODELS if model.table_1 is not None}
  try:
    models = json.loads(local(table_1).read_text())["models"]
    percents = {name: model["results"]["percent"] for name, model in models.items()}
    ours = {name: [percent[one] for one in paper.COLUMNS] for name, percent in percents.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{table_1}: wanted the JSON of table 1.") from error
  for name, measured in ours.items():
    percent = percent_of(measured)
    if percent is not None:
      found.append(Accuracy(name, _billions(known[name][2]) if name in known else None, percent, "here"))
  return found


def _billions(tokens: str) -> float:
  """Returns the billions of tokens of a cell of table 1, `8000(?)`, `+20`: of uptraining those of uptraining alone."""
  return float("".join(re.findall(r"\d", tokens)))


def plot(
  rows: Sequence[Mapping[str, Any]],
  output_png: str | os.PathLike[str],
  *,
  table_1: str | os.PathLike[str] | None = None,
  columns: tuple[str, str] = ("HellaSwag", "MMLU"),
) -> None:
  """Draws the figure.

  Args:
    rows: what `measure` returned.
    output_png: the file to write.
    table_1: as in `accuracies`.
    columns: columns of table 1 on the left and on the right; the paper has HellaSwag and MMLU.

  Raises:
    FileNotFoundError, ValueError: as `accuracies`.
  """
  left, right = ((column, accuracies(column, table_1)) for column in columns)
  plot_figure_1(left, rows, right, output_png)
