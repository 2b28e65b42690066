import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model import presets
from supra_jax.model.adapters import AdapterConfig, add_adapters, merge_adapters
from supra_jax.model.stacking import stack_layers
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
  made = Transformer(presets.tiny()).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="logits")["params"]
  return stack_layers(made, presets.tiny())


def test_at_first_nothing_changes_and_merged_the_same_is_computed(params):
  """In float64, since how far float32 rounds apart depends on the machine."""
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    model, tokens = Transformer(presets.tiny(), jnp.float64, stacked=True), jnp.arange(12).reshape(2, 6)
    logits = lambda params: model.apply({"params": params}, tokens, method="logits")[0]  # noqa: E731
    adapted = add_adapters(params, AdapterConfig(rank=3, kernels="."), seed=0)
    np.testing.assert_array_equal(logits(adapted), logits(params))
    trained = jax.tree_util.tree_map_with_path(
      lambda path, x: jax.random.normal(jax.random.key(1), x.shape) if path[-1].key == "lora_b" else x, adapted
    )
    merged = merge_adapters(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert np.abs(logits(trained) - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(merged), logits(trained), rtol=1e-7, atol=1e-9)


def test_only_the_kernels_that_are_named_have_some(params):
  adapted = add_adapters(params, AdapterConfig(rank=4), seed=0)
  attention = adapted["run_0"]["self_attn"]
  assert attention["q_proj"]["lora_a"].shape == (2, 48, 4) and attention["k_proj"]["lora_b"].shape == (2, 4, 16)
  have = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(adapted) if path[-1].key == "lora_a"}
  assert have == {"q_proj", "k_proj", "v_proj", "o_proj"}
  # Layers and kernels draw apart, and a seed draws the same.
  a = attention["q_proj"]["lora_a"]
  assert not np.allclose(a[0], a[1]) and not np.allclose(a, attention["v_proj"]["lora_a"])
  again = add_adapters(params, AdapterConfig(rank=4), seed=0)
  assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (adapted, again)), strict=True))
  with pytest.raises(ValueError, match=r"adapters.kernels='qq_proj' finds no kernel"):
    add_adapters(params, AdapterConfig(rank=4, kernels="qq_proj"), seed=0)
