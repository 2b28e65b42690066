"""Figures 3 and 4 of the paper: how similar the attention of linearised models is to their teacher's, head by head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from supra_jax.analysis.pictures import plot_heads
from supra_jax.analysis.similarity import FORMS, MEASURES, Similarity, compare
from supra_jax.core.files import local
from supra_jax.core.plain_json import check_output, write_json
from supra_jax.core.run_record import run_record
from supra_jax.data.text import documents_in_turns
from supra_jax.inference.lm import load


def report(
  teacher: str, models: Mapping[str, str], input: str, output: str | Path, *, texts: int = 4, length: int = 256
) -> str:
  """Compares models with their teacher, and returns a table of means and medians over heads.

  Writes `output`, JSON of all heads, and beside it heat maps of each measure and form, as `OUTPUT_cosine_raw.png`: the
  models, and the teacher on another text as a control.

  Args:
    teacher: model directory of the transformer.
    models: name -> model directory, e.g. before and after uptraining.
    input: text, as `prepare_data` takes it.
    output: JSON file to write.
    texts: number of texts, each the first tokens of a document of its own.
    length: tokens of a text. Time grows with its cube.

  Raises:
    ValueError: too few documents have so many tokens, the teacher has no tokenizer, or as `similarity.compare` and
      `check_output`.
    FileNotFoundError: a model directory or the text is not there.
  """
  check_output(output, (".png",))
  theirs = load(teacher)
  if theirs.tokenizer is None:
    raise ValueError(f"{teacher} has no tokenizer, which the text is read with.")
  rows: list[list[int]] = []
  for document in documents_in_turns(input):
    tokens = theirs.tokenizer.encode(document)[:length]
    if len(tokens) == length:
      rows.append(tokens)
    if len(rows) == texts:
      break
  else:
    raise ValueError(
      f"{input}: {len(rows)} of its documents have {length} tokens or more, wanted {texts} such: give longer ones."
    )
  found = compare(theirs, {name: load(path) for name, path in models.items()}, np.array(rows), progress=True)
  about = {"figures": [3, 4], "models": dict(models), "teacher": teacher, "input": input, "made_by": run_record()}
  write_json(output, about | found.plain())
  file = local(output)
  for measure in MEASURES:
    for form in FORMS:
      picture = file.with_name(f"{file.stem}_{measure}_{form}.png")
      plot_heads(found, picture, measure=measure, form=form)
  return table(found)


def table(found: Similarity) -> str:
  """Returns means and medians over heads in Markdown, the controls last."""
  lines = [
    "| | form | cosine, mean (median) | distance of singular values, mean (median) |",
    "| --- | --- | --- | --- |",
  ]
  for name, forms in found.summary().items():
    for form, measures in forms.items():
      cells = [
        "" if of["mean"] is None else f"{of['mean']:.3f} ({of['median']:.3f})" for of in (measures[m] for m in MEASURES)
      ]
      lines.append(f"| {name} | {form} | {' | '.join(cells)} |")
  for name, layers in found.skipped.items():
    if layers:
      lines.append(f"\n{name}: layers {', '.join(map(str, layers))} have no attention matrix.")
  return "\n".join(lines)
