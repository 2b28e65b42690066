"""ModelConfig -> config.json for transformers' own classes (Llama, Mistral, Qwen) or the code in `for_transformers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights import hf_config, mamba
from convert_weights.errors import ConversionError
from convert_weights.export import Export, essential, one_or_many, shared_linear_config, transformers_tensors
from supra_jax.core.plain_json import to_json
from supra_jax.core.schema import from_mapping
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.lolcats import LolcatsConfig
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.mixers.t2r import NormalisedConfig
from supra_jax.model.registry import MixerConfig, mixer_class, mixer_names

OWN_MODEL_TYPE = "supra"
_CODE = Path(__file__).parent / "for_transformers"
_CODE_FILES = (
  "configuration_supra.py",
  "attention_supra.py",
  "lolcats_supra.py",
  "memory_supra.py",
  "modeling_supra.py",
  "normalised_supra.py",
)
# Key of config.json -> the configs that it has, one for each layer and None for layers with another.
_A_LAYER: Mapping[str, type[MixerConfig]] = {"memories": MemoryConfig, "normalised": NormalisedConfig}
_AUTO_MAP = {
  "AutoConfig": "configuration_supra.SupraConfig",
  "AutoModel": "modeling_supra.SupraModel",
  "AutoModelForCausalLM": "modeling_supra.SupraForCausalLM",
}


def export(config: ModelConfig) -> Export:
  """Describes a directory that transformers loads: with its own class if one computes this model, else with our code.

  Raises:
    ConversionError: a layer's mixer has no form in transformers, or linear layers have different options.
  """
  tensors = transformers_tensors(config)
  ids = {"bos_token_id": config.bos_token_id, "eos_token_id": one_or_many(config.eos_token_ids)}
  text = to_json({key: value for key, value in ids.items() if value is not None}, indent=2) + "\n"
  files = {"generation_config.json": text.encode()}
  if mamba.is_mamba(config):
    return Export(mamba.config_json(config) | ids, tensors, files)
  for model_type, family in hf_config.FAMILIES.items():
    values = _family_config(config, model_type, family)
    if _is_same_model(values, config):
      return Export(values, tensors, files)
  values = {"architectures": ["SupraForCausalLM"], "auto_map": _AUTO_MAP, "model_type": OWN_MODEL_TYPE}
  files |= {name: (_CODE / name).read_bytes() for name in _CODE_FILES}
  fields = dataclasses.asdict(config.replace(layers=config.layers[:1]))
  del fields["layers"]
  others = tuple(layer for layer in config.layers if not isinstance(layer, tuple(_A_LAYER.values())))
  fields |= {"mixers": config.mixers, "supra": dataclasses.asdict(shared_linear_config(others, LolcatsConfig))}
  for key, kind in _A_LAYER.items():
    told = [dataclasses.asdict(layer) if isinstance(layer, kind) else None for layer in config.layers]
    if any(told):
      fields[key] = told
  return Export(values | fields, tensors, files)


def own_config(values: Mapping[str, Any], where: str) -> ModelConfig:
  """Reads the config.json of an export that comes with our own code.

  Args:
    values: contents of config.json.
    where: name of the file, for messages.

  Raises:
    ConversionError: the values do not describe a model.
  """
  fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"layers"} | {"mixers", "supra"}
  # All other keys, but `memories`, are those that transformers adds to every config.
  own = {key: value for key, value in values.items() if key in fields}
  try:
    told = _told(values, where)
    mixers = [mixer if layer is None else "softmax" for mixer, layer in zip(own["mixers"], told, strict=True)]
    config = ModelConfig.from_values({**own, "mixers": mixers}, where)
  except (KeyError, TypeError, ValueError) as error:
    raise ConversionError(f"{where}: {error}") from error
  layers = (layer or other for layer, other in zip(told, config.layers, strict=True))
  return config.replace(layers=tuple(layers))


def _told(values: Mapping[str, Any], where: str) -> list[MixerConfig | None]:
  """Returns the config of each layer that has one of its own; None: the options of all layers are its.

  Raises:
    ValueError: `mixers` is no list, or says something else than the configs of the layers.
  """
  mixers = values.get("mixers")
  if not isinstance(mixers, list) or not all(isinstance(mixer, str) for mixer in mixers):
    raise ValueError(f"mixers: wanted a list of names, got {mixers!r}.")
  made: list[MixerConfig | None] = [None] * len(mixers)
  for key, kind in _A_LAYER.items():
    names = _names(kind)
    configs = [None] * len(mixers) if values.get(key) is None else values[key]
    if not isinstance(configs, list) or [c is not None for c in configs] != [mixer in names for mixer in mixers]:
      wanted = "a list of one entry a layer, null for a layer whose mixer is not"
      raise ValueError(f"{key}: wanted {wanted} {' or '.join(map(repr, names))}.")
    for number, (mixer, config) in enumerate(zip(mixers, configs, strict=True)):
      if config is not None:
        made[number] = from_mapping(mixer_class(mixer).Config, config, f"{where}: {key}[{number}]")
  return made


def _names(kind: type[MixerConfig]) -> list[str]:
  """Returns the names of the mixers whose configs are of a class."""
  return [name for name in mixer_names() if issubclass(mixer_class(name).Config, kind)]


def _is_same_model(values: Mapping[str, Any], config: ModelConfig) -> bool:
  """Whether `values`, a config for one of transformers' classes, reads back as `config`, so that nothing is lost."""
  if values["model_type"] == "llama" and config.hidden_size % config.num_heads:
    return False  # transformers' LlamaConfig refuses such a hidden_size
  try:
    return hf_config.model_config(values, {}, "") == essential(config)
  except ConversionError:
    return False


def _family_config(config: ModelConfig, model_type: str, family: hf_config.Family) -> dict[str, Any]:
  """Returns the config in the keys of a family. Fields for which the family has no key are left out."""
  values = {
    "architectures": [family.architectures[0]],
    "model_type": model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    **rope_keys(config.rope),
    "tie_word_embeddings": config.tie_embeddings,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": one_or_many(config.eos_token_ids),
    "use_cache": True,
  }
  if config.max_positions is not None:
    values["max_position_embeddings"] = config.max_positions
  values |= {
    key: getattr(config, field)
    for field in ("output_bias", "qkv_bias", "mlp_bias")
    if isinstance(key := getattr(family, field), str)
  }
  if family.windows != "none":
    values["sliding_window"] = config.sliding_window
  if family.windows == "some":
    windowed = config.sliding_window is not None
    values |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else config.num_layers}
  return values


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
  """Returns RoPE as keys of config.json: rope_theta and rope_scaling (transformers 4), rope_parameters (5)."""
  kind = "default" if rope.scaling == "none" else rope.scaling
  scaling: dict[str, Any] = {"rope_type": kind}
  if rope.scaling != "none":
    scaling["factor"] = rope.factor
  if rope.scaling in ("llama3", "yarn"):
    scaling["original_max_position_embeddings"] = rope.original_max_positions
  if rope.scaling == "llama3":
    scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if rope.scaling == "yarn":
    names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
    scaling |= {name: getattr(rope, name) for name in names}
  return {
    "rope_theta": rope.base,
    "rope_scaling": None if rope.scaling == "none" else scaling,
    "rope_parameters": {"rope_theta": rope.base, **scaling},
  }
