import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Real models, real processes, 7B compiled, many programs: half of the time of all tests. CI runs them on one of its two
# Pythons.
HEAVY = {
  "test_bucket",
  "test_calibrate",
  "test_export_torch",
  "test_faults",
  "test_finite",
  "test_fuzz",
  "test_generate",
  "test_hybrid",
  "test_layer_losses",
  "test_notebooks",
  "test_peers",
  "test_plan",
  "test_processes",
  "test_sharded",
  "test_smollm2",
  "test_streaming",
  "test_train",
  "test_window",
  "test_x64",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.stem in HEAVY:
      item.add_marker(pytest.mark.heavy)


# Accelerators multiply float32 with fewer bits unless told otherwise; here float32 means float32.
jax.config.update("jax_default_matmul_precision", "highest")


def _random_params(config, seed=0):
  from supra_jax.model.transformer import Transformer  # here, so that tests of lower floors do not need it

  shapes = jax.eval_shape(
    functools.partial(Transformer(config).init, method="logits"), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    x = rng.standard_normal(leaf.shape, np.float32)
    name = path[-1].key
    if name == "kernel":
      return jnp.asarray(x / np.sqrt(leaf.shape[-2]).astype(np.float32))
    # Positive biases keep q.k of a document's first token away from 0, where GroupNorm would blow rounding up.
    offset = {"feature_map": 0.5, "feature_map_kv": 0.5, "q_norm": 1.5, "k_norm": 1.5}.get(path[-2].key, 0.0)
    return jnp.asarray({"embedding": x, "weight": 1 + 0.3 * x, "bias": 0.3 * x + np.float32(offset)}[name])

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def random_params():
  """(config, seed) -> parameters in which no gain is 1 and no bias is 0, so that each one counts."""
  return _random_params


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """What a file compiled is no use to the next: kept, it comes to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
  """For tests of programs that run once or twice: nearly all of their time is compilation."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
