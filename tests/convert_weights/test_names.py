"""The one table of names: all parameters of any model, and one place for each in every format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import openlm_reference as reference
import pytest

from convert_weights import names, openlm_config
from convert_weights.errors import ConversionError
from supra_jax.core.sharding import make_mesh
from supra_jax.model.placement import param_specs
from supra_jax.model.presets import tiny
from supra_jax.model.registry import MixerConfig, layer, layers
from supra_jax.model.transformer import Transformer

BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
  "changes",
  [
    {
      "layers": layers(("softmax", "supra")),
      "norm": "layer_norm",
      "post_embed_norm": True,
      "qk_norm": "head",
      **BIASES,
    },
    {"num_kv_heads": 6, "tie_embeddings": True, "qk_norm": "all_heads", "layers": layers(("supra",) * 2, qk_norm=True)},
    {"value_head_dim": 12, "layers": layers(("supra",) * 2, feature_map="per_head", qk_norm=True)},
    {"layers": layers(("supra", "softmax"), feature_map="per_head_separate"), "norm": "layer_norm_gain"},
    {"layers": layers(("supra_window", "supra")), "value_head_dim": 12, **BIASES},
    # Of one mixer, and not the same.
    {"layers": (layer("supra", qk_norm=True), layer("supra", feature_map="per_head")), "norm": "layer_norm"},
  ],
)
def test_every_parameter_once(changes):
  config = tiny().replace(**changes)
  init = functools.partial(Transformer(config).init, method="logits")
  made = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  wanted = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(made)}
  param_specs(made, make_mesh("", jax.devices()[:1]))  # a line for each, too
  table = names.parameters(config)
  assert {p.path: p.shape for p in table} == wanted and len(table) == len(wanted)
  for place in ("hf", "gguf"):
    taken = [getattr(p, place) for p in table if getattr(p, place) is not None]
    assert len(set(taken)) == len(taken)
  assert all(sorted(p.source_shape) == sorted(p.shape) for p in table)


def test_a_mixer_without_names_is_refused():
  class Other(MixerConfig):
    mixer = "other"

  with pytest.raises(ConversionError, match="Layer 1 is a 'other' layer, which has no names in other formats"):
    names.parameters(tiny().replace(layers=(layer("supra"), Other())))


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"n_heads": 2, "n_heads_kv": 2, "apply_qk_norm": True, "norm_type": "default_layer_norm"},
    {"attn_name": "torch_attn", "post_embed_norm": True, "v_head_dim": 3},
  ],
)
def test_openlms_tensors_are_filled_without_gap_or_overlap(changes):
  sizes = {"vocab_size": 61, "dim": 16, "intermediate_dim_ffn": 20, "n_layers": 2, "n_heads": 4, "n_heads_kv": 2}
  rest = {"qk_head_dim": 4, "v_head_dim": 4, "norm_type": "rms_norm", "attn_name": "linear_attn"}
  settings = {"model_type": "openlm", "apply_qk_norm": False, **sizes, **rest, **changes}
  settings["qk_head_dim"] = settings["dim"] // settings["n_heads"]
  table = names.parameters(openlm_config.model_config(settings, ""))
  shapes = names.openlm_shapes(table)
  assert shapes == reference.shapes(settings)
  used = {name: np.zeros(shape[0], int) for name, shape in shapes.items()}
  for parameter in table:
    used[parameter.openlm][parameter.openlm_row : parameter.openlm_row + parameter.source_shape[0]] += 1
  assert all((count == 1).all() for count in used.values())
