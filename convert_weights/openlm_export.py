"""ModelConfig -> config.json and tensors of OpenLM, the paper's code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from convert_weights import names, openlm_config
from convert_weights.errors import ConversionError, listing
from convert_weights.export import (
  Export,
  Part,
  Tensor,
  differences,
  essential,
  one_or_many,
  part_of,
  shared_linear_config,
)
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.supra import SupraConfig

# transformers' save_pretrained, with which the paper's code writes its models, puts it before every name.
_PREFIX = "model."
# Of names with one meaning the last: what is left out of OpenLM's own models is what it has under autocast.
_NORMS = {ours: theirs for theirs, ours in openlm_config.NORMS.items()}
_ROPES = {ours: theirs for theirs, ours in openlm_config.ROPES.items()}


def export(config: ModelConfig) -> Export:
  """A directory that the paper's code loads.

  Raises:
    ConversionError: OpenLM has no such model; names what it cannot say.
  """
  dense = _with_dense_maps(config)
  values = _config(dense)
  refused = differences(essential(dense), openlm_config.model_config(values, "As a model of OpenLM"))
  if refused:
    raise ConversionError("\n".join(["OpenLM has no such model.", *listing("it cannot say", refused)]))
  return Export(values, _tensors(config, dense))


def _with_dense_maps(config: ModelConfig) -> ModelConfig:
  """The config with OpenLM's feature maps, whose blocks off the diagonal can be 0."""
  kind = shared_linear_config(config).feature_map
  if kind == "per_head_separate" and config.num_kv_heads == config.num_heads:
    return config  # where OpenLM has one map for q and k
  layers = (
    dataclasses.replace(layer, feature_map="dense") if isinstance(layer, SupraConfig) else layer
    for layer in config.layers
  )
  return config.replace(layers=tuple(layers))


def _config(config: ModelConfig) -> dict[str, Any]:
  is_linear, supra, rope = "supra" in config.mixers, shared_linear_config(config), config.rope
  values = {
    "architectures": ["OpenLMForCausalLM"],
    "model_type": openlm_config.MODEL_TYPE,
    "dim": config.hidden_size,
    "intermediate_dim_ffn": config.intermediate_size,
    "n_layers": config.num_layers,
    "n_heads": config.num_heads,
    "n_heads_kv": config.num_kv_heads,
    "vocab_size": config.vocab_size,
    "norm_eps": config.norm_eps,
    "seq_len": config.max_positions,
    "weight_tying": config.tie_embeddings,
    "apply_qk_norm": supra.qk_norm if is_linear else config.qk_norm == "all_heads",
    "qk_head_dim": config.head_dim,
    "v_head_dim": config.value_width,
    "norm_type": _NORMS[config.norm],
    "attn_name": openlm_config.LINEAR_ATTENTION if is_linear else "auto",
    "positional_embedding_type": _ROPES[rope.kind],
    "ffn_type": "swiglu",
    "use_decay": is_linear and supra.decay != "none",
    "use_retnet_slopes": is_linear and supra.decay == "retnet",
    "decay_start": supra.decay_start if is_linear else None,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": one_or_many(config.eos_token_ids),
  }
  # What the released config has no key for is said only where it is not the default.
  if config.post_embed_norm:
    values["post_embed_norm"] = True
  if rope.base != RopeConfig.base:
    values["rotary_base_frequency"] = rope.base
  if rope.scaling == "linear":
    values["rotary_scale"] = rope.factor
  return {key: value for key, value in values.items() if value is not None or key == "decay_start"}


def _tensors(config: ModelConfig, dense: ModelConfig) -> list[Tensor]:
  """OpenLM's tensors, each below the other where it joins several parameters."""
  table = [p for p in names.parameters(dense) if p.openlm is not None]
  shapes = names.openlm_shapes(table)
  parts: dict[str, list[Part]] = {name: [] for name in shapes}
  for parameter in sorted(table, key=lambda p: p.openlm_row):
    parts[str(parameter.openlm)].append(_part(parameter, config))
  if config.tie_embeddings:
    # Under both names, as torch stores it: what is missing transformers draws anew.
    shapes[names.OPENLM_UNEMBEDDING] = shapes[names.OPENLM_EMBEDDING]
    parts[names.OPENLM_UNEMBEDDING] = parts[names.OPENLM_EMBEDDING]
  return [Tensor(_PREFIX + name, shape, parts[name]) for name, shape in shapes.items()]


def _part(parameter: names.Parameter, config: ModelConfig) -> Part:
  *module, leaf = parameter.path
  kind = shared_linear_config(config).feature_map
  if kind == "dense" or not module[-1].startswith("feature_map"):
    return part_of(parameter)
  heads = config.num_heads if module[-1] == "feature_map" else config.num_kv_heads
  if kind == "per_head":
    module[-1] = "feature_map"  # which serves q and k
  expand = _block_diagonal if leaf == "kernel" else _repeated
  return Part((*module, leaf), functools.partial(expand, heads))


def _block_diagonal(heads: int, kernel_MKJ: np.ndarray) -> np.ndarray:
  """Maps of single heads [in, out] as one over all of them, [out, in]."""
  maps, width, _ = kernel_MKJ.shape
  dense = np.zeros((heads, width, heads, width), kernel_MKJ.dtype)
  for head in range(heads):
    dense[head, :, head] = kernel_MKJ[head // (heads // maps)].T
  return dense.reshape(heads * width, heads * width)


def _repeated(heads: int, bias_MK: np.ndarray) -> np.ndarray:
  return np.repeat(bias_MK, heads // len(bias_MK), axis=0).reshape(-1)
