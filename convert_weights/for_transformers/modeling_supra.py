"""SUPRA (arXiv 2405.06640) in plain torch: parallel over a text, and an RNN from token to token.

  model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

supra_jax wrote this file beside the weights; it needs torch and transformers alone. Layers are either SUPRA's, which
remember one matrix a head, or softmax attention, which remembers all keys and values.

Shape suffixes: B batch, T time, S slots of a cache, D width, H query heads, G key/value heads, K key width, V value
width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_supra import SupraConfig

CHUNK = 128  # tokens that meet each other as in softmax attention; what lies before them comes as a state
GROUP_NORM_EPS = 1e-5
PADDING = torch.iinfo(torch.int64).max  # the position of a slot that nothing may see
# Releases of transformers differ in what they call it.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def at_least_float32(x: Tensor) -> Tensor:
  return x.to(torch.promote_types(x.dtype, torch.float32))


class SupraNorm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, in float32."""

  def __init__(self, config: SupraConfig, width: int):
    super().__init__()
    self.centred, self.eps = config.norm != "rms_norm", config.norm_eps
    self.weight = nn.Parameter(torch.ones(width))
    self.bias = nn.Parameter(torch.zeros(width)) if config.norm == "layer_norm" else None

  def forward(self, x: Tensor) -> Tensor:
    y = at_least_float32(x)
    if self.centred:
      y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(y.dtype)
    return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


def head_slopes(config: SupraConfig) -> list[float]:
  """s_h >= 0 of the decays exp(-s_h), one a head: those of lightning attention, of RetNet, or none."""
  heads, decay, start = config.num_heads, config.supra["decay"], config.supra["decay_start"]
  if decay == "none":
    return [0.0] * heads
  if decay == "retnet":
    return [-math.log1p(-(2.0 ** -(5 + h))) for h in range(heads)]

  def series(count: int) -> list[float]:
    ratio = 2.0 ** -(2.0 ** -(math.log2(count) - 3))
    return [(ratio if start is None else start) * ratio**h for h in range(count)]

  below = 2 ** math.floor(math.log2(heads))
  return series(below) + (series(2 * below)[::2][: heads - below] if below < heads else [])


def rope_frequencies(rope: dict[str, Any], width: int) -> Tensor:
  """Angles a position, float64 [K/2]."""
  index = torch.arange(0, width, 2, dtype=torch.float64)
  frequency = rope["base"] ** (-index / width)
  slow = frequency / rope["factor"]
  if rope["scaling"] == "none":
    return frequency
  if rope["scaling"] == "linear":
    return slow
  turns = rope["original_max_positions"] * frequency / (2 * math.pi)
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  keep = ((turns - low) / (high - low)).clamp(0, 1)
  return (1 - keep) * slow + keep * frequency


def rope_table(config: SupraConfig, position_BT: Tensor) -> tuple[Tensor, Tensor]:
  """(cos, sin), float32 [B, T, 1, K/2]. Angles are made in float64: in float32 they are off by 0.03 at a million."""
  where = torch.device("cpu") if position_BT.device.type == "mps" else position_BT.device  # it has no float64
  frequency = rope_frequencies(config.rope, config.head_dim).to(where)
  angle = position_BT.to(where, torch.float64)[..., None, None] * frequency
  cos, sin = (x.to(position_BT.device, torch.float32) for x in (angle.cos(), angle.sin()))
  return cos, sin


