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

# The paper's code saves models with transformers' save_pretrained, which puts this prefix before every name.
_PREFIX = "model."
# If several of OpenLM's names mean the same norm, the last is written: the low-precision variant (`lp`), which differs
# under autocast only and which OpenLM's own models have.
_NORMS = {ours: theirs for theirs, ours in openlm_config.NORMS.items()}
_ROPES = {ours: theirs for theirs, ours in openlm_config.ROPES.items()}


def export(config: ModelConfig) -> Export:
  """Describes a directory that the paper's code loads.

  Raises:
    ConversionError: OpenLM has no such model; the message lists the fields that its config cannot express.
  """
  dense = _with_dense_maps(config)
  values = _config(dense)
  refused = differences(essential(dense), openlm_config.model_config(values, "As a model of OpenLM"))
  if refused:
    raise ConversionError("\n".join(["OpenLM has no such model.", *listing("it cannot express", refused)]))
  return Export(values, _tensors(config, dense))


def _with_dense_maps(config: ModelConfig) -> ModelConfig:
  """Returns the config with dense feature maps, as in OpenLM: maps per head equal a block-diagonal dense map."""
  kind = shared_linear_config(config.layers).feature_map
  if kind == "per_head_separate" and config.num_kv_heads == config.num_heads:
    # Left as it is, so that `export` refuses it: with as many key as query heads OpenLM has one map for both.
    return config
  layers = (
    dataclasses.replace(layer, feature_map="dense") if isinstance(layer, SupraConfig) else layer
    for layer in config.layers
  )
  return config.replace(layers=tuple(layers))


def _config(config: ModelConfig) -> dict[str, Any]:
  is_linear, supra, rope = "supra" in config.mixers, shared_linear_config(config.layers), config.rope
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
  # The released config.json lacks these keys, so each is written only if its value is not the default.
  if config.post_embed_norm:
    values["post_embed_norm"] = True
  if rope.base != RopeConfig.base:
    values["rotary_base_frequency"] = rope.base
  if rope.scaling == "linear":
    values["rotary_scale"] = rope.factor
  return {key: value for key, value in values.items() if value is not None or key == "decay_start"}


def _tensors(config: ModelConfig, dense: ModelConfig) -> list[Tensor]:
  """Returns OpenLM's tensors. The rows of parameters that share a tensor are concatenated, by `openlm_row`."""
  table = [p for p in names.parameters(dense) if p.openlm is not None]
  shapes = names.openlm_shapes(table)
  parts: dict[str, list[Part]] = {name: [] for name in shapes}
  for parameter in sorted(table, key=lambda p: p.openlm_row):
    parts[str(parameter.openlm)].append(_part(parameter, config))
  if config.tie_embeddings:
    # Tied embeddings are written under both names, as torch does: transformers would initialise a missing one randomly.
    shapes[names.OPENLM_UNEMBEDDING] = shapes[names.OPENLM_EMBEDDING]
    parts[names.OPENLM_UNEMBEDDING] = parts[names.OPENLM_EMBEDDING]
  return [Tensor(_PREFIX + name, shape, parts[name]) for name, shape in shapes.items()]


def _part(parameter: names.Parameter, config: ModelConfig) -> Part:
  *module, leaf = parameter.path
  kind = shared_linear_config(config.layers).feature_map
  if kind == "dense" or not module[-1].startswith("feature_map"):
    return part_of(parameter)
  heads = config.num_heads if module[-1] == "feature_map" else config.num_kv_heads
  if kind == "per_head":
    module[-1] = "feature_map"  # q and k share this map
  expand = _block_diagonal if leaf == "kernel" else _repeated
  return Part((*module, leaf), functools.partial(expand, heads))


def _block_diagonal(heads: int, kernel_MKJ: np.ndarray) -> np.ndarray:
  """Returns the kernel of the dense map, [heads * out, heads * in], that equals maps per head, [M, in, out].

  Each of the M maps is used by heads / M neighbouring heads.
  """
  maps, width, _ = kernel_MKJ.shape
  dense = np.zeros((heads, width, heads, width), kernel_MKJ.dtype)
  for head in range(heads):
    dense[head, :, head] = kernel_MKJ[head // (heads // maps)].T
  return dense.reshape(heads * width, heads * width)


def _repeated(heads: int, bias_MK: np.ndarray) -> np.ndarray:
  """Returns the bias of the dense map, [heads * K], that equals maps per head with biases [M, K]."""
  return np.repeat(bias_MK, heads // len(bias_MK), axis=0).reshape(-1)
