import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model.presets import tiny
from supra_jax.model.registry import layers
from supra_jax.model.stacking import stack_layers
from supra_jax.training.optimizer import OptimizerConfig, clip, make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_schedule():
  schedule = make_schedule(OptimizerConfig(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=10), 110)
  # Half a cosine over 100 steps, which ends one step after the last.
  middle, last = (1e-5 + 0.5 * 0.99e-3 * (1 + np.cos(np.pi * n / 100)) for n in (50, 99))
  want = {0: 1e-4, 4: 5e-4, 9: 1e-3, 10: 1e-3, 60: middle, 109: last, 110: 1e-5, 10_000: 1e-5}
  np.testing.assert_allclose([schedule(step) for step in want], list(want.values()), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(60)), middle, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 4), (4, 4), (9, 4), (0, 1)])
def test_schedule_of_short_runs_is_finite(warmup, steps):
  schedule = make_schedule(OptimizerConfig(warmup_steps=warmup), steps)
  rates = np.array([schedule(step) for step in range(steps + 1)])
  assert np.isfinite(rates).all() and (rates > 0).all() and (rates <= 3e-5 * (1 + 1e-6)).all()


def _params(random_params, stacked):
  c = tiny().replace(
    layers=layers(("supra", "supra", "softmax"), feature_map="per_head", qk_norm=True),
    norm="layer_norm",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
  )
  params = random_params(c)
  return stack_layers(params, c) if stacked else params


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("decay_what", ["matrices", "all"])
def test_weight_decay(stacked, decay_what, random_params):
  """With gradients of zero, decay is all that moves a parameter."""
  params = _params(random_params, stacked)
  tx = make_optimizer(OptimizerConfig(weight_decay=0.1, decay_what=decay_what))
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params), params)
  kinds = set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    name, leaf = path[-1].key, params
    for key in path:
      leaf = leaf[key.key]
    kinds.add(name)
    is_decayed = decay_what == "all" or name in ("kernel", "embedding")
    want = 0.1 * leaf if is_decayed else jnp.zeros_like(leaf)
    np.testing.assert_allclose(update, want, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
  assert kinds == {"kernel", "embedding", "weight", "bias"}


@pytest.mark.parametrize(("clip_norm", "factor"), [(0.0, 1.0), (2.0, 0.2), (1e3, 1.0)])
def test_clipping(clip_norm, factor):
  grads = {"a": {"kernel": jnp.array([6.0, 0.0])}, "b": {"bias": jnp.array([8.0])}}
  clipped, norm = clip(grads, clip_norm)
  np.testing.assert_allclose(norm, 10, rtol=1e-6)
  jax.tree.map(lambda got, g: np.testing.assert_allclose(got, factor * g, rtol=1e-6), clipped, grads)


def test_low_memory_moments():
  """Bfloat16 halves one moment; Adafactor keeps a row and a column of a matrix."""
  params = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
  bytes_of = {}
  for name, config in {
    "float32": OptimizerConfig(),
    "bfloat16": OptimizerConfig(moment_dtype="bfloat16"),
    "adafactor": OptimizerConfig(kind="adafactor"),
  }.items():
    tx = make_optimizer(config)
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    updates, state = tx.update(grads, tx.init(params), params)
    bytes_of[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # A first step of a constant gradient is one of size 1, whatever keeps the moments; matrices decay as well.
    np.testing.assert_allclose(updates["kernel"], 1 + config.weight_decay, rtol=1e-2)
    np.testing.assert_allclose(updates["bias"], 1, rtol=1e-2)
  matrix, vector = 256 * 512, 512
  assert abs(bytes_of["float32"] - 8 * (matrix + vector)) < 64
  assert abs(bytes_of["bfloat16"] - 6 * (matrix + vector)) < 64
  assert abs(bytes_of["adafactor"] - 4 * (256 + 512 + vector)) < 64


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("learning_rate", -1.0),
    ("warmup_steps", -1),
    ("clip_norm", -0.1),
    ("decay_what", "some"),
    ("kind", "sgd"),
    ("moment_dtype", "int8"),
  ],
)
def test_invalid_values_are_named(field, value):
  with pytest.raises(ValueError, match=rf"optimizer\.{field}={value!r}"):
    dataclasses.replace(OptimizerConfig(), **{field: value})
