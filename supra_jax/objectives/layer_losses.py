"""How far a model's layers are from its teacher's: attention alone on the teacher's streams, or whole streams.

Both are weighted as calibration is, by what the norm that follows makes of a token: an error is a share of the
teacher's mean square there. A few tokens, whose activations are a thousand times the others', would else be all that
counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.model.layers import at_least_float32
from supra_jax.model.registry import MixerConfig
from supra_jax.model.stacking import runs
from supra_jax.model.transformer import STREAMS, Block, Transformer

Streams = Mapping[str, Mapping[str, jax.Array]]


def read_streams(
  model: Transformer, params: Mapping[str, Any], tokens_BT: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, Streams]:
  """(hidden [B, T, D] after the last norm, what the blocks fill STREAMS with: a run each, [layers, B, T, D])."""
  (hidden_BTD, _), kept = model.apply({"params": params}, tokens_BT, segment_ids=segment_ids, mutable=[STREAMS])
  return hidden_BTD, kept[STREAMS]


def streams_error(model: Transformer, streams: Streams, teacher: Transformer, theirs: Streams) -> jax.Array:
  """Float32 [B, T]: the mean over layers of `|x - x_t|^2 / |x_t|^2`, x being what leaves a layer.

  Args:
    model, teacher: stacked, of equally many layers; their mixers may be others.
    streams, theirs: as `read_streams` gives them.
  """
  x_LBTD, x_teacher_LBTD = _join(model, streams, "leaves"), jax.lax.stop_gradient(_join(teacher, theirs, "leaves"))
  return _error(x_LBTD, x_teacher_LBTD, x_teacher_LBTD).mean(0)


def attention_error(
  model: Transformer,
  params: Mapping[str, Any],
  teacher: Transformer,
  teacher_params: Mapping[str, Any],
  tokens_BT: jax.Array,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Float32 [B, T]: how far each layer's attention is from the teacher's, both reading the teacher's stream.

  The mean of `|attention(x_t) - a_t|^2 / |x_t + a_t|^2` over the layers whose mixer is not the teacher's, a_t being the
  teacher's attention: the attention transfer of LoLCATs (Zhang et al. 2024, eq. 6), after the output projection. Each
  layer reads the teacher's stream, so that no layer depends on another, and no MLP of the model is run.

  Args:
    model, params, teacher, teacher_params: stacked, of equally many layers.
    tokens_BT, segment_ids: int32 [B, T].

  Raises:
    ValueError: all of the model's layers have the teacher's mixers.
  """
  config = model.config
  _, theirs = read_streams(teacher, teacher_params, tokens_BT, segment_ids)
  enters, attended = (jax.lax.stop_gradient(_join(teacher, theirs, name)) for name in ("enters", "attended"))
  context, _ = model.place(tokens_BT, segment_ids=segment_ids)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def layer_error(layer: MixerConfig, params: Any, enters_BTD: jax.Array, attended_BTD: jax.Array) -> jax.Array:
    block = Block(config, layer, model.dtype, model.implementation)
    mixed, _ = block.apply({"params": params}, enters_BTD, None, context, method="attend")
    return _error(mixed, attended_BTD, enters_BTD + attended_BTD)

  errors = [
    jax.lax.map(
      lambda of_layer, layer=config.layers[first]: layer_error(layer, *of_layer),
      (params[f"run_{first}"], enters[first : first + length], attended[first : first + length]),
    )
    for first, length in runs(config.layers)
    if config.layers[first : first + length] != teacher.config.layers[first : first + length]
  ]
  if not errors:
    raise ValueError(f"No layer to transfer attention to: mixers are {config.mixers}.")
  return jnp.concatenate(errors).mean(0)


def _join(model: Transformer, streams: Streams, name: str) -> jax.Array:
  """[layers, B, T, D] of all runs."""
  parts = [streams[f"run_{first}"][name] for first, _ in runs(model.config.layers)]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _error(x: jax.Array, wanted: jax.Array, scale: jax.Array) -> jax.Array:
  """`|x - wanted|^2 / |scale|^2` over the last axis, float32."""
  x, wanted, scale = (at_least_float32(a) for a in (x, wanted, scale))
  return jnp.square(x - wanted).sum(-1) / jnp.maximum(jnp.square(scale).sum(-1), jnp.finfo(scale.dtype).tiny)
