"""Mamba's block (S6; Gu and Dao 2023, arXiv 2312.00752), a baseline that is trained from scratch; no MLP follows it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Annotated, Any, ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.selective_scan import selective_scan
from supra_jax.core.schema import POSITIVE, check
from supra_jax.core.sharding import constrain, per_device
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Dense, Weight, add_bias, at_least_float32, uniform_fan_in
from supra_jax.model.mixers.base import Axes, Context, Mixer, MixerState
from supra_jax.model.mixers.supra_window import taken
from supra_jax.model.registry import MixerConfig, register

FIRST_STEPS = (1e-3, 0.1)  # delta before training is drawn between these, evenly by its logarithm
LEAST_STEP = 1e-4
# Names of dimensions, see `core.sharding`.
CHANNELS = ("batch", None, "ffn")
ALL = ("batch", None, None)
STATE = ("batch", "ffn", None)


@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
  """Config of Mamba's block, with the names of transformers' MambaConfig.

  Attributes:
    state_size: N, numbers in the state of a channel.
    conv_kernel: number of tokens that the convolution sees, the token itself included.
    expand: E / D, channels by the width of the model.
    time_step_rank: rank of the projection that step sizes are made of; None: D / 16, rounded up.
    use_conv_bias: whether the convolution has a bias.
    use_bias: whether in_proj and out_proj have a bias.
  """

  state_size: Annotated[int, POSITIVE] = 16
  conv_kernel: Annotated[int, POSITIVE] = 4
  expand: Annotated[int, POSITIVE] = 2
  time_step_rank: Annotated[int, POSITIVE] | None = None
  use_conv_bias: bool = True
  use_bias: bool = False

  def __post_init__(self):
    check(self, type(self).__name__)

  def channels(self, hidden_size: int) -> int:
    """E."""
    return self.expand * hidden_size

  def rank(self, hidden_size: int) -> int:
    """Rank of the projection that step sizes are made of."""
    return -(-hidden_size // 16) if self.time_step_rank is None else self.time_step_rank


@flax.struct.dataclass
class MambaState(MixerState):
  """h of the selective scan, [B, E, N], and the last inputs of the convolution, [B, conv_kernel - 1, E]; float32."""

  h: jax.Array
  conv: jax.Array


class Convolution(nn.Module):
  """A convolution over time of each channel alone, with a kernel [E, 1, W] as torch's conv1d has it.

  Attributes:
    channels: E.
    width: W.
    use_bias: whether there is a bias.
    dtype: dtype of the computation.
  """

  channels: int
  width: int
  use_bias: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BSE: jax.Array, seen_BTW: jax.Array) -> jax.Array:
    """Returns y_t = sum_w kernel_w x_{t+w} over the w that `seen_BTW` has true, [B, T, E]; S = T + W - 1."""
    kernel = self.param("kernel", uniform_fan_in(self.width), (self.channels, 1, self.width)).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.channels,)) if self.use_bias else None
    x, time = x_BSE.astype(self.dtype), seen_BTW.shape[1]
    terms = (jnp.where(seen_BTW[..., w, None], x[:, w : w + time], 0) * kernel[:, 0, w] for w in range(self.width))
    y = functools.reduce(operator.add, terms)
    return y if bias is None else add_bias(y, bias)


@register("mamba")
class MambaMixer(Mixer):
  """Mamba's block: a short convolution, then the selective scan, gated.

  `x, z = W_in u; x = silu(conv x); delta, b, c = W_x x; y = scan(x, softplus(W_dt delta + bias), -exp(a_log), b, c)`,
  and the output is `W_out ((y + skip x) silu(z))`. Rates, step sizes and the state are float32.
  """

  Config = MambaConfig
  FEEDS = False
  NEW = "in_proj|conv1d|x_proj|dt_proj|a_log|skip|out_proj"
  NO_ADAPTERS = "conv1d"
  AXES: ClassVar[Axes] = (
    ("in_proj/kernel", ("embed", "ffn")),
    ("conv1d/kernel", ("ffn", None, None)),
    ("x_proj/kernel", ("ffn", None)),
    ("dt_proj/kernel", (None, "ffn")),
    ("out_proj/kernel", ("ffn", "embed")),
  )
  PARTS = {"scan": ("h",), "convolution": ("conv",)}
  STATE_AXES = {"h": STATE, "conv": CHANNELS}

  def setup(self):
    c, told = self.config, self.layer
    channels, rank = told.channels(c.hidden_size), told.rank(c.hidden_size)

    def dense(features: int, fan_in: int, scale: float = 1.0, **how: Any) -> Dense:
      return Dense(features, dtype=self.dtype, kernel_init=uniform_fan_in(fan_in / scale**2), **how)

    self.in_proj = dense(2 * channels, c.hidden_size, use_bias=told.use_bias)
    self.conv1d = Convolution(channels, told.conv_kernel, told.use_conv_bias, self.dtype)
    self.x_proj = dense(rank + 2 * told.state_size, channels)
    self.dt_proj = dense(channels, rank, use_bias=True, bias_init=_first_steps)
    self.a_log = Weight(_first_rates, (channels, told.state_size))
    self.skip = Weight(nn.initializers.ones, (channels,))
    # Mamba divides by the root of the depth what the layers add to the stream.
    self.out_proj = dense(c.hidden_size, channels, c.num_layers**-0.5, use_bias=told.use_bias)

  @nn.nowrap
  def init_state(self, batch: int, capacity: int) -> MambaState:
    del capacity  # not used: the state does not grow
    channels = self.layer.channels(self.config.hidden_size)
    h = jnp.zeros((batch, channels, self.layer.state_size), jnp.float32)
    return MambaState(h, jnp.zeros((batch, self.layer.conv_kernel - 1, channels), jnp.float32))

  def outputs(
    self, x_BTD: jax.Array, state: MambaState | None, context: Context
  ) -> tuple[dict[str, jax.Array], MambaState]:
    told, (batch, time, _) = self.layer, x_BTD.shape
    state = self.init_state(batch, 0) if state is None else state
    # A device has all tokens of its channels: each state needs the one before.
    x, z = (constrain(y, *CHANNELS) for y in jnp.split(self.in_proj(x_BTD), 2, axis=-1))
    read = jnp.concatenate([state.conv, x.astype(state.conv.dtype)], axis=1)
    back = jnp.arange(told.conv_kernel)[::-1]
    x = nn.silu(self.conv1d(read, (context.index - context.first)[..., None] >= back))

    rank = told.rank(self.config.hidden_size)
    step, b, c = jnp.split(self.x_proj(x), [rank, rank + told.state_size], axis=-1)
    delta = nn.softplus(at_least_float32(self.dt_proj(step)))
    begins = context.index == context.first
    if context.lengths is not None:
      real = jnp.arange(time) < context.lengths[:, None]
      delta, begins = jnp.where(real[..., None], delta, 0), begins & real
    scan = per_device(_scan, (CHANNELS, CHANNELS, ("ffn", None), ALL, ALL, STATE, ALL[:2]), (CHANNELS, STATE))
    y, h = scan(x, delta, -jnp.exp(self.a_log()), b, c, state.h, begins)
    out = (y + self.skip() * at_least_float32(x)) * nn.silu(at_least_float32(z))
    return {"out_proj": out.astype(self.dtype)}, MambaState(h.astype(state.h.dtype), self._last(read, context, time))

  @nn.nowrap
  def _last(self, read_BSE: jax.Array, context: Context, time: int) -> jax.Array:
    """Returns the last conv_kernel - 1 inputs of the convolution up to the last real token."""
    count = self.layer.conv_kernel - 1
    if context.lengths is None:
      return read_BSE[:, time:]
    return taken(read_BSE, context.lengths[:, None] + jnp.arange(count))

  @classmethod
  def flops(cls, config: ModelConfig, layer: Any, tokens: int) -> float:
    """Returns multiply-adds per token: E (3 D + 2 rank + 2 N) of projections, E W of the convolution, 3 E N of h."""
    del tokens
    channels, rank, size = layer.channels(config.hidden_size), layer.rank(config.hidden_size), layer.state_size
    return channels * (3 * config.hidden_size + 2 * rank + 2 * size + layer.conv_kernel + 3 * size)


def _scan(x, delta, a, b, c, state, begins):
  return selective_scan(x, delta, a, b, c, initial_state=state, begins_BT=begins)


def _first_steps(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Returns a bias before softplus such that delta is log-uniform in FIRST_STEPS."""
  low, high = (math.log(step) for step in FIRST_STEPS)
  step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), LEAST_STEP)
  return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus


def _first_rates(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Returns log(1), ..., log(N) for each channel: S4D's real rates (Gu et al. 2022, arXiv 2206.11893)."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
