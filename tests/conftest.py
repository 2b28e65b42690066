import contextlib
import functools
import gc
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Nearly all of the time of these tests is compilation, and most of that is MLIR's, which XLA's older emitters for CPUs
# do without. Releases after 0.10 have no others, and refuse the flag; so both are tested.
if jax.__version_info__ < (0, 11) and "fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# Threads of torch wait for each other in a loop, and so burn more than half of the time of models as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Each takes minutes: begun last, one of them would keep one worker busy and all others waiting.
FIRST = ("test_smollm2", "test_faults", "test_processes", "test_train")


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_configure(config):
  """One cache of compiled programs for a run of tests, its workers and all processes that they start."""
  if hasattr(config, "workerinput"):
    return  # A worker finds the controller's in its environment.
  config.programs = tempfile.mkdtemp(prefix="supra_jax_programs_")
  names = {"jax_compilation_cache_dir": config.programs, "jax_persistent_cache_min_compile_time_secs": 0}
  for name, value in names.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_unconfigure(config):
  if programs := getattr(config, "programs", None):
    shutil.rmtree(programs, ignore_errors=True)


# Accelerators multiply float32 with fewer bits unless told otherwise; here float32 means float32.
# In processes that tests start too, which so find each other's programs in the cache.
jax.config.update("jax_default_matmul_precision", "highest")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"


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


@pytest.fixture(scope="session")
def start(tmp_path_factory):
  """The model directory that runs start from; not to be written to."""
  from supra_jax.experiments import tiny

  with _most_optimizations_off():  # made before the file's own `quick_compilation`
    return tiny.write_checkpoint(tmp_path_factory.mktemp("start") / "model", "supra")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
  """Path of a text to train on."""
  from supra_jax.experiments import tiny

  return tiny.write_text(tmp_path_factory.mktemp("text") / "topics.jsonl")


# Tracing makes so many objects that collecting them takes time; `forgotten_programs` does it once a file.
gc.disable()


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """What a file compiled is no use to the next: kept, it comes to gigabytes."""
  yield
  jax.clear_caches()
  gc.collect()
  gc.freeze()  # what is left are modules, which the next collection need not look at


@contextlib.contextmanager
def _most_optimizations_off():
  if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
    yield
    return
  jax.config.update("jax_disable_most_optimizations", True)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="module")
def quick_compilation():
  """For tests of programs that run once or twice, here or in processes that are started: most of it is compilation."""
  with _most_optimizations_off():
    yield
