"""Reads questions about long documents: Qasper and NarrativeQA, in their official files and in those of SCROLLS.

A task's files lie in a directory, or below it:
  Qasper       qasper-dev-v0.3.json, qasper-train-v0.3.json (allenai.org): {paper id: paper}
  NarrativeQA  qaps.csv, documents.csv and tmp/ID.content (github.com/google-deepmind/narrativeqa), or *.parquet (the
               hub's deepmind/narrativeqa)
  SCROLLS      validation.jsonl, train.jsonl: {"id", "input", "output"}, for both tasks
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from supra_jax.core.files import local

TASKS = ("qasper", "narrativeqa")
SPLITS = {"train": {"train"}, "validation": {"validation", "valid", "dev"}, "test": {"test"}}


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about a document.

  Attributes:
    id: id of the question.
    document: the text of the document.
    text: the question.
    answers: reference answers, each right by itself.
    kinds: for each answer "extractive", "abstractive", "boolean" or "none", as Qasper's evaluator names them; empty if
      the file does not say.
  """

  id: str
  document: str
  text: str
  answers: tuple[str, ...]
  kinds: tuple[str, ...] = ()

  @property
  def key(self) -> tuple[str, str]:
    """What tells the question from all others."""
    return self.id, self.text


def read_questions(task: str, path: str | os.PathLike[str], split: str) -> list[Question]:
  """Returns the questions of a split of a task that have an answer, those about one document one after the other.

  Args:
    task: one of TASKS.
    path: a directory, whose files name their split (or, in csv, have a column `set`); or a file, which is the split.
    split: a key of SPLITS.

  Raises:
    FileNotFoundError: there is no file of the split.
    ValueError: a file is not of a format that is known here, and the message names the file; or no question has an
      answer.
  """
  if task not in TASKS or split not in SPLITS:
    raise ValueError(f"task={task!r}, split={split!r}: wanted one of {', '.join(TASKS)}, and of {', '.join(SPLITS)}.")
  place = local(path)
  found = [place] if place.is_file() else _files(place, task, split)
  if not found:
    wanted = ", ".join(sorted(SPLITS[split]))
    raise FileNotFoundError(f"{path} has no files of {task} in .json, .jsonl, .csv or .parquet that name {wanted}.")
  questions: dict[tuple[str, str], Question] = {}
  for file in found:
    try:
      for question in _READERS[file.suffix](file, split):
        known = questions.setdefault(question.key, question)
        if known is not question:  # SCROLLS has a line for each answer
          questions[question.key] = dataclasses.replace(known, answers=known.answers + question.answers)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
      raise ValueError(f"{file}: not a file of {task} that is known here: {type(error).__name__} {error}.") from error
  by_document: dict[str, list[Question]] = {}
  for question in questions.values():
    if question.answers:
      by_document.setdefault(question.document, []).append(question)
  if not by_document:
    raise ValueError(f"{path}: no question of {task}, {split}, has an answer.")
  return [question for group in by_document.values() for question in group]


def _files(directory: Path, task: str, split: str) -> list[Path]:
  """Returns the task's files of a split, sorted: those below a folder of the task's name if there is one."""
  names = {"qasper": ("qasper",), "narrativeqa": ("narrativeqa", "narrative_qa")}[task]
  roots = [directory / name for name in names if (directory / name).is_dir()] or [directory]
  files = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in _READERS]
  if tables := [path for path in files if path.name == "qaps.csv"]:
    return tables if task == "narrativeqa" else []
  return [path for path in files if SPLITS[split] & set(re.split("[^a-z]+", path.name.lower()))]


def _qasper(path: Path, split: str) -> Iterator[Question]:
  del split
  for paper in json.loads(path.read_text("utf-8")).values():
    sections = [[section["section_name"] or "", *section["paragraphs"]] for section in paper["full_text"]]
    document = "\n".join(
      [paper["title"], paper["abstract"], *(line for section in sections for line in section if line)]
    )
    for asked in paper["qas"]:
      found = [_qasper_answer(annotation["answer"]) for annotation in asked["answers"]]
      answers, kinds = zip(*found, strict=True) if found else ((), ())
      yield Question(asked["question_id"], document, asked["question"], answers, kinds)


def _qasper_answer(answer: Mapping[str, Any]) -> tuple[str, str]:
  """Returns (text, kind) of an annotator's answer, as Qasper's evaluator reads it."""
  if answer["unanswerable"]:
    return "Unanswerable", "none"
  if answer["extractive_spans"]:
    return ", ".join(answer["extractive_spans"]), "extractive"
  if answer["free_form_answer"]:
    return answer["free_form_answer"], "abstractive"
  if answer["yes_no"] is None:
    raise KeyError("an answer is neither unanswerable, nor extractive, free-form, yes or no")
  return ("Yes" if answer["yes_no"] else "No"), "boolean"


def _scrolls(path: Path, split: str) -> Iterator[Question]:
  del split
  documents: dict[str, str] = {}
  with path.open("rb") as file:
    for line in file:
      row = json.loads(line)
      question, _, document = row["input"].partition("\n\n")
      document = documents.setdefault(document, document)  # one copy for all questions about it
      yield Question(row["id"], document, question, () if row["output"] is None else (row["output"],))


def _narrativeqa_tables(path: Path, split: str) -> Iterator[Question]:
  """Reads qaps.csv, and the stories of the split's questions, which lie beside it."""
  csv.field_size_limit(sys.maxsize)
  with (path.parent / "documents.csv").open(encoding="utf-8", newline="") as file:
    stories = {row["document_id"]: row for row in csv.DictReader(file) if row["set"] in SPLITS[split]}
  texts: dict[str, str] = {}
  with path.open(encoding="utf-8", newline="") as file:
    for number, row in enumerate(csv.DictReader(file)):
      if row["set"] in SPLITS[split]:
        name = row["document_id"]
        if name not in texts:
          texts[name] = _story(path.parent / "tmp" / f"{name}.content", stories[name])
        yield Question(f"{name}:{number}", texts[name], row["question"], (row["answer1"], row["answer2"]))


def _story(path: Path, about: Mapping[str, str]) -> str:
  """Returns a story between the first and last words that documents.csv names; all of the file without them."""
  text = path.read_bytes().decode("utf-8", errors="replace")
  start, end = text.find(about["story_start"]), text.rfind(about["story_end"])
  return text[start : end + len(about["story_end"])] if 0 <= start < end else text


def _narrativeqa_parquet(path: Path, split: str) -> Iterator[Question]:
  del split
  try:
    from pyarrow import ArrowException, parquet
  except ImportError as error:
    raise ValueError(f"{path}: parquet files need pyarrow: `pip install 'supra_jax[parquet]'`.") from error
  texts: dict[str, str] = {}
  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      # A row holds a whole book.
      for batch in file.iter_batches(64, columns=["document", "question", "answers"]):
        for row in batch.to_pylist():
          name = row["document"]["id"]
          text = texts.setdefault(name, row["document"]["text"])
          answers = tuple(answer["text"] for answer in row["answers"])
          yield Question(f"{path.stem}:{name}:{number}", text, row["question"]["text"], answers)
          number += 1
  except (ArrowException, OSError) as error:
    raise ValueError(f"{path}: cannot be read from row {number} on: {error}.") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Question]]] = {
  ".json": _qasper,
  ".jsonl": _scrolls,
  ".csv": _narrativeqa_tables,
  ".parquet": _narrativeqa_parquet,
}
