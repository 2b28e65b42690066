"""Measures zero-shot multiple-choice accuracy of a model, with the prompts and metrics of lm-evaluation-harness.

    python -m benchmarks.multiple_choice --checkpoint=DIR --data=DIR [--samples=FILE.json] [--output=FILE.json]

`--data` holds `TASK/SPLIT.jsonl` of the official data sets; the functions below name the keys that they read.
`--samples` is a JSON object `{TASK: [row, ...]}` that restricts each task to those rows. `acc` takes the likeliest
answer, `acc_norm` the answer with the highest log-likelihood per character.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

import supra_jax
from supra_jax.bin.entry import run
from supra_jax.core.plain_json import to_json
from supra_jax.evaluation.likelihood import loglikelihoods

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model directory to evaluate.", required=True)
_DATA = flags.DEFINE_string("data", None, "Directory of the data sets, TASK/SPLIT.jsonl.", required=True)
_SAMPLES = flags.DEFINE_string("samples", None, "JSON file {task: [row, ...]} of rows to evaluate. Default: all rows.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the table to.")

Item = tuple[list[tuple[str, str]], int]  # ((context, continuation) of each answer, index of the right answer)


def _hellaswag(row: dict) -> Item:
  return [(row["query"], " " + choice) for choice in row["choices"]], row["gold"]


def _piqa(row: dict) -> Item:
  context = f"Question: {row['goal']}\nAnswer:"
  return [(context, " " + row["sol1"]), (context, " " + row["sol2"])], row["label"]


def _arc(row: dict) -> Item:
  context = f"Question: {row['question']}\nAnswer:"
  answers = [(context, " " + text) for text in row["choices"]["text"]]
  return answers, row["choices"]["label"].index(row["answerKey"])


def _winogrande(row: dict) -> Item:
  return [(context, " " + row["continuation"]) for context in row["context_options"]], row["gold"]


TASKS: dict[str, tuple[str, Callable[[dict], Item]]] = {
  "hellaswag": ("validation", _hellaswag),
  "piqa": ("validation", _piqa),
  "arc_easy": ("test", _arc),
  "arc_challenge": ("test", _arc),
  "winogrande": ("validation", _winogrande),
}


def evaluate_task(lm: supra_jax.LM, items: list[Item]) -> dict[str, float | int]:
  """Returns the number of items `n`, the accuracies `acc` and `acc_norm`, and the standard error of `acc`."""
  assert lm.tokenizer is not None
  requests = []
  for answers, _ in items:
    for context, continuation in answers:
      context_ids = lm.tokenizer.encode(context)
      # Encoded together with its context, so that the seam is tokenised as in running text.
      requests.append((context_ids, lm.tokenizer.encode(context + continuation)[len(context_ids) :]))
  scores = iter(score for score, _ in loglikelihoods(lm, requests))
  right, right_norm = [], []
  for answers, gold in items:
    each = np.array([next(scores) for _ in answers])
    characters = np.array([len(continuation.lstrip()) for _, continuation in answers])
    right.append(each.argmax() == gold)
    right_norm.append((each / characters).argmax() == gold)
  acc = float(np.mean(right))
  return {
    "n": len(items),
    "acc": acc,
    "acc_norm": float(np.mean(right_norm)),
    "acc_stderr": float(np.sqrt(acc * (1 - acc) / max(len(items) - 1, 1))),
  }


def main() -> None:
  lm = supra_jax.load(_CHECKPOINT.value)
  samples = json.loads(Path(_SAMPLES.value).read_text()) if _SAMPLES.value else {}
  table = {}
  print(f"{'task':<16}{'n':>6}{'acc':>8}{'acc_norm':>10}{'seconds':>9}")
  for task, (split, read) in TASKS.items():
    with open(Path(_DATA.value) / task / f"{split}.jsonl") as file:
      rows = [json.loads(line) for line in file]
    chosen = samples.get(task, samples.get(f"{task}_local", range(len(rows))))
    began = time.monotonic()
    table[task] = result = evaluate_task(lm, [read(rows[i]) for i in chosen])
    seconds = time.monotonic() - began
    print(f"{task:<16}{result['n']:>6}{result['acc']:>8.3f}{result['acc_norm']:>10.3f}{seconds:>9.0f}", flush=True)
  if _OUTPUT.value:
    Path(_OUTPUT.value).write_text(to_json(table, indent=2) + "\n")


if __name__ == "__main__":
  run(main)
