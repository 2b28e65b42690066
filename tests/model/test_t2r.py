"""T2R and the linear transformer against outputs of other code, and token by token in float64.

tests/golden/openlm/t2r_ops.npz has q, k, v [B, H, T, K], W [H, F, K] and b [H, F] of phi, and the outputs and the state
that an independent torch program computed of them. What all mixers share is in test_conformance.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model.config import RopeConfig
from supra_jax.model.mixers.base import Context
from supra_jax.model.mixers.linear_transformer import LinearTransformerConfig
from supra_jax.model.mixers.supra import head_slopes
from supra_jax.model.mixers.t2r import T2R, T2RConfig, read_normalised
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layer
from supra_jax.model.rope import apply_rope, rope_table
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "openlm" / "t2r_ops.npz")
CONTEXT = Context(None, {}, *[jnp.zeros((2, 24), jnp.int32)] * 2, None, None, None)  # one document, no padding


def of(name):
  """[B, T, H, ...]"""
  return GOLDEN[name].swapaxes(1, 2)


def read(q, k, config, implementation="auto"):
  out, state = read_normalised(q, k, of("v"), None, CONTEXT, config, scale=1.0, implementation=implementation)
  return np.asarray(out), state


def phi(x):
  return np.maximum(np.einsum("bthk,hfk->bthf", x, GOLDEN["W"]) + GOLDEN["b"], 0)


@pytest.mark.parametrize("implementation", ["auto", "recurrent"])
def test_t2r_is_t2r(implementation):
  q, k = phi(of("q") * of("q").shape[-1] ** -0.5), phi(of("k"))
  out, state = read(q, k, T2RConfig(**T2R), implementation)
  np.testing.assert_allclose(out, of("kasai_clamp1e_2"), atol=1e-5)
  np.testing.assert_allclose(state.s, GOLDEN["kasai_state"], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(state.z, GOLDEN["kasai_z"], rtol=1e-5, atol=1e-5)


def test_the_linear_transformer():
  q, k = (jax.nn.elu(of(name)) + 1 for name in "qk")
  out, _ = read(q, k, LinearTransformerConfig())
  np.testing.assert_allclose(out, of("katharopoulos_elu1_eps1e_6"), atol=1e-5)


@pytest.mark.parametrize("decay", ["retnet", "none"])
def test_the_linear_transformer_with_rope_is_roformer_s(decay):
  """Its sums of weights are those before RoPE, and positive."""
  q, k = (np.asarray(jax.nn.elu(of(name)) + 1) for name in "qk")
  rotation = rope_table(RopeConfig(), q.shape[-1], jnp.arange(q.shape[1])[:, None])
  turned = [apply_rope(x, *rotation, interleaved=False) for x in (q, k)]
  config = LinearTransformerConfig(rope=True, decay=decay)
  want, sums = by_a_loop(*turned, of("v"), config, 1.0, weighed=(q, k))
  how = {"scale": 1.0, "implementation": "auto", "weighed": (q, k)}
  got, state = read_normalised(*turned, of("v"), None, CONTEXT, config, **how)
  assert (sums > 0).all()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(state.z, k.sum(1), rtol=1e-5)


def by_a_loop(q, k, v, config, scale, weighed=None):
  """The equation of `read_normalised` in float64, a weight for each pair of tokens; and all sums of the weights."""
  q, k, v, q_z, k_z = (np.float64(x) for x in (q, k, v, *(weighed or (q, k))))
  batch, time, heads = q.shape[:3]
  gamma, out, sums = np.exp(-np.float64(head_slopes(config, heads))), np.zeros_like(v), np.zeros(q.shape[:3])
  for b, t, h in np.ndindex(batch, time, heads):
    weights = scale * k[b, : t + 1, h] @ q[b, t, h]
    total = sums[b, t, h] = scale * (k_z[b, : t + 1, h] @ q_z[b, t, h]).sum()
    divided_by = max(total, config.epsilon) if config.normaliser == "clamp" else total + config.epsilon
    out[b, t, h] = (weights * gamma[h] ** np.arange(t, -1, -1)) @ v[b, : t + 1, h] / divided_by
  return out, sums


@pytest.mark.parametrize("normaliser", ["clamp", "epsilon"])
@pytest.mark.parametrize("decay", ["lightning", "retnet", "none"])
def test_decays_are_of_the_values_alone(decay, normaliser):
  config = T2RConfig(decay=decay, normaliser=normaliser, epsilon=0.5)
  q, k = phi(of("q")), phi(of("k"))
  want, _ = by_a_loop(q, k, of("v"), config, 1.0)
  got, _ = read(q, k, config)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_with_rope_a_sum_of_weights_is_negative(random_params):
  """The paper's listing then divides by 1e-6: the layer's output is large, and is finite with finite gradients."""
  q, k = of("q"), of("k")  # signs of both kinds, as after RoPE
  config = T2RConfig()
  want, sums = by_a_loop(q, k, of("v"), config, 1.0)
  assert (sums < 0).mean() > 0.2
  got, _ = read(q, k, config)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1.0)
  assert np.abs(got).max() > 1e5

  model = tiny(layer("t2r"))
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 64), np.int32)

  def loss(params):
    logits, _ = Transformer(model).apply({"params": params}, tokens, method="logits")
    return (logits**2).mean()

  value, grads = jax.value_and_grad(loss)(random_params(model))
  assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_switches(random_params):
  """Each switch of the config changes what the model says."""
  base = tiny(layer("t2r"))
  params, tokens = random_params(base), np.arange(40)[None] % base.vocab_size

  def logits(config):
    return Transformer(config).apply({"params": params}, tokens, method="logits")[0]

  want = logits(base)
  for change in (
    {"rope": False},
    {"scale_queries": True},
    {"normaliser": "epsilon", "epsilon": 1.0},
    {"decay": "none"},
  ):
    changed = base.replace(layers=(layer("t2r", **change),) * 2)
    assert np.abs(logits(changed) - want).max() > 1e-3, change


def test_supra_without_rope(random_params):
  base = tiny("supra")
  params, tokens = random_params(base), np.arange(40)[None] % base.vocab_size
  bare = base.replace(layers=(layer("supra", rope=False),) * 2)
  none = base.replace(rope=base.rope.__class__(kind="none"))
  got, want = (Transformer(c).apply({"params": params}, tokens, method="logits")[0] for c in (bare, none))
  np.testing.assert_allclose(got, want, atol=1e-6)
