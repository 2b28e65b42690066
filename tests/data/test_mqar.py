"""Rows of multi-query associative recall, checked token by token by a loop that knows nothing of how they are drawn."""

import numpy as np
import pytest

from supra_jax.data.mqar import Recall


def read(task, tokens, weights):
  """Reads a row from left to right; returns ({key: its places}, {key: value of its pair}, distances to the pairs)."""
  places, told, distances = {}, {}, []
  number, targets = 0, 0
  while number < len(tokens):
    token = int(tokens[number])
    if token in task.filler:
      assert weights[number] == 0
      number += 1
      continue
    assert token in task.keys, "a value without a key"
    value = int(tokens[number + 1])
    assert value in task.values, "a key without a value"
    assert weights[number] == 0
    if token in told:
      assert value == told[token], "another value than the pair's"
      assert weights[number + 1] == 1
      distances.append(number - (places[token][-1] + 1))  # to the nearer token of the pair
      targets += 1
    else:
      assert weights[number + 1] == 0
      assert value not in told.values(), "two keys of one value"
      told[token] = value
    places.setdefault(token, []).append(number)
    number += 2
  assert targets == weights.sum()
  return places, told, distances


@pytest.mark.parametrize(
  ("task", "pairs"),
  [(Recall(), 4), (Recall(), 32), (Recall(64, 0, 128), 16), (Recall(65, 31, 1024), 7), (Recall(8, 1, 16), 2)],
)
def test_every_query_has_one_answer_and_is_far_from_its_pair(task, pairs):
  batch = task.rows(np.random.default_rng(0), 50, pairs)
  assert batch["tokens"].shape == batch["target_weights"].shape == (50, task.length + 1)
  assert batch["tokens"].dtype == np.int32 and batch["target_weights"].dtype == np.float32
  assert batch["tokens"].min() >= 0 and batch["tokens"].max() < task.vocab_size
  orders = set()
  for tokens, weights in zip(batch["tokens"], batch["target_weights"], strict=True):
    places, told, distances = read(task, tokens, weights)
    assert len(told) == pairs
    assert all(len(at) == 2 for at in places.values()), "each key is told once, and asked once"
    assert min(distances) > task.gap
    assert max(first for first, _ in places.values()) < min(second for _, second in places.values())
    asked = sorted(places, key=lambda key: places[key][1])
    orders.add(tuple(sorted(places, key=lambda key: places[key][0]).index(key) for key in asked))
  assert len(orders) > 1, "the order of the queries is always the same"


def test_the_least_distance_is_reached():
  """A gap that no row comes near would make the task harder than it says."""
  task = Recall(16, 5, 32)
  batch = task.rows(np.random.default_rng(0), 400, 3)
  found = [d for rows in zip(*batch.values(), strict=True) for d in read(task, *rows)[2]]
  assert min(found) == task.gap + 1
  assert max(found) == task.length - 2  # value in the second place, key in the one before the last


def test_all_ids_and_places_are_drawn():
  task = Recall(16, 2, 32)
  batch = task.rows(np.random.default_rng(1), 2000, 3)
  assert set(batch["tokens"].flat) == set(range(task.vocab_size))
  assert sorted([*task.filler, *task.keys, *task.values]) == list(range(task.vocab_size))
  told = batch["tokens"][:, : task.width]
  is_key = np.isin(told, task.keys)
  assert is_key[:, :-1].any(axis=0).all() and not is_key[:, -1].any()


def test_a_seed_is_a_draw():
  one, same, other = (Recall().rows(np.random.default_rng(seed), 4, 8)["tokens"] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


@pytest.mark.parametrize(("pairs", "most"), [(0, 80), (81, 80)])
def test_pairs_that_do_not_fit_are_refused(pairs, most):
  with pytest.raises(ValueError, match=f"pairs={pairs}: .* room for 1 to {most}"):
    Recall().rows(np.random.default_rng(0), 1, pairs)
