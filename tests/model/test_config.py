import dataclasses
import json
import math

import pytest

from supra_jax.model import presets
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.softmax import SoftmaxConfig
from supra_jax.model.mixers.supra import SupraConfig
from supra_jax.model.mixers.supra_window import WindowConfig
from supra_jax.model.presets import tiny
from supra_jax.model.registry import MixerConfig, layer, layers

ODD = ModelConfig(
  vocab_size=1,
  hidden_size=3,
  intermediate_size=5,
  num_heads=6,
  num_kv_heads=3,
  head_dim=2,
  layers=layers(
    ("softmax", "supra", "supra_window", "softmax"),
    feature_map="per_head_separate",
    decay="retnet",
    decay_start=0.1 + 0.2,
    rope=False,
    qk_norm=True,
    window=2**40,
    sinks=3,
  ),
  value_head_dim=7,
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
@pytest.mark.parametrize(
  "preset", [presets.smollm2_135m, presets.mistral_7b, presets.llama_3_2_1b, presets.qwen3_0_6b, tiny]
)
def test_presets_survive_json(preset, mixer):
  c = preset(mixer)
  assert set(c.mixers) == {mixer}
  assert ModelConfig.from_json(c.to_json()) == c


def test_odd_values_survive_json():
  back = ModelConfig.from_json(ODD.to_json())
  assert back == ODD and hash(back) == hash(ODD)
  assert all(getattr(c, f.name) != f.default for c in (ODD, *ODD.layers) for f in dataclasses.fields(c))


def test_layers_of_one_mixer_that_differ_survive_json():
  """Each distinct config stands in the file once, under a label of its own."""
  shared, other = layer("supra_window", window=8), layer("supra_window", window=16, qk_norm=True)
  c = tiny().replace(
    layers=(shared, layer("softmax"), other, layer("supra"), shared, layer("supra_window"), other, layer("softmax"))
  )
  values = json.loads(c.to_json())
  first, second, third = "supra_window", "supra_window.2", "supra_window.3"
  assert values["mixers"] == [first, "softmax", second, "supra", first, third, second, "softmax"]
  assert values["mixer_configs"] == {
    first: dataclasses.asdict(shared),
    "softmax": {},
    second: dataclasses.asdict(other),
    "supra": dataclasses.asdict(SupraConfig()),
    third: dataclasses.asdict(WindowConfig()),
  }
  assert not {"layers", "supra"} & values.keys()
  back = ModelConfig.from_json(c.to_json())
  assert back == c and back.mixers == c.mixers
  # Equal fields do not make two mixers one: their configs are of other classes.
  assert layer("supra") != layer("supra_window") and tiny("supra") != tiny("supra_window")


def test_what_is_absent_has_its_default():
  values = json.loads(tiny().to_json())
  for name in ("rope", "norm", "value_head_dim", "eos_token_ids"):
    del values[name]
  values["mixer_configs"] = {"supra": {}}
  assert ModelConfig.from_json(json.dumps(values)) == tiny().replace(eos_token_ids=())
  values |= {"mixers": ["supra_window", "softmax"], "mixer_configs": {"supra_window": {"window": 7}, "softmax": {}}}
  assert ModelConfig.from_json(json.dumps(values)).layers == (WindowConfig(window=7, sinks=4), SoftmaxConfig())


def _old(mixers, **more):
  """The config.json of a tiny model, as it was before mixers had configs of their own."""
  values = json.loads(tiny().to_json()) | {"mixers": mixers} | more
  del values["mixer_configs"]
  return json.dumps(values)


PHI = {"feature_map": "per_head", "decay": "retnet", "decay_start": 0.25, "qk_norm": True}


@pytest.mark.parametrize(
  ("supra", "wanted"),
  [
    (PHI | {"window": 9, "sinks": 3}, {**PHI, "window": 9, "sinks": 3}),
    (PHI | {"window": 9}, {**PHI, "window": 9, "sinks": 0}),  # before there were sinks
    (PHI, {**PHI, "window": 64, "sinks": 0}),  # before there were windows
    ({}, {"window": 64, "sinks": 0}),
  ],
)
def test_a_config_from_before_mixers_had_configs_of_their_own(supra, wanted):
  """One key `supra` said it for all layers; what it did not say was then what it is here, sinks 0."""
  got = ModelConfig.from_json(_old(["softmax", "supra", "supra_window", "supra"], supra=supra))
  linear = {name: value for name, value in wanted.items() if name in PHI}
  assert got.layers == (SoftmaxConfig(), SupraConfig(**linear), WindowConfig(**wanted), SupraConfig(**linear))
  assert got.replace(layers=tiny().layers) == tiny()
  assert ModelConfig.from_json(got.to_json()) == got


def test_a_config_from_before_mixers_had_configs_of_their_own_and_without_any():
  assert ModelConfig.from_json(_old(["softmax"] * 2)) == tiny("softmax")
  # Such files had the key whatever their mixers; without either key something is lost, and is not made up.
  with pytest.raises(ValueError, match=r"model config: missing keys \['mixer_configs'\]"):
    ModelConfig.from_json(_old(["softmax", "supra_window"]))
  assert ModelConfig.from_json(_old(["softmax"] * 2, supra=PHI)) == tiny("softmax")


@pytest.mark.parametrize(
  ("mixers", "supra", "message"),
  [
    (["supra"], {"qk_norms": True}, r"model config: supra: unknown keys \['qk_norms'\]"),
    (["softmax"], {"qk_norms": True}, r"model config: supra: unknown keys \['qk_norms'\]"),
    (["supra"], {"qk_norm": "yes"}, r"model config: supra: qk_norm: wanted bool, got 'yes'"),
    (["supra_window"], {"window": 0}, r"window=0.*positive"),
    (["supra"], [], r"model config: supra: wanted an object, got \[\]"),
    (["supra"], None, r"model config: supra: wanted an object, got None"),
    (["supra", "delta_net"], {}, r"model config: mixers: Unknown mixer 'delta_net': wanted one of softmax, supra"),
    (["supra", "supra.2"], {}, r"model config: mixers: Unknown mixer 'supra.2'"),
    ("supra", {}, r"model config: mixers: wanted a list of names, got 'supra'"),
  ],
)
def test_what_is_wrong_in_such_a_config_is_named(mixers, supra, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_json(_old(mixers, supra=supra))


def test_presets_have_published_sizes():
  def parameters(c):
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    attention += 2 * c.head_dim * (c.qk_norm == "head")
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return c.num_layers * layer + c.hidden_size + c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)

  assert parameters(presets.smollm2_135m()) == 134_515_008
  assert parameters(presets.mistral_7b()) == 7_241_732_096
  assert parameters(presets.llama_3_2_1b()) == 1_235_814_400
  assert parameters(presets.qwen3_0_6b()) == 596_049_920


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
    ("mixers", "supra", "a list of names"),
    ("mixers", None, "a list of names"),
    ("mixers", ["supra", ["supra"]], "a list of names"),
    ("mixer_configs", None, "an object"),
    ("mixer_configs", [{}], "an object"),
    ("mixer_configs.supra", "dense", "an object"),
    ("mixer_configs.supra_window.window", 2.0, "int"),
    ("eos_token_ids", 2, "a list"),
    ("eos_token_ids", [2, "3"], "int"),
    ("rope", None, "an object"),
    ("rope", [1], "an object"),
    ("rope.base", "1e4", "float"),
    ("mixer_configs.supra.qk_norm", "yes", "bool"),
    ("mixer_configs.supra.decay_start", "0.5", "float"),
  ],
)
def test_wrong_types_are_named(path, value, wanted):
  with pytest.raises(ValueError, match=rf"{path.replace('.', '.*')}.*wanted {wanted}, got"):
    ModelConfig.from_json(json.dumps(_changed(path, value)))


