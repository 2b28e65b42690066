"""The config of a model: frozen dataclasses, and their JSON form in config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from supra_jax.core.plain_json import to_json
from supra_jax.core.schema import POSITIVE, check, check_keys, from_mapping
from supra_jax.model.registry import MixerConfig, mixer_class

NormKind = Literal["rms_norm", "layer_norm", "layer_norm_gain"]
QKNorm = Literal["none", "head", "all_heads"]
RopeKind = Literal["half", "interleaved", "by_head", "none"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (Su et al. 2021).

  Attributes:
    base: theta in `theta^(-2i/K)`, the frequency of feature pair i.
    scaling: `linear` divides every frequency by `factor`. `llama3` and `yarn` divide low frequencies, keep high ones,
      and blend both in a band between.
    factor: the divisor of `scaling`.
    low_freq_factor, high_freq_factor: ends of the band of `llama3`, in turns within `original_max_positions` tokens.
    original_max_positions: length in tokens of the context before scaling, for `llama3` and `yarn`.
    kind: pairs of features that are rotated together: `half` pairs the features i and i + K/2 of a head, `interleaved`
      2i and 2i + 1. `by_head` pairs as `half` does, and rotates by the index of the head in place of the token's
      position, as in OpenLM's first models. `none` rotates nothing.
    beta_fast, beta_slow: ends of the band of `yarn` (Peng et al. 2023), in turns as for `llama3`.
    truncate: whether the ends of `yarn`'s band are rounded to whole feature pairs.
    attention_factor: factor on the rotated q and k, for `yarn`.
  """

  base: Annotated[float, POSITIVE] = 10_000.0
  scaling: RopeScaling = "none"
  factor: Annotated[float, POSITIVE] = 1.0
  low_freq_factor: Annotated[float, POSITIVE] = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: Annotated[int, POSITIVE] = 8192
  kind: RopeKind = "half"
  beta_fast: Annotated[float, POSITIVE] = 32.0
  beta_slow: Annotated[float, POSITIVE] = 1.0
  truncate: bool = True
  attention_factor: Annotated[float, POSITIVE] = 1.0

  def __post_init__(self):
    check(self, type(self).__name__)
    if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
      raise ValueError(
        f"RopeConfig: llama3 scaling wants high_freq_factor > low_freq_factor, got {self.high_freq_factor} and "
        f"{self.low_freq_factor}."
      )
    if self.scaling == "yarn" and not (self.base > 1 and self.beta_fast >= self.beta_slow):
      raise ValueError(
        f"RopeConfig: yarn scaling wants base > 1 and beta_fast >= beta_slow, got {self.base}, {self.beta_fast} and "
        f"{self.beta_slow}."
      )

  def with_yarn(self, factor: float, original_max_positions: int) -> RopeConfig:
    """Returns the same embedding, stretched by YaRN (Peng et al. 2023) as transformers does by default.

    Args:
      factor: how many times as long texts may be.
      original_max_positions: length in tokens of the longest sequence that the model was trained on.

    Raises:
      ValueError: the embedding is scaled already or does not depend on positions, or an argument is out of range.
    """
    if self.scaling != "none" or self.kind not in ("half", "interleaved"):
      raise ValueError(f"YaRN stretches rotary embeddings without scaling, got {self}.")
    attention_factor = yarn_attention_factor(factor)
    changes: dict[str, Any] = {"factor": factor, "original_max_positions": original_max_positions}
    return dataclasses.replace(self, scaling="yarn", attention_factor=attention_factor, **changes)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
  """Returns 0.1 scale ln(factor) + 1, by which YaRN multiplies q and k (arXiv 2309.00071); 1 if factor <= 1."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Config of a Llama-like language model in which every layer has a mixer of its own.

  Attributes:
    vocab_size: number of rows of the embedding.
    hidden_size: D, width of the model.
    intermediate_size: F, width of the feed-forward layer.
    num_heads: H, number of query heads.
    num_kv_heads: G, number of key/value heads; G divides H.
    head_dim: K, the width of a query or key head.
    value_head_dim: V, the width of a value head; None means K.
    layers: the config of each layer's mixer (softmax attention, linear attention or another), made by `registry.layer`.
      The model has as many layers as there are configs.
    norm: `rms_norm`, `layer_norm` (gain and bias) or `layer_norm_gain`.
    norm_eps: epsilon of these norms (the GroupNorm of `supra` has its own, 1e-5).
    rope: rotary position embedding of all mixers.
    qk_norm: normalisation of the projected q and k, in all mixers: `head` over the K features of each head, with one
      gain for all heads (Qwen3); `all_heads` over all heads together (OpenLM); `none`. In a `supra` layer this norm
      comes before phi, as in the teacher; `SupraConfig.qk_norm` is another norm, after phi.
    post_embed_norm: whether one more norm follows the embedding.
    sliding_window: number of tokens, the token itself and those before, that a token sees in a `softmax` layer; None
      means all.
    tie_embeddings: whether the unembedding is the transposed embedding.
    qkv_bias: whether the projections of q, k and v have a bias.
    output_bias: whether the output projection of attention, o_proj, has a bias.
    mlp_bias: whether the feed-forward layer has biases.
    max_positions: length in tokens of the longest sequence that the teacher was trained on; None: not known.
    bos_token_id: id of the token that begins a text; None: there is none, or it is not known.
    eos_token_ids: ids of the tokens that end a text; may be empty.
  """

  vocab_size: Annotated[int, POSITIVE]
  hidden_size: Annotated[int, POSITIVE]
  intermediate_size: Annotated[int, POSITIVE]
  num_heads: Annotated[int, POSITIVE]
  num_kv_heads: Annotated[int, POSITIVE]
  head_dim: Annotated[int, POSITIVE]
  layers: tuple[MixerConfig, ...]
  value_head_dim: Annotated[int, POSITIVE] | None = None
  norm: NormKind = "rms_norm"
  norm_eps: Annotated[float, POSITIVE] = 1e-5
  rope: RopeConfig = RopeConfig()
  qk_norm: QKNorm = "none"
  post_embed_norm: bool = False
  sliding_window: Annotated[int, POSITIVE] | None = None
  tie_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  max_positions: int | None = None
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    check(self, type(self).__name__)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"ModelConfig: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}.")
    if self.head_dim % 2 and self.rope.kind != "none":
      raise ValueError(f"ModelConfig: head_dim={self.head_dim} is odd; RoPE rotates pairs.")
    if not self.layers:
      raise ValueError("ModelConfig: layers is empty; give one mixer's config a layer.")
    for layer in self.layers:
      if not isinstance(layer, MixerConfig) or not hasattr(layer, "mixer"):
        raise ValueError(f"ModelConfig.layers holds {layer!r}: wanted a mixer's config, such as layer('softmax').")

  @property
  def num_layers(self) -> int:
    return len(self.layers)

  @property
  def mixers(self) -> tuple[str, ...]:
    """The name of each layer's mixer."""
    return tuple(layer.mixer for layer in self.layers)

  @property
  def value_width(self) -> int:
    """V, the width of a value head."""
    return self.head_dim if self.value_head_dim is None else self.value_head_dim

  def replace(self, **changes: Any) -> ModelConfig:
    return dataclasses.replace(self, **changes)

  def to_json(self) -> str:
    """Returns the config as JSON: each distinct mixer config once, under a label, and the labels of all layers."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "layers"}
    labels = _labels(self.layers)
    values["rope"] = dataclasses.asdict(self.rope)
    values["mixers"] = [labels[layer] for layer in self.layers]
    values["mixer_configs"] = {label: dataclasses.asdict(layer) for layer, label in labels.items()}
    return to_json(values, indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> ModelConfig:
    """Returns the config that `to_json` wrote.

    Raises:
      ValueError: `text` is not JSON, or `from_values` rejects it.
    """
    return cls.from_values(json.loads(text))

  @classmethod
  def from_values(cls, values: Any, path: str = "model config") -> ModelConfig:
    """Returns the config that parsed JSON describes.

    Args:
      values: parsed JSON that `to_json` wrote, or of the older format, where one key `supra` configures all mixers.
      path: name of `values` in error messages.

    Raises:
      ValueError: a key is unknown or missing, or a value has the wrong type or is out of range; the message names the
        key.
    """
    old = isinstance(values, Mapping) and "mixer_configs" not in values
    key = "supra" if old else "mixer_configs"
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "layers"}
    required = {name for name, default in fields.items() if default is dataclasses.MISSING} | {"mixers"}
    check_keys(values, fields.keys() | {"mixers", key}, required, path)
    rest = {name: value for name, value in values.items() if name in fields}
    if old and "supra" not in values and set(map(str, values["mixers"])) != {"softmax"}:
      raise ValueError(f"{path}: missing keys ['mixer_configs'], which says what the layers' mixers are told.")
    rest["layers"] = _layers(values["mixers"], values.get(key, {}), path, old=old)
    return typing.cast(ModelConfig, from_mapping(cls, rest, path))


def _labels(layers: Sequence[MixerConfig]) -> dict[MixerConfig, str]:
  """Returns {config: label} of all distinct configs: NAME for the first of the mixer NAME, then `NAME.2` and so on."""
  labels: dict[MixerConfig, str] = {}
  for layer in dict.fromkeys(layers):
    number = 1 + sum(other.mixer == layer.mixer for other in labels)
    labels[layer] = layer.mixer if number == 1 else f"{layer.mixer}.{number}"
  return labels


def _layers(labels: Any, configs: Any, path: str, *, old: bool) -> tuple[MixerConfig, ...]:
  """Returns the mixer config of each layer of a config.json.

  Args:
    labels: one label a layer, from the key `mixers`.
    configs: {label: fields}, from the key `mixer_configs`; with `old`, the fields of the key `supra`, which hold for
      all layers.
    path: name of the config in error messages.
    old: whether the file is from before `mixer_configs`.
  """
  if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
    raise ValueError(f"{path}: mixers: wanted a list of names, got {labels!r}.")
  if not isinstance(configs, Mapping):
    raise ValueError(f"{path}: {'supra' if old else 'mixer_configs'}: wanted an object, got {configs!r}.")
  made: dict[str, MixerConfig] = {}
  for label in dict.fromkeys(labels):
    try:
      config = mixer_class(label if old else label.partition(".")[0]).Config
    except ValueError as error:
      raise ValueError(f"{path}: mixers: {error}") from error
    if old:
      made[label] = _of_supra_key(config, configs, path)
    elif label in configs:
      made[label] = from_mapping(config, configs[label], f"{path}: mixer_configs: {label}")
    else:
      raise ValueError(f"{path}: mixers names {label!r}, and mixer_configs does not say what it is.")
  unused = sorted(set(configs) - set(made)) if not old else []
  if unused:
    raise ValueError(f"{path}: mixer_configs has {unused}, which no layer has.")
  return tuple(made[label] for label in labels)


def _of_supra_key(config: type[MixerConfig], supra: Mapping[str, Any], path: str) -> MixerConfig:
  """Returns a mixer's config, made of the old key `supra`, which had no sinks: the window attention then saw none."""
  whole = from_mapping(mixer_class("supra_window").Config, {"sinks": 0, **supra}, f"{path}: supra")
  return config(**{field.name: getattr(whole, field.name) for field in dataclasses.fields(config)})
