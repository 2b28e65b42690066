"""Tables 1 and 2 of the paper for a list of checkpoints: one that cannot be loaded does not stop the others.

Results gather in one JSON file (`gathered`). What a killed call knew of a model is kept beside the file, and the same
call goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supra_jax.core.files import local
from supra_jax.core.plain_json import check_output
from supra_jax.evaluation import long_context, paper
from supra_jax.evaluation.questions import Question, read_questions
from supra_jax.experiments.gathered import STRETCHED, gather, named, not_run_rows, parts, slug
from supra_jax.inference.lm import LM, load


def table_1(
  models: Sequence[str],
  output: str | os.PathLike[str],
  *,
  limit: int | None = None,
  samples: Mapping[str, Sequence[int]] | None = None,
  data_dir: str | os.PathLike[str] | None = None,
  trust_remote_code: bool = False,
  tasks: Sequence[str] = ("table1",),
  say: Callable[[str], None] = print,
) -> str:
  """Asks models the questions of table 1, as `bin/evaluate --tasks=table1` does.

  Args:
    models: NAME=SPEC each, or SPEC: a model directory, or `hf:NAME` for a model of transformers, a directory or a name
      on the hub.
    output: JSON file of all results; Markdown is written beside it, and a plot if there are several models. Answers of
      a model that is not done are in a directory beside it, `parts`.
    limit: number of questions of each task; None: all.
    samples: task -> indices of the questions that are asked; None: as `limit` says.
    data_dir: directory of the tasks' data sets, see `evaluation.local_data`. None: the Hugging Face hub.
    trust_remote_code: whether code that comes with a model of transformers may run.
    tasks: names of lm-eval's tasks; `table1` stands for all of the table.
    say: called with a line for each model.

  Returns:
    The table in Markdown, the paper's rows first. A model that was not run has the first line of its error.

  Raises:
    FileNotFoundError, ValueError: the tasks or their data are not there, `models` is not as `gathered.named` wants it,
      or `output` holds results of other questions.
    ModuleNotFoundError: lm-eval is not installed.
  """
  from supra_jax.evaluation import comparison  # imports lm-eval, which is an extra
  from supra_jax.evaluation.pictures import plot_scores
  from supra_jax.evaluation.tasks import load_tasks, percentages, report

  check_output(output, (".md", ".png"))
  file, asked = local(output), comparison.task_names(tasks)
  exam = comparison.Exam(asked, limit=limit, data_dir=data_dir, samples=samples)
  about = {"table": 1, "tasks": asked, "limit": limit, "samples": samples, "data_dir": data_dir}

  def ask(name: str, spec: str) -> Any:
    of_model = parts(file) / f"{slug(name)}.json"
    of_model.parent.mkdir(parents=True, exist_ok=True)
    comparison.compare({name: comparison.loader(spec, trust_remote_code)}, exam, of_model)
    results = json.loads(of_model.read_text())
    for written in (of_model, of_model.with_suffix(".md")):
      written.unlink()
    del results["configs"]  # those of lm-eval's tasks, as its release has them, with paths of this machine
    return results | {"percent": dict(zip(paper.COLUMNS, percentages(results), strict=True))}

  try:
    kept = gather(named(models), file, about, ask, check=lambda: load_tasks(exam), say=say)
  finally:
    with contextlib.suppress(OSError):  # it holds answers of a model that is not done, or it was never made
      parts(file).rmdir()
  found = {name: model["results"] for name, model in kept["models"].items()}
  table = paper.table_1({name: tuple(results["percent"].values()) for name, results in found.items()})
  lines = [table, *not_run_rows(kept, len(paper.COLUMNS) + 4)]
  text = (report(found) if found else table).replace(table, "\n".join(lines))
  file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
  if len(found) > 1:
    # Of MMLU the whole alone, without its 57 subjects.
    of_tasks = {n: {task: r["results"][task] for task in asked if task in r["results"]} for n, r in found.items()}
    plot_scores({name: {"results": results} for name, results in of_tasks.items()}, file.with_suffix(".png"))
  return text


def table_2(
  models: Sequence[str],
  output: str | os.PathLike[str],
  *,
  data: Mapping[str, str | os.PathLike[str]],
  lengths: Sequence[int] = paper.LENGTHS,
  limit: int | None = None,
  max_new_tokens: int = 256,
  split: str = "validation",
  shots: Mapping[str, int] = long_context.SHOTS,
  progress: bool = False,
  say: Callable[[str], None] = print,
) -> str:
  """Asks models the questions of table 2, as `bin/long_context` does.

  Args:
    models: NAME=SPEC each, or SPEC: a model directory, or `yarn:FACTOR:DIR`, a model directory whose rotary embedding
      YaRN stretches. A model of transformers, `hf:NAME`, is not run: `long_context` reads documents with the models of
      this package alone.
    output: JSON file of all results; Markdown is written beside it. All answers are in a directory beside it, `parts`.
    data: task, "qasper" or "narrativeqa" -> directory of its files, see `evaluation.questions`.
    lengths: most tokens of prompt and answer together.
    limit: number of questions of each task, from the first; None: all.
    max_new_tokens: most tokens of an answer.
    split: the split whose questions are asked.
    shots: task -> number of examples in the prompt, from the split train.
    progress: whether to show progress on stderr.
    say: called with a line for each model.

  Returns:
    The table of each task in Markdown, the paper's rows first. A model that was not run has the first line of its
    error.

  Raises:
    FileNotFoundError, ValueError: the data are not there, `models` is not as `gathered.named` wants it, a length leaves
      no room for a prompt, or `output` holds results of other questions.
  """
  check_output(output, (".md",))
  if not data or not lengths or min(lengths) <= max_new_tokens:
    raise ValueError(
      f"data={dict(data)}, lengths={list(lengths)}: wanted a task at least, and lengths above the {max_new_tokens} "
      "tokens that an answer may have."
    )
  asked: dict[str, tuple[list[Question], str]] = {}
  for task, directory in data.items():
    questions = read_questions(task, directory, split)
    asked[task] = questions, long_context.drawn_examples(task, directory, shots[task])
    long_context.score(task, questions[0], "")  # a package that is missing is no model's fault
  file = local(output)
  about = {"table": 2, "data": data, "lengths": lengths, "limit": limit, "max_new_tokens": max_new_tokens}
  about |= {"split": split, "shots": {task: shots[task] for task in data}}

  def ask(name: str, spec: str) -> Any:
    lm, how = _reader(spec)
    version = "-".join(str(value)[:8] for value in how.values())
    results = {}
    for task, (questions, before) in asked.items():
      settings = {**how, "dtype": str(lm.model.dtype), "model": name, "split": split, "shots": shots[task]}
      more: dict[str, Any] = {"before": before, "limit": limit or 0, "max_new_tokens": max_new_tokens}
      place = parts(file) / task / slug(name) / version
      results[task] = long_context.answer_questions(
        lm, task, questions, lengths, place, settings=settings, progress=progress, **more
      )
    return results

  kept = gather(named(models), file, about, ask, say=say)
  text = "\n".join(_task_table(task, kept, list(lengths)) for task in data)
  file.with_suffix(".md").write_text(text, encoding="utf-8")
  return text


def _reader(spec: str) -> tuple[LM, dict[str, Any]]:
  """Returns the model of a SPEC of table 2, and what tells it from others: its fingerprint, and YaRN's factor.

  Raises:
    ValueError: it is a model of transformers, or YaRN's factor is no number or one that YaRN rejects.
    FileNotFoundError: there is no such model directory.
  """
  if spec.startswith("hf:"):
    raise ValueError(f"{spec}: wanted a model directory, which convert_weights.hf_to_orbax makes.")
  stretched = re.fullmatch(f"{STRETCHED}(.+)", spec)
  if spec.startswith("yarn:") and stretched is None:
    raise ValueError(f"{spec}: wanted yarn:FACTOR:DIR, as in yarn:4.0:models/teacher.")
  lm = load(spec if stretched is None else stretched[2])
  how: dict[str, Any] = {"fingerprint": lm.checkpoint}
  if stretched is None:
    return lm, how
  return long_context.with_yarn(lm, float(stretched[1])), how | {"yarn_factor": float(stretched[1])}


def _task_table(task: str, kept: Mapping[str, Any], lengths: list[int]) -> str:
  """Returns the table of a task: that of `long_context.table`, with a row for each model."""
  every = [long_context.table(_numbers(model["results"][task])).splitlines() for model in kept["models"].values()]
  if every:
    first = every[0]
    return "\n".join(
      [*first[:-2], *(lines[-2] for lines in every), *not_run_rows(kept, len(lengths) + 1), first[-1], ""]
    )
  rows = [[long_context.TITLES[task], *map(str, lengths)], ["---"] * (len(lengths) + 1)]
  rows += [[name, *cells] for name, cells in paper.table_2(task, lengths).items()]
  return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *not_run_rows(kept, len(lengths) + 1), ""])


def _numbers(results: Mapping[str, Any]) -> dict[str, Any]:
  """Returns results of `answer_questions` as they were before JSON, which has no NaN."""
  of_length = {
    length: {name: math.nan if value is None else value for name, value in summary.items()}
    for length, summary in results["lengths"].items()
  }
  return {**results, "lengths": of_length}
