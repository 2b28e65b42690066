"""Tables 1 and 2 of the paper (*Linearizing Large Language Models*, arXiv 2405.06640), to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Column of table 1 -> (lm-eval's task, metric): "5-shot results are used for MMLU. Norm results are used for PIQA,
# HellaSwag, ARC-C."
COLUMNS: dict[str, tuple[str, str]] = {
  "HellaSwag": ("hellaswag", "acc_norm"),
  "PIQA": ("piqa", "acc_norm"),
  "WG": ("winogrande", "acc"),
  "ARC-E": ("arc_easy", "acc"),
  "ARC-C": ("arc_challenge", "acc_norm"),
  "MMLU": ("mmlu", "acc"),
}
FEWSHOT = {"mmlu": 5}  # examples before a question; of all other tasks none

# (model, size, billions of tokens that it was trained on; "+" after pretraining) and percent, in the order of COLUMNS.
TABLE_1: tuple[tuple[str, str, str, tuple[float | None, ...]], ...] = (
  ("StableLM2", "1.6B", "2000", (69.0, 76.7, 63.6, 68.6, 38.9, 38.4)),
  ("StableLM", "3B", "1000", (73.8, 79.3, 65.8, 72.1, 40.0, 44.2)),
  ("Gemma", "2B", "2000", (71.4, 78.6, 64.4, 74.0, 41.5, 41.2)),
  ("Mamba", "1.4B", "600", (59.0, 73.9, 61.4, 65.5, 32.9, 25.2)),
  ("RWKV-5", "1.5B", "1100", (53.1, 71.6, 59.0, 62.2, 32.7, 26.2)),
  ("Mamba", "2.8B", "600", (66.2, 75.8, 63.4, 69.7, 36.3, 26.3)),
  ("Llama2", "7B", "2000", (76.0, 79.1, 69.1, 76.3, 46.3, 45.9)),
  ("Gemma", "7B", "6000", (80.7, 81.9, 73.7, 81.1, 53.2, 62.9)),
  ("Mistral", "7B", "8000(?)", (81.0, 82.1, 74.0, 80.9, 53.8, 62.4)),
  ("RetNet", "6.7B", "200", (60.7, 75.4, 58.1, None, None, None)),
  ("RWKV-5", "7B", "1100", (70.9, 77.2, 67.4, 71.8, 43.6, 31.0)),
  ("RWKV-5-1.7T", "7B", "1700", (73.0, 78.6, 72.9, 75.8, 45.6, 34.9)),
  ("Mamba (ours)", "7B", "1200", (77.9, 81.0, 71.8, 77.5, 46.7, 33.3)),
  ("Llama2-SUPRA", "7B", "+20", (71.8, 78.6, 65.8, 71.1, 39.5, 24.9)),
  ("Mistral-SUPRA", "7B", "+20", (74.8, 80.1, 67.4, 74.6, 42.3, 28.0)),
  ("Mistral-SUPRA", "7B", "+100", (77.1, 80.4, 70.3, 75.9, 45.8, 34.2)),
)

LENGTHS = (2048, 4096, 8192, 16384)  # tokens that the inputs of table 2 are cut to
# (model, size, tokens of its training contexts, Qasper (2-shot) at LENGTHS, NarrativeQA (0-shot) at LENGTHS); "*" is
# YaRN.
TABLE_2: tuple[tuple[str, str, int, tuple[float, ...], tuple[float, ...]], ...] = (
  ("Llama1-7B", "7B", 2048, (24.43, 7.23, 5.08, 4.88), (21.44, 1.03, 0.0, 0.0)),
  ("Llama2-7B", "7B", 4096, (23.26, 27.26, 6.20, 5.49), (21.32, 22.61, 0.0, 0.0)),
  ("Llama2-7B*", "7B", 4096, (23.26, 27.26, 31.46, 25.52), (21.32, 22.61, 23.0, 14.27)),
  ("Mistral-7B", "7B", 8196, (21.53, 25.50, 33.61, 6.88), (24.94, 26.90, 25.93, 0.63)),
  ("RecurrentGemma-2B", "2.7B", 8192, (22.44, 13.16, 13.42, 12.66), (19.80, 11.59, 12.93, 12.95)),
  ("RWKV-5-1.7T", "7B", 2048, (22.28, 23.87, 22.30, 20.35), (17.77, 18.65, 17.81, 16.00)),
  ("Mamba (ours)", "7B", 2048, (19.68, 5.58, 5.90, 6.32), (19.70, 0.28, 0.0, 0.0)),
  ("Mistral-SUPRA", "7B", 2048, (19.44, 17.13, 17.11, 17.22), (18.99, 17.76, 17.75, 17.74)),
)

# Row of table 3 -> percent of HellaSwag, ARC-Easy and ARC-Challenge. All models have 1B parameters and are trained on
# 100 billion tokens from scratch, or on 10 billion from a transformer of 1.6 trillion; the names say what differs.
TABLE_3: Mapping[str, tuple[float, float, float]] = {
  "Mamba": (58.3, 62.7, 29.1),
  "SUPRA from scratch": (54.7, 59.6, 27.8),
  "T2R from scratch": (55.2, 61.0, 28.4),
  "Transformer (100B)": (55.9, 60.4, 29.3),
  "Transformer (1.6T)": (62.1, 66.2, 34.3),
  "only new weights": (33.2, 37.8, 22.6),
  "2-step": (56.1, 62.2, 30.4),
  "T2R": (40.6, 53.8, 27.9),
  "SUPRA": (57.0, 62.4, 31.6),
  "SUPRA (100B)": (51.7, 57.5, 27.4),
}


def score(
  results: Mapping[str, Any], task: str, metric: str, extraction: str = "none"
) -> tuple[float, float | None] | None:
  """Returns (value, standard error or None) of a task's metric in lm-eval's results; None if it is not there.

  `extraction` is the name of lm-eval's filter, where a task has several ways to take an answer from a text.
  """
  metrics = results["results"].get(task, {})
  value, error = metrics.get(f"{metric},{extraction}"), metrics.get(f"{metric}_stderr,{extraction}")
  if not isinstance(value, float | int):
    return None
  return value, error if isinstance(error, float | int) else None


def average(row: Sequence[float | None]) -> float | None:
  """Returns the mean of a row of table 1; None if a column is missing."""
  present = [value for value in row if value is not None]
  return sum(present) / len(present) if len(present) == len(COLUMNS) else None


def table_1(models: Mapping[str, Sequence[float | None]], *, paper: bool = True) -> str:
  """Returns table 1 in Markdown.

  Args:
    models: name -> percent, in the order of COLUMNS; None: not measured.
    paper: whether the paper's rows come first.
  """
  rows = [(name, size, tokens, scores) for name, size, tokens, scores in TABLE_1] if paper else []
  rows += [(f"**{name}**", "", "", tuple(scores)) for name, scores in models.items()]
  lines = [["Model", "Size", "Tokens", *COLUMNS, "Average"], ["---"] * (len(COLUMNS) + 4)]
  for name, size, tokens, scores in rows:
    values = [*scores, average(scores)]
    lines.append([name, size, tokens, *("" if value is None else f"{value:.1f}" for value in values)])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_2(task: str, lengths: Sequence[int]) -> dict[str, list[str]]:
  """Returns {model: cells} of table 2 at some lengths, "" where the paper has none; {} if it has none of them.

  Args:
    task: "qasper" or "narrativeqa".
    lengths: tokens that inputs are cut to.
  """
  if not set(lengths) & set(LENGTHS):
    return {}
  found = {}
  for model, _, _, qasper, narrativeqa in TABLE_2:
    scores = dict(zip(LENGTHS, qasper if task == "qasper" else narrativeqa, strict=True))
    found[model] = [f"{scores[length]:.1f}" if length in scores else "" for length in lengths]
  return found
