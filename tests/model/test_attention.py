import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model import feature_maps
from supra_jax.model.mixers import softmax
from supra_jax.model.mixers.base import Context
from supra_jax.model.mixers.supra import LinearAttention, SupraConfig, head_slopes
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layers
from supra_jax.model.rope import rope_table
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _alibi(n):
  """The series as ALiBi's authors published it (Press et al. 2022)."""

  def power_of_two(n):
    start = 2 ** (-(2 ** -(np.log2(n) - 3)))
    return [start * start**i for i in range(n)]

  if np.log2(n).is_integer():
    return power_of_two(n)
  below = 2 ** int(np.floor(np.log2(n)))
  return power_of_two(below) + _alibi(2 * below)[0::2][: n - below]


@pytest.mark.parametrize("heads", [*range(1, 13), 14, 24, 32, 40, 64, 71])
def test_lightning_slopes(heads):
  slopes = head_slopes(SupraConfig(), heads)
  assert slopes.dtype == np.float32 and slopes.shape == (heads,)
  np.testing.assert_allclose(slopes, _alibi(heads), rtol=1e-6)


def test_lightning_slopes_of_the_paper():
  """With 32 heads the slowest one keeps 3.35e-4 of a token 2048 back."""
  slopes = head_slopes(SupraConfig(), 32)
  np.testing.assert_allclose(np.exp(-2048 * float(slopes[-1])), 3.35e-4, rtol=2e-3)


def test_decay_start():
  np.testing.assert_allclose(head_slopes(SupraConfig(decay_start=0.3), 4), 0.3 * 0.25 ** np.arange(4), rtol=1e-6)
  np.testing.assert_allclose(head_slopes(SupraConfig(decay_start=2.0), 8), 2.0 * 0.5 ** np.arange(8), rtol=1e-6)


def test_retnet_slopes_do_not_round_to_zero():
  slopes = head_slopes(SupraConfig(decay="retnet"), 64).astype(np.float64)
  # log(1 - x) = -x - x^2/2 - ..., to more digits than float64 has left of 1 - x.
  x = 2.0 ** -(5.0 + np.arange(64))
  np.testing.assert_allclose(slopes, x + x**2 / 2 + x**3 / 3 + x**4 / 4 + x**5 / 5, rtol=1e-6)
  assert (np.diff(slopes) < 0).all() and slopes[-1] > 0
  np.testing.assert_allclose(np.exp(-slopes[:3]), [31 / 32, 63 / 64, 127 / 128], rtol=1e-6)


def test_no_decay():
  np.testing.assert_array_equal(head_slopes(SupraConfig(decay="none"), 6), np.zeros(6, np.float32))


