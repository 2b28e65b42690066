import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from supra_jax.model import costs as flops
from supra_jax.model import presets
from supra_jax.model.registry import layer, layers
from supra_jax.model.transformer import Transformer

TIME = 12
SMALL = presets.tiny().replace(value_head_dim=12)


def products(jaxpr) -> int:
  """FLOPs of all matrix products of a jaxpr, those inside a scan as often as it turns."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    inside = [products(inner) for inner in core.jaxprs_in_params(equation.params)]
    # A cond here chooses a platform: all branches multiply the same.
    total += max(inside) if equation.primitive.name == "cond" else turns * sum(inside)
  return total


def traced_products(model_config, *, gradient: bool) -> float:
  """FLOPs a token of the products that the model is made of."""
  model = Transformer(model_config, implementation="recurrent")
  tokens = jnp.zeros((1, TIME), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, method="logits"))

  def total(params):
    return model.apply(params, tokens, method="logits")[0].sum()

  return products(jax.make_jaxpr(jax.grad(total) if gradient else total)(params).jaxpr) / TIME


class TestFlops:
  @pytest.mark.parametrize(
    "changes",
    [
      {},
      {"num_kv_heads": 6},
      {"tie_embeddings": True, "layers": layers(("supra",) * 2, feature_map="per_head", qk_norm=True)},
      {"layers": layers(("supra",) * 2, feature_map="per_head_separate")},
    ],
  )
  def test_supra_forward_is_what_the_model_multiplies(self, changes):
    c = SMALL.replace(**changes)
    # S += k v^T is no product of matrices in a jaxpr.
    outer_products = 2 * c.num_layers * c.num_heads * c.head_dim * c.value_width
    assert traced_products(c, gradient=False) + outer_products == flops.train_flops_per_token(c, TIME) / 3

  def test_softmax_forward_and_backward_are_what_the_model_multiplies(self):
    c = SMALL.replace(layers=layers(("softmax",) * 2))
    # The traced model multiplies the masked half too: T keys a token where (T + 1)/2 count.
    masked = 6 * c.num_layers * c.num_heads * (c.head_dim + c.value_width) * (TIME - (TIME + 1) / 2)
    assert traced_products(c, gradient=True) - masked == flops.train_flops_per_token(c, TIME)

  @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 2), (5, 1), (TIME, 0), (TIME, 3), (100, 1)])
  def test_supra_window_forward_is_what_the_model_multiplies(self, window, sinks):
    c = SMALL.replace(layers=layers(("supra_window",) * 2, window=window, sinks=sinks))
    block = min(window, TIME)
    # Keys a token, masked and padded ones included.
    traced = -(-TIME // block) * block * (sinks + window + block) / TIME
    seen = sum(min(i + 1, window + sinks) for i in range(TIME)) / TIME
    masked = 2 * c.num_layers * c.num_heads * (c.head_dim + c.value_width) * (traced - seen)
    outer_products = 2 * c.num_layers * c.num_heads * c.head_dim * c.value_width
    wanted = flops.train_flops_per_token(c, TIME) / 3
    assert traced_products(c, gradient=False) - masked + outer_products == pytest.approx(wanted, rel=1e-12)

  def test_mistral_by_hand(self):
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    softmax, supra = 32 * 256 * 4097 / 2, 4096**2 + 1024**2 + 2 * 32 * 128 * 128
    unembedding = 4096 * 32000
    assert flops.train_flops_per_token(presets.mistral_7b(), 4096) == 6 * (32 * (layer + softmax) + unembedding)
    for time in (1, 4096, 10**6):
      rnn = flops.train_flops_per_token(presets.mistral_7b("supra"), time)
      assert rnn == 6 * (32 * (layer + supra) + unembedding)

  @pytest.mark.parametrize("window", [1, 5, TIME, 100, None])
  def test_window(self, window):
    c = SMALL.replace(layers=layers(("softmax",)), sliding_window=window)
    seen = sum(min(i + 1, window or TIME) for i in range(TIME)) / TIME
    one = flops.train_flops_per_token(c.replace(sliding_window=1), TIME)
    more = 6 * c.num_heads * (c.head_dim + c.value_width) * (seen - 1)
    assert flops.train_flops_per_token(c, TIME) - one == pytest.approx(more, rel=1e-9)

  def test_layers_of_a_hybrid_add_up(self):
    both, softmax, supra = (
      flops.train_flops_per_token(SMALL.replace(layers=layers(mixers)), TIME)
      for mixers in (("softmax", "supra"), ("softmax",) * 2, ("supra",) * 2)
    )
    assert 2 * both == softmax + supra

  def test_layers_of_one_mixer_that_differ_add_up(self):
    configs = layer("supra_window", window=2), layer("supra_window", window=9, feature_map="per_head")
    mixed, *each = (
      flops.train_flops_per_token(SMALL.replace(layers=chosen), TIME)
      for chosen in (configs, configs[:1] * 2, configs[1:] * 2)
    )
    assert 2 * mixed == pytest.approx(sum(each), rel=1e-12) and each[0] != each[1]

  def test_no_token(self):
    with pytest.raises(ValueError, match="sequence_length=0"):
      flops.train_flops_per_token(SMALL, 0)


class TestUtilisation:
  def test_peaks(self):
    assert flops.peak_flops(SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")) == 989.4e12
    assert flops.peak_flops(SimpleNamespace(device_kind="TPU v5 lite")) == 197e12
    assert flops.peak_flops(SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert flops.peak_flops(SimpleNamespace(device_kind="cpu")) is None

  def test_share(self):
    assert flops.mfu(1000, 2e9, 10e12) == 0.2
    assert flops.mfu(1000, 2e9, None) is None
