"""LoLCATs' layer (arXiv 2410.10254): softmax over a window and linear attention over all earlier tokens, in one sum.

Shape suffixes: B batch, T tokens, c tokens of a block, W window, X = W + T columns of the window before the call and of
its tokens, H query heads, G key/value heads, R = H / G, N heads of either kind, K key width, V value width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .attention_supra import CHUNK, SupraAttention, Tokens, at_least_float32, linear_attention
from .configuration_supra import SupraConfig

WEIGHT = math.log(1 / 9)  # of gamma = 0.1


class Hedgehog(nn.Module):
  """phi(x) = [softmax(W x), softmax(-W x)] with a matrix W for each head (arXiv 2402.04347)."""

  def __init__(self, heads: int, width: int):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(heads, width, width))

  def forward(self, x_BNTK: Tensor) -> Tensor:
    y = at_least_float32(torch.einsum("bntk,njk->bntj", x_BNTK, self.weight))
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class WindowFactor(nn.Module):
  """gamma = sigmoid(weight), one number for each head."""

  def __init__(self, heads: int):
    super().__init__()
    self.weight = nn.Parameter(torch.full((heads,), WEIGHT))

  def forward(self) -> Tensor:
    return at_least_float32(self.weight).sigmoid()


def with_one(v: Tensor) -> Tensor:
  """Returns v in float32 at least, with a further feature that is 1, whose sum of weights is the denominator."""
  v = at_least_float32(v)
  return torch.cat([v, torch.ones_like(v[..., :1])], -1)


class SupraLolcats(SupraAttention):
  """o_t = sum_i a_ti v_i / sum_i a_ti.

  a_ti is gamma exp(q_t . k_i / sqrt(K) - c_t) for the last W tokens, c_t their largest logit, and phi(q_t) . phi(k_i)
  for all earlier ones, with q and k after RoPE.
  """

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__(config, layer)
    self.window = config.supra["window"]
    self.hedgehog_q = Hedgehog(config.num_heads, config.head_dim)
    self.hedgehog_k = Hedgehog(config.num_kv_heads, config.head_dim)
    self.window_factor = WindowFactor(config.num_heads)

  def forward(
    self, x_BTD: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None
  ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mixes the tokens of one call as `SupraAttention.forward` does.

    The layer remembers the state [B, G, 2K, V + 1] of the tokens that have left the window, float32, and the window's
    keys [B, G, W, K] and values [B, G, W, V]; the last token of the text is in the last place.
    """
    real_BT, time = tokens.real_BT, x_BTD.shape[1]
    # Each row is laid out anew, without its padding, and back in the end.
    order_BT, place_BT = (~real_BT).long().argsort(dim=1, stable=True), (real_BT.cumsum(1) - 1).clamp(min=0)
    turned = self._turned(*self._project(x_BTD), tokens, softmax=True)
    q, k, v = (torch.take_along_dim(x, order_BT[:, None, :, None], 2) for x in turned)
    if held is None:
      state = k.new_zeros(*k.shape[:2], 2 * k.shape[-1], v.shape[-1] + 1, dtype=at_least_float32(k).dtype)
      held = (state, *(x.new_zeros(*x.shape[:2], self.window, x.shape[-1]) for x in (k, v)))
    k, v = (torch.cat([old, new], 2) for old, new in zip(held[1:], (k, v), strict=True))
    written_BX = tokens.seen_B[:, None] + torch.arange(k.shape[2], device=k.device) >= self.window
    count_B1 = real_BT.sum(1, keepdim=True)
    linear, state = self._linearly(
      q, k, v, written_BX & (torch.arange(k.shape[2], device=k.device) < count_B1), held[0]
    )
    blocks = [self._softly(q, k, v, written_BX, begin) for begin in range(0, time, CHUNK)]
    sums = self.window_factor()[:, None, None] * torch.cat(blocks, 2) + linear
    out_BHTV = torch.take_along_dim(sums[..., :-1] / sums[..., -1:], place_BT[:, None, :, None], 2)
    last = (count_B1 + torch.arange(self.window, device=k.device))[:, None, :, None]
    kept = (torch.take_along_dim(x, last, 2) for x in (k, v))
    return self.o_proj(out_BHTV.transpose(1, 2).flatten(2).to(x_BTD.dtype)), (state, *kept)

  def _linearly(
    self, q_BHTK: Tensor, k_BGXK: Tensor, v_BGXV: Tensor, late_BX: Tensor, state: Tensor
  ) -> tuple[Tensor, Tensor]:
    """Returns (sum of phi(q_t) . phi(k_i) [v_i, 1] over i <= t - W, [B, H, T, V + 1]; the state after the last token).

    Token t brings the key and value of token t - W, which `late_BX` says is one of the text.
    """
    repeats, time = q_BHTK.shape[1] // k_BGXK.shape[1], q_BHTK.shape[2]
    features = self.hedgehog_k(k_BGXK[:, :, :time]).masked_fill(~late_BX[:, None, :time, None], 0)
    k, v, before = (x.repeat_interleave(repeats, 1) for x in (features, with_one(v_BGXV[:, :, :time]), state))
    no_decay = q_BHTK.new_zeros(q_BHTK.shape[1], dtype=features.dtype)
    out, after = linear_attention(self.hedgehog_q(q_BHTK), k, v, no_decay, late_BX[:, :time], before)
    return out, after[:, ::repeats]

  def _softly(self, q_BHTK: Tensor, k_BGXK: Tensor, v_BGXV: Tensor, written_BX: Tensor, begin: int) -> Tensor:
    """Returns sum of exp(logit - c_t) [v_i, 1] over the window, [B, H, c, V + 1], of a block of tokens."""
    q = at_least_float32(q_BHTK[:, :, begin : begin + CHUNK]).unflatten(1, (k_BGXK.shape[1], -1))
    size = q.shape[3]
    seen = slice(begin + 1, begin + size + self.window)
    ahead = torch.arange(size + self.window - 1, device=q.device) - torch.arange(size, device=q.device)[:, None]
    mask = (ahead >= 0) & (ahead < self.window) & written_BX[:, None, None, None, seen]
    logits = torch.einsum("bgrck,bgxk->bgrcx", q * q.shape[-1] ** -0.5, k_BGXK[:, :, seen].to(q.dtype))
    logits = logits.masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)).masked_fill(~mask, 0)
    return torch.einsum("bgrcx,bgxv->bgrcv", weights, with_one(v_BGXV[:, :, seen])).flatten(1, 2)