def _softmax_attention(q, k, v, mask):
  """Head by head and query by query, float64."""
  heads, per_group = q.shape[2], q.shape[2] // k.shape[2]
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, h in np.ndindex(*q.shape[:2], heads):
    at = np.flatnonzero(mask[b, t])
    logits = np.float64(k[b, at, h // per_group]) @ np.float64(q[b, t, h]) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max())
    out[b, t, h] = weights @ np.float64(v[b, at, h // per_group]) / weights.sum()
  return out


def test_masked_softmax_attention():
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((2, 3, 6, 8), (2, 5, 2, 8), (2, 5, 2, 4)))
  mask = rng.random((2, 3, 5)) < 0.5
  mask[..., 0] |= ~mask.any(-1)
  got = softmax.masked_softmax_attention(10 * q, k, v, mask)  # sharp, so that the largest logit must be taken off
  np.testing.assert_allclose(got, _softmax_attention(10 * q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_softmax_attention_in_blocks(window):
  """A row is cut into blocks of queries, each with the keys that it sees; beside a cache it is read whole."""
  length = 4 * softmax.LEAST_BLOCK + 3
  c = tiny("softmax").replace(sliding_window=window)
  rng = np.random.default_rng(0)
  tokens = jnp.zeros((2, length), jnp.int32)
  context, _ = Transformer(c).place(tokens, segment_ids=jnp.asarray(np.sort(rng.integers(3, size=(2, length)))))
  x = rng.standard_normal((2, length, c.hidden_size), np.float32)
  attention = softmax.SoftmaxAttention(c, c.layers[0], jnp.float32)
  params = attention.init(jax.random.key(0), x, None, context)

  def squares(x, state):
    out, _ = attention.apply(params, x, state, context)
    return (out**2).sum(), out

  at_once = jax.grad(squares, has_aux=True)
  in_blocks, whole = (at_once(x, state) for state in (None, attention.init_state(2, length)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), in_blocks, whole)
  assert "129,129]" in str(jax.make_jaxpr(lambda x: squares(x, None))(x))  # the first block of queries sees its own


def test_a_query_that_sees_nothing_stays_finite():
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, 2, 2, 4), np.float32) for _ in range(3))
  mask = np.array([[[True, False], [False, False]]])

  def first_token(q, k, v):
    out = softmax.masked_softmax_attention(q, k, v, mask)
    return out[:, 0].sum(), out

  grads, out = jax.grad(first_token, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  assert all(np.isfinite(x).all() for x in (out, *grads))
  np.testing.assert_allclose(out[:, 0], v[:, 0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "per_head", "per_head_separate"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_feature_maps(kind, heads, groups, random_params):
  """phi(x) = relu(W x + b): which W serves which head, written out a head at a time."""
  width = 8
  config = tiny().replace(num_heads=heads, num_kv_heads=groups, layers=layers(("supra",) * 2, feature_map=kind))
  params = random_params(config)["layers_0"]["self_attn"]
  q_map, k_map = feature_maps.make_feature_maps(config, kind, jnp.float32)
  own_k_map = kind == "per_head_separate" or (kind == "dense" and groups < heads)
  assert (k_map is not None) == own_k_map == ("feature_map_kv" in params)

  rng = np.random.default_rng(0)
  for x_heads, module, name in ((heads, q_map, "feature_map"), (groups, k_map, "feature_map_kv")):
    if module is None:
      module, name = q_map, "feature_map"
    x = rng.standard_normal((2, 3, x_heads, width), np.float32)
    kernel, bias = (np.float64(params[name][leaf]) for leaf in ("kernel", "bias"))
    if kind == "dense":
      assert kernel.shape == (x_heads * width, x_heads * width)
      want = (x.reshape(2, 3, -1) @ kernel + bias).reshape(x.shape)
    else:
      maps = heads if kind == "per_head_separate" and name == "feature_map" else groups
      assert kernel.shape == (maps, width, width)
      want = np.stack([x[:, :, h] @ kernel[h * maps // x_heads] + bias[h * maps // x_heads] for h in range(x_heads)], 2)
    got = module.apply({"params": params[name]}, x)
    np.testing.assert_allclose(got, np.maximum(want, 0), atol=1e-5)

    before = {"kernel": rng.standard_normal((5, x_heads * width), np.float32), "bias": x[0, 0].ravel()}
    inputs = rng.standard_normal((2, 3, 5), np.float32)
    with_w = feature_maps.into_projection(before, params[name])
    projected = [(inputs @ p["kernel"] + p["bias"]).reshape(x.shape) for p in (before, with_w)]
    want = module.apply({"params": params[name]}, projected[0])
    got = module.apply({"params": {"bias": params[name]["bias"]}}, projected[1])
    np.testing.assert_allclose(got, want, atol=1e-5)


def _linear_attention_layer(config, params, x_TD):
  """The paper's steps in float64, a head and a token at a time."""
  p = jax.tree.map(np.float64, params)
  H, G, K, V = config.num_heads, config.num_kv_heads, config.head_dim, config.value_width
  told = config.layers[0]
  kind, time = told.feature_map, len(x_TD)

  def dense(name, x):
    return x @ p[name]["kernel"] + p[name].get("bias", 0)

  def phi(x_TNK, name, groups):
    maps = p[name if name in p else "feature_map"]
    if kind == "dense":
      y = x_TNK.reshape(time, -1) @ maps["kernel"] + maps["bias"]
      return np.maximum(y, 0).reshape(x_TNK.shape)
    per_map = x_TNK.shape[1] // groups
    y = [x_TNK[:, h] @ maps["kernel"][h // per_map] + maps["bias"][h // per_map] for h in range(x_TNK.shape[1])]
    return np.maximum(np.stack(y, 1), 0)

  def norm(x_TNK, name, width):  # RMSNorm over a head, or over all together
    x = x_TNK.reshape(time, -1, width)
    return (x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p[name]["weight"]).reshape(x_TNK.shape)

  q, k = dense("q_proj", x_TD).reshape(time, H, K), dense("k_proj", x_TD).reshape(time, G, K)
  if config.qk_norm != "none":
    widths = (K, K) if config.qk_norm == "head" else (H * K, G * K)
    q, k = (norm(x, f"{n}_proj_norm", width) for x, n, width in zip((q, k), "qk", widths, strict=True))
  q, k = phi(q, "feature_map", H if kind == "per_head_separate" else G), phi(k, "feature_map_kv", G)
  v = dense("v_proj", x_TD).reshape(time, G, V)
  k, v = (np.stack([x[:, h * G // H] for h in range(H)], 1) for x in (k, v))
  if told.qk_norm:
    q, k = norm(q, "q_norm", H * K), norm(k, "k_norm", H * K)
  turn = np.exp(1j * np.outer(np.arange(time), config.rope.base ** (-np.arange(0, K, 2) / K)))[:, None]
  q, k = ((x[..., : K // 2] + 1j * x[..., K // 2 :]) * turn for x in (q, k))

  gamma, out = np.exp(-np.float64(head_slopes(told, H))), np.zeros((time, H, V))
  state = np.zeros((H, K // 2, V), complex)
  for t, h in np.ndindex(time, H):
    state[h] = gamma[h] * state[h] + np.outer(k[t, h].conj(), v[t, h])
    o = (q[t, h] @ state[h]).real / np.sqrt(K)
    out[t, h] = (o - o.mean()) / np.sqrt(o.var() + 1e-5)
  return dense("o_proj", out.reshape(time, -1)), np.concatenate([state.real, -state.imag], 1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["dense", "per_head", "per_head_separate"])
@pytest.mark.parametrize(
  ("groups", "value_width", "decay", "teachers_norm"),
  [(2, 8, "lightning", "none"), (6, 12, "retnet", "all_heads"), (3, 4, "none", "head")],
)
def test_linear_attention_layer(groups, value_width, decay, teachers_norm, kind, qk_norm, random_params):
  config = tiny().replace(
    num_kv_heads=groups,
    value_head_dim=value_width,
    qkv_bias=True,
    output_bias=True,
    qk_norm=teachers_norm,
    layers=layers(("supra",) * 2, feature_map=kind, decay=decay, qk_norm=qk_norm),
  )
  params = random_params(config)["layers_0"]["self_attn"]
  x = np.random.default_rng(0).standard_normal((2, 13, config.hidden_size), np.float32)
  place = jnp.broadcast_to(jnp.arange(13), (2, 13))
  rotation = rope_table(config.rope, config.head_dim, place[..., None])
  context = Context(rotation, {}, index=place, first=0 * place, lengths=None, segment_ids=None, continues=None)
  layer = LinearAttention(config, config.layers[0])
  got, state = jax.jit(lambda params, x: layer.apply({"params": params}, x, None, context))(params, x)
  for row in range(2):
    want, want_state = _linear_attention_layer(config, params, x[row])
    np.testing.assert_allclose(got[row], want, atol=1e-4)
    np.testing.assert_allclose(state.s[row], want_state, atol=1e-5 * np.abs(want_state).max())
