"""Sizes of a memory's heads: allotted as all divisions would have it, by errors that are 0 where a head holds all."""

import itertools

import numpy as np
import pytest

from supra_jax.linearization.allotment import allot, allotted, head_errors, held, sized
from supra_jax.model import presets

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_sizes():
  assert held(sized(64)) == 64 and sized(64).windows == (16,) and sized(64).retained == (28,)
  assert held(sized(24)) == 24 and sized(24).windows == (4,) and sized(24).retained == (0,)


def test_of_all_divisions_the_best():
  """Errors that fall convexly, for which one step at a time is best."""
  rng, sizes = np.random.default_rng(0), (8, 16, 24, 32)
  falls = -np.sort(-rng.random((2, 2, 3)), axis=-1)
  errors = np.concatenate([np.full((2, 2, 1), 3.0), 3.0 - np.cumsum(falls, axis=-1)], axis=-1)
  for tokens in (8, 14, 20, 31, 40):
    chosen = allotted(errors, sizes, tokens)
    costs = {
      way: sum(errors.reshape(4, 4)[head, choice] for head, choice in enumerate(way))
      for way in itertools.product(range(4), repeat=4)
      if sum(sizes[choice] for choice in way) <= 4 * tokens
    }
    assert costs[tuple(chosen.ravel().tolist())] == pytest.approx(min(costs.values()))
  with pytest.raises(ValueError, match="7 tokens a head: wanted 8 or more"):
    allotted(errors, sizes, 7)


def test_a_head_that_holds_all_loses_nothing(random_params):
  config = presets.tiny("softmax")
  params = random_params(config)
  batches = [{"tokens": np.random.default_rng(0).integers(0, 97, (2, 41)).astype(np.int32)}]
  choices = [sized(8, sinks=1, chunk=2), sized(16, sinks=1, chunk=2), sized(200, sinks=1, chunk=2)]
  errors = head_errors((params, config), choices, batches)
  assert errors.shape == (config.num_layers, config.num_kv_heads, 3)
  assert (errors[..., 2] < 1e-9).all() and (errors[..., :2] > 1e-5).all()
  layers = allot((params, config), 100, batches, choices)
  assert sum(held(layer, head) for layer in layers for head in range(2)) <= 100 * 2 * config.num_layers
  assert config.replace(layers=layers).mixers == ("memory",) * config.num_layers
