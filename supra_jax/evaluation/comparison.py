"""Asks several models the same, and sets their results side by side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable

from supra_jax.core.plain_json import check_output, write_json
from supra_jax.evaluation.pictures import plot_scores
from supra_jax.evaluation.tasks import TABLE_1_TASKS, Exam, evaluate_tasks, load_tasks, report
from supra_jax.inference.lm import LM, load
from supra_jax.model.int8 import Int8

__all__ = ["Exam", "compare", "fetched", "loader", "read_samples", "task_names"]


def task_names(names: Sequence[str]) -> tuple[str, ...]:
  """Returns names of tasks, with those of the paper's table 1 in place of `table1`."""
  return tuple(dict.fromkeys(task for name in names for task in (TABLE_1_TASKS if name == "table1" else (name,))))


def read_samples(file: str | os.PathLike[str]) -> dict[str, list[int]]:
  """Returns `Exam.samples` from a JSON file like {"piqa": [0, 7]}.

  Raises:
    ValueError: the file cannot be read, or is something else.
  """
  try:
    found = json.loads(Path(file).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{file} cannot be read: {error}") from error
  if not isinstance(found, dict) or not all(isinstance(indices, list) for indices in found.values()):
    raise ValueError(f'{file}: wanted lists of indices of questions, {{"piqa": [0, 7]}}.')
  return found


def fetched(exam: Exam) -> str:
  """Loads the data sets of tasks, and returns a line that says where they are."""
  loaded = load_tasks(exam)
  import datasets

  where = exam.data_dir or datasets.config.HF_DATASETS_CACHE
  return f"{len(loaded['tasks'])} tasks have their data in {where}; HF_HUB_OFFLINE=1 keeps a later run to it."


def loader(spec: str, trust_remote_code: bool = False) -> Callable[[], Any]:
  """Returns a function that loads a model.

  Args:
    spec: a model directory, or `hf:NAME` for a model of transformers, a directory or a name on the hub, which answers
      through lm-eval's own model `hf`.
    trust_remote_code: whether code that comes with a model of transformers may run.

  Raises:
    FileNotFoundError: there is no such directory.
  """
  if not spec.startswith("hf:"):
    if not Path(os.path.expanduser(spec)).is_dir() and "://" not in spec:
      raise FileNotFoundError(f"--compare={spec}: no such directory; hf:NAME is a model of transformers.")
    return lambda: load(spec)
  name = os.path.expanduser(spec.removeprefix("hf:"))
  if not name or (name.startswith((".", "/", "~")) and not Path(name).is_dir()):
    raise FileNotFoundError(f"--compare={spec}: wanted hf:DIR with a directory that is there, or a name on the hub.")

  def of_transformers() -> Any:
    try:
      import torch
      from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
      raise ValueError(f"{error.name} is not installed, which {spec} wants: pip install 'supra_jax[torch]'.") from error

    on_gpu = torch.cuda.is_available()
    how = {"device": "cuda", "batch_size": "auto"} if on_gpu else {"device": "cpu", "batch_size": 8}
    return HFLM(pretrained=name, trust_remote_code=trust_remote_code, **how)

  return of_transformers


def _fingerprint(lm: LM) -> str:
  bits = "int8" if isinstance(lm.params["embed_tokens"]["embedding"], Int8) else lm.model.dtype
  return f"{lm.checkpoint} {bits}"


def compare(models: Mapping[str, Callable[[], Any]], exam: Exam, output: str | os.PathLike[str] | None = None) -> str:
  """Asks models one after the other.

  Args:
    models: name -> function that loads the model, ours or lm-eval's.
    exam: what they are asked.
    output: JSON file for the results, those of the one model or {name: results}; Markdown is written beside it, and a
      plot if there are several models. Answers are kept beside it until all is done, so that the same call goes on
      after a kill. None: nothing is written.

  Returns:
    The results in Markdown.
  """
  check_output(output, (".md", ".png"))
  found: dict[str, dict[str, Any]] = {}
  kept: list[Path] = []
  for name, make in models.items():
    model = make()
    if output is not None:
      known = _fingerprint(model) if isinstance(model, LM) else name
      kept.append(Path(f"{os.fspath(output)}.{re.sub('[^0-9A-Za-z]+', '-', str(known))}.kept"))
    found[name] = evaluate_tasks(model, exam, kept=kept[-1] if kept else None)
    del model
    if output is not None:
      # Configs of tasks hold functions.
      write_json(output, found if len(models) > 1 else found[name], default=handle_non_serializable)
  text = report(found)
  if output is not None:
    Path(output).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if len(models) > 1:
      plot_scores(found, Path(output).with_suffix(".png"))
    for file in kept:
      file.unlink(missing_ok=True)
  return text
