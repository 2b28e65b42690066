"""The attention layer of `modeling_supra.py` and its parts: norms, RoPE, feature maps, and linear attention.

Shape suffixes: B batch, T tokens, C tokens within a chunk, S slots of a cache, D hidden width, N heads (query or
key/value), H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_supra import SupraConfig

CHUNK = 128  # tokens per chunk: linear attention is quadratic within a chunk, a state carries the earlier tokens
GROUP_NORM_EPS = 1e-5
PADDING = torch.iinfo(torch.int64).max  # position of a cache slot that holds padding, which no real token may see


def at_least_float32(x: Tensor) -> Tensor:
  """Casts x up to float32; wider types are unchanged."""
  return x.to(torch.promote_types(x.dtype, torch.float32))


class SupraNorm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32; the output has the input's dtype.

  `config.norm` is `rms_norm`, `layer_norm` (gain and bias) or `layer_norm_gain` (no bias).
  """

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


def head_slopes(heads: int, options: dict[str, Any]) -> list[float]:
  """Returns the slopes s_h >= 0 of the decays exp(-s_h) per head: lightning attention's, RetNet's, or 0 (no decay).

  Args:
    heads: number of heads.
    options: options of linear attention, see `SupraConfig.options`.
  """
  decay, start = options["decay"], options["decay_start"]
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
  """Returns the angle per position by which RoPE turns each pair of features, in radians, float64 [K/2].

  Args:
    rope: the field `rope` of the config.
    width: K, the key width.
  """
  frequency = rope["base"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
  slow = frequency / rope["factor"]
  if rope["scaling"] == "none":
    return frequency
  if rope["scaling"] == "linear":
    return slow
  if rope["scaling"] == "llama3":
    turns = rope["original_max_positions"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
  else:
    keep = yarn_keep(rope, width)
  return (1 - keep) * slow + keep * frequency


def yarn_keep(rope: dict[str, Any], width: int) -> Tensor:
  """Returns the share of each frequency that YaRN (arXiv 2309.00071) leaves unscaled, in [0, 1], float64 [K/2]."""

  def pair(turns: float) -> float:
    return width * math.log(rope["original_max_positions"] / (turns * 2 * math.pi)) / (2 * math.log(rope["base"]))

  first, last = pair(rope["beta_fast"]), pair(rope["beta_slow"])
  if rope["truncate"]:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  ramp = (torch.arange(width // 2, dtype=torch.float64) - first) / (last - first or 0.001)
  return 1 - ramp.clamp(0, 1)


def rope_table(rope: dict[str, Any], width: int, position: Tensor) -> tuple[Tensor, Tensor]:
  """Returns (cos, sin) of RoPE's angles at int64 positions [...], times YaRN's attention_factor, float32 [..., K/2].

  Angles are computed in float64: in float32, they would be off by 0.03 radians at position 1,000,000.
  """
  where = torch.device("cpu") if position.device.type == "mps" else position.device  # mps has no float64
  angle = position.to(where, torch.float64)[..., None] * rope_frequencies(rope, width).to(where)
  cos, sin = ((rope["attention_factor"] * x).to(position.device, torch.float32) for x in (angle.cos(), angle.sin()))
  return cos, sin


def apply_rope(x_BTNK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
  """Rotates pairs of features of each head: (2i, 2i + 1) if `interleaved`, else (i, i + K/2)."""
  x = at_least_float32(x_BTNK)
  first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x_BTNK.dtype)


class DenseFeatureMap(nn.Linear):
  """W x + b of the feature map phi(x) = relu(W x + b), one W over all heads; as an nn.Linear, LoRA can wrap it."""

  def __init__(self, heads: int, width: int):
    super().__init__(heads * width, heads * width)


class PerHeadFeatureMap(nn.Module):
  """W x + b of the feature map phi(x) = relu(W x + b), with `maps` matrices W; N / maps adjacent heads share one."""

  def __init__(self, maps: int, width: int):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(maps, width, width))
    self.bias = nn.Parameter(torch.empty(maps, width))

  def forward(self, x_BTNK: Tensor) -> Tensor:
    x = x_BTNK.unflatten(2, (len(self.weight), -1))
    return (torch.einsum("btmrk,mjk->btmrj", x, self.weight) + self.bias[:, None]).reshape(x_BTNK.shape)


def linear_attention(
  q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, slopes_H: Tensor, real_BT: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
  """Computes linear attention with decay (arXiv 2405.06640).

  o_i = sum over j <= i of exp(-slope (i - j)) (q_i . k_j) v_j, where the state carries the tokens before this call.
  The same code serves a whole text, chunk by chunk, and a single token, which is one step of the RNN.

  Args:
    q_BHTK, k_BHTK, v_BHTV: queries, keys and values after the feature map, float32. k must be 0 at padding.
    slopes_H: slopes of the decays, at least 0.
    real_BT: bool, False at padding, which may be anywhere. Padding does not count in i - j.
    state_BHKV: state before the first token, the decayed sum of k_j v_j^T over all earlier tokens.

  Returns:
    The output o [B, H, T, V], and the state after the last token.
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


class Sight(NamedTuple):
  """Which keys a query of softmax attention sees.

  Attributes:
    window: a query sees this many tokens, counted back from its own, which is included; None means all tokens.
    sinks: number of tokens at the start of the text that a query sees in addition.
  """

  window: int | None
  sinks: int

  def near(self, slot: Tensor, position: Tensor) -> Tensor:
    """Whether a query at `position` sees the key at position `slot`, if slot <= position. `window` must not be None.

    Args:
      slot, position: int64 tensors of positions, which broadcast.
    """
    return (slot > position - self.window) | (slot < self.sinks)

  def slots(self, slot_BS: Tensor, position_B: Tensor) -> Tensor:
    """Returns the indices of the slots that any query from `position_B` on sees, in at least one row; int64."""
    return (self.near(slot_BS, position_B[:, None]) & (slot_BS < PADDING)).any(0).nonzero()[:, 0]

  def columns(self, first: int, stop: int, device: torch.device) -> Tensor:
    """Returns the indices of the sinks and of slots first..stop-1, int64. Needs `Tokens.unpadded`."""
    sinks = torch.arange(min(self.sinks, first), device=device)
    return torch.cat([sinks, torch.arange(first, stop, device=device)])


def sink_reach(config: SupraConfig) -> int | None:
  """Returns the distance, in tokens, to which larger distances between q and the sinks are clamped for RoPE.

  This is the largest distance inside the teacher's trained context, but never less than 2 * window + sinks, up to which
  the sinks may still be inside the window. None: distances are not clamped.
  """
  seen = [tokens for tokens in (config.max_positions, config.sliding_window) if tokens is not None]
  if not seen or not config.supra.get("sinks", 0):
    return None
  return max(min(seen) - 1, 2 * config.supra["window"] + config.supra["sinks"])


def sights(config: SupraConfig) -> dict[str, Sight]:
  """Returns name -> Sight of each mixer of the model that has softmax attention."""
  both = {
    "softmax": Sight(config.sliding_window, 0),
    "supra_window": Sight(config.supra["window"], config.supra.get("sinks", 0)),
  }
  return {mixer: sight for mixer, sight in both.items() if mixer in config.mixers}


class Tokens(NamedTuple):
  """Positions of the tokens of one call, shared by all layers.

  Attributes:
    real_BT: bool, False for padding.
    position_BT: int64, number of real tokens of the row before each token.
    slots: mixer -> position of each key, int64 [B, S], keys of earlier calls included; PADDING for padding.
    rotation: (cos, sin) of RoPE, float32 [B, T, 1, K/2]; None if the model has no RoPE over positions.
    far_rotations: {reach: (cos, sin)}, like `rotation` but at min(position, reach), for each reach of a layer that some
      token may be beyond, see `sink_reach`.
    slopes_H: slopes of the decays, float32.
    unpadded: whether the text begins in this call and has no padding, so that column t holds position t.
    seen_B: int64, number of real tokens of the row before this call.
    choices: sizes of the chunks of memories that may end in this call, see `memory_supra.py`.
  """

  real_BT: Tensor
  position_BT: Tensor
  slots: dict[str, Tensor]
  rotation: tuple[Tensor, Tensor] | None
  far_rotations: dict[int, tuple[Tensor, Tensor]]
  slopes_H: Tensor
  unpadded: bool
  seen_B: Tensor
  choices: set[int]


class SupraAttention(nn.Module):
  """Attention of one layer, of the kind that `config.mixers[layer]` names.

  `softmax` is softmax attention; `supra` is SUPRA's linear attention (arXiv 2405.06640); `supra_window` is the sum of
  linear attention and of softmax attention over the last `window` and the text's first `sinks` tokens. Subclasses in
  `memory_supra.py`, `lolcats_supra.py` and `normalised_supra.py` are the others.
  """

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__()
    self.config, self.layer, self.mixer = config, layer, config.mixers[layer]
    self.options = config.options(layer)
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=config.qkv_bias)
    self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=config.qkv_bias)
    self.v_proj = nn.Linear(config.hidden_size, groups * config.value_width, bias=config.qkv_bias)
    self.o_proj = nn.Linear(heads * config.value_width, config.hidden_size, bias=config.output_bias)
    if config.qk_norm != "none":
      self.q_norm = SupraNorm(config, width if config.qk_norm == "head" else heads * width)
      self.k_norm = SupraNorm(config, width if config.qk_norm == "head" else groups * width)
    if self.mixer not in ("supra", "supra_window", "t2r"):
      return
    if self.mixer == "supra_window":
      self.linear_o_proj = nn.Linear(heads * config.value_width, config.hidden_size, bias=False)
    kind = self.options["feature_map"]
    if kind == "dense":
      self.feature_map = DenseFeatureMap(heads, width)
      self.feature_map_kv = DenseFeatureMap(groups, width) if groups < heads else None
    else:
      self.feature_map = PerHeadFeatureMap(groups if kind == "per_head" else heads, width)
      self.feature_map_kv = PerHeadFeatureMap(groups, width) if kind == "per_head_separate" else None
    if self.options["qk_norm"]:
      self.q_feature_norm = SupraNorm(config, heads * width)
      self.k_feature_norm = SupraNorm(config, heads * width)

  def forward(
    self, x_BTD: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None
  ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mixes the tokens of one call.

    Args:
      x_BTD: input of the layer, already normalised.
      tokens: positions of the tokens.
      held: what the layer remembers, as the previous call returned it; None in the first call.

    Returns:
      The output [B, T, D], and what the layer remembers: (state,), (k, v) or (state, k, v), with the state of linear
      attention [B, H, K, V], and softmax attention's keys k [B, G, S, K] and values v [B, G, S, V].
    """
    q, k, v = self._project(x_BTD)
    outs: list[Tensor] = []
    kept: tuple[Tensor, ...] = ()
    if self.mixer != "supra":
      turned = self._turned(q, k, v, tokens, softmax=True)
      far_q = self._far_queries(q, sink_reach(self.config), tokens) if self.mixer == "supra_window" else None
      out, kept = self._softmax(*turned, far_q, tokens, None if held is None else held[-2:])
      outs.append(out)
    if self.mixer != "softmax":
      turned = self._turned(*self._features(q, k), v, tokens, softmax=False)
      out, state = self._linear(*turned, tokens, None if held is None else held[0])
      outs, kept = [*outs, out], (state, *kept)
    first, *second = (out_BHTV.transpose(1, 2).flatten(2).to(x_BTD.dtype) for out_BHTV in outs)
    return sum((self.linear_o_proj(x) for x in second), self.o_proj(first)), kept

  def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v as [B, T, N, width], normalised as `config.qk_norm` says."""
    c = self.config
    q, k, v = (proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj))
    if c.qk_norm == "all_heads":
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.unflatten(-1, (c.num_heads, -1)), *(x.unflatten(-1, (c.num_kv_heads, -1)) for x in (k, v))
    if c.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    return q, k, v

  def _turned(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v as [B, N, T, width], with q and k rotated by RoPE, and k and v set to 0 at padding."""
    # In linear attention, RoPE by head would rotate q and k of a head by the same angle, which changes no q . k.
    if softmax or (self.config.rope["kind"] != "by_head" and self.options.get("rope", True)):
      q, k = self._rotate(q, tokens.rotation), self._rotate(k, tokens.rotation)
    padding = ~tokens.real_BT[..., None, None]
    # Replaces the values rather than multiplying them by 0: padding may hold NaN, and 0 * NaN is NaN.
    k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

  def _far_queries(self, q_BTHK: Tensor, reach: int | None, tokens: Tokens) -> Tensor | None:
    """Returns q rotated at positions of at most `reach`, [B, H, T, K]; None: no token is beyond `reach`."""
    if reach is None or reach not in tokens.far_rotations:
      return None
    return self._rotate(q_BTHK, tokens.far_rotations[reach]).transpose(1, 2)

  def _rotate(self, x_BTNK: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    rope = self.config.rope
    if rope["kind"] == "by_head":
      rotation = rope_table(rope, x_BTNK.shape[-1], torch.arange(x_BTNK.shape[2], device=x_BTNK.device))
    return x_BTNK if rotation is None else apply_rope(x_BTNK, *rotation, rope["kind"] == "interleaved")

  def _features(self, q_BTHK: Tensor, k_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    k_map = self.feature_map if self.feature_map_kv is None else self.feature_map_kv
    q, k = self._phi(self.feature_map, q_BTHK), self._phi(k_map, k_BTGK)
    if self.options["qk_norm"]:
      # k's norm has gains for every query head, so k is repeated to as many heads as q has.
      k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
      q, k = self.q_feature_norm(q.flatten(2)).view_as(q), self.k_feature_norm(k.flatten(2)).view_as(q)
    return q, k

  def _phi(self, feature_map: nn.Module, x_BTNK: Tensor) -> Tensor:
    x = x_BTNK.flatten(2) if self.options["feature_map"] == "dense" else x_BTNK
    return F.relu(feature_map(x)).view_as(x_BTNK)

  def _linear(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    q, k, v = (at_least_float32(x).repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    out, state = linear_attention(q, k, v, tokens.slopes_H.to(q.dtype), tokens.real_BT, state)
    return F.layer_norm(out * q.shape[-1] ** -0.5, out.shape[-1:], eps=GROUP_NORM_EPS), state

  def _softmax(
    self, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, tokens: Tokens, held: tuple[Tensor, ...] | None
  ) -> tuple[Tensor, tuple[Tensor, ...]]:
    if held is not None:
      k, v = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)
    sight, before = sights(self.config)[self.mixer], k.shape[2] - q.shape[2]
    slot_BS, outs = tokens.slots[self.mixer], []
    scale, repeated = q.shape[-1] ** -0.5, [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    if far_q is not None:
      # One attention call with q and far_q side by side: a sink's key fills the half of far_q, any other key that of q.
      # The other half of each key is 0.
      sink = (slot_BS < sight.sinks)[:, None, :, None]
      q, keys = torch.cat([q, far_q], -1), repeated[0]
      repeated[0] = torch.cat([keys.masked_fill(sink, 0), keys.masked_fill(~sink, 0)], -1)
    size = q.shape[2] if sight.window is None else CHUNK
    for start in range(0, q.shape[2], size):
      own, stop = slice(start, start + size), before + start + size
      position, real = tokens.position_BT[:, own], tokens.real_BT[:, own]
      slots, seen = slot_BS[:, :stop], [x[:, :, :stop] for x in repeated]
      if sight.window is not None and tokens.unpadded:
        kept = sight.columns(max(start - sight.window + 1, 0), slots.shape[1], slots.device)
        slots, seen = slots[:, kept], [x[:, :, kept] for x in seen]
      elif sight.window is not None and not torch.compiler.is_compiling():  # compiled shapes cannot depend on data
        kept = sight.slots(slots, position[:, 0])
        slots, seen = slots[:, kept], [x[:, :, kept] for x in seen]
      query, key = position[:, :, None], slots[:, None]
      mask_BTS = key <= query
      if sight.window is not None:
        mask_BTS &= sight.near(key, query)
      mask_BTS |= ~real[:, :, None]  # padding queries see all keys: a softmax over no keys would be NaN
      outs.append(F.scaled_dot_product_attention(q[:, :, own], *seen, attn_mask=mask_BTS[:, None], scale=scale))
    return torch.cat(outs, 2), (k, v)
