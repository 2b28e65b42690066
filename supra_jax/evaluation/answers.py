"""Compares answers with references: F1 over words, as SQuAD and Qasper have it, and ROUGE-L."""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(text: str) -> list[str]:
  """Returns the words of an answer in lower case, without ASCII punctuation and articles (SQuAD's normalisation)."""
  return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
  """Returns the harmonic mean of precision and recall of an answer's words; 0 if no word is common to both."""
  ours, theirs = words(answer), words(reference)
  common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
  return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def best_f1(answer: str, references: Sequence[str]) -> tuple[float, int]:
  """Returns the largest F1 against any reference, and the index of the first reference that has it."""
  scores = [f1(answer, reference) for reference in references]
  return max(scores), scores.index(max(scores))


def rouge_l(answer: str, references: Sequence[str]) -> float:
  """Returns the largest ROUGE-L F-measure against any reference, by the package rouge-score without a stemmer.

  Raises:
    ValueError: rouge-score is not installed.
  """
  score: float = _rouge().score_multi(list(references), answer)["rougeL"].fmeasure
  return score


@functools.cache
def _rouge() -> Any:
  try:
    from rouge_score import rouge_scorer
  except ImportError as error:
    raise ValueError("ROUGE-L needs the package rouge-score: `pip install 'supra_jax[eval]'`.") from error
  return rouge_scorer.RougeScorer(["rougeL"])
