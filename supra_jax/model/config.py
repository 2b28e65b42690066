"""What a model is: frozen dataclasses, their JSON form, and presets."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

from supra_jax.core.plain_json import to_json
from supra_jax.core.schema import check_choices, check_positive, from_mapping

Mixer = Literal["softmax", "supra", "supra_window"]
FeatureMapKind = Literal["dense", "per_head", "per_head_separate"]
Decay = Literal["lightning", "retnet", "none"]
NormKind = Literal["rms_norm", "layer_norm", "layer_norm_gain"]
QKNorm = Literal["none", "head", "all_heads"]
RopeKind = Literal["half", "interleaved", "by_head", "none"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


_LARGEST_SLOPE = 3.4e38  # slopes are float32


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding (Su et al. 2021).

  Attributes:
    base: theta in `theta^(-2i/K)`.
    scaling: `linear` divides every frequency by `factor`; `llama3` and `yarn` divide the low ones and blend a band
      between.
    factor: the divisor.
    low_freq_factor, high_freq_factor, original_max_positions: the band of `llama3`.
    kind: `half` turns the features i and i + K/2 of a head together, `interleaved` 2i and 2i + 1. `by_head` is `half`
      by a head's index in place of the token's position, as OpenLM's first models have it. `none` turns nothing.
    beta_fast, beta_slow, original_max_positions: the band of `yarn` (Peng et al. 2023), in turns within the original
      context.
    truncate: `yarn`'s band begins and ends at whole features.
    attention_factor: `yarn` multiplies q and k by it.
  """

  base: float = 10_000.0
  scaling: RopeScaling = "none"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192
  kind: RopeKind = "half"
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0

  def __post_init__(self):
    check_choices(self)
    check_positive(
      self, "base", "factor", "low_freq_factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor"
    )
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


@dataclasses.dataclass(frozen=True)
class SupraConfig:
  """How `supra` and `supra_window` depart from softmax attention (arXiv 2405.06640, section 3).

  Attributes:
    feature_map: W of phi(x) = relu(W x + b). `dense`: one [H*K, H*K] over all heads, and a [G*K, G*K] of its own for k
      when G < H, as released checkpoints have it. `per_head`: [G, K, K], each shared by a group's queries and its key,
      as the paper writes it. `per_head_separate`: [H, K, K] for q and [G, K, K] for k.
    decay: the slopes s_h of gamma_h = exp(-s_h).
    decay_start: the first lightning slope, where it is not the series' own ratio.
    qk_norm: normalise the concatenated head features that phi gives q and k, before RoPE.
    window: how many tokens back, itself included, the softmax attention of a `supra_window` layer sees.
    sinks: how many of a text's first tokens it sees as well, wherever it is (Xiao et al. 2023, arXiv 2309.17453).
  """

  feature_map: FeatureMapKind = "dense"
  decay: Decay = "lightning"
  decay_start: float | None = None
  qk_norm: bool = False
  window: int = 64
  sinks: int = 0

  def __post_init__(self):
    check_choices(self)
    check_positive(self, "window")
    if self.sinks < 0:
      raise ValueError(f"SupraConfig.sinks={self.sinks}: wanted 0 or more.")
    if self.decay_start is not None:
      check_positive(self, "decay_start")
      if self.decay_start > _LARGEST_SLOPE:
        raise ValueError(f"SupraConfig.decay_start={self.decay_start!r}: wanted a slope that float32 can hold.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-shaped language model whose layers each choose their mixer.

  Attributes:
    vocab_size, hidden_size, intermediate_size: rows of the embedding, D and F.
    num_heads, num_kv_heads: H and G; G divides H.
    head_dim: K, the width of a query or key head.
    value_head_dim: V; None means K.
    mixers: what each layer has: `softmax`; `supra`, linear attention in its place; `supra_window`, that and beside it
      softmax attention over the last tokens. Its length is the number of layers.
    supra: how the `supra` and `supra_window` layers are made.
    norm: `rms_norm`, `layer_norm` (gain and bias) or `layer_norm_gain`.
    norm_eps: epsilon of those norms (the GroupNorm of `supra` has its own, 1e-5).
    rope: rotary positions, used by all mixers.
    qk_norm: normalise the projected q and k, in all mixers: `head` over each head's K with one gain for all heads
      (Qwen3), `all_heads` over all heads together (OpenLM). In a `supra` layer it stands before phi, where the teacher
      has it, and is kept with the projections.
    post_embed_norm: one more norm, right after the embedding.
    sliding_window: how many tokens back, itself included, a `softmax` layer sees; None means all.
    tie_embeddings: the unembedding is the embedding.
    qkv_bias, output_bias, mlp_bias: biases on q, k, v; on the attention output; in the MLP.
    max_positions: the longest sequence the teacher was trained on; None: not known. For `sink_reach`, and information.
    bos_token_id, eos_token_ids: what starts a text and what ends one.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mixers: tuple[Mixer, ...]
  value_head_dim: int | None = None
  supra: SupraConfig = SupraConfig()
  norm: NormKind = "rms_norm"
  norm_eps: float = 1e-5
  rope: RopeConfig = RopeConfig()
  qk_norm: QKNorm = "none"
  post_embed_norm: bool = False
  sliding_window: int | None = None
  tie_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  max_positions: int | None = None
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    check_choices(self)
    check_positive(
      self, "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "value_width"
    )
    check_positive(self, "norm_eps")
    if self.sliding_window is not None:
      check_positive(self, "sliding_window")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"ModelConfig: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}.")
    if self.head_dim % 2 and self.rope.kind != "none":
      raise ValueError(f"ModelConfig: head_dim={self.head_dim} is odd; RoPE rotates pairs.")
    if not self.mixers:
      raise ValueError("ModelConfig: mixers is empty; give one mixer a layer.")
    for mixer in self.mixers:
      if mixer not in typing.get_args(Mixer):
        raise ValueError(f"ModelConfig.mixers holds {mixer!r}: wanted one of {', '.join(typing.get_args(Mixer))}.")

  @property
  def num_layers(self) -> int:
    return len(self.mixers)

  @property
  def value_width(self) -> int:
    """V, the width of a value head."""
    return self.head_dim if self.value_head_dim is None else self.value_head_dim

  @property
  def sink_reach(self) -> int | None:
    """The furthest that a window's sinks seem to be, however far they are: no further than the teacher ever saw.

    None: as far as they are. Never nearer than twice the window, where they may be in sight.
    """
    seen = [tokens for tokens in (self.max_positions, self.sliding_window) if tokens is not None]
    if not seen or not self.supra.sinks:
      return None
    return max(min(seen) - 1, 2 * self.supra.window + self.supra.sinks)

  def replace(self, **changes: Any) -> ModelConfig:
    return dataclasses.replace(self, **changes)

  def to_json(self) -> str:
    return to_json(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> ModelConfig:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: a key is unknown or missing, or a value has the wrong type, by name.
    """
    return typing.cast(ModelConfig, from_mapping(cls, json.loads(text), "model config"))
