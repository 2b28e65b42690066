"""Chooses the layers of a hybrid that stay softmax: those that bring the calibrated student nearest to its teacher.

In the calibrated student, one layer at a time (attention and MLP) is replaced by the teacher's layer, and
KL(teacher || hybrid) is measured. The layers below the replaced layer do not change: only those above are run again.
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
from supra_jax.model.costs import sequence_bytes, state_bytes, train_flops_per_token
from supra_jax.model.registry import MixerConfig, mixer_class
from supra_jax.model.transformer import Block, Transformer
from supra_jax.objectives.losses import LossSums, Teacher, hidden_loss, inputs_of

Model = tuple[Transformer, Mapping[str, Any]]


class Divergences(NamedTuple):
  """Divergences KL(teacher || model) of next tokens, in nats per token.

  Attributes:
    tokens: number of targets that the divergences are means of.
    student: divergence of the student as it is.
    by_layer: {number of a layer: divergence of the student with this layer replaced by the teacher's}.
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
  """Measures the student's divergence from the teacher, as it is and with one layer replaced by the teacher's.

  Each layer whose mixer differs from the teacher's is replaced in turn. L such layers cost about L / 2 forward passes
  and 2 L unembeddings. Call this function under `jax.set_mesh(mesh)`.

  Args:
    teacher, student: (parameters, one subtree per layer, and config).
    batches: this process's rows of each batch: "tokens" int32 [rows, T + 1], and "segment_ids" of the same shape if
      documents are kept apart.
    mesh: device mesh that parameters and batches are sharded over.
    dtype: dtype of the computation.
    report: called for each batch after each replaced layer, with the divergence on this batch.

  Raises:
    ValueError: no batch has a target, or a divergence is not finite.
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
  """Returns the numbers, sorted, of the `count` layers whose replacement alone leaves the least divergence."""
  return sorted(sorted(divergences.by_layer, key=divergences.by_layer.__getitem__)[:count])


def set_apart(batches: Sequence[Batch], tokens: int, mesh: Mesh) -> tuple[list[Batch], list[Batch]]:
  """Splits batches into those to calibrate with and those to measure divergences on.

  The two are kept apart because a student is far nearer to its teacher on rows that it was calibrated with.

  Args:
    batches: this process's rows of each batch.
    tokens: number of tokens to measure on, over all processes; rounded up to rows that the mesh can cut evenly.
    mesh: device mesh that batches are cut over.

  Returns:
    (batches to calibrate with, batches to measure on). The rows that the last batch has beyond `tokens` are dropped.

  Raises:
    ValueError: no batch would be left to calibrate with.
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
  """Returns, as text, the student's KL from the teacher, and per layer the KL if that layer alone stays softmax.

  The line with the least KL comes first; layers that were chosen to stay softmax are marked.

  Args:
    kept: the value of `kept_softmax` in `Linearized.report` or in source.json.
  """
  lines = [f"KL from the teacher on {kept['tokens']:,} tokens is {kept['student']:.4f}; with one layer as it was:"]
  for layer, divergence in sorted(kept["by_layer"].items(), key=lambda item: item[1]):
    lines.append(f"layer {int(layer):>3}  {divergence:.4f}" + "  stays softmax" * (int(layer) in kept["layers"]))
  return "\n".join(lines)


def costs(config: ModelConfig) -> str:
  """Returns a line with the numbers of RNN and softmax layers, and what the model costs at 2,048 and 32,768 tokens.

  The costs are the bytes of the state (keys and values in bfloat16), and forward FLOPs per token.
  """
  growing = sum(mixer_class(mixer).GROWS for mixer in config.mixers)
  text = f"{config.num_layers - growing} RNN layers, {growing} softmax layers"
  if not growing:
    text += f"; {sequence_bytes(config, 1):,} bytes of state at any length"
  for tokens in (2048, 32768):
    state = f"{state_bytes(config, tokens) / 2**20:,.1f} MiB of state and " if growing else ""
    text += f"; at {tokens:,} tokens {state}{train_flops_per_token(config, tokens) / 3e9:,.2f} GFLOPs a token"
  return text


def _measurements(
  theirs: Model, ours: Model, changed: Sequence[int], batch: Mapping[str, jax.Array]
) -> Iterator[tuple[int | None, LossSums]]:
  """Yields (layer, loss sums of the student with this layer replaced) in order, then (None, those of the student)."""
  layers = range(ours[0].config.num_layers)
  ends = [(model, outside_layers(params)) for model, params in (theirs, ours)]
  target, x_BTD = (embed(*model, batch) for model in ends)
  target = _through(theirs, target, layers, batch)
  for i in layers:
    if i in changed:
      hybrid = _through(ours, _through(theirs, x_BTD, [i], batch), layers[i + 1 :], batch)
      yield i, _divergence(*ends[0], *ends[1], target, hybrid, batch)
    x_BTD = _through(ours, x_BTD, [i], batch)
  yield None, _divergence(*ends[0], *ends[1], target, x_BTD, batch)


def outside_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters outside the layers: embedding, last norm, unembedding."""
  return {name: tree for name, tree in params.items() if not name.startswith("layers_")}


def _through(model: Model, x_BTD: jax.Array, layers: Iterable[int], batch: Mapping[str, jax.Array]) -> jax.Array:
  for i in layers:
    x_BTD = block(model[0], model[0].config.layers[i], model[1][f"layers_{i}"], x_BTD, batch)
  return x_BTD


@functools.partial(jax.jit, static_argnums=0)
def embed(model: Transformer, ends: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  x_BTD: Any = model.apply({"params": ends}, inputs_of(batch)[0], method="embed")
  return x_BTD


def last_norm(model: Transformer, ends: Any, x_BTD: jax.Array) -> jax.Array:
  """Applies the norm after the last layer to the residual stream."""
  hidden_BTD: Any = model.apply({"params": ends}, x_BTD, method=lambda model, x_BTD: model.norm(x_BTD))
  return hidden_BTD


# One program for each kind of layer: all layers of a kind have the same shapes.
@functools.partial(jax.jit, static_argnums=(0, 1))
def block(
  model: Transformer, layer: MixerConfig, params: Any, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
  tokens_BT, segment_ids = inputs_of(batch)
  context, _ = model.place(tokens_BT, segment_ids=segment_ids)
  return Block(model.config, layer, model.dtype).apply({"params": params}, x_BTD, None, context)[0]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _divergence(
  theirs: Transformer, their_ends: Any, ours: Transformer, our_ends: Any, their_BTD: Any, our_BTD: Any, batch: Any
) -> LossSums:
  """Returns the loss sums, `loss` being KL(teacher || student), given both residual streams after the last layer."""
  their_BTD, our_BTD = last_norm(theirs, their_ends, their_BTD), last_norm(ours, our_ends, our_BTD)
  return hidden_loss(ours, our_ends, our_BTD, batch, teacher=Teacher(their_ends, theirs), theirs_BTD=their_BTD)