@pytest.mark.parametrize(
  "path",
  [
    "norms",
    "rope.theta",
    "supra",
    "layers",
    "mixer_configs.supra.qk_norms",
    "mixer_configs.supra.window",  # which another mixer has
    "mixer_configs.supra.mixer",
    "mixer_configs.softmax.qk_norm",
  ],
)
def test_unknown_keys_are_named(path):
  with pytest.raises(ValueError, match=rf"model config.*unknown keys \['{path.split('.')[-1]}'\]"):
    ModelConfig.from_json(json.dumps(_changed(path, 1)))


def test_missing_keys_are_named():
  values = json.loads(tiny().to_json())
  del values["mixers"], values["head_dim"]
  with pytest.raises(ValueError, match=r"missing keys \['head_dim', 'mixers'\]"):
    ModelConfig.from_json(json.dumps(values))
  del values["mixer_configs"]
  with pytest.raises(ValueError, match=r"missing keys \['head_dim', 'mixers'\]"):
    ModelConfig.from_json(json.dumps(values))


def test_all_keys_that_are_wrong_are_named_at_once():
  values = json.loads(tiny().to_json()) | {"norms": 1, "layers": []}
  del values["vocab_size"]
  with pytest.raises(ValueError, match=r"unknown keys \['layers', 'norms'\], missing keys \['vocab_size'\]"):
    ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
  ("mixers", "configs", "message"),
  [
    (
      ["supra", "delta_net"],
      {"supra": {}, "delta_net": {}},
      r"mixers: Unknown mixer 'delta_net': wanted one of softmax, supra, ",
    ),
    (["delta_net.2"], {"delta_net.2": {}}, r"mixers: Unknown mixer 'delta_net': wanted one of softmax, supra, "),
    (["supra", "supra.2"], {"supra": {}}, r"mixers names 'supra\.2', and mixer_configs does not say what it is"),
    (["softmax"], {}, r"mixers names 'softmax', and mixer_configs does not say what it is"),
    (["supra"], {"supra": {}, "softmax": {}, "supra.2": {}}, r"mixer_configs has \['softmax', 'supra.2'\], which no"),
    (["supra.2"], {"supra.2": {"qk_norms": True}}, r"mixer_configs: supra.2: unknown keys \['qk_norms'\]"),
    (["supra.2"], {"supra.2": {"decay": "fast"}}, r"SupraConfig.decay='fast'"),
    (["supra_window"], {"supra_window": {"window": -1}}, r"WindowConfig.window=-1"),
    ([], {}, r"layers is empty"),
  ],
)
def test_labels_and_configs_that_do_not_belong_together_are_named(mixers, configs, message):
  values = json.loads(tiny().to_json()) | {"mixers": mixers, "mixer_configs": configs}
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_json(json.dumps(values))


