import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supra_jax.experiments.tiny import tokenizer_json
from supra_jax.linearization.linearize import linearize, linearize_checkpoint
from supra_jax.linearization.starts import Calibrated, Identity, Lolcats, Random, Window
from supra_jax.model import registry
from supra_jax.model.mixers.lolcats import LolcatsConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.presets import tiny
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model, save_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = ("feature_map", "feature_map_kv", "q_norm", "k_norm")
TEACHER = tiny("softmax").replace(layers=registry.layers(("softmax",) * 3))


def _new(params, layer=0):
  return {name: tree for name, tree in params[f"layers_{layer}"]["self_attn"].items() if name in NEW}


def _assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def _differ(a, b):
  """Whether all drawn leaves of two layers differ; norms begin as ones and zeros."""
  drawn = [(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True) if not (x == x.ravel()[0]).all()]
  assert drawn
  return all((x != y).any() for x, y in drawn)


@pytest.mark.parametrize(
  ("kind", "heads", "groups", "qk_norm"),
  [
    # Each kind with shared and with own keys, and each of both with and without norms.
    ("dense", 6, 2, False),
    ("dense", 4, 4, True),
    ("per_head", 6, 2, True),
    ("per_head", 4, 4, False),
    ("per_head_separate", 6, 2, False),
    ("per_head_separate", 4, 4, True),
  ],
)
def test_what_is_kept_and_what_is_new(kind, heads, groups, qk_norm, random_params):
  teacher = TEACHER.replace(
    num_heads=heads,
    num_kv_heads=groups,
    value_head_dim=12,
    qkv_bias=True,
    qk_norm="head" if qk_norm else "none",
    norm="layer_norm" if qk_norm else "rms_norm",
    tie_embeddings=qk_norm,
  )
  kept = random_params(teacher)
  before = jax.tree.map(np.copy, kept)
  made = linearize(kept, teacher, Random(), mixer=SupraConfig(feature_map=kind, qk_norm=qk_norm))
  params, config = made.params, made.config
  assert config == teacher.replace(layers=registry.layers(("supra",) * 3, feature_map=kind, qk_norm=qk_norm))
  init = functools.partial(Transformer(config).init, method="logits")
  made = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, made["params"])

  _assert_same_bits(kept, before)  # the given tree is left alone
  for i in range(3):
    at = params[f"layers_{i}"]["self_attn"]
    without = params[f"layers_{i}"] | {"self_attn": {name: tree for name, tree in at.items() if name not in NEW}}
    _assert_same_bits(without, kept[f"layers_{i}"])
  _assert_same_bits(*({k: v for k, v in tree.items() if "layers" not in k} for tree in (params, kept)))

  K, G = teacher.head_dim, groups
  shapes = {
    "dense": {"feature_map": (heads * K, heads * K)} | ({"feature_map_kv": (G * K, G * K)} if heads > G else {}),
    "per_head": {"feature_map": (G, K, K)},
    "per_head_separate": {"feature_map": (heads, K, K), "feature_map_kv": (G, K, K)},
  }[kind]
  for i in range(3):
    new = _new(params, i)
    norms = {name: new.pop(name) for name in ("q_norm", "k_norm") if name in new}
    assert {name: tree["kernel"].shape for name, tree in new.items()} == shapes
    for name, tree in new.items():
      assert tree["bias"].shape == (*shapes[name][:-2], shapes[name][-1])
      bound = shapes[name][-2] ** -0.5
      for leaf in tree.values():
        # Uniform: within the bound, near it somewhere, with a mean of 0 and a variance of bound^2 / 3, give or take 4
        # standard errors.
        assert 0.6 * bound < np.abs(leaf).max() <= bound
        assert abs(leaf.mean()) < 4 * bound / np.sqrt(3 * leaf.size)
        assert abs(np.square(leaf).mean() / (bound**2 / 3) - 1) < 4 * np.sqrt(0.8 / leaf.size)
    assert set(norms) == ({"q_norm", "k_norm"} if qk_norm else set())
    for tree in norms.values():
      assert (tree["weight"] == np.ones(heads * K)).all()
      assert set(tree) == {"weight", "bias"} and (tree["bias"] == np.zeros(heads * K)).all()
    if "feature_map_kv" in new and shapes["feature_map"] == shapes["feature_map_kv"]:
      assert _differ(new["feature_map"], new["feature_map_kv"])
  assert _differ(_new(params, 0), _new(params, 1))


