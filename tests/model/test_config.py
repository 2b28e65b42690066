import dataclasses
import json
import math

import pytest

from supra_jax.model import presets
from supra_jax.model.config import ModelConfig, RopeConfig, SupraConfig
from supra_jax.model.presets import tiny

ODD = ModelConfig(
  vocab_size=1,
  hidden_size=3,
  intermediate_size=5,
  num_heads=6,
  num_kv_heads=3,
  head_dim=2,
  mixers=("softmax", "supra", "softmax"),
  value_head_dim=7,
  supra=SupraConfig(feature_map="per_head_separate", decay="retnet", decay_start=0.1 + 0.2, qk_norm=True),
  norm="layer_norm_gain",
  norm_eps=1e-300,
  rope=RopeConfig(500_000.25, "llama3", 32.5, 1.25, 4.75, 4096, "by_head", 31.5, 1.5, False, 0.75),
  qk_norm="head",
  post_embed_norm=True,
  sliding_window=1,
  tie_embeddings=True,
  qkv_bias=True,
  output_bias=True,
  mlp_bias=True,
  max_positions=2**40,
  bos_token_id=0,
  eos_token_ids=(0, 2, 128_009),
)


@pytest.mark.parametrize("mixer", ["softmax", "supra", "supra_window"])
@pytest.mark.parametrize("preset", [presets.smollm2_135m, presets.mistral_7b, tiny])
def test_presets_survive_json(preset, mixer):
  c = preset(mixer)
  assert set(c.mixers) == {mixer}
  assert ModelConfig.from_json(c.to_json()) == c


def test_odd_values_survive_json():
  back = ModelConfig.from_json(ODD.to_json())
  assert back == ODD and hash(back) == hash(ODD)
  assert all(getattr(ODD, f.name) != f.default for f in dataclasses.fields(ModelConfig))


def test_what_is_absent_has_its_default():
  values = json.loads(tiny().to_json())
  for name in ("supra", "rope", "norm", "value_head_dim", "eos_token_ids"):
    del values[name]
  assert ModelConfig.from_json(json.dumps(values)) == tiny().replace(eos_token_ids=())


def test_a_config_from_before_there_were_windows():
  values = json.loads(tiny().to_json())
  del values["supra"]["window"], values["supra"]["sinks"]
  assert ModelConfig.from_json(json.dumps(values)) == tiny()


def test_presets_have_published_sizes():
  def parameters(c):
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return c.num_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)

  assert parameters(presets.smollm2_135m()) == 134_515_008
  assert parameters(presets.mistral_7b()) == 7_241_732_096


def _changed(path, value):
  values = json.loads(ODD.to_json())
  *parents, last = path.split(".")
  at = values
  for name in parents:
    at = at[name]
  at[last] = value
  return values


@pytest.mark.parametrize(
  ("path", "value", "wanted"),
  [
    ("vocab_size", 97.0, "int"),
    ("vocab_size", "97", "int"),
    ("vocab_size", True, "int"),
    ("vocab_size", None, "int"),
    ("norm_eps", "1e-5", "float"),
    ("norm_eps", True, "float"),
    ("tie_embeddings", 1, "bool"),
    ("sliding_window", 4.5, "int"),
    ("mixers", "supra", "a list"),
    ("eos_token_ids", 2, "a list"),
    ("eos_token_ids", [2, "3"], "int"),
    ("rope", None, "an object"),
    ("rope", [1], "an object"),
    ("rope.base", "1e4", "float"),
    ("supra.qk_norm", "yes", "bool"),
    ("supra.decay_start", "0.5", "float"),
  ],
)
def test_wrong_types_are_named(path, value, wanted):
  with pytest.raises(ValueError, match=rf"{path.replace('.', '.*')}.*wanted {wanted}, got"):
    ModelConfig.from_json(json.dumps(_changed(path, value)))


