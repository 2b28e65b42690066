"""Data sets of lm-eval's tasks from local files, for machines without network.

lm-eval's tasks name their data sets as the Hugging Face hub does: a path, `allenai/ai2_arc`, and perhaps a name,
`ARC-Easy`. `local_datasets(DIR)` looks for files of .jsonl, .json or .parquet in DIR/allenai/ai2_arc, DIR/ai2_arc or
DIR/arc_easy, the task's own name. A folder or the file's name says the split, and the data set's name where there are
several: `ARC-Easy/test-00000-of-00001.parquet`, as `hf download` writes it, or `dev/anatomy.jsonl`. Columns are those
of the hub's data sets; the few shorter forms in `_OFFICIAL` are understood too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from supra_jax.evaluation.scoring import common_prefix

_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "dev", "test": "test", "auxiliary_train": "auxiliary_train"}
# (path, name or None) on the hub -> the folder's short name, where it is not the last part of the path.
_SHORT: dict[tuple[str, str | None], str] = {
  ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
  ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
  ("EleutherAI/lambada_openai", "default"): "lambada_openai",
}


@contextlib.contextmanager
def local_datasets(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Makes `datasets.load_dataset`, which lm-eval's tasks call, read from a local directory.

  Raises:
    FileNotFoundError: (load_dataset) the directory has no files of a data set.
    ValueError: (load_dataset) a file cannot be read, or its name tells no split.
  """
  if not Path(directory).is_dir():
    raise FileNotFoundError(f"--data_dir={directory}: no such directory.")
  from_hub = datasets.load_dataset

  def load(path: str, name: str | None = None, **how: Any) -> datasets.DatasetDict:
    del how  # revision, streaming and what else the hub wants
    return read(Path(directory), path, name)

  datasets.load_dataset = load
  try:
    yield
  finally:
    datasets.load_dataset = from_hub


def read(directory: Path, path: str, name: str | None = None) -> datasets.DatasetDict:
  """Returns all splits of a data set; see `local_datasets`."""
  short = _SHORT.get((path, name), path.rpartition("/")[2])
  folders = [directory / path, directory / path.rpartition("/")[2], directory / short]
  folder = next((folder for folder in folders if folder.is_dir()), None)
  if folder is None:
    wanted = " or ".join(dict.fromkeys(str(folder) for folder in folders))
    raise FileNotFoundError(
      f"{directory} has no data set {path}: wanted {wanted} with files of .jsonl, .json or .parquet. With network, "
      f"`hf download {path} --repo-type=dataset --local-dir={directory / path}` writes them."
    )
  files = [file for file in sorted(folder.rglob("*")) if re.fullmatch(r".*\.(jsonl|json|parquet)", file.name)]
  named = [file for file in files if name in _words(file.relative_to(folder))]
  splits: dict[str, list[dict[str, Any]]] = {}
  for file in named or files:
    found = [_SPLITS[word] for word in _words(file.relative_to(folder)) if word in _SPLITS]
    if found:
      splits.setdefault(found[0], []).extend(_rows(file))
  if not splits:
    raise ValueError(f"{folder} has no file whose name or folder is a split: {', '.join(_SPLITS)}.")
  official = _OFFICIAL.get(path)
  made = {
    split: datasets.Dataset.from_list([official(row) if official else row for row in rows])
    for split, rows in splits.items()
  }
  # A task looks into its training split even where no example of it is wanted.
  some = next(iter(made.values()))
  return datasets.DatasetDict({split: some.select([]) for split in ("train", "validation", "test")} | made)


def _words(path: Path) -> list[str]:
  """Returns what the parts of a path say: `ARC-Easy/test-00000-of-00001.parquet` -> ["ARC-Easy", "test"]."""
  *folders, file = path.parts
  return [*folders, re.sub(r"(-\d{5}-of-\d{5})?(-[0-9a-f]{16})?\.\w+$", "", file)]


def _rows(file: Path) -> list[dict[str, Any]]:
  try:
    if file.suffix == ".parquet":
      return datasets.Dataset.from_parquet(str(file), keep_in_memory=True).to_list()
    with open(file, encoding="utf-8") as lines:
      rows = json.load(lines) if file.suffix == ".json" else [*_json_lines(lines)]
  except (ValueError, OSError) as error:
    raise ValueError(f"{file} cannot be read: {error}") from error
  if not rows:
    raise ValueError(f"{file} holds nothing.")
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f"{file}: wanted JSON objects, one a line, or a list of them.")
  return rows


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
  for number, line in enumerate(lines, 1):
    try:
      if line.strip():
        yield json.loads(line)
    except ValueError as error:
      raise ValueError(f"line {number}: {error}") from error


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
  """{"query", "choices", "gold"}, cleaned already, as {"activity_label", "ctx_a", "ctx_b", "endings", "label"}."""
  if "query" not in row:
    return row
  label, _, context = row["query"].partition(": ")
  return {
    "activity_label": label, "ctx_a": context, "ctx_b": "", "endings": row["choices"], "label": str(row["gold"])
  }  # fmt: skip


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
  """{"context_options", "continuation", "gold"} as {"sentence", "option1", "option2", "answer"}."""
  if "context_options" not in row:
    return row
  first, second = row["context_options"]
  common = common_prefix(first, second)
  return {
    "sentence": f"{first[:common]}_ {row['continuation']}",
    "option1": first[common:],
    "option2": second[common:],
    "answer": str(row["gold"] + 1),
  }


_OFFICIAL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
  "Rowan/hellaswag": _hellaswag,
  "allenai/winogrande": _winogrande,
  "winogrande": _winogrande,
}
