"""Config of a SUPRA model (arXiv 2405.06640) for transformers: the fields of supra_jax's ModelConfig, same names."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

_DEFAULTS: dict[str, Any] = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 128,
  "mixers": ["supra"] * 32,
  "memories": None,
  "normalised": None,
  "value_head_dim": None,
  "supra": {
    "feature_map": "dense",
    "decay": "lightning",
    "decay_start": None,
    "rope": True,
    "qk_norm": False,
    "window": 64,
    "sinks": 0,
  },
  "norm": "rms_norm",
  "norm_eps": 1e-5,
  "rope": {
    "base": 10_000.0,
    "scaling": "none",
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 8192,
    "kind": "half",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": 1.0,
  },
  "qk_norm": "none",
  "post_embed_norm": False,
  "sliding_window": None,
  "tie_embeddings": False,
  "qkv_bias": False,
  "output_bias": False,
  "mlp_bias": False,
  "max_positions": None,
  "bos_token_id": None,
  "eos_token_ids": [],
}


class SupraConfig(PretrainedConfig):
  """Config of a Llama-like model. `mixers` says which attention each layer has: softmax, SUPRA's linear one, both,
  softmax over a bounded memory, LoLCATs', T2R's, or the linear transformer's.

  `supra` has the options of all other layers with linear attention. `memories` is None, or has for each layer the
  options of its bounded memory, or None; so has `normalised`, for T2R and the linear transformer. `config.py` and
  `mixers/` in `supra_jax/model` describe each field. The defaults are Mistral-7B with linear attention in all layers.
  """

  model_type = "supra"
  attribute_map: ClassVar[dict[str, str]] = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tie_embeddings",
  }

  def __init__(self, **values: Any):
    own = {name: values.pop(name, default) for name, default in _DEFAULTS.items()}
    # Whether the base class sets these two depends on the release of transformers.
    own |= {name: values.pop(name) for name in ("eos_token_id", "pad_token_id") if values.get(name) is not None}
    self.pad_token_id = None
    super().__init__(**values)
    # Set after super().__init__, because the base class of some releases sets token ids and tie_word_embeddings itself.
    for name, value in own.items():
      setattr(self, name, value)

  @property
  def eos_token_id(self) -> int | list[int] | None:
    """`eos_token_ids` in transformers' form: a single id, a list of several, or None for no id."""
    return self.eos_token_ids if len(self.eos_token_ids) > 1 else next(iter(self.eos_token_ids), None)

  @eos_token_id.setter
  def eos_token_id(self, value: int | list[int] | None) -> None:
    self.eos_token_ids = [] if value is None else [value] if isinstance(value, int) else list(value)

  def to_dict(self) -> dict[str, Any]:
    """Returns all values and eos_token_id, which `generate` uses if there is no generation_config.json."""
    return super().to_dict() | {"eos_token_id": self.eos_token_id}

  def options(self, layer: int) -> dict[str, Any]:
    """Returns the options of a layer's linear attention."""
    own: dict[str, Any] | None = None if self.normalised is None else self.normalised[layer]
    return self.supra if own is None else own

  @property
  def num_hidden_layers(self) -> int:
    return len(self.mixers)

  @property
  def value_width(self) -> int:
    """V, the width of a value head."""
    return self.head_dim if self.value_head_dim is None else self.value_head_dim