def apply_rope(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Turns the pairs of features (i, i + K/2) of each head."""
  low, high = at_least_float32(x_BTHK).chunk(2, -1)
  return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x_BTHK.dtype)


class DenseFeatureMap(nn.Linear):
  """phi(x) = relu(W x + b) over all heads together."""

  def __init__(self, heads: int, width: int):
    super().__init__(heads * width, heads * width)

  def forward(self, x_BTNK: Tensor) -> Tensor:
    return F.relu(super().forward(x_BTNK.flatten(2))).view_as(x_BTNK)


class PerHeadFeatureMap(nn.Module):
  """phi(x) = relu(W x + b) with `maps` matrices, each shared by as many neighbouring heads."""

  def __init__(self, maps: int, width: int):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(maps, width, width))
    self.bias = nn.Parameter(torch.empty(maps, width))

  def forward(self, x_BTNK: Tensor) -> Tensor:
    x = x_BTNK.unflatten(2, (len(self.weight), -1))
    return F.relu(torch.einsum("btmrk,mjk->btmrj", x, self.weight) + self.bias[:, None]).view_as(x_BTNK)


def linear_attention(
  q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, slopes_H: Tensor, real_BT: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
  """(o, state after the last token), o_i = sum over j <= i of exp(-slope (i - j)) (q_i . k_j) v_j, in float32.

  Tokens that are not real are passed over, wherever they stand: their k has to be 0, and no time goes by. A single
  token is a step of the RNN; a text no longer than a chunk is the quadratic form.
  """
  slopes, outs = slopes_H[:, None], []
  for q, k, v, real in zip(*(x.split(CHUNK, -2) for x in (q_BHTK, k_BHTK, v_BHTV, real_BT[..., None])), strict=True):
    time_B1C = real[..., 0].to(q.dtype).cumsum(-1)[:, None]
    left_BHC = torch.exp(-slopes * (time_B1C[..., -1:] - time_B1C))
    age_B1CC = (time_B1C[..., None] - time_B1C[..., None, :]).clamp(min=0)
    weights = (q @ k.transpose(-1, -2)) * torch.exp(-slopes[..., None] * age_B1CC).tril()
    outs.append(weights @ v + torch.exp(-slopes * time_B1C)[..., None] * (q @ state_BHKV))
    before = torch.exp(-slopes * time_B1C[..., -1:])[..., None] * state_BHKV
    state_BHKV = before + (k * left_BHC[..., None]).transpose(-1, -2) @ v
  return torch.cat(outs, -2), state_BHKV


class Tokens(NamedTuple):
  """Where the tokens of one call stand; the same for all layers.

  Attributes:
    real_BT: bool, false for padding.
    position_BT: int64, how many real tokens came before.
    slot_BS: int64, the position of each key, those of earlier calls included; PADDING where there is none.
    cos, sin: rotary angles.
    slopes_H: of the decays.
  """

  real_BT: Tensor
  position_BT: Tensor
  slot_BS: Tensor
  cos: Tensor
  sin: Tensor
  slopes_H: Tensor


class SupraCache(Cache):
  """All that the model remembers of what it has read.

  Attributes:
    columns: how many tokens a row it has read, padding included.
    seen_B: how many of them were real.
    slot_BS: the positions of the keys that softmax layers remember.
    tensors: for each layer its state (S,) or its keys and values (k, v).
  """

  is_croppable = False  # an RNN cannot unread

  def __init__(self) -> None:
    super().__init__(layers=[])
    self.columns = 0
    self.seen_B: Tensor | None = None
    self.slot_BS: Tensor | None = None
    self.tensors: dict[int, tuple[Tensor, ...]] = {}

  @property
  def is_linear(self) -> list[bool]:
    """`generate` asks whether `get_seq_length` can be relied on: false says yes."""
    return [False]

  def get_seq_length(self, layer_idx: int = 0) -> int:
    return self.columns

  def _for_each(self, change: Any) -> None:
    self.seen_B, self.slot_BS = change(self.seen_B), change(self.slot_BS)
    self.tensors = {layer: tuple(change(x) for x in held) for layer, held in self.tensors.items()}

  def reorder_cache(self, beam_idx: Tensor) -> None:
    self.batch_select_indices(beam_idx)

  def batch_select_indices(self, indices: Tensor) -> None:
    self._for_each(lambda x: x[indices.to(x.device)])

  def batch_repeat_interleave(self, repeats: int) -> None:
    self._for_each(lambda x: x.repeat_interleave(repeats, 0))

  def reset(self) -> None:
    self.columns, self.seen_B, self.slot_BS, self.tensors = 0, None, None, {}

  def crop(self, *args: Any) -> None:
    raise ValueError("A recurrent state cannot be cropped.")


class SupraAttention(nn.Module):
  """Softmax attention, or SUPRA's linear one."""

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__()
    self.config, self.layer, self.linear = config, layer, config.mixers[layer] == "supra"
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=config.qkv_bias)
    self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=config.qkv_bias)
    self.v_proj = nn.Linear(config.hidden_size, groups * config.value_width, bias=config.qkv_bias)
    self.o_proj = nn.Linear(heads * config.value_width, config.hidden_size, bias=config.output_bias)
    if config.qk_norm != "none":
      self.q_norm = SupraNorm(config, width if config.qk_norm == "head" else heads * width)
      self.k_norm = SupraNorm(config, width if config.qk_norm == "head" else groups * width)
    if not self.linear:
      return
    kind = config.supra["feature_map"]
    if kind == "dense":
      self.feature_map = DenseFeatureMap(heads, width)
      self.feature_map_kv = DenseFeatureMap(groups, width) if groups < heads else None
    else:
      self.feature_map = PerHeadFeatureMap(groups if kind == "per_head" else heads, width)
      self.feature_map_kv = PerHeadFeatureMap(groups, width) if kind == "per_head_separate" else None
    if config.supra["qk_norm"]:
      self.feature_q_norm = SupraNorm(config, heads * width)
      self.feature_k_norm = SupraNorm(config, heads * width)

  def forward(self, x_BTD: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    c = self.config
    q, k, v = (proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj))
    if c.qk_norm == "all_heads":
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.unflatten(-1, (c.num_heads, -1)), *(x.unflatten(-1, (c.num_kv_heads, -1)) for x in (k, v))
    if c.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    if self.linear:
      q, k = self._features(q, k)
    q, k = (apply_rope(x, tokens.cos, tokens.sin) for x in (q, k))
    padding = ~tokens.real_BT[..., None, None]
    # Selected, not multiplied: padding may hold what is not finite.
    k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out_BHTV, held = (self._linear if self.linear else self._softmax)(q, k, v, tokens, held)
    return self.o_proj(out_BHTV.transpose(1, 2).flatten(2).to(x_BTD.dtype)), held

  def _features(self, q_BTHK: Tensor, k_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    k_map = self.feature_map if self.feature_map_kv is None else self.feature_map_kv
    q, k = self.feature_map(q_BTHK), k_map(k_BTGK)
    if self.config.supra["qk_norm"]:
      # Its gains of k are one a query head, so that k leaves with as many heads as q.
      k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
      q, k = self.feature_q_norm(q.flatten(2)).view_as(q), self.feature_k_norm(k.flatten(2)).view_as(q)
    return q, k

  def _linear(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None):
    heads = q.shape[1]
    q, k, v = (at_least_float32(x).repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if held is None else held[0]
    out, state = linear_attention(q, k, v, tokens.slopes_H.to(q.dtype), tokens.real_BT, state)
    return F.layer_norm(out * q.shape[-1] ** -0.5, out.shape[-1:], eps=GROUP_NORM_EPS), (state,)

  def _softmax(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None):
    if held is not None:
      k, v = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)
    query, key = tokens.position_BT[:, :, None], tokens.slot_BS[:, None]
    mask_BTS = key <= query
    if self.config.sliding_window is not None:
      mask_BTS &= key > query - self.config.sliding_window
    mask_BTS |= ~tokens.real_BT[:, :, None]  # padding sees everything: a softmax over nothing would be NaN
    repeat = q.shape[1] // k.shape[1]
    repeated = (x.repeat_interleave(repeat, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, *repeated, attn_mask=mask_BTS[:, None]), (k, v)


class SupraMLP(nn.Module):
  """`down(silu(gate x) * up x)`."""

  def __init__(self, config: SupraConfig):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

  def forward(self, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SupraBlock(nn.Module):
  """`x + attention(norm x)`, then `x + MLP(norm x)`."""

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__()
    self.input_layernorm = SupraNorm(config, config.hidden_size)
    self.self_attn = SupraAttention(config, layer)
    self.post_attention_layernorm = SupraNorm(config, config.hidden_size)
    self.mlp = SupraMLP(config)

  def forward(self, x: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    mixed, held = self.self_attn(self.input_layernorm(x), tokens, held)
    x = x + mixed
    return x + self.mlp(self.post_attention_layernorm(x)), held


class SupraPreTrainedModel(PreTrainedModel):
  """How new weights are drawn, and what transformers may do with the model."""

  config_class = SupraConfig
  base_model_prefix = "model"
  _no_split_modules = ["SupraBlock"]  # noqa: RUF012: the base class reads it as it is
  _supports_sdpa = True
  _is_stateful = True

  def _init_weights(self, module: nn.Module) -> None:
    super()._init_weights(module)
    if isinstance(module, DenseFeatureMap | PerHeadFeatureMap):
      for parameter in (module.weight, module.bias):
        nn.init.uniform_(parameter, -(module.weight.shape[-1] ** -0.5), module.weight.shape[-1] ** -0.5)


class SupraModel(SupraPreTrainedModel):
  """All but the unembedding."""

  def __init__(self, config: SupraConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.post_embed_norm = SupraNorm(config, config.hidden_size) if config.post_embed_norm else nn.Identity()
    self.layers = nn.ModuleList(SupraBlock(config, layer) for layer in range(len(config.mixers)))
    self.norm = SupraNorm(config, config.hidden_size)
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.embed_tokens = value

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: SupraCache | None = None,
    past_key_values: SupraCache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
  ) -> BaseModelOutputWithPast:
    """Reads tokens, going on from the cache.

    Args:
      input_ids: int64 [B, T].
      attention_mask: 0 for padding, on either side or between; of these tokens [B, T], or of all that were ever read.
      cache: what an earlier call returned; it is changed. `past_key_values` is its older name.
      inputs_embeds: [B, T, D], in place of the ids.
      use_cache: return one.
      output_hidden_states: return the embeddings and what each layer makes of them.
    """
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    x = self.post_embed_norm(x)
    cache = past_key_values if cache is None else cache
    if cache is None and use_cache:
      cache = SupraCache()
    tokens = self._place(x, attention_mask, cache)
    seen = [x]
    for layer, block in enumerate(self.layers):
      x, held = block(x, tokens, None if cache is None else cache.tensors.get(layer))
      if cache is not None:
        cache.tensors[layer] = held
      seen.append(x)
    if cache is not None:
      self._forget(cache)
    return BaseModelOutputWithPast(
      last_hidden_state=self.norm(x), hidden_states=tuple(seen) if output_hidden_states else None, **{CACHE_NAME: cache}
    )

  def _place(self, x_BTD: Tensor, attention_mask: Tensor | None, cache: SupraCache | None) -> Tokens:
    batch, time = x_BTD.shape[:2]
    read = 0 if cache is None else cache.columns
    if attention_mask is not None and attention_mask.shape not in ((batch, time), (batch, read + time)):
      raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: wanted {(batch, read + time)}.")
    if attention_mask is None:
      real = torch.ones(batch, time, dtype=torch.bool, device=x_BTD.device)
    else:
      real = attention_mask[:, -time:].to(x_BTD.device, torch.bool)
    count = real.cumsum(1)
    if cache is not None and cache.seen_B is not None:
      count = count + cache.seen_B[:, None]
    position = (count - 1).clamp(min=0)
    slot = position.masked_fill(~real, PADDING)
    if cache is not None:
      slot = slot if cache.slot_BS is None else torch.cat([cache.slot_BS, slot], 1)
      cache.columns, cache.seen_B, cache.slot_BS = read + time, count[:, -1], slot
    slopes = torch.tensor(head_slopes(self.config), dtype=torch.float32, device=x_BTD.device)
    return Tokens(real, position, slot, *rope_table(self.config, position), slopes)

  def _forget(self, cache: SupraCache) -> None:
    """Drops the oldest slots, those that no row's next token can see."""
    window = self.config.sliding_window
    if window is None or "softmax" not in self.config.mixers:
      return
    past = cache.slot_BS <= cache.seen_B[:, None] - window
    first = int((past | (cache.slot_BS == PADDING)).all(0).long().cumprod(0).sum())
    cache.slot_BS = cache.slot_BS[:, first:]
    for layer, mixer in enumerate(self.config.mixers):
      if mixer == "softmax":
        cache.tensors[layer] = tuple(x[:, :, first:] for x in cache.tensors[layer])


class SupraForCausalLM(SupraPreTrainedModel, GenerationMixin):
  """The language model. `generate` passes its state from token to token."""

  def __init__(self, config: SupraConfig):
    super().__init__(config)
    self.model = SupraModel(config)
    # Tied, there is none: the embedding serves.
    self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  @classmethod
  def _supports_default_dynamic_cache(cls) -> bool:
    return False

  def get_input_embeddings(self) -> nn.Module:
    return self.model.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.model.embed_tokens = value

  def get_output_embeddings(self) -> nn.Module:
    return self.model.embed_tokens if self.lm_head is None else self.lm_head

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: SupraCache | None = None,
    past_key_values: SupraCache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **kwargs: Any,
  ) -> CausalLMOutputWithPast:
    """Logits float32 [B, T, vocabulary], of the last `logits_to_keep` tokens if that is not 0; see `SupraModel`."""
    if kwargs.get("position_ids") is not None:
      raise ValueError("position_ids are not supported: positions follow from attention_mask and the cache.")
    read = self.model(
      input_ids, attention_mask, cache, past_key_values, inputs_embeds, use_cache, output_hidden_states
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = at_least_float32(F.linear(read.last_hidden_state[:, kept], self.get_output_embeddings().weight))
    loss = None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
    output = CausalLMOutputWithPast(
      loss=loss, logits=logits, hidden_states=read.hidden_states, **{CACHE_NAME: read[CACHE_NAME] if use_cache else None}
    )
    return output.to_tuple() if return_dict is False else output
