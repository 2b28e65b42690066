"""Linear attention divided by a sum of weights: T2R's (arXiv 2103.13076) and the linear transformer's (2006.16236).

Shape suffixes: B batch, T tokens, D hidden width, H query heads, K key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_supra import SupraAttention, Tokens, at_least_float32, head_slopes, linear_attention


class SupraNormalised(SupraAttention):
  """o_i = sum over j <= i of exp(-slope (i - j)) (q_i . k_j) v_j / normaliser(sum over j <= i of q_i . k_j).

  The linear transformer's q and k in the normaliser are those before RoPE (RoFormer, arXiv 2104.09864, eq. 19).
  """

  def forward(
    self, x_BTD: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None
  ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mixes the tokens of one call as `SupraAttention.forward` does.

    The layer remembers the state of linear attention [B, H, K, V] and the sum of all keys [B, H, K], both float32.
    """
    options, width = self.options, self.config.head_dim
    q, k, v = self._project(x_BTD)
    scale = width**-0.5 if self.mixer == "t2r" else 1.0
    if options.get("scale_queries"):
      q, scale = q * scale, 1.0
    q, k = self._features(q, k) if self.mixer == "t2r" else (F.elu(at_least_float32(x)) + 1 for x in (q, k))
    before_rope = q.transpose(1, 2), k.masked_fill(~tokens.real_BT[..., None, None], 0).transpose(1, 2)
    turned = self._turned(q, k, v, tokens, softmax=False)
    weighed = turned[:2] if self.mixer == "t2r" else before_rope
    heads = self.config.num_heads
    q, k, v, q_z, k_z = (at_least_float32(x).repeat_interleave(heads // x.shape[1], 1) for x in (*turned, *weighed))
    s, z = held or (q.new_zeros(*q.shape[:2], width, v.shape[-1]), q.new_zeros(*q.shape[:2], width))
    slopes = torch.tensor(head_slopes(self.config.num_heads, options), dtype=q.dtype, device=q.device)
    out, s = linear_attention(q * scale, k, v, slopes, tokens.real_BT, s)
    total, z = linear_attention(q_z * scale, k_z, torch.ones_like(v[..., :1]), 0 * slopes, tokens.real_BT, z[..., None])
    clamps = options["normaliser"] == "clamp"
    out = out / (total.clamp(min=options["epsilon"]) if clamps else total + options["epsilon"])
    return self.o_proj(out.transpose(1, 2).flatten(2).to(x_BTD.dtype)), (s, z[..., 0])
