"""The tokens that a memory holds, against a loop over tokens that keeps plain lists."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.model import presets
from supra_jax.model.bounded_attention import Where, attend, empty_slots
from supra_jax.model.bounded_block import Far
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.registry import layer
from supra_jax.model.slot_layout import Layout
from supra_jax.model.stacking import stack_layers, stacks
from supra_jax.model.transformer import Transformer
from supra_jax.objectives.layer_losses import attention_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def turned(x, position):
  """RoPE in float64: pairs of features i and i + K/2 turned by position / 10^i."""
  half = x.shape[-1] // 2
  angle = np.asarray(position)[..., None] * 10.0 ** -np.arange(half)
  first, second = x[..., :half], x[..., half:]
  return np.concatenate(
    [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
  )


def by_a_loop(q, k, v, *, window, retained, sinks, chunk, reach=10**9):
  """Attention of a document and a key/value head, [T, R, K], [T, K], [T, V] -> (out [T, R, V], what is retained).

  q and k are before RoPE. Retained tokens that were reach - C or more behind the last choice, and sinks outside the
  window, are no further away than `reach`.
  """
  score, kept, out, held = np.zeros(len(q)), [], [], []
  for t in range(len(q)):
    unjudged = t // chunk * chunk
    near = range(max(unjudged - window, 0), t + 1)
    seen = sorted({*range(min(sinks, t + 1)), *kept, *near})

    def logits(j, t=t, near=near, unjudged=unjudged, kept=tuple(kept)):
      if j < sinks and j not in near:
        return turned(q[t], min(t, reach)) @ turned(k[j], j)
      if j in kept and unjudged - 1 - j >= reach - chunk:
        return turned(q[t], min(t, reach)) @ k[j]
      return turned(q[t], t) @ turned(k[j], j)

    found = np.stack([logits(j) for j in seen], axis=-1) / math.sqrt(q.shape[-1])
    weights = np.exp(found - found.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out.append(weights @ v[seen])
    score[seen] += weights.sum(0)
    if (t + 1) % chunk == 0:
      left = [i for i in (*kept, *range(max(unjudged - window, 0), max(t + 1 - window, 0))) if i >= sinks]
      kept = sorted(sorted(left, key=lambda i: -score[i] / (t + 1 - i))[:retained])
    held.append(list(kept))
  return np.array(out), held


def turned_back(k, position):
  half = k.shape[-1] // 2
  angle = position[..., None] * 10.0 ** -jnp.arange(half)
  first, second = k[..., :half], k[..., half:]
  return jnp.concatenate(
    [first * jnp.cos(angle) + second * jnp.sin(angle), second * jnp.cos(angle) - first * jnp.sin(angle)], axis=-1
  )


SIZES = [
  {"window": 5, "retained": (3,), "sinks": 2, "chunk": 4},
  {"window": 2, "retained": (6, 0), "sinks": 0, "chunk": 3},
  {"window": 1, "retained": (3, 1), "sinks": 4, "chunk": 7},
  {"window": 4, "retained": (4,), "sinks": 1, "chunk": 1},
  {"window": 6, "retained": (0,), "sinks": 2, "chunk": 2},
  {"window": 3, "retained": (2, 6, 2, 5), "sinks": 2, "chunk": 2, "reach": 11},
]


CUTS = (1, 9, 10, 30)
# What reads the whole text in packed rows, and pieces of a text alone; the other two for one of the sizes.
READ = [(cuts, packed, sizes) for cuts, packed in (((), True), (CUTS, False)) for sizes in SIZES]
READ += [((), False, SIZES[-1]), (CUTS, True, SIZES[-1])]


@pytest.mark.parametrize("cuts, packed, sizes", READ)
def test_attention_and_choices_against_a_loop(cuts, packed, sizes):
  batch, time, heads, repeats, width = 2, 43, 4, 3, 8
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, time, heads, repeats, width)) * 2
    k, v = (rng.standard_normal((batch, time, heads, width)) for _ in range(2))
    window, sinks, chunk = (sizes[name] for name in ("window", "sinks", "chunk"))
    layout = Layout(sizes["retained"])
    held = empty_slots(batch, heads, layout, ring=window + chunk, sinks=sinks, widths=(width, width), dtype=jnp.float64)
    position, reach = np.arange(time)[None, :, None], sizes.get("reach", 10**9)
    near_q, near_k = turned(q, position[..., None]), turned(k, position)
    far_q = turned(q, np.minimum(position, reach)[..., None])
    outs = []
    for start, stop in zip((0, *cuts), (*cuts, time), strict=True):
      count = np.full(batch, stop - start, np.int32)
      where = Where(
        np.full(batch, start, np.int32), count, np.zeros((batch, stop - start), np.int32), start == 0, packed
      )

      def piece(x, start=start, stop=stop):
        return x[:, start:stop].reshape(batch, stop - start, heads * repeats, width)

      far = Far(piece(far_q), reach - chunk, lambda k, position: turned_back(k, position))
      how = {"sinks": sinks, "chunk": chunk, "far": far}
      out, held = attend(piece(near_q), near_k[:, start:stop], v[:, start:stop], held, where, layout, **how)
      outs.append(np.asarray(out))
    got = np.concatenate(outs, axis=1).reshape(batch, time, heads, repeats, width)
  by_head = np.asarray(layout.by_head(held.kept_index, -1)).reshape(batch, heads, -1)
  for b in range(batch):
    for g in range(heads):
      own = {**sizes, "retained": sizes["retained"][g % len(sizes["retained"])]}
      want, kept = by_a_loop(q[b, :, g], k[b, :, g], v[b, :, g], **own)
      np.testing.assert_allclose(got[b, :, g], want, atol=1e-9)
      assert sorted(i for i in by_head[b, g].tolist() if i >= 0) == kept[-1]


def test_slots_of_heads():
  layout = Layout((3, 1, 3, 0))
  assert layout.slots == 7 and layout.begins.tolist() == [1, 0, 4, 0]
  assert layout.groups == [(0, [3], 0), (1, [1], 0), (3, [0, 2], 1)]
  numbers = np.arange(7)[None, None]
  assert layout.by_head(numbers, 9).tolist() == [[[[1, 2, 3], [0, 9, 9], [4, 5, 6], [9, 9, 9]]]]
  assert [part.tolist() for part in layout.split(numbers)] == [[[[[]]]], [[[[0]]]], [[[[1, 2, 3], [4, 5, 6]]]]]
  heads = np.arange(4)[None, None]
  assert layout.joined(layout.heads_of(jnp.asarray(heads))).tolist() == heads.tolist()
  with pytest.raises(ValueError, match=r"MemoryConfig\.retained holds -1"):
    MemoryConfig(retained=(-1,))
  with pytest.raises(ValueError, match="retained is empty"):
    MemoryConfig(retained=())
  with pytest.raises(ValueError, match="3 numbers, which do not divide 2 key/value heads"):
    from supra_jax.model.registry import mixer_class

    raise ValueError(mixer_class("memory").refusal(presets.tiny(), MemoryConfig(retained=(1, 2, 3))))


def test_a_memory_of_the_whole_text_is_softmax_attention(random_params):
  """Windows as long as the text see all of it; and a document of many tokens is not all held."""
  from supra_jax.model.transformer import Transformer

  config = presets.tiny()
  params, tokens = random_params(config.replace(layers=(layer("softmax"),) * 2)), np.arange(60).reshape(2, 30) % 97

  def logits(told):
    model = Transformer(config.replace(layers=(told,) * 2))
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t, method="logits")[0])(params, tokens))

  whole = logits(layer("softmax"))
  np.testing.assert_allclose(logits(layer("memory", window=30, retained=(0,), state_dtype="float32")), whole, atol=1e-4)
  np.testing.assert_allclose(
    logits(layer("memory", window=4, retained=(26,), chunk=8, state_dtype="float32")), whole, atol=1e-4
  )
  assert np.abs(logits(layer("memory", window=4, retained=(4,), chunk=8)) - whole).max() > 1e-2


def of_sizes(*sizes):
  told = {"window": 3, "sinks": 1, "chunk": 4, "state_dtype": "float32"}
  return presets.tiny().replace(layers=tuple(layer("memory", **told, retained=(size,)) for size in sizes))


@pytest.mark.parametrize(("packed", "remat"), [(False, "none"), (True, "block")])
def test_layers_of_different_sizes_are_one_stack(random_params, remat, packed):
  """Loss and gradients are those of layers one by one."""
  config = of_sizes(2, 3, 2, 5, 3)
  assert stacks(config.layers) == [(0, 5)]
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 33))
  how = {"segment_ids": np.repeat(np.arange(3), 11)[None].repeat(2, 0) if packed else None, "method": "logits"}

  def loss(params, model):
    params = stack_layers(params, config) if model.stacked else params
    return (model.apply({"params": params}, tokens, **how)[0] ** 2).mean()

  models = Transformer(config), Transformer(config, stacked=True, remat=remat)
  (want, wants), (got, gots) = (
    jax.jit(jax.value_and_grad(loss), static_argnums=1)(random_params(config), m) for m in models
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), gots, wants)


def test_each_layer_of_a_stack_transfers_from_its_own_size(random_params):
  """A layer's error depends on no other layer: exchanging the sizes of two layers keeps the sum."""
  softmax = presets.tiny("softmax")
  params = stack_layers(random_params(softmax), softmax)
  tokens = np.random.default_rng(0).integers(0, softmax.vocab_size, (2, 33))

  def error(*sizes):
    return attention_error(
      Transformer(of_sizes(*sizes), stacked=True), params, Transformer(softmax, stacked=True), params, tokens
    )

  small, mixed, back, large = (error(*sizes) for sizes in ((0, 0), (0, 9), (9, 0), (9, 9)))
  np.testing.assert_allclose(mixed + back, small + large, rtol=1e-5)
  assert large.sum() < mixed.sum() < small.sum()
