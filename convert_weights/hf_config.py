"""A Hugging Face `config.json` of a Llama or a Mistral -> ModelConfig, or a refusal by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from supra_jax.config import ModelConfig, RopeConfig

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# What transformers assumes where a config is silent. Shapes have no default here: a config without them is broken.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  "llama": {"num_key_value_heads": None, "sliding_window": None},
  "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_BASE = 10_000.0

_TRANSLATED = {
  "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
  "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
  "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
  "sliding_window", "layer_types", "bos_token_id", "eos_token_id", "pretraining_tp", "partial_rotary_factor",
}  # fmt: skip
# Keys that public Llama and Mistral checkpoints carry and that leave the forward pass alone.
_HARMLESS = {
  "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path",
  "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop", "chunk_size_feed_forward",
  "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
  "encoder_no_repeat_ngram_size", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout",
  "hidden_dropout_prob", "id2label", "initializer_range", "is_llama_config", "label2id", "length_penalty",
  "max_length", "max_sequence_length", "min_length", "model_max_length", "neftune_noise_alpha",
  "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
  "output_hidden_states", "output_scores", "pad_token_id", "problem_type", "repetition_penalty", "resid_pdrop",
  "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
  "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version", "typical_p",
  "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip
_ROPE_KEYS = {
  "default": set[str](),
  "linear": {"factor"},
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
  """Translates a config.

  Args:
    config: contents of config.json, in the older spelling (rope_theta, rope_scaling) or the newer (rope_parameters).
    generation: contents of generation_config.json, or empty; adds ids that end a text.
    where: names the file in messages.

  Raises:
    ConversionError: something in it is not supported, missing or contradictory; all of it is listed.
  """
  reader = ConfigReader(config)
  model_type = config.get("model_type")
  if model_type not in _ARCHITECTURES:
    raise ConversionError(f"{where}: model_type={model_type!r} is not supported: only {', '.join(_ARCHITECTURES)}.")
  reader.only("architectures", [_ARCHITECTURES[model_type]])
  reader.only("hidden_act", "silu")
  reader.only("pretraining_tp", 1)
  reader.only("partial_rotary_factor", 1)
  if model_type == "mistral":
    # transformers ignores these keys for Mistral, so a true one says that the file is not what it seems.
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
  reader.unknown_keys(_TRANSLATED | _HARMLESS)
  vocab_size = reader.required("vocab_size")
  hidden_size, num_heads = reader.required("hidden_size"), reader.required("num_attention_heads")
  if config.get("head_dim") is None and hidden_size % num_heads:
    reader.refuse("hidden_size", f"not divisible by num_attention_heads={num_heads}, and head_dim is not given")
  kv_default = _DEFAULTS[model_type]["num_key_value_heads"] if "num_key_value_heads" not in config else None
  attention_bias = reader.flag("attention_bias")
  translated = {
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": reader.required("intermediate_size"),
    "num_heads": num_heads,
    "num_kv_heads": reader.number("num_key_value_heads", int, kv_default or num_heads),
    "head_dim": reader.number("head_dim", int, hidden_size // num_heads),
    "mixers": ("softmax",) * reader.required("num_hidden_layers"),
    "norm_eps": reader.number("rms_norm_eps", float, _DEFAULT_NORM_EPS),
    "sliding_window": _sliding_window(reader, model_type),
    "tie_embeddings": reader.flag("tie_word_embeddings"),
    "qkv_bias": attention_bias,
    "output_bias": attention_bias,
    "mlp_bias": reader.flag("mlp_bias"),
    "max_positions": reader.number("max_position_embeddings", int, None),
  }
  rope = _rope(reader)
  generation_reader = ConfigReader(generation)
  bos = reader.token_ids("bos_token_id", vocab_size) or generation_reader.token_ids("bos_token_id", vocab_size)
  eos = [i for r in (reader, generation_reader) for i in r.token_ids("eos_token_id", vocab_size, many=True)]
  refused = reader.refused + [f"generation_config.json: {line}" for line in generation_reader.refused]
  if refused:
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *listing("refused", refused)]))
  try:
    return ModelConfig(
      **translated, rope=rope, bos_token_id=bos[0] if bos else None, eos_token_ids=tuple(dict.fromkeys(eos))
    )
  except ValueError as error:
    raise ConversionError(f"{where}: {error}") from error


def _sliding_window(reader: ConfigReader, model_type: str) -> int | None:
  values = reader.values
  window = reader.number("sliding_window", int, None)
  if model_type == "llama":
    reader.only("sliding_window")
  elif "sliding_window" not in values:
    window = _DEFAULTS[model_type]["sliding_window"]
  layer_types = values.get("layer_types")
  if layer_types is not None:
    expected = "full_attention" if window is None else "sliding_attention"
    if not isinstance(layer_types, list) or layer_types != [expected] * (values.get("num_hidden_layers") or 0):
      reader.refuse("layer_types", f"only {expected!r} for every layer is supported with sliding_window={window}")
  return window


def _rope(reader: ConfigReader) -> RopeConfig:
  """Rotary settings from either spelling; where both are there they must agree."""
  values = reader.values
  bases: set[float] = set()
  scalings: list[RopeConfig] = []
  if values.get("rope_theta") is not None:
    bases.add(reader.number("rope_theta", float, 0.0) or 0.0)
  for key in ("rope_scaling", "rope_parameters"):
    section = values.get(key)
    if section is None:
      continue
    if not isinstance(section, dict):
      reader.refuse(key, "wanted an object")
      continue
    inner = ConfigReader(section)
    if section.get("rope_theta") is not None:
      bases.add(inner.number("rope_theta", float, 0.0) or 0.0)
    scalings += _rope_scaling(inner)
    reader.refused += [f"{key}.{line}" for line in inner.refused]
  if len(bases) > 1:
    reader.refused.append(f"rope_theta: given more than once, as {' and '.join(map(str, sorted(bases)))}")
  if len(set(scalings)) > 1:
    reader.refused.append(
      f"rope_scaling={values.get('rope_scaling')!r} and rope_parameters={values.get('rope_parameters')!r} disagree"
    )
  if reader.refused:
    return RopeConfig()
  return dataclasses.replace(
    scalings[0] if scalings else RopeConfig(), base=bases.pop() if bases else _DEFAULT_ROPE_BASE
  )


def _rope_scaling(inner: ConfigReader) -> list[RopeConfig]:
  """The scaling part of one section, as a RopeConfig of any base; empty when it was refused."""
  section = inner.values
  inner.only("partial_rotary_factor", 1)
  named = [section[key] for key in ("rope_type", "type") if section.get(key) is not None] or ["default"]
  kind = named[0]
  if named != [kind] * len(named) or not isinstance(kind, str) or kind not in _ROPE_KEYS:
    inner.refuse("rope_type" if "rope_type" in section else "type", f"only {' or '.join(_ROPE_KEYS)} is supported")
    return []
  wanted = _ROPE_KEYS[kind]
  inner.unknown_keys({"rope_type", "type", "rope_theta", "partial_rotary_factor"} | wanted)
  for key in sorted(wanted):
    if section.get(key) is None:
      inner.refuse(key, f"missing, {kind} scaling needs it")
  numbers = {key: inner.number(key, int if key.startswith("original") else float, None) for key in wanted}
  if inner.refused:
    return []
  try:
    if kind == "default":
      return [RopeConfig()]
    if kind == "linear":
      return [RopeConfig(scaling="linear", factor=numbers["factor"])]
    return [
      RopeConfig(
        scaling="llama3",
        factor=numbers["factor"],
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_max_positions=numbers["original_max_position_embeddings"],
      )
    ]
  except ValueError as error:
    inner.refused.append(str(error))
    return []
