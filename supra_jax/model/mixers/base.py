"""Base classes of mixers, `Mixer` and `Projections`; of their states, `MixerState`; and the `Context` of a call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.core.sharding import constrain
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Dense, Norm
from supra_jax.model.registry import MixerConfig
from supra_jax.model.rope import apply_rope, rope_table

# Names (in `sharding.DIMENSIONS`) of the dimensions of q, k and v.
HEADS = ("batch", "time", "heads", None)

Rotation = tuple[jax.Array, jax.Array]
Axes = tuple[tuple[str, tuple[str | None, ...]], ...]


@flax.struct.dataclass
class Context:
  """Positions and documents of the tokens of one call; the same for all layers.

  Attributes:
    rotation: (cos, sin), float32 [B, T, 1, K/2], of the RoPE angles at each token's position in its document; None if
      the model has no RoPE by position.
    far_rotations: {reach: (cos, sin)}, like `rotation` but at min(position, reach), for each value that a mixer of the
      model returns from `Mixer.reach`.
    index: int32 [B, T], the index of each token among all tokens of the row, from the first that the state has read.
    first: int32 [B, T], the index of the first token of each token's document.
    lengths: int32 [B], number of real tokens in each row; None means all.
    segment_ids: int32 [B, T], document ids; None means that all tokens continue the state's document.
    continues: bool [B], whether token 0 of a row continues the state's document; None means that it does in all rows.
    kind: int32 [], in a stack of layers that differ, which of the mixer's `kinds` the layer is; None: its only one.
  """

  rotation: Rotation | None
  far_rotations: dict[int, Rotation]
  index: jax.Array
  first: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  continues: jax.Array | None
  kind: jax.Array | None = None


@flax.struct.dataclass
class MixerState:
  """What a mixer remembers of the tokens that it has read: a pytree of arrays whose first axis is the batch."""

  @property
  def capacity(self) -> int | None:
    """Number of tokens that the state can hold; None: any number."""
    return None

  def grow(self, capacity: int) -> Self:
    """Returns the same state with room for at least `capacity` tokens."""
    del capacity
    return self

  def take(self, rows: jax.typing.ArrayLike) -> Self:
    """Returns the state of the given rows of the batch, in the given order; a row may be given several times."""
    rows = jnp.asarray(rows)
    return jax.tree.map(lambda x: x[rows], self)

  def put(self, slots: jax.typing.ArrayLike, other: Self) -> Self:
    """Returns this state with row i of the state `other` in place of row `slots[i]`, for all i."""
    slots = jnp.asarray(slots)
    if self.capacity is not None:
      other = other.grow(self.capacity)
    return jax.tree.map(lambda x, new: x.at[slots].set(new), self, other)


class Mixer(nn.Module):
  """The part of a layer that mixes tokens, such as attention.

  `registry.register(NAME)` registers a subclass, and sets `Config.mixer` to the name. Parameters with the same meaning
  have the same name and shape in all mixers, so that a layer can change its mixer and keep what was trained.

  Attributes:
    config: config of the model.
    layer: config of this layer, an instance of `Config`.
    dtype: dtype of the computation.
    implementation: implementation of the linear attention op (`kernels_pallas.linear_attention`).
    state_dtype: dtype in which the state holds keys and values; None: `dtype`.
    kinds: configs that the layers of a stack have, where they differ; `layer` is the first. Only mixers whose configs
      may be `alike` without being equal are given some, and only with the state None; they then return None for it.

  Class attributes:
    Config: class of the mixer's config, a frozen dataclass derived from MixerConfig; config.json has its fields.
    NEW: regex found in the names, below the mixer, of the parameters that a softmax layer does not have: those that
      linearization adds, which training calls new weights. "": there are none.
    NO_ADAPTERS: regex found in the names, below the mixer, of kernels that are not computed by `layers.Dense`, and
      therefore cannot have adapters. "": there are none.
    AXES: (regex of a parameter's name below the mixer, names of the parameter's dimensions) of every parameter but
      biases, gains and adapters; tells `placement` how a mesh shards the parameter.
    PARTS: {part: fields of the state}, to count bytes by part and to ablate a part.
    STATE_AXES: {field of the state: names of the field's dimensions}; tells `placement` how a mesh shards the field.
    FEEDS: whether an MLP follows the mixer in its layer.
    GROWS: whether the state grows with the number of tokens read.
    begin: classmethod (drawn, start) -> {name: tree}, the initial values of the new parameters when a trained softmax
      layer becomes this mixer. `drawn`, {name: tree}, has the values that `init` draws; `start.phi` is "random" or
      "identity", the initial feature maps. None: the mixer cannot replace a trained layer.
  """

  config: ModelConfig
  layer: Any
  dtype: Any = jnp.float32
  implementation: str = "auto"
  state_dtype: Any = None
  kinds: tuple[Any, ...] = ()

  Config: ClassVar[type[MixerConfig]]
  NEW: ClassVar[str] = ""
  AXES: ClassVar[Axes] = ()
  PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  STATE_AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
  FEEDS: ClassVar[bool] = True
  GROWS: ClassVar[bool] = False
  NO_ADAPTERS: ClassVar[str] = ""
  begin: ClassVar[Any] = None

  @property
  def held_dtype(self) -> Any:
    """The dtype in which the state holds keys and values."""
    return jnp.dtype(self.dtype if self.state_dtype is None else self.state_dtype)

  @nn.nowrap
  def held(self, x: jax.Array) -> jax.Array:
    """Returns keys or values as the state holds them; what is read at once is rounded too, and so the same."""
    if self.held_dtype == x.dtype:
      return x
    kind = jnp.finfo(self.held_dtype)
    # XLA may drop a cast down that a cast up follows (xla_allow_excess_precision), but not this.
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(self.held_dtype)

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> Any:
    """Returns the state before any token, for `batch` rows; if the mixer GROWS, with room for `capacity` tokens."""
    raise NotImplementedError

  def outputs(self, x_BTD: jax.Array, state: Any, context: Context) -> tuple[dict[str, jax.Array], Any]:
    """Computes everything but the output projections.

    Args:
      x_BTD: the layer's input after the norm; T is 1 while decoding.
      state: the state that an earlier call or `init_state` returned; None: no tokens were read before.
      context: positions and documents of the tokens.

    Returns:
      ({name of an output projection: input of that projection, [B, T, width]}, the state after the last real token).
    """
    raise NotImplementedError

  def __call__(self, x_BTD: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    """Returns (sum of the output projections of `outputs`, [B, T, D]; the state after the last real token)."""
    outputs, state = self.outputs(x_BTD, state, context)
    return functools.reduce(operator.add, (getattr(self, name)(x_BTF) for name, x_BTF in outputs.items())), state

  @classmethod
  def for_inference(cls, config: ModelConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns parameters, {name: tree} below the mixer, with which it computes the same, and reads fewer bytes."""
    del config
    return params

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Returns the multiply-adds per token of the forward pass, averaged over a sequence of `tokens` tokens."""
    raise NotImplementedError

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    """Returns a sentence that says why a layer with this config cannot replace a softmax layer; None: it can."""
    del config, layer
    return None

  @classmethod
  def reach(cls, config: ModelConfig, layer: Any) -> int | None:
    """Returns the largest position in the entry of `Context.far_rotations` that this mixer uses; None: it uses none."""
    del config, layer
    return None


class Projections(Mixer):
  """A mixer with the q, k, v and output projections of softmax attention, named as in Hugging Face's Llama."""

  AXES: ClassVar[Axes] = (
    ("[qkv]_proj/kernel", ("embed", "heads")),
    ("o_proj/kernel", ("heads", "embed")),
  )

  def setup(self):
    c = self.config
    qkv = functools.partial(Dense, use_bias=c.qkv_bias, dtype=self.dtype)
    self.q_proj = qkv(c.num_heads * c.head_dim)
    self.k_proj = qkv(c.num_kv_heads * c.head_dim)
    self.v_proj = qkv(c.num_kv_heads * c.value_width)
    self.o_proj = Dense(c.hidden_size, use_bias=c.output_bias, dtype=self.dtype)
    if c.qk_norm != "none":
      self.q_proj_norm = Norm(c.norm, c.norm_eps, self.dtype)
      self.k_proj_norm = Norm(c.norm, c.norm_eps, self.dtype)

  def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] of x; q and k normalised as `ModelConfig.qk_norm` says."""
    c, lead = self.config, x_BTD.shape[:2]
    q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
    if c.qk_norm == "all_heads":
      q, k = self.q_proj_norm(q), self.k_proj_norm(k)
    q, k = q.reshape(*lead, c.num_heads, c.head_dim), k.reshape(*lead, c.num_kv_heads, c.head_dim)
    if c.qk_norm == "head":
      q, k = self.q_proj_norm(q), self.k_proj_norm(k)
    q, k, v = (constrain(x, *HEADS) for x in (q, k, v.reshape(*lead, c.num_kv_heads, c.value_width)))
    return q, k, v

  @nn.nowrap
  def rotate(self, x_BTHK: jax.Array, rotation: Rotation | None) -> jax.Array:
    """Applies RoPE by position; returns `x_BTHK` unchanged if `rotation` is None."""
    if rotation is None:
      return x_BTHK
    return apply_rope(x_BTHK, *rotation, interleaved=self.config.rope.kind == "interleaved")

  @nn.nowrap
  def rotate_by_head(self, x_BTNK: jax.Array) -> jax.Array:
    """Applies RoPE by the index of the head (OpenLM's first models); returns `x_BTNK` unchanged for any other RoPE.

    Used in softmax attention only: in linear attention q and k of a head would be rotated by the same angle.
    """
    c = self.config
    if c.rope.kind != "by_head":
      return x_BTNK
    return apply_rope(x_BTNK, *rope_table(c.rope, c.head_dim, jnp.arange(x_BTNK.shape[2])))

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Returns the multiply-adds per token of the four projections: D (H K + G K + G V) + H V D."""
    del layer, tokens
    c = config
    inputs = c.num_heads * c.head_dim + c.num_kv_heads * (c.head_dim + c.value_width)
    return c.hidden_size * (inputs + c.num_heads * c.value_width)


def side_by_side(x_BTHV: jax.Array) -> jax.Array:
  """Concatenates the heads: returns [B, T, H * V] of [B, T, H, V]."""
  return x_BTHV.reshape(*x_BTHV.shape[:2], -1)
