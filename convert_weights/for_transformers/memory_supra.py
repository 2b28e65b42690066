"""Softmax attention over a bounded memory: a text's first tokens, its last ones, and others that attention chooses.

Shape suffixes: B batch, T tokens, c tokens of a block, C tokens between two choices, W window, X = W + C, H query
heads, G key/value heads, R = H / G, K key width, V value width. A head has places for the tokens that it retains: M is
the number of places of the head that has most, S that of all heads together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_supra import SupraAttention, Tokens, apply_rope, at_least_float32, rope_table, sink_reach
from .configuration_supra import SupraConfig


class Memory(NamedTuple):
  """What a layer holds of the text of each row. u is the position of the first token since the last choice.

  Attributes:
    k, v: keys [B, G, W + C, K], after RoPE, and values [B, G, W + C, V] of the last tokens; position u - W + i is at i.
    score: float32 [B, G, W + C], the attention that each of these tokens has received.
    kept_k, kept_v: keys [B, S, K] and values [B, S, V] of the retained tokens, the first head's first; within a call,
      [B, G, M, K] and [B, G, M, V].
    kept_position: int32 [B, G, M], positions of the retained tokens; -1: the place is empty.
    kept_score: float32 [B, G, M].
  """

  k: Tensor
  v: Tensor
  score: Tensor
  kept_k: Tensor
  kept_v: Tensor
  kept_position: Tensor
  kept_score: Tensor


class Block(NamedTuple):
  """Tokens of a call between two choices.

  Attributes:
    queries: q [B, G, R, c, K], and if some token may be far also the queries that far tokens are seen by.
    k, v: keys [B, G, c, K] and values [B, G, c, V].
    position_Bc: int64, positions of the tokens.
    real_Bc: bool, False where there is no token.
    written_BC: bool, whether the token with position u + i is in the block.
    begin_B: int64, u.
  """

  queries: list[Tensor]
  k: Tensor
  v: Tensor
  position_Bc: Tensor
  real_Bc: Tensor
  written_BC: Tensor
  begin_B: Tensor


def memory_reach(config: SupraConfig, memory: dict[str, Any]) -> int | None:
  """Returns the largest position to which q is rotated when it meets sinks and far tokens; None: any position.

  This is the largest distance inside the teacher's trained context, but more than the distance of tokens that are near.
  """
  seen = [tokens for tokens in (config.max_positions, config.sliding_window) if tokens is not None]
  if not seen:
    return None
  return max(min(seen) - 1, memory["window"] + 3 * memory["chunk"] + memory["sinks"])


def reaches(config: SupraConfig) -> dict[int, int]:
  """Returns {reach of some layer: length in tokens of a text in which no layer with this reach needs it}."""
  reach = sink_reach(config)
  found = {} if reach is None else {reach: reach + 1}
  for memory in filter(None, config.memories or ()):
    reach = memory_reach(config, memory)
    if reach is not None:
      found[reach] = min(found.get(reach, reach), reach - memory["chunk"])
  return found


class SupraMemory(SupraAttention):
  """Softmax attention over the last W to W + C tokens, the text's first N, called sinks, and retained ones.

  A choice is made after every C tokens of the text, by each key/value head on its own: C tokens leave the window. Of
  these and the retained ones, the head retains those that have received most attention per token of their age, and all
  sinks. A text is read in blocks, in each row from one choice to the next.
  """

  def __init__(self, config: SupraConfig, layer: int):
    super().__init__(config, layer)
    memory = config.memories[layer]
    self.window, self.chunk, self.sinks = memory["window"], memory["chunk"], memory["sinks"]
    self.at_random, self.held_dtype = memory["score"] == "random", getattr(torch, memory["state_dtype"])
    self.reach = memory_reach(config, memory)
    pattern = memory["retained"]
    self.sizes = [self.sinks + size for size in pattern] * (config.num_kv_heads // len(pattern))

  def forward(
    self, x_BTD: Tensor, tokens: Tokens, held: tuple[Tensor, ...] | None
  ) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mixes the tokens of one call as `SupraAttention.forward` does; what the layer remembers is a `Memory`."""
    q, k, v = self._project(x_BTD)
    far_q = self._far_queries(q, self.reach, tokens)
    q, k, v = self._turned(q, k, v, tokens, softmax=True)
    # What is read at once is rounded too, and so the same.
    k, v = k.to(self.held_dtype), v.to(self.held_dtype)
    queries = [
      at_least_float32(x).unflatten(1, (k.shape[1], -1)) * x.shape[-1] ** -0.5 for x in (q, far_q) if x is not None
    ]
    before = self._empty(k, v) if held is None else Memory(*held)
    memory = self._by_head(before)
    chooses, outs = self.chunk in tokens.choices, []
    blocks, column_BT = self._blocks(queries, k, v, tokens, begins=held is None)
    for block in blocks:
      out, memory = self._read(memory, block)
      outs.append(out)
      if chooses:
        memory = self._choose(memory, block)
    kept_k, kept_v = (self._compact(x) for x in memory[3:5]) if chooses else before[3:5]
    out_BGRTV = torch.take_along_dim(torch.cat(outs, -2), column_BT[:, None, None, :, None], -2)
    out_BTF = out_BGRTV.flatten(1, 2).transpose(1, 2).flatten(2)
    return self.o_proj(out_BTF.to(x_BTD.dtype)), memory._replace(kept_k=kept_k, kept_v=kept_v)

  def _empty(self, k_BGTK: Tensor, v_BGTV: Tensor) -> Memory:
    (batch, heads), size = k_BGTK.shape[:2], self.window + self.chunk
    near = [x.new_zeros(batch, heads, size, x.shape[-1]) for x in (k_BGTK, v_BGTV)]
    kept = [x.new_zeros(batch, sum(self.sizes), x.shape[-1]) for x in (k_BGTK, v_BGTV)]
    score, kept_score = (k_BGTK.new_zeros(batch, heads, n, dtype=torch.float32) for n in (size, max(self.sizes)))
    kept_position = torch.full_like(kept_score, -1, dtype=torch.int32)
    return Memory(near[0], near[1], score, kept[0], kept[1], kept_position, kept_score)

  def _by_head(self, memory: Memory) -> Memory:
    """Returns the memory with keys and values of retained tokens as [B, G, M, ...]; empty places hold other tokens'."""
    sizes = torch.tensor(self.sizes, device=memory.kept_k.device)
    place = (sizes.cumsum(0) - sizes)[:, None] + torch.arange(max(self.sizes), device=sizes.device)
    place = place.clamp(max=sum(self.sizes) - 1)
    return memory._replace(kept_k=memory.kept_k[:, place], kept_v=memory.kept_v[:, place])

  def _compact(self, x_BGM: Tensor) -> Tensor:
    """Returns [B, S, ...] of [B, G, M, ...]."""
    return torch.cat([x_BGM[:, head, :size] for head, size in enumerate(self.sizes)], 1)

  def _blocks(
    self, queries: list[Tensor], k_BGTK: Tensor, v_BGTV: Tensor, tokens: Tokens, begins: bool
  ) -> tuple[list[Block], Tensor]:
    """Returns the blocks of a call, and the index of each token among all tokens of the blocks, int64 [B, T].

    Args:
      queries: as in `Block`, for all tokens of the call.
      k_BGTK, v_BGTV: keys and values.
      tokens: positions of the tokens.
      begins: whether the text begins in this call.
    """
    (batch, time), chunk, device = tokens.real_BT.shape, self.chunk, k_BGTK.device
    begin_B, cell = tokens.seen_B // chunk * chunk, torch.arange(chunk, device=device)
    column_BT = tokens.position_BT - begin_B[:, None]
    if time == 1:
      written_BC = tokens.real_BT & (column_BT == cell)
      block = Block(queries, k_BGTK, v_BGTV, tokens.position_BT, tokens.real_BT, written_BC, begin_B)
      return [block], torch.zeros_like(column_BT)
    # Each row is laid out anew, without its padding, so that its choices fall on the ends of blocks.
    count = -(-(time if begins else time + chunk - 1) // chunk)
    column_BT = column_BT.masked_fill(~tokens.real_BT, count * chunk)
    source = column_BT.new_zeros(batch, count * chunk + 1)
    source = source.scatter(1, column_BT, torch.arange(time, device=device).expand(batch, -1))
    real = torch.zeros_like(source, dtype=torch.bool).scatter(1, column_BT, True)
    blocks = []
    for number in range(count):
      own = slice(number * chunk, (number + 1) * chunk)
      k, v = (torch.take_along_dim(x, source[:, None, own, None], 2) for x in (k_BGTK, v_BGTV))
      asking = [torch.take_along_dim(q, source[:, None, None, own, None], 3) for q in queries]
      begin = begin_B + number * chunk
      blocks.append(Block(asking, k, v, begin[:, None] + cell, real[:, own], real[:, own], begin))
    return blocks, column_BT.clamp(max=count * chunk - 1)

  def _read(self, memory: Memory, block: Block) -> tuple[Tensor, Memory]:
    """Returns the output for a block, [B, G, R, c, V], and the memory with the block's tokens and the new scores."""
    q, *far_q = block.queries
    write = block.written_BC[:, None, :, None]
    k, v = (
      torch.cat([old[:, :, : self.window], torch.where(write, new, old[:, :, self.window :])], 2)
      for old, new in ((memory.k, block.k), (memory.v, block.v))
    )
    size, near_k, kept_k = max(self.sizes), k.to(q.dtype), memory.kept_k.to(q.dtype)
    token_B1X = block.begin_B[:, None, None] - self.window + torch.arange(k.shape[2], device=k.device)
    near = (token_B1X >= 0) & (token_B1X <= block.position_Bc[..., None])
    kept = memory.kept_position[:, :, None] >= 0

    def products(q_BGRcK: Tensor, k_BGXK: Tensor) -> Tensor:
      return torch.einsum("bgrck,bgxk->bgrcx", q_BGRcK, k_BGXK)

    own = products(q, kept_k)
    if far_q:
      age = block.begin_B[:, None, None] - 1 - memory.kept_position
      is_far = (memory.kept_position < self.sinks) | (age >= self._far)
      own = torch.where(is_far[:, :, None, None], products(far_q[0], kept_k), own)
    unseen = torch.finfo(q.dtype).min  # not -inf: padding may see no token at all, and a softmax over none would be NaN
    logits = [own.masked_fill(~kept[:, :, None], unseen), products(q, near_k).masked_fill(~near[:, None, None], unseen)]
    weights = torch.cat(logits, -1).softmax(-1)
    out = torch.einsum("bgrcx,bgxv->bgrcv", weights, torch.cat([memory.kept_v, v], 2).to(q.dtype))
    received = weights.detach().masked_fill(~block.real_Bc[:, None, None, :, None], 0).sum((2, 3)).float()
    kept_score, score = memory.kept_score + received[..., :size], memory.score + received[..., size:]
    return out, memory._replace(k=k, v=v, score=score, kept_score=kept_score)

  @property
  def _far(self) -> int:
    """The distance from the last choice from which on a retained token is far; its key is then held before RoPE."""
    return self.reach - self.chunk

  def _choose(self, memory: Memory, block: Block) -> Memory:
    """Returns the memory after a choice, in the rows in which the block ends with one."""
    chunk, size = self.chunk, max(self.sizes)
    end_B11 = block.begin_B[:, None, None] + chunk
    leaving = end_B11 - chunk - self.window + torch.arange(chunk, device=end_B11.device)
    position = torch.cat([memory.kept_position, leaving.expand(-1, len(self.sizes), -1)], 2)
    score = torch.cat([memory.kept_score, memory.score[..., :chunk]], 2)
    worth = score
    if self.at_random:
      worth = ((position * 2654435761 & 0xFFFFFFFF) >> 8).float()  # Knuth's multiplicative hash, its high bits
    worth = (worth / (end_B11 - position)).masked_fill(position < self.sinks, torch.inf).masked_fill(position < 0, -1)
    # Stable: of equals those that leave the window go.
    best = worth.argsort(dim=-1, descending=True, stable=True)[..., :size]
    sizes = torch.tensor(self.sizes, device=position.device)[:, None]
    position = position.gather(2, best).masked_fill(torch.arange(size, device=position.device) >= sizes, -1).int()
    kept_k, kept_v = (
      torch.take_along_dim(torch.cat([kept, near[:, :, :chunk]], 2), best[..., None], 2)
      for kept, near in ((memory.kept_k, memory.k), (memory.kept_v, memory.v))
    )
    if len(block.queries) > 1:
      age = end_B11 - 1 - position
      crossed = (position >= self.sinks) & (age >= self._far) & (age < self._far + chunk)
      kept_k = torch.where(crossed[..., None], self._without_rope(kept_k, position.clamp(min=0)), kept_k)
    k, v = (F.pad(x[:, :, chunk:], (0, 0, 0, chunk)) for x in (memory.k, memory.v))
    chosen = Memory(k, v, F.pad(memory.score[..., chunk:], (0, chunk)), kept_k, kept_v, position, score.gather(2, best))
    ends_B = block.written_BC[:, -1]
    return Memory(
      *(torch.where(ends_B.view(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(chosen, memory, strict=True))
    )

  def _without_rope(self, k_BGMK: Tensor, position_BGM: Tensor) -> Tensor:
    rope = self.config.rope
    cos, sin = (x / rope["attention_factor"] for x in rope_table(rope, k_BGMK.shape[-1], position_BGM))
    return apply_rope(k_BGMK, cos, -sin, rope["kind"] == "interleaved")
