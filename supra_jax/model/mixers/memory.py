"""The teacher's softmax attention over a bounded memory: the first tokens, the last ones, and those that earned it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.schema import POSITIVE, AtLeast, check
from supra_jax.model.bounded_attention import MemoryState, Where, attend, empty_slots
from supra_jax.model.bounded_block import Far
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.base import Context, Projections, side_by_side
from supra_jax.model.mixers.softmax import attention_flops
from supra_jax.model.mixers.supra_window import window_places
from supra_jax.model.registry import MixerConfig, register
from supra_jax.model.rope import apply_rope, rope_table
from supra_jax.model.slot_layout import Layout

HEADS_OF_TOKENS = ("batch", None, "heads", None)


@dataclasses.dataclass(frozen=True)
class MemoryConfig(MixerConfig):
  """Config of softmax attention over N + W + M tokens of the document, and up to C more.

  Attributes:
    window: W, number of last tokens that a key/value head holds.
    retained: M, number of tokens that left the window and are held on: one number for all key/value heads, or P numbers
      for a pattern of P heads that is repeated.
    sinks: N, number of first tokens of the document that all heads hold (Xiao et al. 2023, arXiv 2309.17453).
    chunk: C, tokens of the document between two choices of what is held on. Tokens since the last choice are seen too.
    score: what makes a token worth holding on: the attention it received; or random numbers, which shows what the first
      is worth.
    state_dtype: dtype in which the state holds keys and values, unless the program names another.
  """

  window: Annotated[int, POSITIVE] = 16
  retained: tuple[Annotated[int, AtLeast(0)], ...] = (96,)
  sinks: Annotated[int, AtLeast(0)] = 4
  chunk: Annotated[int, POSITIVE] = 16
  score: Literal["attention", "random"] = "attention"
  state_dtype: Literal["bfloat16", "float32"] = "bfloat16"

  def __post_init__(self):
    check(self, type(self).__name__)
    if not self.retained:
      raise ValueError("MemoryConfig.retained is empty: wanted a number of tokens for all heads, or one for each.")

  @property
  def alike(self) -> MemoryConfig:
    return dataclasses.replace(self, retained=(0,))

  @property
  def layout(self) -> Layout:
    """Where the retained tokens of each head lie."""
    return Layout(self.retained)


@register("memory")
class MemoryAttention(Projections):
  """W_o softmax(q k^T / sqrt(K)) v over the tokens that a head holds; the state does not grow.

  The score of a token is the attention that it has received from all queries of its group so far (H2O: Zhang et al.
  2023, arXiv 2306.14048), a sum. Every C tokens of the document the tokens that have left the window meet the retained
  ones, and the M with the largest scores a token of age are retained. The same tokens are chosen however the text is
  cut, but for near ties that rounding decides.
  """

  Config = MemoryConfig
  PARTS = {"window": ("k", "v", "score"), "retained": ("kept_k", "kept_v", "kept_index", "kept_score")}
  STATE_AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
    "k": HEADS_OF_TOKENS,
    "v": HEADS_OF_TOKENS,
    "score": HEADS_OF_TOKENS[:3],
    "kept_k": ("batch", "heads", None, None),
    "kept_v": ("batch", "heads", None, None),
    "kept_index": ("batch", "heads", None),
    "kept_score": ("batch", "heads", None),
  }

  @property
  def held_dtype(self) -> Any:
    """The dtype in which the state holds keys and values."""
    return jnp.dtype(self.layer.state_dtype if self.state_dtype is None else self.state_dtype)

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> MemoryState:
    del capacity
    return self._empty(batch, self.layer.layout)

  @nn.nowrap
  def _empty(self, batch: int, layout: Layout) -> MemoryState:
    widths = (self.config.head_dim, self.config.value_width)
    how = {"ring": self.layer.window + self.layer.chunk, "sinks": self.layer.sinks, "widths": widths}
    return empty_slots(batch, self.config.num_kv_heads, layout, **how, dtype=self.held_dtype)

  def outputs(
    self, x_BTD: jax.Array, state: MemoryState | None, context: Context
  ) -> tuple[dict[str, jax.Array], MemoryState | None]:
    q, k, v = self.project(x_BTD)
    q, k = self.rotate_by_head(q), self.rotate_by_head(k)
    reach = self.reach(self.config, self.layer)
    if state is None and reach is not None and x_BTD.shape[1] <= reach - self.layer.chunk:
      reach = None  # no two of the tokens are too far apart
    far = None
    if reach is not None:
      far = Far(self.rotate(q, context.far_rotations[reach]), reach - self.layer.chunk, self._without_rope)
    q, k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)
    k, v = self.held(k), self.held(v)
    where = Where(**window_places(context), fresh=state is None, packed=context.segment_ids is not None)
    told = self.layer
    how: dict[str, Any] = {"sinks": told.sinks, "chunk": told.chunk, "far": far, "at_random": told.score == "random"}
    if context.kind is not None:

      @functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
      def said(layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, self._empty(len(x_BTD), layout), where, layout, **how)[0]

      out = jax.lax.switch(context.kind, [functools.partial(said, kind.layout) for kind in self.kinds], q, k, v)
      return {"o_proj": side_by_side(out)}, None
    held = self.init_state(len(x_BTD), 0) if state is None else state
    out, held = attend(q, k, v, held, where, told.layout, **how)
    return {"o_proj": side_by_side(out)}, held

  @nn.nowrap
  def _without_rope(self, k_BMGK: jax.Array, position_BMG: jax.Array) -> jax.Array:
    rope = self.config.rope
    cos, sin = rope_table(rope, self.config.head_dim, position_BMG)
    scale = rope.attention_factor  # k keeps it
    bare = apply_rope(k_BMGK, cos / scale, -sin / scale, interleaved=rope.kind == "interleaved")
    return self.held(bare)

  @classmethod
  def reach(cls, config: ModelConfig, layer: Any) -> int | None:
    """Returns the largest position that q is rotated to when it meets sinks and far tokens; None: any position.

    It is the largest distance between two tokens that the teacher's attention has seen in training, but more than what
    is near.
    """
    limits = [limit for limit in (config.max_positions, config.sliding_window) if limit is not None]
    if not limits or config.rope.kind not in ("half", "interleaved"):
      return None
    return max(min(limits) - 1, layer.window + 3 * layer.chunk + layer.sinks)

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    seen = layer.sinks + layer.window + layer.chunk // 2 + sum(layer.retained) // len(layer.retained)
    return super().flops(config, layer, tokens) + attention_flops(config, tokens, seen)

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    if config.num_kv_heads % len(layer.retained):
      return (
        f"retained has {len(layer.retained)} numbers, which do not divide {config.num_kv_heads} key/value heads: "
        "wanted one number for all, or a pattern that is repeated."
      )
    near = layer.window + layer.chunk
    if config.sliding_window is None or near <= config.sliding_window:
      return None
    return f"The teacher's own softmax sees {config.sliding_window} tokens, fewer than the last {near} of a memory."

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    del start
    return drawn  # there is nothing new
