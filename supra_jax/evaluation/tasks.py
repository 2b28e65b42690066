"""Runs tasks of lm-evaluation-harness on our models and on others, and makes table 1 of their results."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from lm_eval import evaluator
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager

from supra_jax.evaluation.harness import HarnessLM
from supra_jax.evaluation.local_data import local_datasets
from supra_jax.evaluation.paper import COLUMNS, FEWSHOT, score, table_1
from supra_jax.inference.lm import LM

TABLE_1_TASKS = tuple(task for task, _ in COLUMNS.values())
# Metrics of lm-eval that are no shares, whatever their value.
_NO_SHARES = {"bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"}


@dataclasses.dataclass(frozen=True)
class Exam:
  """What models are asked.

  Attributes:
    tasks: names of lm-eval's tasks and groups.
    fewshot: examples before a question; None: as the paper, 5 for MMLU and none for others.
    limit: number of questions of each task; None: all.
    data_dir: directory of the data sets, see `local_data`; None: the Hugging Face hub, or what was loaded from there.
    chat: whether prompts are rendered by the model's chat template.
    log_samples: whether the results have every question with its log-likelihoods.
    samples: task -> indices of the questions that are asked; of tasks that are not among them, and with None, all are.
    seed: of the draws of examples.
  """

  tasks: Sequence[str] = TABLE_1_TASKS
  fewshot: int | None = None
  limit: int | None = None
  data_dir: str | os.PathLike[str] | None = None
  chat: bool = False
  log_samples: bool = False
  samples: Mapping[str, Sequence[int]] | None = None
  seed: int = 1234


def load_tasks(exam: Exam) -> Any:
  """Returns the tasks, with their data, as `TaskManager.load` returns them.

  Raises:
    FileNotFoundError: `data_dir` lacks a data set.
    ValueError: lm-eval has no such task, a data set lacks what is asked, or there are both `limit` and `samples`.
  """
  if exam.limit is not None and exam.samples is not None:
    raise ValueError("Both limit and samples say which questions are asked: give one.")
  datasets.disable_progress_bars()
  manager = _manager()
  names = manager.match_tasks(list(exam.tasks))
  if missing := [task for task in exam.tasks if task not in names and not manager.match_tasks([task])]:
    raise ValueError(
      f"lm-eval has no task {', '.join(map(repr, missing))}; `python -m supra_jax.bin.lm_eval ls tasks` lists all."
    )
  with local_datasets(exam.data_dir) if exam.data_dir else contextlib.nullcontext():
    loaded = manager.load(names)
  counts = {}
  for name, task in loaded["tasks"].items():
    if task.get_config("num_fewshot") != 0:  # lm-eval itself never changes tasks that have 0 in their config
      task.set_config(key="num_fewshot", value=_fewshot(exam, name, loaded.get("groups", {})))
    task.set_fewshot_seed(seed=exam.seed)
    counts[name] = len(task.eval_docs)  # lm-eval prepares all questions each time they are asked for
    if not counts[name]:
      raise ValueError(f"{name}: {exam.data_dir} has no question of the split that is asked.")
    wanted = task.get_config("num_fewshot")
    examples = len(list(task.fewshot_docs() or ())) if wanted else 0
    if wanted and wanted > examples:
      there = f"there are {examples}" if examples else "there is no data to take them from"
      raise ValueError(f"{name} wants {wanted} examples, and {there}.")
  for name, indices in (exam.samples or {}).items():
    if name not in loaded["tasks"]:
      asked = [*loaded["tasks"]]
      some = ", ".join(asked[:8]) + " and others" * (len(asked) > 8)
      raise ValueError(f"samples has questions of {name}, which is no task that is asked; asked are {some}.")
    _check_samples(name, indices, counts[name])
  return loaded


def _check_samples(name: str, indices: Sequence[int], count: int) -> None:
  if wrong := [i for i in indices if type(i) is not int or not 0 <= i < count]:
    raise ValueError(f"samples asks question {wrong[0]!r} of {name}, which has questions 0 to {count - 1}.")
  if not indices:
    raise ValueError(f"samples asks no question of {name}.")
  if twice := [i for i in indices if indices.count(i) > 1]:
    raise ValueError(f"samples asks question {twice[0]} of {name} twice.")


@functools.cache
def _manager() -> TaskManager:
  return TaskManager()  # reads thousands of files


def _fewshot(exam: Exam, name: str, groups: Mapping[str, Any]) -> int:
  if exam.fewshot is not None:
    return exam.fewshot
  within = [group for group, held in groups.items() if name in {task.task_name for task in held.get_all_tasks()}]
  return next((FEWSHOT[known] for known in (name.partition("_")[0], *within) if known in FEWSHOT), 0)


def evaluate_tasks(model: LM | Any, exam: Exam, *, kept: str | os.PathLike[str] | None = None) -> dict[str, Any]:
  """Returns the results of a model in lm-eval's format.

  Args:
    model: our model, or an `LM` of lm-eval.
    exam: what it is asked.
    kept: file for answers as they come: the same call goes on from there after it was cut off. None: nowhere.

  Raises:
    FileNotFoundError, ValueError: as `load_tasks` and `HarnessLM`.
  """
  began = time.monotonic()
  loaded = load_tasks(exam)
  harness = HarnessLM(lm=model) if isinstance(model, LM) else model
  if exam.chat and isinstance(harness, HarnessLM) and harness.lm.template is None:
    raise ValueError("This checkpoint has no chat template: run without --chat.")
  keeping = CachingLM(harness, os.fspath(kept)) if kept else harness
  results = evaluator.evaluate(
    keeping,
    loaded,
    limit=exam.limit,
    # Sorted, since lm-eval asks in the order of the data and labels the answers in the order of the indices.
    samples=exam.samples and {name: sorted(indices) for name, indices in exam.samples.items()},
    log_samples=exam.log_samples,
    apply_chat_template=exam.chat,
    fewshot_as_multiturn=exam.chat,
  )
  asked = {
    "tasks": list(exam.tasks),
    "limit": exam.limit,
    "samples": exam.samples,
    "chat": exam.chat,
    "fewshot_seed": exam.seed,
    "data_dir": None if exam.data_dir is None else os.fspath(exam.data_dir),
  }
  results["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  results["lm_eval_version"] = importlib.metadata.version("lm_eval")
  results["seconds"] = time.monotonic() - began
  results["config"] = asked | (harness.get_model_info() if hasattr(harness, "get_model_info") else {})
  if isinstance(harness, HarnessLM):
    results["tokens"] = dataclasses.asdict(harness.work)
  return results


def percentages(results: Mapping[str, Any]) -> tuple[float | None, ...]:
  """Returns the columns of table 1 in percent; None: not asked."""
  found = (score(results, task, metric) for task, metric in COLUMNS.values())
  return tuple(None if one is None else 100 * one[0] for one in found)


def report(models: Mapping[str, Mapping[str, Any]], *, paper: bool = True) -> str:
  """Returns what was found in Markdown: table 1 where its tasks were asked, else a line for each task and metric.

  Args:
    models: name -> results of `evaluate_tasks`.
    paper: whether the paper's rows stand in table 1.
  """
  asked = {task for results in models.values() for task in results["results"]}
  parts = []
  if asked & set(TABLE_1_TASKS):
    parts.append(table_1({name: percentages(results) for name, results in models.items()}, paper=paper))
    if sample := _sample(next(iter(models.values())).get("config", {})):
      parts.append(f"The last row{'s are' if len(models) > 1 else ' is'} of {sample}, the paper's of all.")
  parts.append("\n".join(_lines(models)))
  parts.append("\n".join(f"{name}: {_spent(results)}" for name, results in models.items()))
  return "\n\n".join(parts)


def _spent(results: Mapping[str, Any]) -> str:
  tokens = results.get("tokens") or {"asked": 0}
  read = f"; of texts of {tokens['asked']:,} tokens {tokens['read']:,} were read" if tokens["asked"] else ""
  return f"{results['seconds']:,.0f} seconds{read}."


def _lines(models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """Yields a table with a line for each task and metric, and a column for each model: percent and standard error."""
  yield f"| Task | Metric | {' | '.join(models)} |"
  yield f"| --- | --- |{' ---: |' * len(models)}"
  first = next(iter(models.values()))["results"]
  for task, metrics in first.items():
    for key in metrics:
      metric, comma, how = key.partition(",")
      if not comma or metric.endswith("_stderr"):
        continue
      found = [score(results, task, metric, how) for results in models.values()]
      share = metric not in _NO_SHARES and all(0 <= one[0] <= 1 for one in found if one is not None)
      cells = [_cell(one, 100 if share else 1) for one in found]
      yield f"| {task} | {metric}{f' ({how})' * (how != 'none')} | {' | '.join(cells)} |"


def _sample(config: Mapping[str, Any]) -> str:
  """Returns what was asked where it was not all, "" where it was."""
  if config.get("samples"):
    return "chosen questions"
  return "" if config.get("limit") is None else f"{config['limit']} questions of each task"


def _cell(found: tuple[float, float | None] | None, scale: int) -> str:
  if found is None:
    return ""
  value, error = found
  return f"{scale * value:.2f}" + ("" if error is None else f" ± {scale * error:.2f}")
