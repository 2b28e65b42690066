"""Fits a memory into a budget of bytes: the start `Memory`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supra_jax.core.sharding import put_batch
from supra_jax.data.loading import Batch
from supra_jax.data.planted import plant_repeats
from supra_jax.linearization.allotment import allotted, head_errors, with_order
from supra_jax.linearization.calibrate import Report
from supra_jax.linearization.starts import Memory
from supra_jax.model.config import ModelConfig
from supra_jax.model.costs import sequence_bytes
from supra_jax.model.mixers.memory import MemoryConfig
from supra_jax.model.registry import MIXER

# Sizes of heads, as shares of what a head retains on average: an eighth at least, since some heads fall apart without a
# few tokens, which does not show to second order; at most what of 2, 4 or 8 heads the others leave for one.
LEAST = 1 / 8
SHARES = (LEAST, 1 / 4, 1 / 2, 1, *(heads - (heads - 1) * LEAST for heads in (2, 4, 8)))
FEW_TOKENS = 100  # a head that holds fewer chooses more often
SPARE = 1.05  # less room than this is what the steps from size to size leave
PLANTED = 3  # every third batch is read once more, with random strings in it


def remembered(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  start: Memory,
  batches: Sequence[Batch],
  mesh: Mesh,
  chosen: Sequence[int],
  report: Report | None = None,
) -> tuple[dict[str, Any], ModelConfig, dict[str, Any]]:
  """Makes memories of layers of a softmax model; call this function under `jax.set_mesh(mesh)`.

  Args:
    teacher: (parameters, one subtree per layer, and config) of the softmax model.
    start: the budget.
    batches: this process's rows of each batch, from which the sizes of the heads are found.
    mesh: device mesh that parameters and batches are sharded over. The heads of each size divide by its axis `tensor`.
    chosen: numbers of the layers to replace.
    report: called after each layer, see `head_errors`.

  Returns:
    (parameters, in which the key/value heads of a layer may have another order; config; what was found, for
    source.json: `retained` and `order`, see `Allotment`, and `nats_lost`, the sum of what the heads lose, see
    `head_errors`, with these sizes and with one size for all; with `recall_weight` recall is in it, in the unit of the
    text).

  Raises:
    ValueError: the budget is too small.
  """
  common, tokens = within(start, teacher[1], chosen)
  whole = 8 if tokens >= 64 else 1  # so many tokens make a tile
  of_share = {share: int(share * tokens / whole) * whole for share in SHARES}
  length = batches[0]["tokens"].shape[1] - 1
  most = max(of_share[1], length)  # what rows do not fill cannot be measured
  if of_share[1] > length:
    warnings.warn(
      f"A head may hold {of_share[1]:,} tokens, and the rows that sizes are found on have {length:,}: they say nothing "
      "of what is further back. Longer rows or documents say more.",
      stacklevel=2,
    )
  sizes = sorted({size for size in of_share.values() if size <= most})
  choices = [dataclasses.replace(common, retained=(size,)) for size in sizes]
  read_again = batches[::PLANTED] if start.recall_weight else []
  planted = [_planted(batch, start.seed + i) for i, batch in enumerate(read_again)]
  placed = [{name: x[0] for name, x in put_batch(batch, mesh).items()} for batch in [*batches, *planted]]
  by_batch = head_errors(teacher, choices, placed, dtype=start.dtype, report=report)[:, list(chosen)]
  errors = by_batch[: len(batches)].mean(axis=0)
  if planted:
    recall = by_batch[len(batches) :].mean(axis=0)
    errors = errors + start.recall_weight * errors.sum() / max(recall.sum(), 1e-9) * recall
  # RoPE by the number of a head forbids another order.
  repeats = teacher[1].num_kv_heads if teacher[1].rope.kind == "by_head" else mesh.shape.get("tensor", 1)
  found = allotted(errors, sizes, tokens, patterns=start.patterns, repeats=repeats)
  found = found._replace(retained=_filled(found.retained, tokens, whole))
  one_size = errors[..., sizes.index(of_share[1])].sum()
  lost = {"sizes_of_heads": round(found.error, 5), "one_size": round(float(one_size), 5)}
  params, config = with_memories(teacher, common, found.retained.tolist(), found.order.tolist(), chosen)
  return params, config, {"retained": found.retained.tolist(), "order": found.order.tolist(), "nats_lost": lost}


def _filled(retained: np.ndarray, tokens: float, whole: int) -> np.ndarray:
  """Returns `retained`, larger by one factor if much room is left: rows show no gain of more tokens than they have."""
  room = tokens / max(retained.mean(), 1)
  return (retained * room / whole).astype(int) * whole if room > SPARE else retained


def _planted(batch: Batch, seed: int) -> Batch:
  """Returns a batch with random strings in it that stand twice."""
  tokens, known = plant_repeats(batch["tokens"], batch.get("segment_ids"), seed=seed)
  return {**batch, "tokens": tokens, "target_weights": known.astype(np.float32)}


def with_memories(
  teacher: tuple[Mapping[str, Any], ModelConfig],
  common: MemoryConfig,
  retained: Sequence[Sequence[int]],
  order: Sequence[Sequence[int]],
  chosen: Sequence[int],
) -> tuple[dict[str, Any], ModelConfig]:
  """Returns (parameters, config) of a teacher whose chosen layers are memories; see `Allotment`."""
  params, config = dict(teacher[0]), teacher[1]
  layers = list(config.layers)
  for number, heads, sizes in zip(chosen, order, retained, strict=True):
    layers[number] = dataclasses.replace(common, retained=tuple(sizes))
    tree = params[f"layers_{number}"]
    params[f"layers_{number}"] = {**tree, MIXER: with_order(tree[MIXER], heads, config)}
  return params, config.replace(layers=tuple(layers))


def within(start: Memory, config: ModelConfig, chosen: Sequence[int]) -> tuple[MemoryConfig, float]:
  """Returns (what all heads have in common, number of tokens that each may retain on average).

  Raises:
    ValueError: the budget is too small, or larger than the transformer's whole context.
  """

  def held(layer: MemoryConfig) -> int:
    return sequence_bytes(config.replace(layers=(layer,) * len(chosen)), 1)

  heads = len(chosen) * config.num_kv_heads
  a_token = (config.head_dim + config.value_width) * jnp.dtype(start.state_dtype).itemsize * heads
  budget = start.state_tokens * a_token if start.state_bytes is None else start.state_bytes
  tokens = budget / a_token
  window = start.window or max(8, int(tokens / 6 / 8) * 8)
  chunk = start.chunk or (8 if tokens < FEW_TOKENS else 16)
  if start.window is None and config.sliding_window is not None:
    window = max(min(window, config.sliding_window - chunk), 1)
  common = MemoryConfig(window=window, sinks=start.sinks, chunk=chunk, retained=(0,), state_dtype=start.state_dtype)
  least, with_one = held(common), held(dataclasses.replace(common, retained=(1,)))
  if start.state_bytes is None:
    given, wanted = f"state_tokens={start.state_tokens}", f"{-(-least // a_token):,}"
  else:
    given, wanted = f"state_bytes={start.state_bytes:,}", f"{least:,}"
  if budget < least:
    raise ValueError(
      f"{given}: wanted at least {wanted}, for {start.sinks} first tokens (sinks), the last {window} (window) and up "
      f"to {chunk} more (chunk), of which each key/value head holds keys, values and scores."
    )
  if config.max_positions is not None and tokens > config.max_positions:
    raise ValueError(
      f"{given}: that is {tokens:,.0f} tokens of each key/value head, and the transformer's own context is "
      f"{config.max_positions:,}: wanted less, or the transformer itself."
    )
  return common, (budget - least) / (with_one - least)
