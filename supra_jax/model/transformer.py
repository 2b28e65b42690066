"""The language model: one definition for teacher, RNN and hybrids, and for training, prefill and decoding."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import constrain
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Dense, Embed, Norm, SwiGLU
from supra_jax.model.mixers.base import Context, MixerState
from supra_jax.model.registry import MixerConfig, mixer_class
from supra_jax.model.rope import rope_table
from supra_jax.model.stacking import kinds, stacks

Padding = Literal["right", "left"]
Remat = Literal["none", "matmuls", "block"]
# What the forward pass saves of a layer if the backward pass recomputes the rest: products with parameters, or nothing.
REMAT_POLICIES: dict[str, Any] = {
  "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "block": None,
}


@flax.struct.dataclass
class DecodeState:
  """All that a model remembers of the tokens that it has read.

  Attributes:
    layers: the state of each layer's mixer.
    cached: int32 [B], number of tokens read.
    position: int32 [B], position of the next token in its document.
    segment: int32 [B], id of the last document; -1 before the first token that has an id.
  """

  layers: tuple[MixerState, ...]
  cached: jax.Array
  position: jax.Array
  segment: jax.Array

  @property
  def capacity(self) -> int | None:
    """Number of tokens that the states of all layers can hold; None: any number."""
    return min((layer.capacity for layer in self.layers if layer.capacity is not None), default=None)

  def grow(self, capacity: int) -> DecodeState:
    """Returns the same state with room for at least `capacity` tokens."""
    return dataclasses.replace(self, layers=tuple(layer.grow(capacity) for layer in self.layers))

  def take(self, rows: jax.typing.ArrayLike) -> DecodeState:
    """Returns the state of the given rows of the batch, in the given order; a row may be given several times."""
    counters = {name: getattr(self, name)[jnp.asarray(rows)] for name in _FRESH}
    return DecodeState(tuple(layer.take(rows) for layer in self.layers), **counters)

  def put(self, slots: jax.typing.ArrayLike, other: DecodeState) -> DecodeState:
    """Returns this state with row i of the state `other` in place of row `slots[i]`, for all i."""
    counters = {name: getattr(self, name).at[jnp.asarray(slots)].set(getattr(other, name)) for name in _FRESH}
    layers = tuple(ours.put(slots, theirs) for ours, theirs in zip(self.layers, other.layers, strict=True))
    return DecodeState(layers, **counters)


STREAMS = "streams"  # name of the Flax collection that a Block fills when it is mutable
_FRESH = {"cached": 0, "position": 0, "segment": -1}  # counters of a DecodeState that has read no token


class Block(nn.Module):
  """One layer of the model: `x + mixer(norm x)`, then, unless the mixer has no MLP behind it, `x + SwiGLU(norm x)`.

  When the collection STREAMS is mutable, the block writes three arrays [B, T, D] to it: `enters`, the input x;
  `attended`, the output of the mixer; `leaves`, the result of the block.
  """

  config: ModelConfig
  layer: MixerConfig
  dtype: Any = jnp.float32
  implementation: str = "auto"
  state_dtype: Any = None
  kinds: tuple[MixerConfig, ...] = ()

  def setup(self):
    c = self.config
    mixer = mixer_class(self.layer.mixer)
    self.self_attn = mixer(c, self.layer, self.dtype, self.implementation, self.state_dtype, self.kinds)
    self.input_layernorm = Norm(c.norm, c.norm_eps, self.dtype)
    self.feeds = mixer.FEEDS
    if self.feeds:
      self.post_attention_layernorm = Norm(c.norm, c.norm_eps, self.dtype)
      self.mlp = SwiGLU(c, self.dtype)

  def __call__(
    self, x_BTD: jax.Array, state: MixerState | None, context: Context, kind: jax.Array | None = None
  ) -> tuple[jax.Array, MixerState]:
    mixed, state = self.attend(x_BTD, state, context, kind)
    self._keep(enters=x_BTD, attended=mixed)
    x_BTD = constrain(self.feed(x_BTD + mixed), "batch", "time", None)
    self._keep(leaves=x_BTD)
    return x_BTD, state

  def attend(
    self, x_BTD: jax.Array, state: MixerState | None, context: Context, kind: jax.Array | None = None
  ) -> tuple[jax.Array, MixerState]:
    """Applies the input norm and the mixer; returns (mixer output [B, T, D], the state after the last real token)."""
    return self.self_attn(self.input_layernorm(x_BTD), state, dataclasses.replace(context, kind=kind))

  def feed(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the second half of the block, if there is one; returns x + SwiGLU(norm x)."""
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)) if self.feeds else x_BTD

  def _keep(self, **streams: jax.Array) -> None:
    for name, x_BTD in streams.items():
      self.sow(STREAMS, name, x_BTD, reduce_fn=lambda _, x: x, init_fn=lambda: None)


