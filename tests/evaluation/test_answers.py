"""F1 and ROUGE-L, against the scorer of SQuAD that lm-evaluation-harness carries and values worked out by hand."""

import random

import pytest

from supra_jax.evaluation.answers import best_f1, f1, rouge_l, words

PAIRS = [
  ("The cat, sat!", "a cat sat", 1.0),
  ("cat sat down", "cat sat", 0.8),  # precision 2/3, recall 1
  ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it
  ("dog", "cat", 0.0),
  ("Unanswerable", "unanswerable.", 1.0),
  ("state-of-the-art", "state of the art", 0.0),  # punctuation goes without a trace
  ("", "yes", 0.0),
]


@pytest.mark.parametrize("answer, reference, wanted", PAIRS)
def test_f1_by_hand(answer, reference, wanted):
  assert f1(answer, reference) == pytest.approx(wanted)


def test_f1_of_squad():
  metrics = pytest.importorskip("lm_eval.tasks.qasper.metrics")
  draw = random.Random(0)
  vocabulary = [
    "the",
    "An",
    "a",
    "cat",
    "Cat.",
    "sat",
    "(on)",
    "mat",
    "x-ray",
    "ümlaut",
    "5%",
    "5",
    "theory",
    "\u2019s",
  ]
  for _ in range(300):
    answer, reference = (" ".join(draw.choices(vocabulary, k=draw.randint(1, 6))) for _ in range(2))
    assert words(answer) == metrics.normalize_answer(answer).split()
    assert f1(answer, reference) == pytest.approx(metrics.f1_abstractive([answer], [reference]))


def test_the_best_reference_counts():
  assert best_f1("cat sat", ["dog", "a cat", "cat sat", "The cat sat"]) == (1.0, 2)


def test_rouge_l_by_hand():
  pytest.importorskip("rouge_score")
  # Longest common subsequence "the cat the mat", of 5 and 6 words: 2 * 4/5 * 4/6 / (4/5 + 4/6).
  assert rouge_l("the cat near the mat", ["The cat sat on the mat."]) == pytest.approx(8 / 11)
  assert rouge_l("the cat near the mat", ["dogs", "The cat sat on the mat."]) == pytest.approx(8 / 11)
  assert rouge_l("running", ["run"]) == 0  # no stemmer
  assert rouge_l("", ["run"]) == 0
