"""Planted texts: the answer is where it is said to be, once, and training does not see what tests ask."""

import functools

import numpy as np
import pytest

from supra_jax.data.planted import KINDS, plant
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
