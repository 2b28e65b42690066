"""A Hugging Face `config.json` of one of FAMILIES -> ModelConfig, or an error that names every unsupported key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from convert_weights.hf_rope import rope_config
from supra_jax.model.config import ModelConfig, QKNorm
from supra_jax.model.mixers.softmax import SoftmaxConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """Properties of a model_type in transformers, and the defaults of its config class.

  Attributes:
    architectures: names of the model class that `architectures` in config.json may have.
    num_kv_heads: default number of key and value heads; None means the number of query heads.
    head_dim: default width of a head; None means hidden_size / num_attention_heads.
    sliding_window: default window, in tokens; None means no window.
    windows: which layers have a sliding window: `none`; `all`; or `some`, the layers from max_window_layers on, if
      use_sliding_window is true.
    qkv_bias, output_bias, mlp_bias: whether these projections have a bias, or the key of config.json that says so.
    qk_norm: value of `ModelConfig.qk_norm`.
  """

  architectures: tuple[str, ...]
  num_kv_heads: int | None = None
  head_dim: int | None = None
  sliding_window: int | None = None
  windows: Literal["none", "all", "some"] = "none"
  qkv_bias: bool | str = False
  output_bias: bool | str = False
  mlp_bias: bool | str = False
  qk_norm: QKNorm = "none"


# model_type -> family. All other shapes have no default: a config without them is refused as broken.
FAMILIES: Mapping[str, Family] = {
  "llama": Family(
    ("LlamaForCausalLM", "LLaMAForCausalLM"),
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
  ),
  "mistral": Family(("MistralForCausalLM",), num_kv_heads=8, sliding_window=4096, windows="all"),
  "qwen2": Family(("Qwen2ForCausalLM",), num_kv_heads=32, sliding_window=4096, windows="some", qkv_bias=True),
  "qwen3": Family(
    ("Qwen3ForCausalLM",),
    num_kv_heads=32,
    head_dim=128,
    sliding_window=4096,
    windows="some",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="head",
  ),
}
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_MAX_WINDOW_LAYERS = 28

TRANSLATED = {
  "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
  "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
  "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
  "sliding_window", "layer_types", "bos_token_id", "eos_token_id", "pretraining_tp", "partial_rotary_factor",
}  # fmt: skip
# Keys of public checkpoints that transformers' classes ignore, in all families. They concern training, generation,
# classifiers or the tool that made the checkpoint; dual_chunk_attention_config is read by vLLM only.
HARMLESS = {
  "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path",
  "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop", "chunk_size_feed_forward",
  "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "dual_chunk_attention_config",
  "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "finetuning_task", "forced_bos_token_id",
  "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label",
  "initializer_range", "is_llama_config", "label2id", "length_penalty", "max_length", "max_sequence_length",
  "mergekit_version", "min_length", "model_max_length", "neftune_noise_alpha", "no_repeat_ngram_size",
  "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
  "output_scores", "pad_token_id", "problem_type", "repetition_penalty", "resid_pdrop", "return_dict",
  "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
  "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version", "typical_p",
  "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache", "use_sdpa",
}  # fmt: skip
# Keys that only families with windows in some layers read.
_WINDOW_KEYS = {"use_sliding_window", "max_window_layers"}


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
  """Translates the config of a Hugging Face model into a ModelConfig.

  Args:
    config: contents of config.json, with RoPE in the keys of transformers 4 (rope_theta, rope_scaling) or of
      transformers 5 (rope_parameters).
    generation: contents of generation_config.json, or empty. Its EOS ids are added to those of `config`; its BOS id is
      used if `config` has none.
    where: name of the file, for messages.

  Raises:
    ConversionError: the model_type is not in FAMILIES; some keys are unsupported or missing, which the message lists;
      or values contradict each other.
  """
  reader = ConfigReader(config)
  model_type = config.get("model_type")
  family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
  if family is None:
    raise ConversionError(
      f"{where}: model_type={model_type!r} is not supported: only {', '.join(FAMILIES)}, mamba, openlm."
    )
  reader.only("architectures", *([name] for name in family.architectures))
  reader.only("hidden_act", "silu")
  reader.only("pretraining_tp", 1)
  reader.only("partial_rotary_factor", 1)
  reader.unknown_keys(TRANSLATED | HARMLESS | (_WINDOW_KEYS if family.windows == "some" else set()))
  vocab_size = reader.required("vocab_size")
  hidden_size, num_heads = reader.required("hidden_size"), reader.required("num_attention_heads")
  head_dim = family.head_dim
  if head_dim is None:
    head_dim = hidden_size // num_heads
    if config.get("head_dim") is None and hidden_size % num_heads:
      reader.refuse("hidden_size", f"not divisible by num_attention_heads={num_heads}, and head_dim is not given")
  kv_default = family.num_kv_heads if "num_key_value_heads" not in config else None
  num_layers = reader.layers("num_hidden_layers")
  max_positions = reader.number("max_position_embeddings", int, None)
  translated = {
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": reader.required("intermediate_size"),
    "num_heads": num_heads,
    "num_kv_heads": reader.number("num_key_value_heads", int, kv_default or num_heads),
    "head_dim": reader.number("head_dim", int, head_dim),
    "layers": (SoftmaxConfig(),) * num_layers,
    "norm_eps": reader.number("rms_norm_eps", float, _DEFAULT_NORM_EPS),
    "sliding_window": _sliding_window(reader, family, num_layers, max_positions),
    "qk_norm": family.qk_norm,
    "tie_embeddings": reader.flag("tie_word_embeddings"),
    **_biases(reader, family),
    "max_positions": max_positions,
  }
  rope = rope_config(reader)
  bos, eos, refused = token_ids(reader, generation, vocab_size)
  if refused:
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *listing("refused", refused)]))
  try:
    return ModelConfig(**translated, rope=rope, bos_token_id=bos, eos_token_ids=eos)
  except ValueError as error:
    raise ConversionError(f"{where}: {error}") from error


def token_ids(
  reader: ConfigReader, generation: Mapping[str, Any], vocab_size: int
) -> tuple[int | None, tuple[int, ...], list[str]]:
  """Returns (BOS id, EOS ids, complaints about both files) of a config and a generation_config.json, see above."""
  generation_reader = ConfigReader(generation)
  bos = reader.token_ids("bos_token_id", vocab_size) or generation_reader.token_ids("bos_token_id", vocab_size)
  eos = [i for r in (reader, generation_reader) for i in r.token_ids("eos_token_id", vocab_size, many=True)]
  refused = reader.refused + [f"generation_config.json: {line}" for line in generation_reader.refused]
  return bos[0] if bos else None, tuple(dict.fromkeys(eos)), refused


def _biases(reader: ConfigReader, family: Family) -> dict[str, bool]:
  """Returns which projections have a bias. Refuses a key that transformers ignores unless it agrees with the family."""
  biases = {name: getattr(family, name) for name in ("qkv_bias", "output_bias", "mlp_bias")}
  for key, always in (("attention_bias", family.qkv_bias), ("mlp_bias", family.mlp_bias)):
    if isinstance(always, bool):
      reader.only(key, always)
  return {name: reader.flag(bias) if isinstance(bias, str) else bias for name, bias in biases.items()}


def _sliding_window(reader: ConfigReader, family: Family, num_layers: int, max_positions: int | None) -> int | None:
  """Returns the sliding window of all layers, in tokens; None: no window. Refuses a window in only some layers."""
  values, first = reader.values, 0
  window = reader.number("sliding_window", int, None if "sliding_window" in values else family.sliding_window)
  if family.windows == "none":
    # transformers' attention ignores the window, but its cache drops older tokens. Unless the window holds all
    # positions, a text read token by token gives other logits than the same text read at once.
    if window is not None and window < (max_positions or math.inf):
      reader.refuse(
        "sliding_window", "only null, or a window no shorter than max_position_embeddings, is supported in this family"
      )
    window = None
  elif family.windows == "some":
    window = window if reader.flag("use_sliding_window") else None
    first = values.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if type(first) is not int or first < 0:
      reader.refuse("max_window_layers", "wanted a number of layers")
      first = 0
  full = num_layers if window is None else min(first, num_layers)
  layers = ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
  given = values.get("layer_types")
  if given is not None and given != layers:
    if family.windows == "some" and window is not None:
      layers = given
    else:
      reader.refuse("layer_types", f"only {layers[0]!r} for every layer is supported with sliding_window={window}")
  if layers == ["full_attention"] * num_layers:
    return None
  if layers != ["sliding_attention"] * num_layers:
    reader.refuse(
      "max_window_layers" if given is None else "layer_types", "a window for some of the layers only is not supported"
    )
  return window