class Transformer(nn.Module):
  """A decoder-only language model in which each layer has a mixer of its own.

  Attributes:
    config: the model's shape and layers.
    dtype: dtype of the computation; parameters are cast to it where they are used. Norms, RoPE, softmax, the linear
      state and logits are computed in float32 at least.
    implementation: implementation of the linear attention op (`kernels_pallas.linear_attention`).
    stacked: whether parameters are stacked (`stacking.stack_layers`). Each stack of layers is then one `nn.scan`, which
      compiles faster; meant for training. Layers of a stack that differ are scanned only if no state is given; the
      returned state then lacks theirs.
    remat: what the backward pass recomputes: `none`; `matmuls`, everything but products with parameters; `block`,
      whole layers.
    state_dtype: dtype in which states hold keys and values. The parallel form rounds them too, so that both forms
      compute the same. None: `dtype`.
  """

  config: ModelConfig
  dtype: Any = jnp.float32
  implementation: str = "auto"
  stacked: bool = False
  remat: Remat = "none"
  state_dtype: Any = None

  def setup(self):
    c = self.config
    self.embed_tokens = Embed(c.vocab_size, c.hidden_size, self.dtype)
    if c.post_embed_norm:
      self.post_embed_norm = Norm(c.norm, c.norm_eps, self.dtype)
    block: Any = Block
    told = self.dtype, self.implementation, self.state_dtype
    if self.remat != "none":
      block = nn.remat(Block, prevent_cse=not self.stacked, policy=REMAT_POLICIES[self.remat])
    if self.stacked:
      self.blocks = [
        nn.scan(
          block,
          variable_axes={"params": 0, STREAMS: 0},
          split_rngs={"params": True},
          in_axes=(0, nn.broadcast, 0),
          length=length,
        )(c, c.layers[first], *told, kinds(c.layers[first : first + length])[0], name=f"run_{first}")
        for first, length in stacks(c.layers)
      ]
    else:
      self.blocks = [block(c, layer, *told, name=f"layers_{i}") for i, layer in enumerate(c.layers)]
    self.norm = Norm(c.norm, c.norm_eps, self.dtype)
    if not c.tie_embeddings:
      wide = jnp.promote_types(self.dtype, jnp.float32)
      self.lm_head = Dense(c.vocab_size, dtype=self.dtype, out_dtype=wide)

  @nn.nowrap
  def init_state(self, batch: int, capacity: int = 0) -> DecodeState:
    """Returns the state before any token.

    Args:
      batch: B, number of rows.
      capacity: number of tokens that layers whose state grows with the text (`Mixer.GROWS`) make room for.
    """
    told = {"dtype": self.dtype, "state_dtype": self.state_dtype}
    mixers = (mixer_class(layer.mixer)(self.config, layer, **told) for layer in self.config.layers)
    layers = tuple(mixer.init_state(batch, capacity) for mixer in mixers)
    # Separate buffers: the state is donated, and one buffer cannot be donated twice.
    counters = {name: jnp.full(batch, value, jnp.int32) for name, value in _FRESH.items()}
    return DecodeState(layers, **counters)

  def __call__(
    self,
    tokens_BT: jax.Array,
    state: DecodeState | None = None,
    *,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    padding: Padding = "right",
  ) -> tuple[jax.Array, DecodeState]:
    """Reads tokens that follow those that `state` has read.

    A sequence may be cut into several calls that pass the state on, or padded: both change the result by rounding only.

    Args:
      tokens_BT: int [B, T], T >= 1. Padding may hold any value.
      state: the state that an earlier call or `init_state` returned; None reads from the start.
      lengths: int [B], number of real tokens in each row, 0 to T; None: all tokens are real.
      segment_ids: int [B, T], document ids. State and position are reset where the id changes, and at token 0 if the
        id of token 0 differs from that of the state's last document. None: all tokens continue the state's document.
      padding: side of the row that the padding is on.

    Returns:
      (hidden, state): the activations [B, T, D] after the last norm, undefined at padding, which `unembed` takes; and
      the state after the last real token. Under jit, hidden is NaN in rows whose tokens exceed the state's capacity.

    Raises:
      ValueError: `padding` is unknown; or, outside jit, the tokens exceed the capacity of the state's caches.
    """
    time = tokens_BT.shape[1]
    if padding not in ("right", "left"):
      raise ValueError(f"padding={padding!r}: wanted 'right' or 'left'.")
    shift = None
    if padding == "left" and lengths is not None:
      # Mixers support right padding only: roll the real tokens of each row to the front, and the results back.
      shift = time - lengths
      tokens_BT = _roll_rows(tokens_BT, -shift)
      segment_ids = None if segment_ids is None else _roll_rows(segment_ids, -shift)

    context, end = self.place(tokens_BT, state, lengths, segment_ids)
    x_BTD = self.embed(tokens_BT)
    layer_states = (None,) * self.config.num_layers if state is None else state.layers
    new_states: list[MixerState] = []
    if self.stacked:
      for block, (first, length) in zip(self.blocks, stacks(self.config.layers), strict=True):
        layers, given = self.config.layers[first : first + length], layer_states[first : first + length]
        kind = kinds(layers)[1]
        if kind is not None and state is not None:
          x_BTD, run = self._one_by_one(block.variables["params"], layers, x_BTD, given, context)
          new_states += run
          continue
        together = None if state is None else jax.tree.map(lambda *s: jnp.stack(s), *given)
        x_BTD, run = block(x_BTD, together, context, kind)
        new_states += [jax.tree.map(lambda leaf, i=i: leaf[i], run) for i in range(length)]
    else:
      for block, layer_state in zip(self.blocks, layer_states, strict=True):
        x_BTD, layer_state = block(x_BTD, layer_state, context)
        new_states.append(layer_state)
    hidden_BTD = self.norm(x_BTD)

    end = dataclasses.replace(end, layers=tuple(new_states))
    if state is not None and end.capacity is not None:
      hidden_BTD = jnp.where((end.cached <= end.capacity)[:, None, None], hidden_BTD, jnp.nan)
    return hidden_BTD if shift is None else _roll_rows(hidden_BTD, shift), end

  def _one_by_one(self, params, layers, x_BTD, states, context: Context) -> tuple[jax.Array, list[MixerState]]:
    """Applies the layers of a stack whose states differ in shape."""
    ends: list[Any] = []
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
      block = Block(self.config, layer, self.dtype, self.implementation, self.state_dtype, parent=None)
      x_BTD, end = block.apply({"params": jax.tree.map(lambda x, i=i: x[i], params)}, x_BTD, state, context)
      ends.append(end)
    return x_BTD, ends

  def embed(self, tokens_BT: jax.Array) -> jax.Array:
    """Returns the input of the first layer, [B, T, D], for tokens [B, T]."""
    x_BTD = self.embed_tokens(jnp.clip(tokens_BT, 0, self.config.vocab_size - 1))
    if self.config.post_embed_norm:
      x_BTD = self.post_embed_norm(x_BTD)
    return constrain(x_BTD, "batch", "time", None)

  def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
    """Returns the logits, [B, T, vocab_size] in float32 at least, of hidden [B, T, D]."""
    logits = self.embed_tokens.attend(hidden_BTD) if self.config.tie_embeddings else self.lm_head(hidden_BTD)
    return constrain(logits, "batch", *["time"] * (logits.ndim - 2), "vocabulary")

  def logits(self, tokens_BT: jax.Array, state: DecodeState | None = None, **kwargs) -> tuple[jax.Array, DecodeState]:
    """Returns (logits of every position, state), for scoring; for the arguments see `__call__`.

    Also the method to call `init` with, since it uses all parameters.
    """
    hidden_BTD, state = self(tokens_BT, state, **kwargs)
    return self.unembed(hidden_BTD), state

  @nn.nowrap
  def place(
    self,
    tokens_BT: jax.Array,
    state: DecodeState | None = None,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> tuple[Context, DecodeState]:
    """Returns the Context of a call, and a state with the counters after the last real token, whose `layers` is empty.

    For the arguments see `__call__`; padding is on the right.

    Raises:
      ValueError: outside jit, the tokens exceed the capacity of the state's caches.
    """
    batch, time = tokens_BT.shape
    step = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    cached, position, segment = (
      jnp.full(batch, fresh, jnp.int32) if state is None else getattr(state, name) for name, fresh in _FRESH.items()
    )
    count = jnp.full(batch, time, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    if state is not None and state.capacity is not None:
      _refuse_overflow(cached, count, state.capacity)

    continues = None
    if segment_ids is None:
      position_BT = position[:, None] + step
    else:
      # A row without real tokens has only padding, whose ids say nothing: the state's document continues.
      continues = (segment_ids[:, 0] == segment) | (count == 0)
      changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
      start = jax.lax.cummax(jnp.where(changes, step, 0), axis=1)
      carried = jnp.where(continues, position, 0)[:, None]
      position_BT = step - start + jnp.where(start == 0, carried, 0)
    index_BT = cached[:, None] + step

    last = jnp.maximum(count - 1, 0)[:, None]
    some = count > 0
    end = DecodeState(
      layers=(),
      cached=cached + count,
      position=jnp.where(some, jnp.take_along_axis(position_BT, last, 1)[:, 0] + 1, position),
      segment=segment
      if segment_ids is None
      else jnp.where(some, jnp.take_along_axis(segment_ids.astype(jnp.int32), last, 1)[:, 0], segment),
    )
    rotation = None
    if self.config.rope.kind in ("half", "interleaved"):
      rotation = rope_table(self.config.rope, self.config.head_dim, position_BT[..., None])
    reaches = {mixer_class(layer.mixer).reach(self.config, layer) for layer in self.config.layers}
    far_rotations = {
      reach: rope_table(self.config.rope, self.config.head_dim, jnp.minimum(position_BT, reach)[..., None])
      for reach in reaches
      if reach is not None
    }
    context = Context(
      rotation=rotation,
      far_rotations=far_rotations,
      index=index_BT,
      first=index_BT - position_BT,
      lengths=lengths,
      segment_ids=segment_ids,
      continues=continues,
    )
    return context, end


def _refuse_overflow(cached: jax.Array, count: jax.Array, capacity: int) -> None:
  if isinstance(cached, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
    return  # under jit `__call__` fills the hidden states of such rows with NaN
  wanted = int((cached + count).max())
  if wanted > capacity:
    raise ValueError(
      f"The state's key/value caches hold {capacity} tokens and {wanted} are wanted. Make it with "
      f"init_state(batch, capacity={wanted}) or more."
    )


def _roll_rows(x: jax.Array, shift_B: jax.Array) -> jax.Array:
  """Rolls axis 1 of x [B, T, ...], each row by its own shift."""
  return jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(x, shift_B)
