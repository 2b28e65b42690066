"""Planted texts: the answer is where it is said to be, once, and training does not see what tests ask."""

import functools

import numpy as np
import pytest

from supra_jax.data.planted import KINDS, STRINGS, plant, plant_repeats
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.experiments import tiny

FILLER = np.arange(100, 400)


@functools.cache
def tokenizer():
  return Tokenizer.from_files({"tokenizer.json": tiny.tokenizer_json()}, tiny.tiny_config("supra"))


def made(kind, distance, **how):
  encode = functools.partial(tokenizer().encode, continues=True)
  return plant(kind, distance, FILLER, **({"count": 5, "encode": encode, "before": 400} | how))


def places(tokens, part):
  """Every index at which `part` begins in `tokens`, by comparing all."""
  return [i for i in range(len(tokens) - len(part) + 1) if list(tokens[i : i + len(part)]) == list(part)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_is_at_its_distance(kind, split):
  for distance in (400, 1023):
    for text in made(kind, distance, split=split):
      assert text.context.dtype == text.candidates.dtype == np.int32
      assert len(text.context) == 400 + distance and text.where == 400
      assert places(text.context, text.answer) == [400]
      assert list(text.text[-len(text.answer) :]) == list(text.answer) and len(text.candidates) == 16
      assert len({tuple(answer) for answer in text.candidates}) == 16
      # The other facts are there too, and come before random answers.
      told = 1 if kind == "passkey" else 6
      assert [len(places(text.context, answer)) for answer in text.candidates] == [1] * told + [0] * (16 - told)


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_is_of_the_right_fact(kind):
  """What stands before the answer in its fact stands, with its name, at the end of the text too."""
  for text in made(kind, 500):
    if kind == "repeat":
      assert list(text.context[-4:]) == list(text.context[396:400])
      continue
    words = tokenizer().decode(text.context).split("\n")
    number = tokenizer().decode(text.answer).strip()
    fact = next(line for line in words if number in line)
    assert kind == "passkey" or {word.strip(":") for word in fact.split()} & set(words[-1].replace(":", "").split())
    names = [line for line in words if line.partition(":")[0] == words[-1].partition(":")[0]]
    assert kind != "pairs" or names == [fact, words[-1]]


def test_a_seed_is_the_same_text_and_another_is_not():
  first, again, other = (made("multi_key", 600, seed=seed) for seed in (3, 3, 4))
  for x, y, z in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(x.text, y.text)
    assert x.right == y.right and (x.text.shape != z.text.shape or (x.text != z.text).any())


def test_repeats_are_known_from_before_in_their_document():
  text = np.random.default_rng(0).integers(100, 5000, (2, 513)).astype(np.int32)
  rows, known = plant_repeats(text, seed=3)
  asked, answered = STRINGS[0]
  assert known.sum(axis=1).tolist() == [512 // 64 * answered] * 2
  for row, of_row in zip(rows, known, strict=True):
    for end in np.flatnonzero(of_row)[answered - 1 :: answered]:
      string = row[end + 1 - asked - answered : end + 1]
      assert len(places(row[: end + 1], string)) == 2
  changed = (rows != text).sum(axis=1)
  assert (changed > 60).all() and (changed <= 8 * 2 * (asked + answered)).all()
  assert set(rows[0]) <= set(text[0]) and (text[0] != rows[0]).any()
  segments = np.repeat(np.arange(3), 171)[None].repeat(2, axis=0)
  same, inside = plant_repeats(text, segments, seed=3)
  assert (same == rows).all() and 0 < inside.sum() < known.sum() and (inside <= known).all()
  assert not plant_repeats(text, np.arange(513)[None].repeat(2, axis=0))[1].any()


def test_training_and_test_share_no_words():
  encode = functools.partial(tokenizer().encode, continues=True)
  for kind in KINDS:
    train, test = (plant(kind, 500, FILLER, count=20, split=s, encode=encode, before=300) for s in ("train", "test"))
    if kind == "repeat":  # the strings are of different tokens
      assert not set(np.concatenate([t.answer for t in train])) & set(np.concatenate([t.answer for t in test]))
    else:
      ask = [{tokenizer().decode(text.context).split("\n")[-1] for text in texts} for texts in (train, test)]
      assert not ask[0] & ask[1]


@pytest.mark.parametrize(
  ("how", "what"),
  [
    ({"kind": "riddle"}, "riddle"),
    ({"split": "valid"}, "valid"),
    ({"encode": None}, "wanted `encode`"),
    ({"distance": 20}, "do not fit"),
    ({"before": 20}, "do not fit"),
    ({"facts": 17, "candidates": 20}, "17 facts"),
    ({"facts": 6, "candidates": 5}, "6 facts"),
    ({"kind": "repeat", "alphabet": [1, 2, 3]}, "3 different tokens"),
  ],
)
def test_what_cannot_be_planted_is_said(how, what):
  how = {"kind": "multi_key", "distance": 600} | how
  with pytest.raises(ValueError, match=what):
    made(**how)
