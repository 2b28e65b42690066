"""Computes distances between a model's layers and its teacher's: of residual streams, or of attention outputs.

Both distances are relative: at each token the squared error is divided by the teacher's squared activation, as in
calibration, since the norm that follows scales every token to the same size. Otherwise a few tokens, whose activations
are a thousand times those of the others, would dominate the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from supra_jax.model.layers import at_least_float32
from supra_jax.model.registry import MixerConfig
from supra_jax.model.stacking import kinds, stacks
from supra_jax.model.transformer import STREAMS, Block, Transformer

Streams = Mapping[str, Mapping[str, jax.Array]]


def read_streams(
  model: Transformer, params: Mapping[str, Any], tokens_BT: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, Streams]:
  """Runs a stacked model, and returns also the activations that each block stores in the collection STREAMS.

  Args:
    model: a stacked transformer.
    params: parameters of the model.
    tokens_BT: int32 [B, T].
    segment_ids: int32 [B, T], document ids, or None.

  Returns:
    (hidden states [B, T, D] after the last norm, {run: {name: [layers, B, T, D]}}). A run is a scan over equal layers;
    `model.transformer.Block` lists the names.
  """
  (hidden_BTD, _), kept = model.apply({"params": params}, tokens_BT, segment_ids=segment_ids, mutable=[STREAMS])
  return hidden_BTD, kept[STREAMS]


def streams_error(model: Transformer, streams: Streams, teacher: Transformer, theirs: Streams) -> jax.Array:
  """Returns the relative squared error of the residual stream, averaged over layers, float32 [B, T].

  The error of a layer is `|x - x_t|^2 / |x_t|^2`, where x is the output of the model's layer and x_t the output of the
  teacher's layer. No gradient reaches the teacher.

  Args:
    model: a stacked transformer.
    streams: activations of the model, as `read_streams` returns them.
    teacher: a stacked transformer with the same number of layers; the mixers may differ.
    theirs: activations of the teacher, as `read_streams` returns them.
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
  """Returns the relative squared error of attention outputs on the teacher's residual stream, float32 [B, T].

  The error is the mean of `|attention(x_t) - a_t|^2 / |x_t + a_t|^2` over the layers whose mixer differs from the
  teacher's. x_t is the input of the teacher's layer, and a_t the output of the teacher's attention, after the output
  projection. This is the attention transfer of LoLCATs (Zhang et al. 2024, eq. 6), but after the output projection. All
  layers read the teacher's stream, so that no layer depends on another, and the model's MLPs are not run. No gradient
  reaches the teacher.

  Args:
    model: a stacked transformer.
    params: parameters of the model.
    teacher: a stacked transformer with the same number of layers.
    teacher_params: parameters of the teacher.
    tokens_BT: int32 [B, T].
    segment_ids: int32 [B, T], document ids, or None.

  Raises:
    ValueError: all of the model's layers have the teacher's mixers.
  """
  config = model.config
  _, theirs = read_streams(teacher, teacher_params, tokens_BT, segment_ids)
  enters, attended = (jax.lax.stop_gradient(_join(teacher, theirs, name)) for name in ("enters", "attended"))
  context, _ = model.place(tokens_BT, segment_ids=segment_ids)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def layer_error(layers: tuple[MixerConfig, ...], params: Any, enters_BTD: jax.Array, attended_BTD: jax.Array, kind):
    block = Block(config, layers[0], model.dtype, model.implementation, kinds=layers)
    mixed, _ = block.apply({"params": params}, enters_BTD, None, context, kind, method="attend")
    return _error(mixed, attended_BTD, enters_BTD + attended_BTD)

  def stack_errors(first: int, length: int) -> jax.Array:
    layers, kind = kinds(config.layers[first : first + length])
    of_layers = params[f"run_{first}"], enters[first : first + length], attended[first : first + length], kind
    return jax.lax.map(lambda of_layer: layer_error(layers, *of_layer), of_layers)

  errors = [
    stack_errors(first, length)
    for first, length in stacks(config.layers)
    if config.layers[first : first + length] != teacher.config.layers[first : first + length]
  ]
  if not errors:
    raise ValueError(f"No layer to transfer attention to: all layers have the teacher's mixers, {config.mixers}.")
  return jnp.concatenate(errors).mean(0)


def _join(model: Transformer, streams: Streams, name: str) -> jax.Array:
  """Concatenates the activation `name` of all runs to [layers, B, T, D]."""
  parts = [streams[f"run_{first}"][name] for first, _ in stacks(model.config.layers)]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _error(x: jax.Array, wanted: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `|x - wanted|^2 / |scale|^2` over the last axis, in float32 at least."""
  x, wanted, scale = (at_least_float32(a) for a in (x, wanted, scale))
  return jnp.square(x - wanted).sum(-1) / jnp.maximum(jnp.square(scale).sum(-1), jnp.finfo(scale.dtype).tiny)
