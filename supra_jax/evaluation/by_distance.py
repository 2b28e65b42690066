"""Recall by distance: the likelihood, among others, of an answer that was read a given number of tokens ago."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supra_jax.core.sharding import on_mesh
from supra_jax.data.planted import Planted
from supra_jax.evaluation.intervals import share_interval
from supra_jax.evaluation.readers import TEACHER, Reader, reach
from supra_jax.model.finite import not_finite
from supra_jax.model.transformer import DecodeState, Transformer
from supra_jax.objectives.heldout import log_likelihoods

KNOWN = 0.5  # share of right answers below which the teacher counts as failing
DISTANCES = (128, 256, 512, 1024, 2048, 4096, 8192)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Transformer, params, hidden_BD, state: DecodeState, candidates_BCM) -> jax.Array:
  """Returns the log-likelihood of each candidate after the text that was read, float32 [B, C]."""
  bound = model.bind({"params": params})
  first_BV = jax.nn.log_softmax(bound.unembed(hidden_BD[:, None])[:, 0])
  score_BC = jnp.take_along_axis(first_BV, candidates_BCM[..., 0], axis=-1)
  if candidates_BCM.shape[-1] == 1:
    return score_BC

  def rest(candidate_BM):
    logits, _ = bound.logits(candidate_BM[:, :-1], state)
    return log_likelihoods(logits, candidate_BM[:, 1:]).sum(-1)

  # One candidate after another: a key/value cache for each would be too much memory.
  return score_BC + jax.lax.map(rest, candidates_BCM.swapaxes(0, 1)).T


def ranks(
  reader: Reader, texts: Sequence[Planted], *, batch_size: int = 4, advance: Callable[[int], None] = lambda _: None
) -> np.ndarray:
  """Returns the rank of each right answer by likelihood, float64 [N]: how many candidates are likelier.

  Another candidate that is as likely counts half.

  Args:
    reader: the model.
    texts: planted texts.
    batch_size: most texts that are read at a time.
    advance: called with the number of tokens after each batch.

  Raises:
    NotFiniteError: logits are not finite.
  """
  found = np.zeros(len(texts))
  alike: dict[tuple[int, ...], list[int]] = {}
  for number, text in enumerate(texts):
    alike.setdefault((len(text.context), *text.candidates.shape), []).append(number)
  for (length, _, answered), members in sorted(alike.items()):
    for start in range(0, len(members), batch_size):
      batch = members[start : start + batch_size]
      filled = batch + batch[-1:] * (min(batch_size, len(members)) - len(batch))  # so that all batches share a program
      context = np.stack([texts[i].context for i in filled])
      candidates = np.stack([texts[i].candidates for i in filled])
      hidden, state = reader.read(context, reader.fresh(len(filled), length + answered))
      with on_mesh(reader.mesh):
        scores = np.asarray(_scores(reader.model, reader.params, hidden, state, candidates))
      if not np.isfinite(scores).all():
        raise not_finite(reader.model, reader.params, context.tolist())
      for row, number in enumerate(batch):
        right = texts[number].right
        likelier, as_likely = scores[row] > scores[row, right], scores[row] == scores[row, right]
        found[number] = likelier.sum() + (as_likely.sum() - 1) / 2
      advance(len(batch) * length)
  return found


def summary(found_N: np.ndarray, candidates: int) -> dict[str, Any]:
  """Returns what ranks say: {items, right: the share of rank 0, interval: of the share, mean_rank, chance}."""
  right = int((found_N == 0).sum())
  return {
    "items": len(found_N),
    "right": right / len(found_N),
    "interval": share_interval(right, len(found_N)),
    "mean_rank": float(found_N.mean()),
    "chance": 1 / candidates,
  }


def by_distance(
  models: Mapping[str, Reader], texts: Mapping[int, Sequence[Planted]], **how: Any
) -> list[dict[str, Any]]:
  """Returns the recall of each model at each distance.

  Args:
    models: the models, as `readers` returns them.
    texts: {distance: planted texts}.
    **how: arguments of `ranks`.

  Returns:
    For each distance {distance, models: {name: `summary`}, teacher_fails: whether the teacher finds fewer than KNOWN of
    the answers, beyond_reach: names of the models whose softmax windows, added up over the layers, do not reach back}.
  """
  rows = []
  for distance, planted in sorted(texts.items()):
    candidates = len(planted[0].candidates)
    found = {name: summary(ranks(reader, planted, **how), candidates) for name, reader in models.items()}
    rows.append({"distance": distance, "models": found} | marks(models, found, distance))
  return rows


def marks(models: Mapping[str, Reader], found: Mapping[str, Mapping[str, Any]], distance: int) -> dict[str, Any]:
  """Returns `teacher_fails` and `beyond_reach` of `by_distance`."""
  reaches = {name: reach(reader) for name, reader in models.items()}
  return {
    "teacher_fails": TEACHER in found and found[TEACHER]["right"] < KNOWN,
    "beyond_reach": [name for name, seen in reaches.items() if seen is not None and seen < distance],
  }
