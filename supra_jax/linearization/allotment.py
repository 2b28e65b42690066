"""Gives every key/value head of a memory a size of its own, so that the least of attention's output is lost a byte.

For each layer, head and size the loss of a head is measured on the teacher's own streams: the mean square of what its
attention says with all tokens and does not say with those that it would hold, behind W_o, over that of the stream. Then
heads grow from the smallest size, one step at a time, where a step gains most for each token that it holds more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.data.loading import Batch
from supra_jax.linearization.hybrid import embed, outside_layers
from supra_jax.model.config import ModelConfig
from supra_jax.model.layers import Norm, at_least_float32
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.registry import MIXER, MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer
from supra_jax.objectives.losses import inputs_of


def held(config: MemoryConfig, head: int = 0) -> int:
  """Returns the number of tokens that a head holds: sinks, window, tokens since the last choice, and retained ones."""
  sizes = (sizes[head if len(sizes) > 1 else 0] for sizes in (config.windows, config.retained))
  return config.sinks + config.chunk + sum(sizes)


def sized(tokens: int, *, sinks: int = 4, chunk: int = 16) -> MemoryConfig:
  """Returns a memory whose heads hold so many tokens each, a quarter of them in the window if there is room."""
  rest = tokens - sinks - chunk
  window = max(min(tokens // 4, rest), 1)
  return MemoryConfig(windows=(window,), retained=(max(rest - window, 0),), sinks=sinks, chunk=chunk)


def head_errors(
  teacher: tuple[Mapping[str, Any], ModelConfig], choices: Sequence[MemoryConfig], batches: Sequence[Batch]
) -> np.ndarray:
  """Returns the share of the stream that each head loses with each of the choices, float64 [L, G, choices]."""
  params, config = teacher
  model = Transformer(config)
  totals = np.zeros((config.num_layers, config.num_kv_heads, len(choices)))
  ends = outside_layers(params)
  for batch in batches:
    x_BTD = embed(model, ends, batch)
    for number, layer in enumerate(config.layers):
      x_BTD, lost = _lost(model, layer, tuple(choices), params[f"layers_{number}"], x_BTD, batch)
      totals[number] += np.asarray(lost, np.float64)
  return totals / len(batches)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lost(model: Transformer, layer: MixerConfig, choices: tuple[MemoryConfig, ...], params, x_BTD, batch):
  """Returns (the stream after a layer, what each head loses with each choice [G, choices])."""
  c = model.config
  tokens_BT, segment_ids = inputs_of(batch)
  layers = (layer, *choices)
  context, _ = Transformer(c.replace(layers=layers)).place(tokens_BT, segment_ids=segment_ids)
  normed = Norm(c.norm, c.norm_eps, model.dtype).apply({"params": params["input_layernorm"]}, x_BTD)

  def said(told: MixerConfig) -> jax.Array:
    mixer = mixer_class(told.mixer)(c, told, model.dtype)
    out: Any = mixer.apply({"params": params[MIXER]}, normed, None, context, method="outputs")
    return out[0]["o_proj"].reshape(*tokens_BT.shape, c.num_kv_heads, -1)

  whole = said(layer)
  kernel = params[MIXER]["o_proj"]["kernel"].reshape(c.num_kv_heads, -1, c.hidden_size)
  stream = at_least_float32(x_BTD)
  weight_BT = 1 / (jnp.mean(stream * stream, axis=-1) + c.norm_eps)
  lost = []
  for choice in choices:
    missing_BTGD = jnp.einsum("btgf,gfd->btgd", whole - said(choice), kernel)
    lost.append(jnp.mean(jnp.mean(missing_BTGD**2, axis=-1) * weight_BT[..., None], axis=(0, 1)))
  x_BTD = Block(c, layer, model.dtype).apply({"params": params}, x_BTD, None, context)[0]
  return x_BTD, jnp.stack(lost, axis=-1)


def allotted(errors: np.ndarray, sizes: Sequence[int], tokens: int) -> np.ndarray:
  """Returns the choice of each head, int [L, G]: the least error with at most `tokens` tokens a head on average.

  Args:
    errors: [L, G, choices].
    sizes: number of tokens of each choice, increasing.
    tokens: tokens a head may hold on average.

  Raises:
    ValueError: not even the smallest choice fits.
  """
  layers, groups, _ = errors.shape
  room = tokens * layers * groups - sizes[0] * layers * groups
  if room < 0:
    raise ValueError(f"{tokens} tokens a head: wanted {sizes[0]} or more.")
  chosen = np.zeros((layers, groups), int)
  while True:
    best, step = 0.0, None
    for layer, group in np.ndindex(layers, groups):
      now = int(chosen[layer, group])
      for more in range(now + 1, len(sizes)):
        cost = sizes[more] - sizes[now]
        gain = (errors[layer, group, now] - errors[layer, group, more]) / cost
        if cost <= room and gain > best:
          best, step = gain, (layer, group, more)
    if step is None:
      return chosen
    layer, group, more = step
    room -= sizes[more] - sizes[int(chosen[layer, group])]
    chosen[layer, group] = more


def allot(
  teacher: tuple[Mapping[str, Any], ModelConfig], tokens: int, batches: Sequence[Batch], choices: Sequence[MemoryConfig]
) -> tuple[MemoryConfig, ...]:
  """Returns the memory of each layer, with `tokens` tokens a head on average."""
  sizes = [held(choice) for choice in choices]
  chosen = allotted(head_errors(teacher, choices, batches), sizes, tokens)
  return tuple(
    dataclasses.replace(
      choices[0],
      windows=tuple(choices[i].windows[0] for i in row),
      retained=tuple(choices[i].retained[0] for i in row),
    )
    for row in chosen.tolist()
  )
