import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model import layers
from supra_jax.model.config import RopeConfig
from supra_jax.model.presets import tiny
from supra_jax.model.rope import apply_rope, rope_frequencies, rope_table

LLAMA3 = RopeConfig(
  base=500_000.0, scaling="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def _frequencies(rope, width):
  """The formulas once more, a pair at a time, in plain Python."""
  out = []
  for i in range(0, width, 2):
    f = rope.base ** (-i / width)
    if rope.scaling == "linear":
      f /= rope.factor
    elif rope.scaling == "llama3":
      wavelength = 2 * np.pi / f
      smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
      )
      if wavelength > rope.original_max_positions / rope.low_freq_factor:
        f /= rope.factor
      elif wavelength > rope.original_max_positions / rope.high_freq_factor:
        f = (1 - smooth) * f / rope.factor + smooth * f
    elif rope.scaling == "yarn":
      # The pair that makes `beta` turns within the original context; these formulas are YaRN's own, appendix A.2.
      first, last = (
        width * np.log(rope.original_max_positions / (2 * np.pi * beta)) / (2 * np.log(rope.base))
        for beta in (rope.beta_fast, rope.beta_slow)
      )
      if rope.truncate:
        first, last = np.floor(first), np.ceil(last)
      first, last = max(first, 0), min(last, width - 1)
      ramp = min(max((i / 2 - first) / (last - first if last != first else 0.001), 0), 1)
      f = f / rope.factor * ramp + f * (1 - ramp)
    out.append(f)
  return np.array(out)


ROPES = [
  RopeConfig(),
  RopeConfig(base=1e6),
  RopeConfig(base=5e5, scaling="linear", factor=2.5),
  LLAMA3,
  RopeConfig(scaling="llama3", factor=8.0, low_freq_factor=2.0, high_freq_factor=3.0, original_max_positions=64),
  RopeConfig(base=1e6, scaling="yarn", factor=4.0, original_max_positions=32768),
  RopeConfig(scaling="yarn", factor=8.0, original_max_positions=300, beta_fast=20.5, beta_slow=2.5, truncate=False),
  RopeConfig(scaling="yarn", factor=3.0, original_max_positions=64, beta_fast=2.0, beta_slow=2.0, truncate=False),
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("width", [2, 8, 128])
def test_rope_frequencies(rope, width):
  np.testing.assert_allclose(rope_frequencies(rope, width), _frequencies(rope, width), rtol=1e-14)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_frequencies_as_transformers_has_them(rope):
  transformers = pytest.importorskip("transformers")
  rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
  kind = "default" if rope.scaling == "none" else rope.scaling
  config = transformers.LlamaConfig(
    hidden_size=256,
    num_attention_heads=4,
    head_dim=64,
    max_position_embeddings=131072,
    rope_parameters={
      "rope_type": kind,
      "rope_theta": rope.base,
      "factor": rope.factor,
      "low_freq_factor": rope.low_freq_factor,
      "high_freq_factor": rope.high_freq_factor,
      "original_max_position_embeddings": rope.original_max_positions,
      "beta_fast": rope.beta_fast,
      "beta_slow": rope.beta_slow,
      "truncate": rope.truncate,
      "attention_factor": 1.0,
    },
  )
  if kind == "default":
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
  else:
    theirs, factor = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
  assert factor == 1
  np.testing.assert_allclose(rope_frequencies(rope, 64), theirs.numpy(), rtol=2e-6)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_table_is_exact_at_any_position(rope):
  rng = np.random.default_rng(0)
  edges = [0, 1, 2**11 - 1, 2**11, 2**21 - 1, 2**21, 10**6, 10**6 + 1, 2**31 - 2, 2**31 - 1]
  positions = np.concatenate([edges, rng.integers(0, 2**31, 990)]).astype(np.int32).reshape(10, 100)
  cos, sin = jax.jit(functools.partial(rope_table, rope, 64))(positions)
  angles = positions.astype(np.float64)[..., None] * _frequencies(rope, 64)
  assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (10, 100, 32)
  assert np.abs(np.cos(angles) - cos).max() < 1e-6
  assert np.abs(np.sin(angles) - sin).max() < 1e-6


def test_the_attention_factor_is_on_both_q_and_k():
  plain, scaled = (rope_table(RopeConfig(attention_factor=f), 8, jnp.arange(3)) for f in (1.0, 1.25))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x * 1.25, y), plain, scaled)


