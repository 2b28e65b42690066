"""OpenLM's config.json, of softmax and SUPRA models -> ModelConfig, or an error that names every unsupported key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from supra_jax.model.config import ModelConfig, NormKind, RopeConfig, RopeKind
from supra_jax.model.mixers.softmax import SoftmaxConfig
from supra_jax.model.mixers.supra import SupraConfig

MODEL_TYPE = "openlm"
NORMS: Mapping[str, NormKind] = {
  "default_layer_norm": "layer_norm",
  "lp_layer_norm": "layer_norm",
  "gain_only_layer_norm": "layer_norm_gain",
  "gain_only_lp_layer_norm": "layer_norm_gain",
  "rms_norm": "rms_norm",
}
ROPES: Mapping[str, RopeKind] = {
  "rotary": "half",
  "llama_rotary": "interleaved",
  "head_rotary": "by_head",
  "none": "none",
}
LINEAR_ATTENTION = "linear_attn"
# Implementations of the same function; which one a config names depends on what its author had installed.
_SOFTMAX_ATTENTION = ("auto", "xformers_attn", "xformers_attn_variable_length", "torch_attn")
_SWIGLU = ("swiglu", "swiglu_torch")

# Defaults of OpenLM's code for keys that the config lacks.
_DEFAULT_KV_HEADS = 8
_DEFAULT_NORM, _DEFAULT_NORM_EPS = "default_layer_norm", 1e-5
_DEFAULT_ROPE, _DEFAULT_ROPE_BASE = "rotary", 10_000.0

_TRANSLATED = {
  "model_type", "architectures", "dim", "intermediate_dim_ffn", "n_layers", "n_heads", "n_heads_kv", "vocab_size",
  "norm_eps", "seq_len", "post_embed_norm", "weight_tying", "apply_qk_norm", "qk_head_dim", "v_head_dim", "norm_type",
  "attn_name", "positional_embedding_type", "rotary_base_frequency", "rotary_scale", "ffn_type", "moe_freq",
  "use_decay", "use_retnet_slopes", "decay_start", "bos_token_id", "eos_token_id",
}  # fmt: skip
# Keys about training or about mixtures of experts (moe_freq=0 means none), and keys transformers adds to every config.
_HARMLESS = {
  "_name_or_path", "dtype", "init_device", "moe_capacity_factor", "moe_expert_model_parallelism", "moe_loss_weight",
  "moe_num_experts", "moe_top_k", "moe_weight_parallelism", "pad_token_id", "torch_dtype", "transformers_version",
  "use_cache",
}  # fmt: skip


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """Translates the config of an OpenLM model into a ModelConfig.

  Args:
    config: contents of config.json.
    where: name of the file, for messages.

  Raises:
    ConversionError: some keys are unsupported or missing, which the message lists; or values contradict each other.
  """
  reader = ConfigReader(config)
  reader.only("architectures", ["OpenLMForCausalLM"])
  reader.only("ffn_type", *_SWIGLU)
  reader.only("norm_type", *NORMS)
  reader.only("positional_embedding_type", *ROPES)
  reader.only("attn_name", LINEAR_ATTENTION, *_SOFTMAX_ATTENTION)
  reader.only("moe_freq", 0)
  reader.unknown_keys(_TRANSLATED | _HARMLESS)
  vocab_size, hidden_size, num_heads = (reader.required(key) for key in ("vocab_size", "dim", "n_heads"))
  if hidden_size % num_heads:
    reader.refuse("dim", f"not divisible by n_heads={num_heads}")
  num_kv_heads = reader.number("n_heads_kv", int, _DEFAULT_KV_HEADS)
  is_linear = config.get("attn_name") == LINEAR_ATTENTION
  normalises_qk = reader.flag("apply_qk_norm")
  if normalises_qk and not is_linear and num_kv_heads != num_heads:
    reader.refuse("apply_qk_norm", f"OpenLM's softmax attention then needs n_heads_kv={num_heads}, got {num_kv_heads}")
  head_dim = reader.number("qk_head_dim", int, hidden_size // num_heads)
  rope = _rope(reader)
  # OpenLM's RoPE and phi assume heads of width dim / n_heads; with any other width its own code fails.
  if head_dim != hidden_size // num_heads and (is_linear or rope.kind != "none"):
    reader.refuse("qk_head_dim", f"only dim / n_heads = {hidden_size // num_heads} is supported here")
  bos = reader.token_ids("bos_token_id", vocab_size)
  translated = {
    "vocab_size": vocab_size,
    "hidden_size": hidden_size,
    "intermediate_size": reader.number("intermediate_dim_ffn", int, 256 * -(-(8 * hidden_size // 3) // 256)),
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "value_head_dim": reader.number("v_head_dim", int, hidden_size // num_heads),
    "layers": (_supra(reader, normalises_qk) if is_linear else SoftmaxConfig(),) * reader.layers("n_layers"),
    "norm": NORMS.get(str(config.get("norm_type") or _DEFAULT_NORM)),
    "norm_eps": reader.number("norm_eps", float, _DEFAULT_NORM_EPS),
    "rope": rope,
    "qk_norm": "all_heads" if normalises_qk and not is_linear else "none",
    "post_embed_norm": reader.flag("post_embed_norm"),
    "tie_embeddings": reader.flag("weight_tying"),
    "max_positions": reader.number("seq_len", int, None),
    "bos_token_id": bos[0] if bos else None,
    "eos_token_ids": reader.token_ids("eos_token_id", vocab_size, many=True),
  }
  if translated["value_head_dim"] == head_dim:
    translated["value_head_dim"] = None
  if reader.refused:
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *listing("refused", reader.refused)]))
  try:
    return ModelConfig(**translated)
  except ValueError as error:
    raise ConversionError(f"{where}: {error}") from error


def _rope(reader: ConfigReader) -> RopeConfig:
  kind = ROPES.get(str(reader.values.get("positional_embedding_type") or _DEFAULT_ROPE), "half")
  base = reader.number("rotary_base_frequency", float, _DEFAULT_ROPE_BASE) or _DEFAULT_ROPE_BASE
  scale = reader.number("rotary_scale", float, 1.0) or 1.0
  if kind != "half":  # OpenLM's other kinds ignore base and scale
    return RopeConfig(kind=kind)
  return RopeConfig(base) if scale == 1 else RopeConfig(base, "linear", scale)


def _supra(reader: ConfigReader, normalises_features: bool) -> SupraConfig:
  start = reader.number("decay_start", float, None)
  retnet = reader.flag("use_retnet_slopes")
  if not reader.flag("use_decay"):
    return SupraConfig(decay="none", qk_norm=normalises_features)
  if retnet:
    return SupraConfig(decay="retnet", qk_norm=normalises_features)
  return SupraConfig(decay_start=start, qk_norm=normalises_features)
