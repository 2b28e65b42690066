"""Takes away one part of a state at a time, to find which part earns its bytes.

A model reads the first half of a document. One part of its state, in all layers, is then replaced: by that of a state
that has read nothing, or by that of another document. The model goes on, and its loss is compared with that of the
state as it was, by the number of tokens since. The later ones say what a reset so many tokens before has cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.evaluation.intervals import interval
from supra_jax.evaluation.readers import Reader
from supra_jax.model.config import ModelConfig
from supra_jax.model.registry import mixer_class
from supra_jax.model.transformer import DecodeState

ALL = "all parts"
EDGES = (0, 16, 64, 256, 1024)  # tokens since the replacement


def parts(config: ModelConfig) -> tuple[str, ...]:
  """Returns the names of the parts that the states of a model's layers have (`Mixer.PARTS`)."""
  return tuple(dict.fromkeys(part for mixer in config.mixers for part in mixer_class(mixer).PARTS))


def with_part_of(state: DecodeState, other: DecodeState, config: ModelConfig, part: str) -> DecodeState:
  """Returns a state with one part, in all layers that have it, of another state of the same shapes.

  Args:
    state: the state, which stays as it is.
    other: the state to take the part from.
    config: config of the model.
    part: one of `parts`, or ALL. Counters of tokens are no part, so that positions go on as they were.

  Raises:
    ValueError: there is no such part.
  """
  if part not in (*parts(config), ALL):
    raise ValueError(f"part={part!r}: wanted one of {', '.join(parts(config))}, {ALL}.")
  layers = []
  for layer, ours, theirs in zip(config.layers, state.layers, other.layers, strict=True):
    told = mixer_class(layer.mixer).PARTS
    fields = [field for name, names in told.items() if part in (name, ALL) for field in names]
    layers.append(dataclasses.replace(ours, **{field: getattr(theirs, field) for field in fields}))
  return dataclasses.replace(state, layers=tuple(layers))


def ablate(
  reader: Reader, rows: np.ndarray, *, batch_size: int = 2, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
  """Measures what each part of a model's state is worth; see above.

  A part that replaces keys and values by zeros leaves their slots to the softmax, where they count as keys of logit 0.

  Args:
    reader: the model.
    rows: token ids [D, T], one document a row; a document lends its state to the one before it, so that D >= 2.
    batch_size: least number of rows that are read at a time, at least 2.
    advance: called with the number of tokens after each reading.

  Returns:
    {part: {bytes, share: of the state's bytes, nothing, another}}. `nothing` and `another` are of a part without
    memory and of another document's: {added, interval, by_distance}, the mean loss in nats per token beyond that of the
    state as it was, its 95 % interval over documents, and the same by tokens since the replacement.

  Raises:
    ValueError: there are fewer than two documents.
  """
  if len(rows) < 2:
    raise ValueError(f"{len(rows)} documents: wanted at least 2, whose states replace each other's.")
  half = rows.shape[1] // 2
  names = [*parts(reader.config), ALL] if len(parts(reader.config)) > 1 else list(parts(reader.config))
  added: dict[tuple[str, str], list[np.ndarray]] = {(name, how): [] for name in names for how in ("nothing", "another")}
  for batch in np.array_split(rows, max(len(rows) // max(batch_size, 2), 1)):
    _, state = reader.read(batch[:, :half], reader.fresh(*batch.shape))
    advance(batch[:, :half].size)
    rest = batch[:, half:]
    intact = reader.losses(rest, _copied(state))
    others = {"nothing": reader.fresh(*batch.shape), "another": state.take(np.roll(np.arange(len(batch)), 1))}
    for (name, how), found in added.items():
      replaced = with_part_of(state, others[how], reader.config, name)
      found.append(reader.losses(rest, _copied(replaced)).astype(np.float64) - intact)
      advance(rest.size)
  return _report(reader, rows.shape[1], {key: np.concatenate(found) for key, found in added.items()})


def readings(reader: Reader, rows: np.ndarray) -> int:
  """Returns the number of tokens that `ablate` reports to `advance` in all."""
  half = rows.shape[1] // 2
  count = len(parts(reader.config))
  return len(rows) * (half + 2 * (count + (count > 1)) * (rows.shape[1] - half))


def _copied(state: DecodeState) -> DecodeState:
  """Returns a state of buffers of its own, to be donated."""
  return jax.tree.map(jnp.copy, state)


def _report(reader: Reader, tokens: int, added: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
  sizes = reader.bytes_by_part(tokens)
  sizes[ALL] = sum(sizes.values())
  result: dict[str, Any] = {}
  for (name, how), losses_DT in added.items():
    entry = result.setdefault(name, {"bytes": sizes.get(name, 0), "share": sizes.get(name, 0) / max(sizes[ALL], 1)})
    sums = np.column_stack([losses_DT.sum(1), np.full(len(losses_DT), losses_DT.shape[1])])
    by_distance = []
    for low, high in zip(EDGES, (*EDGES[1:], losses_DT.shape[1]), strict=True):
      if low < min(high, losses_DT.shape[1]):
        part = losses_DT[:, low:high]
        by_distance.append({"from": low, "to": low + part.shape[1], "added": float(part.mean())})
    entry[how] = {"added": float(losses_DT.mean()), "interval": interval(_mean, sums), "by_distance": by_distance}
  return result


def _mean(sums: np.ndarray) -> np.ndarray:
  return sums[..., 0] / sums[..., 1]
