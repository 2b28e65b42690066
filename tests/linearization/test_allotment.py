"""Sizes of a memory's heads: allotted as all divisions would have it, by errors that are 0 where a head holds all."""

import functools
import itertools

import jax
import numpy as np
import pytest

from supra_jax.linearization.allotment import allotted, head_errors, with_order
from supra_jax.model import presets
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.losses import language_model_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


# Of what the best division gains, the largest share that a division by price and what is left may miss.
SHARE = 0.15


def falling(rng, layers, heads, sizes):
  """Errors that fall convexly."""
  falls = -np.sort(-rng.random((layers, heads, sizes - 1)), axis=-1)
  return np.concatenate([np.zeros((layers, heads, 1)), -np.cumsum(falls, axis=-1)], axis=-1) + sizes


@pytest.mark.parametrize("most", [1, 2, 3])
def test_of_all_divisions_nearly_the_best(most):
  """Against all patterns of three layers of two heads; a price a token finds all but what no price finds."""
  rng, sizes = np.random.default_rng(0), (0, 8, 16, 24)
  patterns = list(itertools.combinations_with_replacement(range(4), 2))
  for trial in range(4):
    errors = falling(rng, 3, 2, 4)
    for tokens in (0, 5, 11, 20, 24):
      found = allotted(errors, sizes, tokens, patterns=most)
      assert found.retained.sum() <= tokens * 6
      assert len(np.unique(found.retained, axis=0)) <= most
      paid = sum(
        errors[i, head, sizes.index(size)]
        for i in range(3)
        for head, size in zip(found.order[i], found.retained[i], strict=True)
      )
      assert paid == pytest.approx(found.error)
      best = np.inf
      for way in itertools.product(range(len(patterns)), repeat=3):
        if len(set(way)) <= most and sum(sizes[j] for p in way for j in patterns[p]) <= tokens * 6:
          pairs = [[(a, b), (b, a)] for a, b in (patterns[p] for p in way)]
          best = min(best, sum(min(errors[i, 0, a] + errors[i, 1, b] for a, b in pair) for i, pair in enumerate(pairs)))
      assert best - 1e-9 <= found.error <= best + SHARE * (errors[..., 0].sum() - best) + 1e-9, trial
  with pytest.raises(ValueError, match="7 retained tokens a head: wanted 8 or more"):
    allotted(errors, (8, 16, 24, 32), 7, patterns=1)


def test_heads_of_a_size_divide_by_repeats():
  errors = falling(np.random.default_rng(1), 2, 12, 3)
  found = allotted(errors, (0, 4, 8), 5, patterns=2, repeats=2)
  assert found.retained.shape == (2, 6)
  assert sorted(found.order[0].tolist()) == list(range(12))
  assert allotted(errors, (0, 4, 8), 5, patterns=2, repeats=12).retained.shape == (2, 1)
  with pytest.raises(ValueError, match="repeats=5: wanted a divisor of 12 heads"):
    allotted(errors, (0, 4, 8), 5, patterns=2, repeats=5)


def test_a_head_that_holds_all_loses_nothing(random_params):
  config = presets.tiny("softmax")
  params = random_params(config)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 41)).astype(np.int32)
  batches = [{"tokens": tokens}]
  choices = [MemoryConfig(window=2, retained=(m,), sinks=1, chunk=2, state_dtype="float32") for m in (0, 4, 40)]
  errors = head_errors((params, config), choices, batches)
  assert errors.shape == (1, config.num_layers, config.num_kv_heads, 3)
  assert (errors[..., 2] < 1e-9).all() and (errors[..., :2] > 1e-7).all()
  rough = head_errors((params, config), choices[:2], batches, dtype="bfloat16")
  np.testing.assert_allclose(rough, errors[..., :2], rtol=0.1, atol=1e-3)
  spoilt = jax.tree.map(lambda x: x.at[0].set(np.nan), params)
  with pytest.raises(ValueError, match="the teacher's activations are not finite"):
    head_errors((spoilt, config), choices, batches)


def test_an_error_is_what_the_loss_becomes_of_it(random_params):
  """Only the last token that is read misses one, so only its target is worse; small errors change it linearly."""
  config = presets.tiny("softmax").replace(num_heads=2, num_kv_heads=1)
  params = random_params(config)
  for number in range(config.num_layers):
    kernel = params[f"layers_{number}"]["self_attn"]["o_proj"]["kernel"]
    params[f"layers_{number}"]["self_attn"]["o_proj"]["kernel"] = kernel * 0.01
  choice = MemoryConfig(window=4, retained=(0,), sinks=1, chunk=1, state_dtype="float32")
  length = choice.window + choice.sinks + choice.chunk + 1
  tokens = np.random.default_rng(0).integers(0, 97, (1, length + 1)).astype(np.int32)
  last = np.zeros(tokens.shape, np.float32)
  last[:, -1] = 1
  batches = [{"tokens": tokens, "target_weights": weights} for weights in (last, np.roll(last, -1, 1), 0 * last)]
  errors, *nothing = head_errors((params, config), [choice], batches)

  def loss(layers):
    model = Transformer(config.replace(layers=tuple(layers)))
    return float(jax.jit(functools.partial(language_model_loss, model))(params, batches[0]).loss)

  for number in range(config.num_layers):
    layers = list(config.layers)
    layers[number] = choice
    changed = abs(loss(layers) - loss(config.layers))
    assert changed > 1e-5 and errors[number, 0, 0] == pytest.approx(changed**2 / 2, rel=0.05)
  assert np.max(nothing) < 1e-15


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "output_bias": True, "qk_norm": "all_heads"}])
def test_heads_in_another_order_compute_the_same(changes, random_params):
  config = presets.tiny("softmax").replace(num_heads=8, num_kv_heads=4, **changes)
  params = random_params(config)
  moved = dict(params)
  for i, order in enumerate(([2, 0, 3, 1], [3, 1, 2, 0])):
    moved[f"layers_{i}"] = {
      **params[f"layers_{i}"],
      "self_attn": with_order(params[f"layers_{i}"]["self_attn"], order, config),
    }
  tokens = np.arange(24).reshape(2, 12)
  run = jax.jit(lambda p: Transformer(config).apply({"params": p}, tokens, method="logits")[0])
  np.testing.assert_allclose(run(moved), run(params), atol=2e-5)
  before, after = (tree["layers_0"]["self_attn"]["k_proj"]["kernel"] for tree in (params, moved))
  assert np.abs(after - before).max() > 0
