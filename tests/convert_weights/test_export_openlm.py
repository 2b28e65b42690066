"""What OpenLM can say and what it cannot; its joined and block-diagonal tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from round_trip import assert_same_model, save, there_and_back
from safetensors.numpy import load_file

from convert_weights import openlm_config
from convert_weights.errors import ConversionError
from convert_weights.openlm_export import export as export_openlm
from supra_jax.model.config import RopeConfig
from supra_jax.model.presets import tiny
from supra_jax.model.registry import layers
from supra_jax.model.transformer import Transformer
from supra_jax.storage.model_directory import load_model

LINEAR = tiny()


@pytest.mark.parametrize(
  "changes, refused",
  [
    (
      {"layers": layers(("supra", "softmax")), "qkv_bias": True, "sliding_window": 7},
      ["mixers=", "qkv_bias=True", "sliding_window=7"],
    ),
    ({"layers": layers(("supra_window",) * 2)}, ["mixers=('supra_window', 'supra_window')"]),
    ({"layers": layers(("supra", "supra_window"), window=7)}, ["mixers=('supra', 'supra_window')"]),
    (
      {"num_kv_heads": 6, "layers": layers(("supra", "softmax"), feature_map="per_head_separate")},
      ["mixers=('supra', 'softmax')", "supra.feature_map='per_head_separate'"],
    ),
    ({"output_bias": True, "mlp_bias": True}, ["output_bias=True", "mlp_bias=True"]),
    ({"rope": RopeConfig(scaling="llama3", factor=2.0)}, ["rope.scaling='llama3'", "rope.factor=2.0"]),
    ({"rope": RopeConfig(1e6, kind="interleaved")}, ["rope.base=1000000.0"]),
    ({"qk_norm": "head"}, ["qk_norm='head'"]),
    ({"qk_norm": "all_heads"}, ["qk_norm='all_heads'"]),
    ({"head_dim": 16}, ["qk_head_dim=16"]),
    (
      {"num_kv_heads": 6, "layers": layers(("supra",) * 2, feature_map="per_head_separate")},
      ["supra.feature_map='per_head_separate'"],
    ),
  ],
)
def test_what_openlm_cannot_say_is_refused(changes, refused):
  with pytest.raises(ConversionError, match="OpenLM") as caught:
    export_openlm(LINEAR.replace(**changes))
  assert all(name in str(caught.value) for name in refused)
  assert f"({len(refused)}):" in str(caught.value)


@pytest.mark.parametrize(
  "config",
  [
    LINEAR.replace(
      value_head_dim=12, norm="layer_norm", post_embed_norm=True, rope=RopeConfig(1e6, "linear", factor=2.0)
    ),
    LINEAR.replace(
      layers=layers(("supra",) * 2, decay_start=0.5, qk_norm=True),
      rope=RopeConfig(kind="interleaved"),
      max_positions=64,
    ),
    LINEAR.replace(layers=layers(("supra",) * 2, decay="retnet"), norm="layer_norm_gain", rope=RopeConfig(kind="none")),
    tiny("softmax").replace(num_kv_heads=6, qk_norm="all_heads", rope=RopeConfig(kind="by_head"), eos_token_ids=()),
  ],
)
def test_what_openlm_can_say(config):
  export = export_openlm(config)
  assert openlm_config.model_config(export.config, "") == config
  parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(config)))
  assert sum(np.prod(tensor.shape) for tensor in export.tensors) == parameters


def shapes_of(config):
  init = functools.partial(Transformer(config).init, method="logits")
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize("kind, groups", [("per_head", 2), ("per_head", 6), ("per_head_separate", 2)])
def test_maps_of_single_heads_become_openlm_s_dense_ones(kind, groups, random_params, tmp_path):
  config = LINEAR.replace(layers=layers(("supra",), feature_map=kind), num_kv_heads=groups, sliding_window=4)
  params = random_params(config)
  _, second = there_and_back(save(tmp_path / "first", config, params), tmp_path, format="openlm")
  assert second.config == config.replace(layers=layers(("supra",), feature_map="dense"), sliding_window=None)
  old, new = params["layers_0"]["self_attn"], second.params["layers_0"]["self_attn"]
  for heads, ours, theirs in ((6, "feature_map", "feature_map"), (groups, "feature_map_kv", "feature_map_kv")):
    maps = old.get(ours, old["feature_map"])
    x = np.random.default_rng(0).standard_normal((heads, config.head_dim))
    share = heads // len(maps["bias"])
    want = [x[h] @ maps["kernel"][h // share] + maps["bias"][h // share] for h in range(heads)]
    dense = new.get(theirs, new["feature_map"])
    np.testing.assert_allclose(x.reshape(-1) @ dense["kernel"] + dense["bias"], np.concatenate(want), atol=1e-5)


def test_tied_embeddings_in_openlm(random_params, tmp_path):
  config = LINEAR.replace(tie_embeddings=True)
  first = save(tmp_path / "first", config, random_params(config))
  exported, second = there_and_back(first, tmp_path, format="openlm")
  assert_same_model(second, load_model(first))
  tensors = load_file(exported / "model.safetensors")
  np.testing.assert_array_equal(tensors["model.output.weight"], tensors["model.tok_embeddings.weight"])
