"""What every mixer is: a Flax module with projections that all mixers share, the state that it keeps, and its facts."""

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

# Names of the dimensions of q, k and v, for the mesh.
HEADS = ("batch", "time", "heads", None)

Rotation = tuple[jax.Array, jax.Array]
Axes = tuple[tuple[str, tuple[str | None, ...]], ...]


@flax.struct.dataclass
class Context:
  """Where the tokens of one call stand; the same for all layers.

  Attributes:
    rotation: (cos, sin), float32 [B, T, 1, K/2], of each token's position in its document; None where the model has no
      RoPE by position.
    far_rotations: {reach: (cos, sin)}, the rotation of min(position, reach), for each reach that a mixer of the model
      asks for (`Mixer.reach`).
    index: int32 [B, T], the number of each token among all that the state has read.
    first: int32 [B, T], the index of the first token of its document.
    lengths: int32 [B], how many tokens are real; None means all.
    segment_ids: int32 [B, T], document ids; None means that no document starts inside.
    continues: bool [B], whether token 0 goes on with the state's document; None means that all do.
  """

  rotation: Rotation | None
  far_rotations: dict[int, Rotation]
  index: jax.Array
  first: jax.Array
  lengths: jax.Array | None
  segment_ids: jax.Array | None
  continues: jax.Array | None


@flax.struct.dataclass
class MixerState:
  """What a layer remembers of the tokens that it has read: arrays whose first axis is the batch."""

  @property
  def capacity(self) -> int | None:
    """How many tokens the state can hold; None where that is any number."""
    return None

  def grow(self, capacity: int) -> Self:
    """The same state with room for at least `capacity` tokens."""
    del capacity
    return self

  def take(self, rows: jax.typing.ArrayLike) -> Self:
    """The states of some rows of the batch, in that order; a row may be taken several times."""
    rows = jnp.asarray(rows)
    return jax.tree.map(lambda x: x[rows], self)

  def put(self, slots: jax.typing.ArrayLike, other: Self) -> Self:
    """Returns this state with the rows of another one in place of rows `slots`."""
    slots = jnp.asarray(slots)
    if self.capacity is not None:
      other = other.grow(self.capacity)
    return jax.tree.map(lambda x, new: x.at[slots].set(new), self, other)


class Mixer(nn.Module):
  """The part of a layer through which tokens see each other.

  A subclass is registered by name (`registry.register`), which `Config.mixer` then holds. Parameters that mean the same
  have the same name and shape in all mixers, so that a layer can change its mixer and keep what was trained.

  Attributes:
    config: of the model.
    layer: of this layer, an instance of `Config`.
    dtype: of the computation.
    implementation: of the linear attention op (`kernels_pallas.linear_attention`).

  Class attributes:
    Config: frozen dataclass, a MixerConfig; in config.json under the mixer's name.
    NEW: regex found in the names, below the mixer, of parameters that no softmax layer has; "" where there are none.
      What linearising adds, and what training calls new weights.
    NO_ADAPTERS: regex found in the names of kernels that are not computed by `layers.Dense`; "" where all are.
    AXES: (regex of a parameter's name below the mixer, names of its dimensions) for `placement`. Biases, gains and
      adapters need no line.
    PARTS: {part: fields of the state}, for bytes a part and for ablation.
    STATE_AXES: {field of the state: names of its dimensions}, how a mesh cuts a state.
    GROWS: whether the state grows with the number of tokens read.
    begin: classmethod (drawn, start) -> parameters: how the new parameters begin when a trained softmax layer becomes
      this mixer; `drawn` are they as `init` draws them, {name: tree}, and `start.phi` says whether feature maps are to
      begin "random" or as the "identity". None: the mixer is only for models trained from nothing.
  """

  config: ModelConfig
  layer: Any
  dtype: Any = jnp.float32
  implementation: str = "auto"

  Config: ClassVar[type[MixerConfig]]
  NEW: ClassVar[str] = ""
  AXES: ClassVar[Axes] = ()
  PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  STATE_AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
  GROWS: ClassVar[bool] = False
  NO_ADAPTERS: ClassVar[str] = ""
  begin: ClassVar[Any] = None

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> Any:
    """The state before any token; `capacity` tokens have to fit into it where it GROWS."""
    raise NotImplementedError

  def outputs(self, x_BTD: jax.Array, state: Any, context: Context) -> tuple[dict[str, jax.Array], Any]:
    """All but the output projections.

    Args:
      x_BTD: the normalised stream; T is 1 while decoding.
      state: what an earlier call returned, or `init_state`; None: nothing was read before.
      context: where the tokens stand.

    Returns:
      ({name of an output projection: what it reads, [B, T, F]}, the state after the last real token).
    """
    raise NotImplementedError

  def __call__(self, x_BTD: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    """The sum of what the output projections make of `outputs`, [B, T, D]; and the state."""
    outputs, state = self.outputs(x_BTD, state, context)
    return functools.reduce(operator.add, (getattr(self, name)(x_BTF) for name, x_BTF in outputs.items())), state

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Multiply-adds a token of the forward pass, a mean over a sequence of so many tokens."""
    raise NotImplementedError

  @classmethod
  def refusal(cls, config: ModelConfig, layer: Any) -> str | None:
    """Why a layer with this config cannot take over a softmax layer of this model, as a sentence; None: it can."""
    del config, layer
    return None

  @classmethod
  def reach(cls, config: ModelConfig, layer: Any) -> int | None:
    """The position at which `Context.far_rotations` is clamped for this mixer; None where it uses none."""
    del config, layer
    return None


class Projections(Mixer):
  """A mixer with the q, k, v and output projections of softmax attention, under the names of Hugging Face's Llama."""

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
    """Q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], normalised as the teacher does it."""
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
    """Applies RoPE by position; returns x where the model has none."""
    if rotation is None:
      return x_BTHK
    return apply_rope(x_BTHK, *rotation, interleaved=self.config.rope.kind == "interleaved")

  @nn.nowrap
  def rotate_by_head(self, x_BTNK: jax.Array) -> jax.Array:
    """Applies RoPE by the index of the head, where the config has it (OpenLM's first models).

    Only softmax attention uses it: in linear attention q and k of a head would turn by the same angle.
    """
    c = self.config
    if c.rope.kind != "by_head":
      return x_BTNK
    return apply_rope(x_BTNK, *rope_table(c.rope, c.head_dim, jnp.arange(x_BTNK.shape[2])))

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Of the four projections: D (H K + G K + G V) + H V D."""
    del layer, tokens
    c = config
    inputs = c.num_heads * c.head_dim + c.num_kv_heads * (c.head_dim + c.value_width)
    return c.hidden_size * (inputs + c.num_heads * c.value_width)


def side_by_side(x_BTHV: jax.Array) -> jax.Array:
  """[B, T, H, V] -> [B, T, H * V]."""
  return x_BTHV.reshape(*x_BTHV.shape[:2], -1)