def test_apply_rope_rotates_halves_or_neighbours():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, 3, 8), np.float32)
  angle = rng.uniform(0, 6, (2, 5, 4))
  cos, sin = (f(angle)[:, :, None].astype(np.float32) for f in (np.cos, np.sin))
  turned = apply_rope(x, cos, sin)
  # As a complex number, component i with component i + K/2.
  want = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
  np.testing.assert_allclose(turned, np.concatenate([want.real, want.imag], -1), atol=1e-6)
  want = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, :, None]
  turned = apply_rope(x, cos, sin, interleaved=True)
  np.testing.assert_allclose(turned, np.stack([want.real, want.imag], -1).reshape(x.shape), atol=1e-6)


def test_rope_scores_depend_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, 1, 1, 1, 16), np.float32)

  def score(i, j):
    turned = (apply_rope(x, *rope_table(RopeConfig(), 16, jnp.full((1, 1, 1), at))) for x, at in ((q, i), (k, j)))
    return float(jnp.vdot(*turned))

  near = score(7, 3)
  np.testing.assert_allclose([score(2**31 - 1, 2**31 - 5), score(10**6, 10**6 - 4)], near, atol=1e-5)
  assert abs(score(3, 7) - near) > 1e-2


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", "layer_norm_gain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms(kind, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((3, 5, 24)) * 0.02 + 0.05, dtype)
  weight, bias = rng.standard_normal((2, 24))
  params = {"weight": jnp.float32(weight)} | ({"bias": jnp.float32(bias)} if kind == "layer_norm" else {})
  norm = layers.Norm(kind, 1e-4, jnp.dtype(dtype))
  made = norm.init(jax.random.key(0), x)["params"]
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
  assert (made["weight"] == 1).all() and (kind != "layer_norm" or (made["bias"] == 0).all())
  got = norm.apply({"params": params}, x)
  assert got.dtype == x.dtype

  x = np.asarray(x, np.float64)
  centred = x if kind == "rms_norm" else x - x.mean(-1, keepdims=True)
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-4) * weight
  want += bias if kind == "layer_norm" else 0
  np.testing.assert_allclose(np.asarray(got, np.float64), want, **_tolerance(dtype))


def test_norms_are_torchs():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  x, weight, bias = rng.standard_normal((4, 24), np.float32), *rng.standard_normal((2, 24), np.float32)
  tensors = [torch.from_numpy(a) for a in (x, weight, bias)]
  for kind, want, params in (
    ("rms_norm", torch.nn.functional.rms_norm(tensors[0], (24,), tensors[1], 1e-3), {"weight": weight}),
    ("layer_norm_gain", torch.nn.functional.layer_norm(tensors[0], (24,), tensors[1], None, 1e-3), {"weight": weight}),
    (
      "layer_norm",
      torch.nn.functional.layer_norm(tensors[0], (24,), *tensors[1:], 1e-3),
      {"weight": weight, "bias": bias},
    ),
  ):
    np.testing.assert_allclose(layers.Norm(kind, 1e-3).apply({"params": params}, x), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 epsilon is a tenth of the variance and more
def test_group_norm(dtype, scale):
  rng = np.random.default_rng(0)
  x = jnp.asarray((rng.standard_normal((2, 7, 3, 10)) + 0.5) * scale, dtype)
  got = layers.group_norm(x)
  assert got.dtype == x.dtype
  wide = np.asarray(x, np.float64)
  centred = wide - wide.mean(-1, keepdims=True)
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, **_tolerance(dtype))


def test_group_norm_is_torchs():
  torch = pytest.importorskip("torch")
  x = np.random.default_rng(0).standard_normal((2, 7, 3, 10), np.float32) * 0.01
  want = torch.nn.GroupNorm(3, 30, affine=False)(torch.from_numpy(x).reshape(14, 30)).numpy().reshape(x.shape)
  np.testing.assert_allclose(layers.group_norm(jnp.asarray(x)), want, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(bias, random_params):
  config = tiny().replace(mlp_bias=bias)
  params = random_params(config)["layers_0"]["mlp"]
  x = np.random.default_rng(0).standard_normal((2, 3, config.hidden_size), np.float32)

  def dense(name, x):
    return x @ np.float64(params[name]["kernel"]) + (np.float64(params[name]["bias"]) if bias else 0)

  gate = dense("gate_proj", x)
  want = dense("down_proj", gate / (1 + np.exp(-gate)) * dense("up_proj", x))
  np.testing.assert_allclose(layers.SwiGLU(config).apply({"params": params}, x), want, atol=1e-4)


def _tolerance(dtype):
  return {"atol": 2e-6, "rtol": 2e-6} if dtype == "float32" else {"atol": 1e-6, "rtol": 2**-8}
