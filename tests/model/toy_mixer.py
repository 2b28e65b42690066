"""A mixer of its own, registered here and nowhere else: what `CONTRIBUTING.md` describes, and tests try."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from supra_jax.model.mixers.base import MixerState, Projections, side_by_side
from supra_jax.model.registry import MixerConfig, register


@dataclasses.dataclass(frozen=True)
class ToyConfig(MixerConfig):
  keep: float = 0.5


@flax.struct.dataclass
class ToyState(MixerState):
  mean: jax.Array  # [B, G, V]


@register("toy")
class Toy(Projections):
  """A mean of values that forgets, m_t = keep m_(t-1) + v_t, times a gate and a gain of its own."""

  Config = ToyConfig
  NEW = "gain"
  PARTS = {"mean": ("mean",)}
  STATE_AXES = {"mean": ("batch", "heads", None)}

  def setup(self):
    super().setup()
    self.gain = self.param("gain", lambda key: {"weight": jnp.ones(self.config.value_width)})

  @nn.nowrap
  def init_state(self, batch, capacity):
    return ToyState(jnp.zeros((batch, self.config.num_kv_heads, self.config.value_width)))

  def outputs(self, x_BTD, state, context):
    q, _, v = self.project(x_BTD)
    time, groups = v.shape[1], v.shape[2]
    real = jnp.ones(v.shape[:2], bool) if context.lengths is None else jnp.arange(time) < context.lengths[:, None]

    def step(mean, token):
      value, first, is_real = token
      new = jnp.where(first[:, None, None], 0, mean) * self.layer.keep + value
      return jnp.where(is_real[:, None, None], new, mean), new

    start = self.init_state(len(x_BTD), 0) if state is None else state
    tokens = (x.swapaxes(0, 1) for x in (v, context.index == context.first, real))
    mean, means = jax.lax.scan(step, start.mean, tuple(tokens))
    gates = jax.nn.sigmoid(q.mean(-1, keepdims=True))
    out = gates * jnp.repeat(means.swapaxes(0, 1) * self.gain["weight"], q.shape[2] // groups, axis=2)
    return {"o_proj": side_by_side(out)}, ToyState(mean)

  @classmethod
  def begin(cls, drawn, start):
    return drawn