@pytest.mark.parametrize("path", ["norms", "rope.theta", "supra.qk_norms"])
def test_unknown_keys_are_named(path):
  with pytest.raises(ValueError, match=rf"model config.*unknown keys \['{path.split('.')[-1]}'\]"):
    ModelConfig.from_json(json.dumps(_changed(path, 1)))


def test_missing_keys_are_named():
  values = json.loads(tiny().to_json())
  del values["mixers"], values["head_dim"]
  with pytest.raises(ValueError, match=r"missing keys \['head_dim', 'mixers'\]"):
    ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_object_is_refused(text):
  with pytest.raises(ValueError):
    ModelConfig.from_json(text)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 0}, r"vocab_size=0.*positive"),
    ({"hidden_size": -1}, r"hidden_size=-1.*positive"),
    ({"value_head_dim": 0}, r"value_width=0.*positive"),
    ({"norm_eps": float("nan")}, r"norm_eps=nan.*positive|norm_eps: wanted a finite number, got nan"),
    ({"sliding_window": 0}, r"sliding_window=0.*positive"),
    ({"num_kv_heads": 4}, r"num_kv_heads=4 does not divide num_heads=6"),
    ({"head_dim": 7}, r"head_dim=7 is odd"),
    ({"mixers": ()}, r"mixers is empty"),
    ({"mixers": ("supra", "mamba")}, r"mixers holds 'mamba'.*'softmax', 'supra'"),
    ({"mixers": ("supra", ["supra"])}, r"mixers holds \['supra'\]"),
    ({"norm": "batch_norm"}, r"norm='batch_norm'.*'rms_norm', 'layer_norm', 'layer_norm_gain'"),
  ],
)
def test_invalid_values_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny().replace(**changes)
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_json(json.dumps(json.loads(tiny().to_json()) | changes))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SupraConfig(feature_map="elu"), r"SupraConfig.feature_map='elu'.*'dense'"),
    (lambda: SupraConfig(decay="fast"), r"SupraConfig.decay='fast'"),
    (lambda: SupraConfig(window=0), r"SupraConfig.window=0.*positive"),
    (lambda: SupraConfig(sinks=-1), r"SupraConfig.sinks=-1.*0 or more"),
    (lambda: SupraConfig(decay_start=0.0), r"SupraConfig.decay_start=0.0.*positive"),
    (lambda: SupraConfig(decay_start=math.inf), r"SupraConfig.decay_start=inf.*positive finite number"),
    (lambda: SupraConfig(decay_start=math.nan), r"SupraConfig.decay_start=nan.*positive finite number"),
    (lambda: SupraConfig(decay_start=1e39), r"SupraConfig.decay_start=1e\+39: wanted a slope that float32 can hold"),
    (lambda: RopeConfig(base=math.inf), r"RopeConfig.base=inf.*positive finite number"),
    (lambda: RopeConfig(base=0.0), r"RopeConfig.base=0.0.*positive"),
    (lambda: RopeConfig(scaling="ntk"), r"RopeConfig.scaling='ntk'.*'llama3'"),
    (lambda: RopeConfig(factor=-2.0), r"RopeConfig.factor=-2.0.*positive"),
    (lambda: RopeConfig(scaling="llama3", high_freq_factor=1.0), "high_freq_factor > low_freq_factor, got 1.0"),
    (lambda: RopeConfig(scaling="yarn", beta_fast=0.5), "beta_fast >= beta_slow, got 10000.0, 0.5 and 1.0"),
    (lambda: RopeConfig(kind="alibi"), r"RopeConfig.kind='alibi'.*'by_head'"),
  ],
)
def test_invalid_parts_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_named(text):
  given = json.dumps(_changed("supra.decay_start", 0.5)).replace("0.5", text)
  with pytest.raises(ValueError, match=r"supra: decay_start: wanted a finite number, got (nan|-?inf)"):
    ModelConfig.from_json(given)


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny().vocab_size = 3
