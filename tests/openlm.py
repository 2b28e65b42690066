"""The reference's tiny checkpoints as our models; a test's mapping of a few tensors, not an importer."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from supra_jax.config import ModelConfig, SupraConfig

GOLDEN = Path(__file__).parent / "golden" / "openlm"
NORMS = {"rms_norm": "rms_norm", "gain_only_lp_layer_norm": "layer_norm_gain", "default_layer_norm": "layer_norm"}


def load_config(case: str) -> ModelConfig:
  c = json.loads((GOLDEN / case / "config.json").read_text())
  return ModelConfig(
    vocab_size=c["vocab_size"],
    hidden_size=c["dim"],
    intermediate_size=c["intermediate_dim_ffn"],
    num_heads=c["n_heads"],
    num_kv_heads=c["n_heads_kv"],
    head_dim=c["qk_head_dim"],
    value_head_dim=c["v_head_dim"],
    mixers=("supra",) * c["n_layers"],
    supra=SupraConfig(decay="lightning" if c["use_decay"] else "none", decay_start=c["decay_start"]),
    norm=NORMS[c["norm_type"]],
    norm_eps=c["norm_eps"],
    tie_embeddings=c["weight_tying"],
  )


def to_params(tensors: dict, config: ModelConfig) -> dict:
  """Maps `layers.0.attention.in_proj.weight` and its like; works on weights as on their gradients."""

  def kernel(name):
    return {"kernel": np.asarray(tensors[name + ".weight"]).T}

  def split(name, names, sizes):
    parts = np.split(np.asarray(tensors[name + ".weight"]), np.cumsum(sizes)[:-1])
    return {n: {"kernel": part.T} for n, part in zip(names, parts, strict=True)}

  c = config
  q, k, v = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.value_width
  params = {
    "embed_tokens": {"embedding": np.asarray(tensors["tok_embeddings.weight"])},
    "norm": {"weight": np.asarray(tensors["norm.weight"])},
    "lm_head": kernel("output"),
  }
  for i in range(c.num_layers):
    at, ffn = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
    attention = split(at + "in_proj", ("q_proj", "k_proj", "v_proj"), (q, k, v))
    attention["o_proj"] = kernel(at + "out_proj")
    for ours, theirs in (("feature_map", "_totrain_embed"), ("feature_map_kv", "_totrain_embed_kv")):
      if at + theirs + ".weight" in tensors:
        attention[ours] = kernel(at + theirs) | {"bias": np.asarray(tensors[at + theirs + ".bias"])}
    params[f"layers_{i}"] = {
      "input_layernorm": {"weight": np.asarray(tensors[f"layers.{i}.attention_norm.weight"])},
      "self_attn": attention,
      "post_attention_layernorm": {"weight": np.asarray(tensors[f"layers.{i}.ffn_norm.weight"])},
      "mlp": split(ffn + "w12", ("gate_proj", "up_proj"), (c.intermediate_size,) * 2)
      | {"down_proj": kernel(ffn + "w3")},
    }
  return jax.tree.map(np.ascontiguousarray, params)


def load_params(case: str, config: ModelConfig) -> dict:
  tensors = load_file(GOLDEN / case / "model.safetensors")
  return to_params({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, config)


def load_golden(case: str, name: str = "golden.npz") -> dict:
  with np.load(GOLDEN / case / name) as file:
    return dict(file)
