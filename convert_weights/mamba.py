"""Mamba models (`MambaForCausalLM`, such as state-spaces/mamba-130m-hf): their config.json and names, in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from convert_weights.config_reader import ConfigReader
from convert_weights.errors import ConversionError, listing
from convert_weights.hf_config import HARMLESS, token_ids
from supra_jax.model.config import ModelConfig, RopeConfig
from supra_jax.model.mixers.mamba import MambaConfig

MODEL_TYPE, ARCHITECTURE = "mamba", "MambaForCausalLM"
# How weights are drawn and which of several implementations runs does not change a trained model. The stream between
# layers is float32 where `residual_in_fp32` is true, which differs in bfloat16 alone.
_HARMLESS = {
  "d_model", "d_inner", "fused_add_norm", "intermediate_size", "n_layer", "pad_vocab_size_multiple",
  "rescale_prenorm_residual", "residual_in_fp32", "ssm_cfg", "time_step_floor", "time_step_init_scheme",
  "time_step_max", "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy",
}  # fmt: skip
_KEYS = {
  "architectures", "bos_token_id", "conv_kernel", "eos_token_id", "expand", "hidden_act", "hidden_size",
  "layer_norm_epsilon", "model_type", "num_hidden_layers", "rms_norm", "state_size", "tie_word_embeddings",
  "time_step_rank", "use_bias", "use_conv_bias", "vocab_size",
}  # fmt: skip
# The embedding's name in checkpoints that are older than transformers' class.
OLD_EMBEDDING = re.compile(r"backbone\.embedding\.weight")
EMBEDDING = "backbone.embeddings.weight"


def is_mamba(config: ModelConfig) -> bool:
  """Whether transformers' Mamba class computes this model."""
  layer = config.layers[0]
  return (
    isinstance(layer, MambaConfig)
    and set(config.layers) == {layer}
    and config.norm == "rms_norm"
    and not config.post_embed_norm
  )


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
  """Translates the config of a Mamba model, as `hf_config.model_config` does for transformers.

  The fields of attention and MLP, which the model has not, are 1 head of the model's width.

  Raises:
    ConversionError: keys are unsupported or missing; the message lists them.
  """
  reader = ConfigReader(config)
  reader.only("architectures", [ARCHITECTURE])
  reader.only("hidden_act", "silu")
  reader.only("rms_norm", True)
  reader.unknown_keys(_KEYS | _HARMLESS | HARMLESS)
  defaults = {"use_conv_bias": True, "tie_word_embeddings": True}
  flags = {
    key: reader.flag(key) if config.get(key) is not None else defaults.get(key, False)
    for key in ("use_bias", "use_conv_bias", "tie_word_embeddings")
  }
  rank = None if config.get("time_step_rank", "auto") == "auto" else reader.number("time_step_rank", int, None)
  vocab_size, hidden_size = reader.required("vocab_size"), reader.required("hidden_size")
  layer = MambaConfig(
    state_size=reader.number("state_size", int, 16) or 1,
    conv_kernel=reader.number("conv_kernel", int, 4) or 1,
    expand=reader.number("expand", int, 2) or 1,
    time_step_rank=rank,
    use_conv_bias=flags["use_conv_bias"],
    use_bias=flags["use_bias"],
  )
  count, norm_eps = reader.layers("num_hidden_layers"), reader.number("layer_norm_epsilon", float, 1e-5)
  bos, eos, refused = token_ids(reader, generation, vocab_size)
  if refused:
    raise ConversionError("\n".join([f"{where}: this model cannot be converted.", *listing("refused", refused)]))
  return ModelConfig(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    intermediate_size=layer.channels(hidden_size),
    num_heads=1,
    num_kv_heads=1,
    head_dim=hidden_size,
    layers=(layer,) * count,
    norm_eps=norm_eps,
    rope=RopeConfig(kind="none"),
    tie_embeddings=flags["tie_word_embeddings"],
    bos_token_id=bos,
    eos_token_ids=eos,
  )


def config_json(config: ModelConfig) -> dict[str, Any]:
  """Returns the config.json of a model that `is_mamba`, without its type and token ids."""
  layer = config.layers[0]
  assert isinstance(layer, MambaConfig)
  return {
    "architectures": [ARCHITECTURE],
    "model_type": MODEL_TYPE,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": layer.channels(config.hidden_size),
    "num_hidden_layers": config.num_layers,
    "state_size": layer.state_size,
    "conv_kernel": layer.conv_kernel,
    "expand": layer.expand,
    "time_step_rank": layer.rank(config.hidden_size),
    "use_bias": layer.use_bias,
    "use_conv_bias": layer.use_conv_bias,
    "hidden_act": "silu",
    "layer_norm_epsilon": config.norm_eps,
    "residual_in_fp32": True,
    "tie_word_embeddings": config.tie_embeddings,
    "use_cache": True,
  }
