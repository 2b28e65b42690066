"""Answers questions about long documents, cut to several lengths: table 2 of the paper (arXiv 2405.06640).

The prompt is that of lm-evaluation-harness for SCROLLS: examples, then the document, then the question; its last tokens
stay. An answer ends at a line break. Questions that are all about yes or no get the likelier of the two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from supra_jax.core.files import local, locked
from supra_jax.core.plain_json import to_json, write_json
from supra_jax.core.progress import Progress
from supra_jax.core.sharding import on_mesh
from supra_jax.evaluation import paper
from supra_jax.evaluation.answers import best_f1, rouge_l, words
from supra_jax.evaluation.questions import Question, read_questions
from supra_jax.evaluation.scoring import common_prefix
from supra_jax.inference import decode
from supra_jax.inference.lm import LM, ROWS
from supra_jax.inference.state import State

SHOTS = {"qasper": 2, "narrativeqa": 0}  # examples in the prompt, as in the paper
SCORES = {"qasper": "f1", "narrativeqa": "rouge_l"}
TITLES = {"qasper": "Qasper", "narrativeqa": "NarrativeQA", "f1": "F1", "rouge_l": "ROUGE-L"}
ANSWERS_FILE = "answers.jsonl"
SETTINGS_FILE = "settings.json"
_SEED = 0  # draws the examples


def with_yarn(lm: LM, factor: float, original_max_positions: int | None = None) -> LM:
  """Returns the model with its rotary embedding stretched by YaRN (arXiv 2309.00071), without training.

  Args:
    lm: the model.
    factor: how many times as long texts may be.
    original_max_positions: length in tokens of the longest sequence that the model was trained on; None: as its config
      says.

  Raises:
    ValueError: the length is not known, or `RopeConfig.with_yarn` rejects the arguments.
  """
  original = original_max_positions or lm.config.max_positions
  if original is None:
    raise ValueError("The config does not say how long the texts were that the model was trained on: give a length.")
  config = lm.config.replace(rope=lm.config.rope.with_yarn(factor, original))
  # Without a fingerprint, since states of the model as it is stored are not this model's.
  return LM(config, lm.params, lm.tokenizer, lm.generation, lm.model.implementation, None, lm.mesh)


def examples(questions: Sequence[Question], count: int) -> str:
  """Returns the part of a prompt before the document: `count` questions with documents and answers, drawn once."""
  if len(questions) < count:
    raise ValueError(f"{count} examples are wanted, and there are {len(questions)} questions to draw them from.")
  drawn = random.Random(_SEED).sample(questions, count)
  return "".join(f"{_asked(shot)} {', '.join(dict.fromkeys(shot.answers))}\n\n" for shot in drawn)


def drawn_examples(task: str, data: str | os.PathLike[str], shots: int) -> str:
  """Returns `examples` from the split train of `questions.read_questions`; "" for none.

  Raises:
    FileNotFoundError, ValueError: as `read_questions`; or `data` is one file, whose questions are those that are asked.
  """
  if not shots:
    return ""
  if Path(data).is_file():
    raise ValueError(f"{data} is one file, and {shots} examples have to come from another: give a directory, or none.")
  return examples(read_questions(task, data, "train"), shots)


def _asked(question: Question) -> str:
  return f"{question.document}\n\nQuestion: {question.text}\nAnswer:"


def score(task: str, question: Question, answer: str) -> dict[str, Any]:
  """Returns the scores of an answer, each from 0 to 1, and the kind of the reference that it is nearest to, or None.

  An empty answer to a question of Qasper says that the question cannot be answered.
  """
  if task == "qasper":
    answer = answer.strip() or "Unanswerable"
  best, reference = best_f1(answer, question.answers)
  scores = {"f1": best, "kind": question.kinds[reference] if question.kinds else None}
  return scores | ({"rouge_l": rouge_l(answer, question.answers)} if SCORES[task] == "rouge_l" else {})


def answer_questions(
  lm: LM,
  task: str,
  questions: Sequence[Question],
  lengths: Sequence[int],
  output: str | os.PathLike[str],
  *,
  before: str = "",
  limit: int = 0,
  max_new_tokens: int = 256,
  rows: int = ROWS,
  settings: Mapping[str, Any] | None = None,
  progress: bool = False,
) -> dict[str, Any]:
  """Answers questions at each length, and writes answers.jsonl, results.json and table.md.

  A call that was interrupted goes on where it stopped. The document of several questions is read once for all of them.

  Args:
    lm: the model, with its tokenizer.
    task: a key of SCORES.
    questions: what `questions.read_questions` returns.
    lengths: most tokens of prompt and answer together. Of a longer prompt the last tokens stay; questions about one
      document are cut at the same place, so that the longest prompt of them has all tokens that are left to it.
    output: local directory for the files.
    before: what comes before the document in each prompt, see `examples`.
    limit: number of questions to answer, from the first; 0 means all.
    max_new_tokens: most tokens of an answer.
    rows: most answers that decode at a time.
    settings: what else the answers depend on. A directory with answers of other settings is refused.
    progress: whether to show progress on stderr.

  Returns:
    What results.json holds: the settings, and for each length the number of answers, their mean scores in percent with
    standard errors, and F1 by kind of reference where it is known.

  Raises:
    NotFiniteError: logits are not finite.
    ValueError: the model has no tokenizer, a length leaves no room for a prompt, a package is missing, or the directory
      holds answers of other settings.
  """
  if lm.tokenizer is None:
    raise ValueError("This checkpoint has no tokenizer to read questions with.")
  if short := [length for length in lengths if length <= max_new_tokens]:
    raise ValueError(f"Length {short[0]} leaves no room for a prompt: an answer may have {max_new_tokens} tokens.")
  for question in questions[:1]:
    score(task, question, "")  # if a package is missing, this says so before the model works
  directory = local(output)
  about = {**(settings or {}), "task": task, "max_new_tokens": max_new_tokens, "example_characters": len(before)}
  about["data"] = _digest(questions, before)
  with locked(directory):
    known = _known(directory / SETTINGS_FILE, directory / ANSWERS_FILE, about)
    wanted = list(dict.fromkeys(question.key for question in questions[: limit or None]))
    missing = {(length, *key) for length in lengths for key in wanted} - known.keys()
    total = len(wanted) * len(lengths)
    with (
      (directory / ANSWERS_FILE).open("a", encoding="utf-8") as file,
      Progress(total, "{done}/{total} answers", first=total - len(missing), enabled=progress) as shown,
    ):
      for length, question, answer in _all_answers(lm, task, questions, lengths, missing, before, max_new_tokens, rows):
        row = {"length": length, "id": question.id, "question": question.text, "answer": answer}
        known[length, *question.key] = row | score(task, question, answer)
        file.write(to_json(known[length, *question.key], ensure_ascii=False) + "\n")
        file.flush()
        shown.advance(1)
  results = about | {"lengths": {n: _summary(task, [known[n, *key] for key in wanted]) for n in lengths}}
  write_json(directory / "results.json", results)
  (directory / "table.md").write_text(table(results))
  return results


def _digest(questions: Sequence[Question], before: str) -> str:
  """Returns a fingerprint of all questions, documents and examples."""
  found = hashlib.sha256(before.encode())
  for question in questions:
    found.update(repr(dataclasses.astuple(question)).encode())
  return found.hexdigest()[:16]


def _known(settings: Path, answers: Path, about: Mapping[str, Any]) -> dict[tuple[int, str, str], dict[str, Any]]:
  """Returns the answers that an earlier call left, after a look at its settings; drops a line that was cut short."""
  if settings.exists():
    theirs = json.loads(settings.read_text())
    for name in sorted(theirs.keys() | about.keys()):
      if theirs.get(name) != about.get(name):
        mine = about.get(name)
        raise ValueError(
          f"{settings.parent} holds answers for {name}={theirs.get(name)!r}, not {mine!r}: take another --output."
        )
  else:
    write_json(settings, about)
  stored = answers.read_bytes() if answers.exists() else b""
  whole = stored[: stored.rfind(b"\n") + 1]
  if whole != stored:
    answers.write_bytes(whole)
  rows = [json.loads(line) for line in whole.split(b"\n") if line]
  return {(row["length"], row["id"], row["question"]): row for row in rows}


def _all_answers(
  lm: LM,
  task: str,
  questions: Sequence[Question],
  lengths: Sequence[int],
  missing: Collection[tuple[int, str, str]],
  before: str,
  max_new_tokens: int,
  rows: int,
) -> Iterator[tuple[int, Question, str]]:
  """Yields (length, question, answer) of those that are `missing`, document by document; see `answer_questions`."""
  assert lm.tokenizer is not None
  for _, members in itertools.groupby(questions, key=lambda question: question.document):
    group = list(members)
    if not any((length, *question.key) in missing for length in lengths for question in group):
      continue
    prompts = [lm.tokenizer.encode(before + _asked(question)) for question in group]
    for length in lengths:
      start = max(max(map(len, prompts)) - (length - max_new_tokens), 0)
      asked = [i for i, question in enumerate(group) if (length, *question.key) in missing]
      if asked:
        kept = [prompts[i][start:] for i in asked]
        for question, answer in _answers(lm, task, [group[i] for i in asked], kept, max_new_tokens, rows):
          yield length, question, answer


def _answers(
  lm: LM, task: str, questions: Sequence[Question], prompts: Sequence[list[int]], max_new_tokens: int, rows: int
) -> Iterator[tuple[Question, str]]:
  """Yields (question, answer) of questions about one document; the common beginning of their prompts is read once."""
  shared = common_prefix(min(prompts), max(prompts))  # in the order of words in a dictionary
  state = lm.read(prompts[0][:shared]) if shared else None
  free: list[tuple[Question, list[int]]] = []
  for question, ids in zip(questions, prompts, strict=True):
    if task == "qasper" and all(words(answer) in (["yes"], ["no"]) for answer in question.answers):
      after = lm.read(ids[shared:], state)
      scores = {word: loglikelihood(lm, after, f" {word}") for word in ("yes", "no")}
      yield question, max(scores, key=scores.__getitem__)
    else:
      free.append((question, ids[shared:]))
  # Powers of two, so that few programs are compiled.
  rows = min(rows, 1 << max(len(free) - 1, 0).bit_length())
  how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": "\n", "temperature": 0.0, "repetition_penalty": 1.0}
  made = lm.complete([ids for _, ids in free], state=state, rows=rows, **how) if free else []
  for (question, _), completion in zip(free, made, strict=True):
    yield question, completion.text.strip()


def loglikelihood(lm: LM, state: State, text: str) -> float:
  """Returns the log-likelihood in nats of a text that follows a state of one row; no other logits are computed."""
  assert lm.tokenizer is not None
  total = 0.0
  ids = lm.tokenizer.encode(text, continues=True)
  for i, token in enumerate(ids):
    state = lm.read(ids[i - 1 : i], state) if i else state
    with on_mesh(lm.mesh):
      logits = decode.unembed(lm.model, lm.params, state.hidden)
    total += float(jax.nn.log_softmax(logits[0])[token])
  return total


def _summary(task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns mean and standard error of the scores of answers, in percent."""
  summary: dict[str, Any] = {"answers": len(rows)}
  for name in dict.fromkeys([SCORES[task], "f1"]):
    values = 100 * np.array([row[name] for row in rows])
    summary[name] = values.mean().item() if rows else math.nan
    summary[f"{name}_stderr"] = values.std(ddof=1).item() / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
  kinds = sorted({row["kind"] for row in rows} - {None})
  if kinds:
    summary["f1_by_kind"] = {
      kind: 100 * np.mean([row["f1"] for row in rows if row["kind"] == kind]).item() for kind in kinds
    }
  return summary


def table(results: Mapping[str, Any]) -> str:
  """Returns results as a table in Markdown: a column a length, a row a model; the paper's models come first."""
  task, lengths = results["task"], results["lengths"]
  name = SCORES[task]
  head = [f"{TITLES[task]}, {TITLES[name]}, {results.get('shots', 0)}-shot", *map(str, lengths)]
  cells = [str(results.get("model", "this model"))]
  for summary in lengths.values():
    error = summary[f"{name}_stderr"]
    cells.append(f"{summary[name]:.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else ""))
  of_paper = [[model, *cells_of] for model, cells_of in paper.table_2(task, list(map(int, lengths))).items()]
  rows = [
    head,
    ["---"] * len(head),
    *of_paper,
    cells,
    ["answers", *(str(summary["answers"]) for summary in lengths.values())],
  ]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)