def test_seeds_and_places(random_params):
  kept = random_params(TEACHER)
  params = linearize(kept, TEACHER, Random(3)).params
  assert _differ(_new(linearize(kept, TEACHER, Random(4)).params), _new(params))
  # A layer's draw does not depend on which others are chosen, nor on when.
  for layers in ([-2], (2, 0)):
    some = linearize(kept, TEACHER, Random(3), layers=layers)
    chosen = {i % 3 for i in layers}
    assert some.report["layers"] == sorted(chosen)
    assert some.config.mixers == tuple("supra" if i in chosen else "softmax" for i in range(3))
    for i in range(3):
      _assert_same_bits(some.params[f"layers_{i}"], (params if i in chosen else kept)[f"layers_{i}"])
  once = linearize(kept, TEACHER, Random(3), layers=[0])
  _assert_same_bits(
    linearize(once.params, once.config, Random(3)).params, params
  )  # None: the softmax layers that are left


def test_new_parameters_have_the_dtype_of_the_old(random_params):
  kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(TEACHER))
  params = linearize(kept, TEACHER, Random(), mixer=SupraConfig(qk_norm=True)).params
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  ("layers", "message"),
  [
    ([3], "Layer 3: the model has layers 0 to 2"),
    ([0, -4], "Layer -4: the model has layers 0 to 2"),
    ([1, 0], "Layer 1 is a 'supra' layer"),
    ([-2], "Layer -2 is a 'supra' layer"),
    ([], "layers is empty: wanted numbers of layers, or None for all softmax layers"),
  ],
)
def test_wrong_layers_are_named(layers, message):
  with pytest.raises(ValueError, match=message):
    linearize({}, TEACHER.replace(layers=registry.layers(("softmax", "supra", "softmax"))), layers=layers)


def test_no_softmax_layer_is_left():
  with pytest.raises(ValueError, match=r"No layer to linearise: its layers are 3 of supra; wanted the transformer"):
    linearize({}, TEACHER.replace(layers=registry.layers(("supra",) * 3)))


def test_a_window(random_params):
  """The linear attention's own projection begins as 0, all else as without a window; layers may differ."""
  kept = random_params(TEACHER)
  made = linearize(kept, TEACHER, Window(window=7), layers=[0, 2])
  plain = linearize(kept, TEACHER, Identity(), layers=[0, 2])
  assert made.config.mixers == ("supra_window", "softmax", "supra_window")
  assert made.config.layers[0] == made.config.layers[2] == WindowConfig(window=7, sinks=4)
  for i in (0, 2):
    attention = dict(made.params[f"layers_{i}"]["self_attn"])
    (name,) = attention.pop("linear_o_proj").items()
    assert name[0] == "kernel" and name[1].shape == (48, 48) and not name[1].any()
    _assert_same_bits(attention, plain.params[f"layers_{i}"]["self_attn"])
  # The layer that is left may get a window of its own, and a linear attention of another kind.
  more = linearize(made.params, made.config, Window(window=3, sinks=0), mixer=SupraConfig(feature_map="per_head"))
  assert more.config.layers == (
    WindowConfig(window=7),
    WindowConfig(window=3, sinks=0, feature_map="per_head"),
    WindowConfig(window=7),
  )
  tokens = np.zeros((1, 9), np.int32)
  logits = jax.jit(functools.partial(Transformer(more.config).apply, method="logits"))
  assert np.isfinite(logits({"params": more.params}, tokens)[0]).all()
  for start, mixer in ((Window(window=7), None), (Identity(), WindowConfig(window=7))):
    with pytest.raises(ValueError, match="window=7: the teacher's own softmax sees 4 tokens"):
      linearize(kept, TEACHER.replace(sliding_window=4), start, mixer=mixer)


@pytest.mark.parametrize("start", [Random(), Identity()])
def test_a_base_of_rope_of_its_own(start, random_params):
  """The config's alone; and only where no softmax attention is left, which was trained with the teacher's."""
  kept = random_params(TEACHER)
  made = linearize(kept, TEACHER, start, rope_base=1e6)
  assert made.config.rope == dataclasses.replace(TEACHER.rope, base=1e6) and made.report["rope_base"] == 1e6
  other = linearize(kept, TEACHER, start)
  assert other.config.rope == TEACHER.rope and "rope_base" not in other.report
  _assert_same_bits(made.params, other.params)
  with pytest.raises(ValueError, match=r"rope_base=1e[+]06: softmax attention wants the base .* some layers keep it"):
    linearize(kept, TEACHER, start, layers=[0], rope_base=1e6)
  with pytest.raises(ValueError, match=r"rope_base=1e[+]06: .* supra_window layers have it"):
    linearize(kept, TEACHER, Window(window=2), rope_base=1e6)


