"""The teacher's softmax attention over a bounded memory: the first tokens, the last ones, and those that earned it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.schema import POSITIVE, AtLeast, check
from supra_jax.model.bounded_attention import Far, Slots, Where, attend, empty_slots
from supra_jax.model.config import ModelConfig
from supra_jax.model.mixers.base import Context, MixerState, Projections, side_by_side
from supra_jax.model.mixers.softmax import attention_flops
from supra_jax.model.registry import MixerConfig, register
from supra_jax.model.rope import apply_rope, rope_table


@dataclasses.dataclass(frozen=True)
class MemoryConfig(MixerConfig):
  """Config of softmax attention over N + W + M tokens of the document, and up to C more.

  Attributes:
    windows: W, number of last tokens that a key/value head holds: one number for each head, or one for all.
    retained: M, number of tokens that left the window and are held on: one number for each head, or one for all.
    sinks: N, number of first tokens of the document that all heads hold (Xiao et al. 2023, arXiv 2309.17453).
    chunk: C, tokens of the document between two choices of what is held on. Tokens since the last choice are seen too.
  """

  windows: tuple[Annotated[int, POSITIVE], ...] = (64,)
  retained: tuple[Annotated[int, AtLeast(0)], ...] = (64,)
  sinks: Annotated[int, AtLeast(0)] = 4
  chunk: Annotated[int, POSITIVE] = 16

  def __post_init__(self):
    check(self, type(self).__name__)

  def groups(self, heads: int) -> list[tuple[int, int, list[int]]]:
    """Returns (W, M, key/value heads of that size) of each size, the order in which the state holds them.

    Raises:
      ValueError: there is neither one size nor one for each of so many heads.
    """
    for name in ("windows", "retained"):
      if len(getattr(self, name)) not in (1, heads):
        raise ValueError(f"{name} has {len(getattr(self, name))} sizes: wanted 1, or {heads}, one for each head.")
    sizes = list(
      zip(self.windows * (heads // len(self.windows)), self.retained * (heads // len(self.retained)), strict=True)
    )
    return [(*size, [i for i, other in enumerate(sizes) if other == size]) for size in sorted(set(sizes))]


@flax.struct.dataclass
class MemoryState(MixerState):
  """The fields of `Slots`, each a tuple with an array for each size of head."""

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  score: tuple[jax.Array, ...]
  kept_k: tuple[jax.Array, ...]
  kept_v: tuple[jax.Array, ...]
  kept_index: tuple[jax.Array, ...]
  kept_score: tuple[jax.Array, ...]

  def slots(self, size: int) -> Slots:
    """Returns what the heads of one size hold, by the number of the size."""
    return Slots(*(getattr(self, name)[size] for name in Slots._fields))


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
    name: ("batch", None, "heads", *[None] * name.endswith(("k", "v"))) for name in Slots._fields
  }

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> MemoryState:
    del capacity
    sizes = self.layer.groups(self.config.num_kv_heads)
    made = [self._empty(batch, *size) for size in sizes]
    return MemoryState(**{name: tuple(getattr(slots, name) for slots in made) for name in Slots._fields})

  @nn.nowrap
  def _empty(self, batch: int, window: int, retained: int, heads: Sequence[int]) -> Slots:
    widths = (self.config.head_dim, self.config.value_width)
    ring = window + self.layer.chunk
    return empty_slots(batch, ring, retained, len(heads), self.layer.sinks, widths, self.held_dtype)

  def outputs(
    self, x_BTD: jax.Array, state: MemoryState | None, context: Context
  ) -> tuple[dict[str, jax.Array], MemoryState]:
    q, k, v = self.project(x_BTD)
    q, k = self.rotate_by_head(q), self.rotate_by_head(k)
    reach = self.reach(self.config, self.layer)
    far_q = None if reach is None else self.rotate(q, context.far_rotations[reach])
    q, k = self.rotate(q, context.rotation), self.rotate(k, context.rotation)
    k, v = self.held(k), self.held(v)
    batch, time, groups, _ = k.shape
    repeats = q.shape[2] // groups
    count = jnp.full(batch, time, jnp.int32) if context.lengths is None else context.lengths
    where = Where(context.index[:, 0], count, context.first, state is None and context.segment_ids is None)
    outs, held, order = [], [], []
    for number, (window, retained, heads) in enumerate(self.layer.groups(groups)):
      slots = self._empty(batch, window, retained, heads) if state is None else state.slots(number)
      own = jnp.asarray(heads)

      def of(x, own=own):
        """The queries of these key/value heads, [B, T, G R, K]."""
        return x.reshape(batch, time, groups, repeats, -1)[:, :, own].reshape(batch, time, len(own) * repeats, -1)

      far = None if reach is None else Far(of(far_q), reach - self.layer.chunk, self._without_rope)
      how = {"sinks": self.layer.sinks, "chunk": self.layer.chunk, "far": far}
      out, slots = attend(of(q), k[:, :, own], v[:, :, own], slots, where, **how)
      outs.append(out.reshape(batch, time, len(heads), repeats, -1))
      held.append(slots)
      order += heads
    back = jnp.asarray([order.index(head) for head in range(groups)])
    out = jnp.concatenate(outs, axis=2)[:, :, back].reshape(batch, time, groups * repeats, -1)
    state = MemoryState(**{name: tuple(getattr(slots, name) for slots in held) for name in Slots._fields})
    return {"o_proj": side_by_side(out)}, state

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

    It is the largest distance between two tokens that the teacher has seen in training, but more than what is near.
    """
    if config.max_positions is None or config.rope.kind not in ("half", "interleaved"):
      return None
    return max(config.max_positions - 1, max(layer.windows) + 3 * layer.chunk + layer.sinks)

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    total = super().flops(config, layer, tokens)
    for window, retained, heads in layer.groups(config.num_kv_heads):
      seen = layer.sinks + window + retained + layer.chunk // 2
      total += attention_flops(config, tokens, seen) * len(heads) / config.num_kv_heads
    return total

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    layer.groups(config.num_kv_heads)
    if config.sliding_window is None:
      return None
    return f"The teacher's own softmax sees {config.sliding_window} tokens, which a memory goes beyond: take a window."

  @classmethod
  def begin(cls, drawn: Mapping[str, Any], start: Any) -> Mapping[str, Any]:
    del start
    return drawn  # there is nothing new
