"""Hybrids: the layers that stay softmax are those that bring an RNN nearest to its teacher.

Each layer in turn, attention and MLP, is replaced by the teacher's in the calibrated student, and KL(teacher || hybrid)
is measured. Layers below it do not change, so that only the layers above it run anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from supra_jax.core.sharding import batch_shards, process_shard, put_batch
from supra_jax.data.loading import Batch
from supra_jax.linearization.calibrate import Report
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import state_bytes, train_flops_per_token
from supra_jax.model.registry import MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer
from supra_jax.objectives.losses import LossSums, Teacher, hidden_loss, inputs_of

Model = tuple[Transformer, Mapping[str, Any]]


class Divergences(NamedTuple):
  """KL(teacher || model) in nats a token.

  Attributes:
    tokens: number of targets that it was measured on.
    student: divergence of the student itself.
    by_layer: {layer: divergence of the student with the teacher's layer in its place}.
  """

  tokens: int
  student: float
  by_layer: dict[int, float]


def layer_divergences(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  student: tuple[Mapping[str, Any], ModelConfig],
  batches: Iterable[Batch],
  mesh: Mesh,
  *,
  dtype: Any = jnp.float32,
  report: Report | None = None,
) -> Divergences:
  """Measures each layer whose mixer is not the teacher's. Call it under `jax.set_mesh(mesh)`.

  L layers cost about L / 2 forward passes, and 2 L unembeddings.

  Args:
    teacher, student: parameters, one subtree a layer, and config.
    batches: rows of this process, "tokens" int32 [rows, T + 1], and "segment_ids" alike if documents are kept apart.
    mesh: mesh that cuts parameters and batches.
    dtype: dtype of the computation.
    report: called after each layer with the divergence on a batch.

  Raises:
    ValueError: there is no target.
  """
  theirs, ours = ((Transformer(config, jnp.dtype(dtype)), params) for params, config in (teacher, student))
  changed = [i for i, layer in enumerate(student[1].layers) if layer != teacher[1].layers[i]]
  total, weight = dict.fromkeys([None, *changed], 0.0), 0.0
  for rows in batches:
    batch = jax.tree.map(lambda x: x[0], put_batch(rows, mesh))
    for layer, sums in _measurements(theirs, ours, changed, batch):
      total[layer] += float(sums.loss)
      if layer is None:
        weight += float(sums.weight)
      elif report is not None:
        divergence = float(sums.loss / sums.weight)
        report(layer, len(changed), divergence, f"KL with layer {layer} kept {divergence:.3f}")
  if not all(map(math.isfinite, total.values())):
    raise ValueError("Divergences from the teacher cannot be measured: its logits, or the student's, are not finite.")
  if not weight:
    raise ValueError("Nothing to measure divergences on: no batch has a target.")
  return Divergences(round(weight), total[None] / weight, {layer: total[layer] / weight for layer in changed})


def choose_softmax_layers(divergences: Divergences, count: int) -> list[int]:
  """The layers, in order, whose replacement alone leaves the least divergence."""
  return sorted(sorted(divergences.by_layer, key=divergences.by_layer.__getitem__)[:count])


def set_apart(batches: Sequence[Batch], tokens: int, mesh: Mesh) -> tuple[list[Batch], list[Batch]]:
  """Cuts batches into (those to calibrate with, those to measure on: so many tokens, in rows that the mesh can cut).

  A student is far nearer to its teacher on rows that it was calibrated with than on others.

  Raises:
    ValueError: nothing would be left to calibrate with.
  """
  shards, (_, processes) = batch_shards(mesh), process_shard(mesh)
  rows, length = batches[0]["tokens"].shape
  wanted = -(-tokens // ((length - 1) * shards)) * shards // processes
  count = -(-wanted // rows)
  if len(batches) <= count:
    raise ValueError(
      f"{tokens} tokens to measure on are all of the text: it has {len(batches)} batches. Give more text."
    )
  part = {name: x[: wanted - (count - 1) * rows] for name, x in batches[-1].items()}
  return list(batches[:-count]), [*batches[-count:-1], part]


def table(kept: Mapping[str, Any]) -> str:
  """How a model's softmax layers were chosen, a line a layer, the nearest to the teacher first.

  Args:
    kept: `kept_softmax` of `Linearized.report` or of source.json.
  """
  lines = [f"KL from the teacher on {kept['tokens']:,} tokens is {kept['student']:.4f}; with one layer as it was:"]
  for layer, divergence in sorted(kept["by_layer"].items(), key=lambda item: item[1]):
    lines.append(f"layer {int(layer):>3}  {divergence:.4f}" + "  stays softmax" * (int(layer) in kept["layers"]))
  return "\n".join(lines)


def costs(config: ModelConfig) -> str:
  """A line: the number of layers of either kind; state (keys and values in bfloat16) and work at 2k and 32k tokens."""
  growing = sum(mixer_class(mixer).GROWS for mixer in config.mixers)
  text = f"{config.num_layers - growing} RNN layers, {growing} softmax layers"
  for tokens in (2048, 32768):
    state, work = state_bytes(config, tokens) / 2**20, train_flops_per_token(config, tokens) / 3e9
    text += f"; at {tokens:,} tokens {state:,.1f} MiB of state and {work:,.2f} GFLOPs a token"
  return text


def _measurements(
  theirs: Model, ours: Model, changed: Sequence[int], batch: Mapping[str, jax.Array]
) -> Iterator[tuple[int | None, LossSums]]:
  """Yields (layer, divergence with the teacher's layer in its place) in order, then (None, the student's)."""
  layers = range(ours[0].config.num_layers)
  ends = [(model, _ends(params)) for model, params in (theirs, ours)]
  target, x_BTD = (_embed(*model, batch) for model in ends)
  target = _through(theirs, target, layers, batch)
  for i in layers:
    if i in changed:
      hybrid = _through(ours, _through(theirs, x_BTD, [i], batch), layers[i + 1 :], batch)
      yield i, _divergence(*ends[0], *ends[1], target, hybrid, batch)
    x_BTD = _through(ours, x_BTD, [i], batch)
  yield None, _divergence(*ends[0], *ends[1], target, x_BTD, batch)


def _ends(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters outside the layers: embedding, last norm, unembedding."""
  return {name: tree for name, tree in params.items() if not name.startswith("layers_")}


def _through(model: Model, x_BTD: jax.Array, layers: Iterable[int], batch: Mapping[str, jax.Array]) -> jax.Array:
  for i in layers:
    x_BTD = _block(model[0], model[0].config.layers[i], model[1][f"layers_{i}"], x_BTD, batch)
  return x_BTD


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Transformer, ends: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  x_BTD: Any = model.apply({"params": ends}, inputs_of(batch)[0], method="embed")
  return x_BTD


# One program for each kind of layer: all layers of a kind have the same shapes.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(
  model: Transformer, layer: MixerConfig, params: Any, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
  tokens_BT, segment_ids = inputs_of(batch)
  context, _ = model.place(tokens_BT, segment_ids=segment_ids)
  return Block(model.config, layer, model.dtype).apply({"params": params}, x_BTD, None, context)[0]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _divergence(
  theirs: Transformer, their_ends: Any, ours: Transformer, our_ends: Any, their_BTD: Any, our_BTD: Any, batch: Any
) -> LossSums:
  """Of streams behind the last layer."""
  their_BTD, our_BTD = (
    model.apply({"params": ends}, x_BTD, method=lambda model, x_BTD: model.norm(x_BTD))
    for model, ends, x_BTD in ((theirs, their_ends, their_BTD), (ours, our_ends, our_BTD))
  )
  return hidden_loss(ours, our_ends, our_BTD, batch, teacher=Teacher(their_ends, theirs), theirs_BTD=their_BTD)
