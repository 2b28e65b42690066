"""A block of tokens that a memory reads (`bounded_attention`): its attention, and the choice of what is held on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supra_jax.model.bounded_positions import Positions
from supra_jax.model.mixers.softmax import UNSEEN, attention_logits
from supra_jax.model.mixers.supra_window import taken
from supra_jax.model.slot_layout import Layout


class Far(NamedTuple):
  """How tokens are seen from further away than the teacher has seen two tokens apart.

  Attributes:
    q_BTHK: queries after RoPE at a position of at most `reach`; sinks outside the window are seen by them.
    least: distance from the last choice at which a retained token is far: its key is then held before RoPE, and seen
      by these queries.
    without_rope: (keys [..., K], int32 positions [...]) -> the keys before RoPE.
  """

  q_BTHK: jax.Array
  least: int
  without_rope: Callable[[jax.Array, jax.Array], jax.Array]


class Kept(NamedTuple):
  """The retained tokens, see `bounded_attention.MemoryState`; `token` is `kept_index`."""

  k: jax.Array
  v: jax.Array
  token: jax.Array
  score: jax.Array


class _Choice(NamedTuple):
  """Which of the C tokens that leave the window take which slots, int32 [B, A, P, C] each.

  Attributes:
    token: index of each of the C tokens in the row.
    column: where in the text it is.
    slot: the slot that it takes; S: none.
  """

  token: jax.Array
  column: jax.Array
  slot: jax.Array


class _Weights(NamedTuple):
  """Weights of a softmax before they are divided by their sum.

  Attributes:
    near: [B, A, P, c, R, N + X], of the sinks and the text.
    own: [B, A, h, c, R, M] of the retained tokens, for the h heads of each size.
    share: [B, A, P, c, R], 1 / their sum.
  """

  near: jax.Array
  own: list[jax.Array]
  share: jax.Array


@dataclasses.dataclass(frozen=True)
class Block:
  """Reads a block of at most C tokens, in which at most one choice is made.

  A choice is made after every C tokens of a document, so that of two documents that share a block one at most comes to
  a choice in it: the first, after token e. Tokens behind e see what is retained after the choice. All of that was
  retained before, or in the text, so that logits are computed once.

  Attributes:
    layout, sinks, chunk, far, at_random: as in `bounded_attention.attend`.
    aligned: whether no token comes after a choice.
  """

  layout: Layout
  sinks: int
  chunk: int
  far: Far | None
  at_random: bool
  aligned: bool

  def __call__(self, queries, text, seen_BXG, where: Positions, kept: Kept):
    """Reads a block.

    Args:
      queries: q [B, c, H, K], and if `far` is given its queries.
      text: keys and values [B, N + X, G, K]: of the first N tokens of the document of the block's first token, and of
        X tokens, the block and those before it, in the order of their indices or as a ring: at least W + C, and W + C
        before the block if a token comes after a choice.
      seen_BXG: their scores.
      where: positions of the tokens.
      kept: what is retained.

    Returns:
      (out [B, c, H, V]; what is retained after the block; the scores of the X tokens).
    """
    q = queries[0]
    size = q.shape[1]
    mask = where.sees_BcX[:, None, None, :, None]
    since = where.first_Bc[:, None, None, :, None, None]
    visible = [token[:, :, :, None, None] >= since for token in self.layout.split(kept.token)]

    k, v = (x.astype(q.dtype) for x in text)
    sink_logits = [attention_logits(queries[-1], k[:, : self.sinks])] * bool(self.sinks)
    near_logits = self._by_pattern(jnp.concatenate([*sink_logits, attention_logits(q, k[:, self.sinks :])], axis=-1))
    logits = near_logits, self._own_logits(queries, kept, where)
    values = self._by_pattern(v.swapaxes(1, 2)), [x.astype(q.dtype) for x in self.layout.split(kept.v)]

    chooses = bool(self.layout.slots) and not (self.aligned and 1 < size < self.chunk)
    twice = chooses and not self.aligned
    weights = self._weights(logits, mask, visible)
    kept, seen = self._scored(weights, where.real_Bc & ~where.late_Bc, kept, seen_BXG)
    if not twice:
      out = self._out(weights, values)
    if chooses:

      def choose(kept: Kept) -> tuple[Kept, _Choice]:
        choice = self._choice(kept, seen, where)
        return self._chosen(kept, choice, where, text, seen), choice

      if size == 1:
        kept = jax.lax.cond(where.any_B.any(), lambda kept: choose(kept)[0], lambda kept: kept, kept)
      else:
        held, (kept, choice) = kept, choose(kept)
    if twice:
      late = where.late_Bc[:, None, None, :, None, None]
      gone = self.layout.split(kept.token != held.token)
      visible = [before & ~(late & x[:, :, :, None, None]) for before, x in zip(visible, gone, strict=True)]
      stayed = self._stayed(choice, where.key_BX)[:, :, :, None, None]
      stayed = stayed & (where.key_BX[:, None, None, None, None] >= since)
      mask = mask | jnp.pad(late & stayed, [(0, 0)] * 5 + [(self.sinks, 0)])
      weights = self._weights(logits, mask, visible)
      out = self._out(weights, values)
      kept, got = self._scored(weights, where.late_Bc & where.real_Bc, kept, jnp.zeros_like(seen))
      kept = kept._replace(score=self._put(kept.score, choice, got, add=True))
      seen = seen + got
    return out, kept, seen

  def _by_pattern(self, x_BG: jax.Array) -> jax.Array:
    """Returns [B, A, P, ...] of [B, G, ...]."""
    return x_BG.reshape(len(x_BG), -1, len(self.layout.sizes), *x_BG.shape[2:])

  def _own_logits(self, queries, kept: Kept, where: Positions) -> list[jax.Array]:
    """Returns the logits of the retained tokens, [B, A, h, c, R, M] for the h heads of each size."""

    def product(q_BcHK, k_BASK) -> list[jax.Array]:
      lead = *q_BcHK.shape[:2], k_BASK.shape[1], len(self.layout.sizes)
      q = q_BcHK.reshape(*lead, -1, q_BcHK.shape[-1]).transpose(0, 2, 3, 1, 4, 5) / math.sqrt(q_BcHK.shape[-1])
      wide = jnp.promote_types(q.dtype, jnp.float32)
      pairs = zip(self.layout.heads_of(q), self.layout.split(k_BASK.astype(q.dtype)), strict=True)
      return [jnp.einsum("bahcrk,bahmk->bahcrm", q, k, preferred_element_type=wide) for q, k in pairs]

    if self.far is None:
      return product(queries[0], kept.k)
    far, k, last = self.far, kept.k, where.unjudged_Bc[:, None, None, :, None, None] - 1
    is_far = [last - token[:, :, :, None, None] >= far.least for token in self.layout.split(kept.token)]
    if self.aligned:
      both = product(
        jnp.concatenate([x[..., None, :] for x in queries], axis=-2).reshape(*queries[0].shape[:2], -1, k.shape[-1]), k
      )
      return [jnp.where(x, y[..., 1::2, :], y[..., ::2, :]) for x, y in zip(is_far, both, strict=True)]

    def with_far(own):
      # A choice in the block may make a token far whose key is held after RoPE.
      bare = where.unjudged_Bc[:, :1, None] - 1 - kept.token >= far.least
      position = jnp.maximum(kept.token - where.first_Bc[:, :1, None], 0)
      bare_k = jnp.where(bare[..., None], k, far.without_rope(k, position))
      return [jnp.where(x, a, b) for x, a, b in zip(is_far, product(queries[1], bare_k), own, strict=True)]

    own = product(queries[0], k)
    return jax.lax.cond(jnp.stack([x.any() for x in is_far]).any(), with_far, lambda own: own, own)

  def _weights(self, logits, mask, visible) -> _Weights:
    """Computes the softmax over the text and the retained tokens."""
    near = jnp.where(mask, logits[0], UNSEEN)
    own = [jnp.where(seen, x, UNSEEN) for seen, x in zip(visible, logits[1], strict=True)]
    highest = self.layout.joined([x.max(axis=-1, initial=UNSEEN) for x in own])
    top = jax.lax.stop_gradient(jnp.maximum(near.max(axis=-1), highest))
    near = jnp.exp(near - top[..., None])
    own = [jnp.exp(x - of[..., None]) for x, of in zip(own, self.layout.heads_of(top), strict=True)]
    return _Weights(near, own, 1 / (near.sum(axis=-1) + self.layout.joined([x.sum(axis=-1) for x in own])))

  def _out(self, weights: _Weights, values) -> jax.Array:
    """Returns the sum of the values by their weights, [B, c, H, V]."""
    dtype, wide = values[0].dtype, weights.share.dtype
    product = functools.partial(jnp.einsum, "bapcrs,bapsv->bapcrv", preferred_element_type=wide)
    own = [product(x.astype(dtype), v) for x, v in zip(weights.own, values[1], strict=True)]
    out = (product(weights.near.astype(dtype), values[0]) + self.layout.joined(own)) * weights.share[..., None]
    out = out.astype(dtype).transpose(0, 3, 1, 2, 4, 5)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])

  def _scored(self, weights: _Weights, counts_Bc, kept: Kept, seen_BSG) -> tuple[Kept, jax.Array]:
    """Adds to the scores the attention that tokens receive from the queries that count."""
    weights = jax.lax.stop_gradient(weights)
    share = weights.share * counts_Bc[:, None, None, :, None].astype(weights.share.dtype)
    received = functools.partial(jnp.einsum, "bapcrs,bapcr->baps")
    near = received(weights.near, share)[..., self.sinks :]
    seen = seen_BSG + near.reshape(len(near), -1, near.shape[-1]).swapaxes(1, 2).astype(seen_BSG.dtype)
    own = [received(x, of) for x, of in zip(weights.own, self.layout.heads_of(share), strict=True)]
    whole = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in own], axis=-1)
    return kept._replace(score=kept.score + whole.astype(kept.score.dtype)), seen

  def _choice(self, kept: Kept, seen, where: Positions) -> _Choice:
    """Finds which of the C tokens that leave the window take the slots of tokens that are worth less."""
    chunk, first = self.chunk, where.first_at_end_B1

    def worth(score, token, valid):
      if self.at_random:
        mixed = token.astype(jnp.uint32) * jnp.uint32(2654435761)  # Knuth's multiplicative hash, its high bits
        score = jnp.broadcast_to((mixed >> 8).astype(score.dtype), score.shape)
      return jnp.where(valid, score / (where.end_B1[..., None] + 1 - token).astype(score.dtype), -1.0)

    fresh = self._by_pattern(taken(seen, where.column_BC).swapaxes(1, 2))
    token = where.token_BC[:, None]
    new = worth(fresh.reshape(len(fresh), -1, chunk), token, token - first[..., None] >= self.sinks)
    old = worth(kept.score, kept.token, kept.token >= first[..., None])
    # The best of the new against the least of the old, the second best against the second least, and so on.
    best, source = jax.lax.top_k(new.reshape(fresh.shape), chunk)
    least, lost = jax.lax.top_k(-self.layout.by_head(old, jnp.inf, at_least=chunk), chunk)
    takes = (best > -least) & where.any_B[:, None, None, None]
    slot = jnp.where(takes, jnp.asarray(self.layout.begins)[:, None] + lost, self.layout.slots)
    column, extent = where.column_BC[:, None, None, :1] + source, where.key_BX.shape[1]
    column = jnp.where(column < extent, column, column - extent)
    return _Choice(token[:, None, :, :1] + source, column, slot)

  def _chosen(self, kept: Kept, choice: _Choice, where: Positions, text, seen) -> Kept:
    """Returns what is retained after a choice."""
    near = [x[:, self.sinks :] for x in text]
    k, v, score = (self._put(x, choice, y) for x, y in zip((kept.k, kept.v, kept.score), (*near, seen), strict=True))
    token = self._write(kept.token, choice, choice.token)
    if self.far is not None:
      far, first = self.far, where.first_at_end_B1[..., None]
      distance = where.end_B1[..., None] - token
      crossed = (token >= first) & (distance >= far.least) & (distance < far.least + self.chunk)
      crossed = crossed & where.any_B[:, None, None]
      position = jnp.where(crossed, token - first, 0)
      bare = jax.lax.cond(crossed.any(), lambda k: far.without_rope(k, position), lambda k: k, k)
      k = jnp.where(crossed[..., None], bare, k)
    return Kept(k, v, token, score)

  def _put(self, x_BAS: jax.Array, choice: _Choice, text_BXG: jax.Array, *, add: bool = False) -> jax.Array:
    """Writes to their slots the entries of a text of the tokens that take one."""
    text = self._by_pattern(text_BXG.swapaxes(1, 2))
    column = choice.column.reshape(*choice.column.shape, *[1] * (text.ndim - 4))
    return self._write(x_BAS, choice, jnp.take_along_axis(text, column, axis=3, mode="promise_in_bounds"), add=add)

  @staticmethod
  def _write(x_BAS: jax.Array, choice: _Choice, new_BAPC: jax.Array, *, add: bool = False) -> jax.Array:
    batch, repeats = x_BAS.shape[:2]
    at = x_BAS.at[
      jnp.arange(batch)[:, None, None], jnp.arange(repeats)[:, None], choice.slot.reshape(batch, repeats, -1)
    ]
    new = new_BAPC.reshape(batch, repeats, -1, *x_BAS.shape[3:]).astype(x_BAS.dtype)
    return at.add(new, mode="drop") if add else at.set(new, mode="drop")

  def _stayed(self, choice: _Choice, key_BX: jax.Array) -> jax.Array:
    """Returns whether each token of a text left the window at the choice and was retained, [B, A, P, X]."""
    token = jnp.where(choice.slot < self.layout.slots, choice.token, -1)
    return (key_BX[:, None, None, :, None] == token[..., None, :]).any(axis=-1)