def test_lolcats(random_params):
  """Feature maps begin as W = I, factors as 0.1; a text no longer than the window is read as by the teacher."""
  kept = random_params(TEACHER)
  made = linearize(kept, TEACHER, Lolcats(window=9))
  assert made.config.layers == (LolcatsConfig(window=9),) * 3
  assert made.report["start"] == {"method": "lolcats", "window": 9}
  assert made.report["mixer"] == {"mixer": "lolcats", "window": 9}
  for i in range(3):
    attention = dict(made.params[f"layers_{i}"]["self_attn"])
    for name, heads in (("hedgehog_q", TEACHER.num_heads), ("hedgehog_k", TEACHER.num_kv_heads)):
      np.testing.assert_array_equal(attention.pop(name)["kernel"], np.broadcast_to(np.eye(8), (heads, 8, 8)))
    np.testing.assert_allclose(jax.nn.sigmoid(attention.pop("window_factor")["weight"]), 0.1, rtol=1e-5)
    _assert_same_bits(attention, kept[f"layers_{i}"]["self_attn"])
  tokens = np.arange(9)[None]
  want, got = (
    jax.jit(functools.partial(Transformer(config).apply, method="logits"))({"params": params}, tokens)[0]
    for config, params in ((TEACHER, kept), (made.config, made.params))
  )
  np.testing.assert_allclose(got, want, atol=1e-4)
  with pytest.raises(ValueError, match="makes lolcats layers, not such of SupraConfig"):
    linearize(kept, TEACHER, Lolcats(), mixer="supra")
  with pytest.raises(ValueError, match="window=64: the teacher's own softmax sees 4 tokens"):
    linearize(kept, TEACHER.replace(sliding_window=4), Lolcats())


def test_a_mixer_that_is_given_is_taken_as_it_is(random_params):
  """Or refused by a start that would change it; without a start it begins with phi(x) = relu(x)."""
  kept = random_params(TEACHER)
  made = linearize(kept, TEACHER, mixer=registry.layer("supra_window", window=5, sinks=1))
  assert made.config.layers == (WindowConfig(window=5, sinks=1),) * 3
  assert made.report["start"] == {"method": "identity"}
  assert linearize(kept, TEACHER, mixer="supra").config.layers == (SupraConfig(),) * 3
  with pytest.raises(
    ValueError, match="makes supra_window layers of the mixer supra, not of supra_window: method=identity"
  ):
    linearize(kept, TEACHER, Window(window=8), mixer=WindowConfig(window=5))
  with pytest.raises(
    ValueError, match=r"start='random': wanted one of Memory\(\), Window\(\), Lolcats\(\), Calibrated\(\)"
  ):
    linearize(kept, TEACHER, "random")
  with pytest.raises(ValueError, match=r"Calibrated\.batch_size=0: wanted a whole number, 1 or more"):
    Calibrated(batch_size=0)


def test_a_mixer_that_cannot_take_over_is_refused():
  with pytest.raises(ValueError, match="The mixer 'softmax' cannot take over a trained layer"):
    linearize({}, TEACHER, Identity(), mixer=registry.layer("softmax"))


def test_nothing_left_to_linearise():
  with pytest.raises(ValueError, match="No layer to linearise"):
    linearize({}, tiny("supra"))


def test_checkpoint_to_checkpoint(tmp_path, random_params):
  params = random_params(TEACHER)
  files = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": b'{"a": 1}'}
  save_model(tmp_path / "teacher", config=TEACHER, params=params, tokenizer_files=files, source={"name": "theirs"})
  made = linearize_checkpoint(tmp_path / "teacher", tmp_path / "rnn", Random(5), layers=[0, -1])
  got = load_model(tmp_path / "rnn")
  want = linearize(params, TEACHER, Random(5), layers=[0, 2])
  assert got.config == made.config == want.config
  _assert_same_bits(got.params, want.params)
  assert got.tokenizer_files == files
  assert got.source["linearized_from"] == {"name": "theirs"}
  assert got.source["start"] == {"method": "random", "seed": 5} and got.source["layers"] == [0, 2]
  assert got.source["mixer"]["mixer"] == "supra" and got.source["mixer"]["decay"] == "lightning"
  assert json.loads((tmp_path / "rnn" / "source.json").read_text()) == got.source
