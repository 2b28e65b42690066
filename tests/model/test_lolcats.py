"""LoLCATs' layer against its equation, token by token in float64. What all mixers share is in test_conformance.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model.mixers.lolcats import LolcatsAttention
from supra_jax.model.presets import tiny
from supra_jax.model.registry import MIXER, layer
from supra_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = tiny("lolcats").replace(value_head_dim=4)
DOCUMENTS = [[9, 1, 13], [3, 20]]  # tokens of each document, of two rows
TIME = 23


def softmax(x):
  exponential = np.exp(x - x.max())
  return exponential / exponential.sum()


def turned(x_NK, position):
  """RoPE: turns the features i and i + K/2."""
  half = x_NK.shape[-1] // 2
  angle = position * CONFIG.rope.base ** (-np.arange(half) / half)
  first, second = x_NK[:, :half], x_NK[:, half:]
  sin, cos = np.sin(angle), np.cos(angle)
  return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def by_a_loop(params, x_TD, window):
  """Computes the layer's output [T, D] for one document: for each token and head, a weight for each token before."""
  c = CONFIG

  def projected(name, heads):
    return (x_TD @ params[name]["kernel"]).reshape(len(x_TD), heads, -1)

  def phi(x_K, kernel_KK):
    return np.concatenate([softmax(x_K @ kernel_KK), softmax(-x_K @ kernel_KK)])

  q, k = projected("q_proj", c.num_heads), projected("k_proj", c.num_kv_heads)
  v = projected("v_proj", c.num_kv_heads)
  q, k = (np.stack([turned(x, t) for t, x in enumerate(y)]) for y in (q, k))
  out = np.zeros((len(x_TD), c.num_heads, c.value_width))
  for t in range(len(x_TD)):
    for h in range(c.num_heads):
      g = h // (c.num_heads // c.num_kv_heads)
      gamma = 1 / (1 + np.exp(-params["window_factor"]["weight"][h]))
      near = range(max(0, t - window + 1), t + 1)
      logits = k[near, g] @ q[t, h] / np.sqrt(c.head_dim)
      phi_q = phi(q[t, h], params["hedgehog_q"]["kernel"][h])
      far = [phi_q @ phi(k[i, g], params["hedgehog_k"]["kernel"][g]) for i in range(near[0])]
      weights = np.array([*far, *gamma * np.exp(logits - logits.max())])
      out[t, h] = weights @ v[: t + 1, g] / weights.sum()
  return out.reshape(len(x_TD), -1) @ params["o_proj"]["kernel"]


@pytest.mark.parametrize(
  ("window", "cuts", "padding"),
  [(4, [], 0), (1, [1, 2, 8, 20], 0), (4, [6, 7, 11], 2), (4, [1, 2, 8, 20], 0), (30, [6, 7, 11], 0)],
)
def test_against_a_loop(window, cuts, padding, random_params):
  """Documents of a row are apart; pieces go on from a state, with padding of rubbish behind each."""
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(CONFIG)["layers_0"][MIXER])
    x = np.random.default_rng(0).standard_normal((2, TIME, CONFIG.hidden_size)) * 2
    ids = np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]).astype(np.int32)
    told = layer("lolcats", window=window)
    mixer, model = LolcatsAttention(CONFIG, told, jnp.float64), Transformer(CONFIG.replace(layers=(told,)))

    @jax.jit
    def read(x, ids, state, held):
      lengths = jnp.full(2, x.shape[1] - padding) if padding else None
      context, state = model.place(ids, state, lengths, ids)
      out, held = mixer.apply({"params": params}, x, held, context)
      return out, state, held

    state, held, outs = None, None, []
    for piece, own in zip(np.split(x, cuts, axis=1), np.split(ids, cuts, axis=1), strict=True):
      piece = np.pad(piece, ((0, 0), (0, padding), (0, 0)), constant_values=5)
      out, state, held = read(piece, np.pad(own, ((0, 0), (0, padding))), state, held)
      outs.append(out[:, : out.shape[1] - padding])
  got = np.concatenate(outs, axis=1)
  for row, lengths in enumerate(DOCUMENTS):
    want = [by_a_loop(params, document, window) for document in np.split(x[row], np.cumsum(lengths)[:-1])]
    np.testing.assert_allclose(got[row], np.concatenate(want), atol=2e-6)  # RoPE's angles are float32


def test_a_text_within_the_window_is_read_as_by_the_teacher(random_params):
  teacher, tokens = tiny("softmax"), np.arange(40).reshape(2, 20)
  told = layer("lolcats", window=20)
  params = random_params(teacher.replace(layers=(told,) * 2))

  def logits(config):
    return np.asarray(jax.jit(lambda p: Transformer(config).apply({"params": p}, tokens, method="logits")[0])(params))

  want = logits(teacher)
  np.testing.assert_allclose(logits(teacher.replace(layers=(told,) * 2)), want, atol=2e-5)
  shorter = logits(teacher.replace(layers=(layer("lolcats", window=19),) * 2))
  np.testing.assert_allclose(shorter[:, :19], want[:, :19], atol=2e-5)
  assert np.abs(shorter[:, 19] - want[:, 19]).max() > 1e-3


def test_gradients_are_finite_where_softmax_is_a_maximum(random_params):
  """With logits of thousands most exponentials and features are 0, in float32."""
  config = CONFIG.replace(layers=(layer("lolcats", window=3),) * 2)
  params = jax.tree.map(lambda x: 30 * x, random_params(config))
  tokens = np.arange(24).reshape(2, 12)

  def loss(params):
    return Transformer(config).apply({"params": params}, tokens, method="logits")[0].mean()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