def test_configs_by_name():
  assert layer("supra_window", window=8) == WindowConfig(window=8) and layer("softmax") == SoftmaxConfig()
  assert layer(WindowConfig(window=8)) == WindowConfig(window=8)
  assert layer(WindowConfig(window=8), qk_norm=True) == WindowConfig(window=8, qk_norm=True)
  names = ("supra_window", "softmax", "supra", "supra_window")
  window, linear = WindowConfig(decay="none", sinks=1), SupraConfig(decay="none")
  assert layers(names, decay="none", sinks=1) == (window, SoftmaxConfig(), linear, window)
  assert tiny().replace(layers=layers(names)).mixers == names
  for wrong in (lambda: layer("delta_net"), lambda: layers(("supra", "delta_net"))):
    with pytest.raises(ValueError, match=r"Unknown mixer 'delta_net': wanted one of softmax, supra, supra_window"):
      wrong()
  with pytest.raises(ValueError, match=r"No mixer of softmax, supra has the fields sinks, window"):
    layers(("softmax", "supra"), window=8, sinks=1, decay="none")
  with pytest.raises(TypeError, match="window"):
    layer("supra", window=8)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_object_is_refused(text):
  with pytest.raises(ValueError):
    ModelConfig.from_json(text)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 0}, r"vocab_size=0.*positive"),
    ({"hidden_size": -1}, r"hidden_size=-1.*positive"),
    ({"value_head_dim": 0}, r"value_head_dim=0.*positive"),
    ({"norm_eps": float("nan")}, r"norm_eps=nan.*positive|norm_eps: wanted a finite number, got nan"),
    ({"sliding_window": 0}, r"sliding_window=0.*positive"),
    ({"num_kv_heads": 4}, r"num_kv_heads=4 does not divide num_heads=6"),
    ({"head_dim": 7}, r"head_dim=7 is odd"),
    ({"norm": "batch_norm"}, r"norm='batch_norm'.*'rms_norm', 'layer_norm', 'layer_norm_gain'"),
  ],
)
def test_invalid_values_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny().replace(**changes)
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_json(json.dumps(json.loads(tiny().to_json()) | changes))


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((), r"layers is empty"),
    ((layer("supra"), "supra"), r"layers holds 'supra': wanted a mixer's config"),
    ((layer("supra"), ["supra"]), r"layers holds \['supra'\]"),
    ((MixerConfig(),), r"layers holds MixerConfig\(\): wanted a mixer's config"),
  ],
)
def test_layers_that_are_no_configs_are_named(given, message):
  with pytest.raises(ValueError, match=message):
    tiny().replace(layers=given)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: SupraConfig(feature_map="elu"), r"SupraConfig.feature_map='elu'.*'dense'"),
    (lambda: SupraConfig(decay="fast"), r"SupraConfig.decay='fast'"),
    (lambda: WindowConfig(window=0), r"WindowConfig.window=0.*positive"),
    (lambda: WindowConfig(sinks=-1), r"WindowConfig.sinks=-1.*0 or more"),
    (lambda: WindowConfig(decay="fast"), r"WindowConfig.decay='fast'"),
    (lambda: SupraConfig(decay_start=0.0), r"SupraConfig.decay_start=0.0.*positive"),
    (lambda: SupraConfig(decay_start=math.inf), r"SupraConfig.decay_start=inf.*positive finite number"),
    (lambda: SupraConfig(decay_start=math.nan), r"SupraConfig.decay_start=nan.*positive finite number"),
    (lambda: SupraConfig(decay_start=1e39), r"SupraConfig.decay_start=1e\+39.*a slope that float32 can hold"),
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
  given = json.dumps(_changed("mixer_configs.supra.decay_start", 0.5)).replace("0.5", text)
  with pytest.raises(ValueError, match=r"supra: decay_start: wanted a finite number, got (nan|-?inf)"):
    ModelConfig.from_json(given)


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny().vocab_size = 3
