"""Exported layers with a bounded memory: ways to read, the cache, gradients, rounding, and their config."""

import copy
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_exports import carried, close, exported, tokens_of  # noqa: E402

import supra_jax  # noqa: E402
from convert_weights import hf_export, openlm_export  # noqa: E402
from convert_weights.errors import ConversionError  # noqa: E402
from supra_jax.model.presets import tiny  # noqa: E402
from supra_jax.model.registry import layer, mixer_class  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation", "exported_code")

EXACT = {"state_dtype": "float32"}
MIXED = tiny().replace(
  layers=(
    layer("memory", window=3, retained=(4, 1), sinks=2, chunk=4, **EXACT),
    layer("supra", decay="none"),
    layer("memory", window=2, retained=(0, 5), sinks=0, chunk=3, **EXACT),
  ),
  max_positions=24,  # later tokens meet some that are further away
)


@pytest.fixture(scope="module")
def mixed(random_params, tmp_path_factory):
  """(our model, theirs)."""
  params = random_params(MIXED)
  return supra_jax.LM(MIXED, params), exported(MIXED, params, tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("cuts", [(1,) * 60, (1, 2, 7, 20, 1, 29), (60,)], ids=["tokens", "pieces", "whole"])
@torch.no_grad()
def test_padding_anywhere_and_any_cuts(mixed, cuts):
  """Rows at different positions, of which each makes its choices after its own C tokens."""
  ours, theirs = mixed
  real = np.random.default_rng(1).random((4, 60)) < np.array([[1.0], [0.8], [0.5], [0.1]])
  tokens = tokens_of(MIXED, *real.shape)
  rows = [row[mask] for row, mask in zip(tokens, real, strict=True)]
  packed = np.stack([np.pad(row, (0, 60 - len(row))) for row in rows])
  want, _ = ours(packed, lengths=[len(row) for row in rows])
  logits, past = [], {}
  for piece, mask in zip(*(np.split(x, np.cumsum(cuts)[:-1], axis=1) for x in (tokens, real)), strict=True):
    output = theirs(torch.from_numpy(piece), attention_mask=torch.from_numpy(mask), use_cache=True, **past)
    logits.append(output.logits)
    past = carried(output)
  got = torch.cat(logits, 1).numpy()
  for row, mask, wanted in zip(got, real, want, strict=True):
    close(row[mask], wanted[: mask.sum()])


@torch.no_grad()
def test_the_cache_does_not_grow(mixed):
  """Its keys and values have the size of those in our state."""
  _, theirs = mixed
  tokens = torch.from_numpy(tokens_of(MIXED, 2, 200))
  output, seen = theirs(tokens[:, :1], use_cache=True), set()
  for t in range(1, 200):
    output = theirs(tokens[:, t : t + 1], use_cache=True, **carried(output))
    (cache,) = carried(output).values()
    seen.add(tuple(x.shape for held in cache.tensors.values() for x in held))
  assert len(seen) == 1
  for number, told in enumerate(MIXED.layers):
    if told.mixer == "memory":
      state = mixer_class("memory")(MIXED, told).init_state(2, 0)
      held = cache.tensors[number]
      assert sum(x.numel() for x in (*held[:2], *held[3:5])) == sum(
        x.size for x in (state.k, state.v, state.kept_k, state.kept_v)
      )


def test_gradients(mixed):
  """Against finite differences, in float64, with padding."""
  model = copy.deepcopy(mixed[1]).double()
  tokens = torch.from_numpy(tokens_of(MIXED, 2, 40))
  mask = torch.ones_like(tokens)
  mask[1, :7] = 0

  generator = torch.Generator().manual_seed(0)
  cotangent = torch.randn(2, 40, MIXED.vocab_size, generator=generator, dtype=torch.float64) * mask[..., None]

  def loss():
    return (model(tokens, attention_mask=mask).logits * cotangent).mean()

  loss().backward()
  for name in ("layers.0.self_attn.k_proj", "layers.0.self_attn.q_proj", "layers.2.self_attn.v_proj", "embed_tokens"):
    weight = model.model.get_submodule(name).weight
    way = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    losses = []
    with torch.no_grad():
      for step in (1e-4, -2e-4):
        weight += step * way
        losses.append(float(loss()))
      weight += 1e-4 * way
    slope = float((weight.grad * way).sum())
    assert abs(slope) > 0.01 and (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=1e-3), name


@torch.no_grad()
def test_a_state_in_bfloat16(random_params, tmp_path):
  """Keys and values are rounded as ours are, in the cache and within a call."""
  config = tiny().replace(layers=(layer("memory", window=3, retained=(4, 2), chunk=4),))
  params = random_params(config)
  tokens = tokens_of(config, 4, 60)
  model = exported(config, params, tmp_path)
  output = model(torch.from_numpy(tokens), use_cache=True)

  def ours(dtype):
    told = dataclasses.replace(config.layers[0], state_dtype=dtype)
    return np.asarray(supra_jax.LM(config.replace(layers=(told,)), params)(tokens)[0])

  # A number halfway between two that bfloat16 has may be rounded otherwise, so that the mean counts here.
  assert np.abs(output.logits.numpy() - ours("bfloat16")).mean() < 1e-4
  assert np.abs(output.logits.numpy() - ours("float32")).mean() > 1e-3
  (cache,) = carried(output).values()
  assert [x.dtype for x in cache.tensors[0] if x.ndim == 4 or x.shape[1] > 2] == [torch.bfloat16] * 4


MEMORIES = tiny().replace(
  layers=(layer("memory"), layer("supra"), layer("memory", retained=(3, 8), score="random"), layer("softmax")),
)


def test_the_config_holds_the_memory_of_each_layer():
  values = json.loads(json.dumps(hf_export.export(MEMORIES).config))
  assert values["mixers"] == ["memory", "supra", "memory", "softmax"]
  assert values["memories"] == [
    {"window": 16, "retained": [96], "sinks": 4, "chunk": 16, "score": "attention", "state_dtype": "bfloat16"},
    None,
    {"window": 16, "retained": [3, 8], "sinks": 4, "chunk": 16, "score": "random", "state_dtype": "bfloat16"},
    None,
  ]
  assert hf_export.own_config(values, "") == MEMORIES
  assert "memories" not in hf_export.export(tiny()).config


@pytest.mark.parametrize(
  "memories, said",
  [
    (None, "one entry a layer"),
    ([None] * 4, "one entry a layer"),
    ([{}, None, {}], "one entry a layer"),
    ([{}, {}, {}, None], "one entry a layer"),
    (7, "one entry a layer"),
    ([{}, None, {"window": 0}, None], "MemoryConfig.window=0"),
    ([{}, None, {"windows": 3}, None], r"memories\[2\]: .*windows"),
    ([{}, None, 5, None], r"memories\[2\]"),
  ],
)
def test_memories_that_the_layers_do_not_have_are_refused(memories, said):
  values = json.loads(json.dumps(hf_export.export(MEMORIES).config))
  with pytest.raises(ConversionError, match=said):
    hf_export.own_config(values | {"memories": memories}, "config.json")


def test_openlm_has_no_memory():
  with pytest.raises(ConversionError, match="mixer 'memory': the format has none such"):
    openlm_export.export(tiny("memory"))
