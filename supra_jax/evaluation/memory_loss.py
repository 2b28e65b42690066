"""Loss on the tokens where memory counts: far repeats, and where the teacher's full context beats a window.

Most tokens of a text follow from the few before, so that the loss over all of them hardly shows what a state remembers.
`recovered` says which share of the teacher's advantage over a window of softmax a model has:

  R = (loss of the window - loss of the model) / (loss of the window - loss of the teacher)

R is 0 for a model that is as good as the window, and 1 for one as good as its teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from supra_jax.evaluation.intervals import interval
from supra_jax.evaluation.readers import TEACHER, Reader

NGRAM = 3  # tokens of a repeat
NATS = 1.0  # by which the teacher's full context beats a window on the tokens that are chosen for it
Losses = Mapping[str, np.ndarray]


def repeat_distances(tokens_T: np.ndarray, ngram: int = NGRAM) -> np.ndarray:
  """Returns for each token how far back the n-gram that it ends occurs the latest time before, int [T]; 0: nowhere.

  Args:
    tokens_T: token ids of one document.
    ngram: n, at least 2.
  """
  found = np.zeros(len(tokens_T), np.int64)
  if len(tokens_T) < ngram:
    return found
  grams = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens_T), ngram)
  _, kind = np.unique(grams, axis=0, return_inverse=True)
  order = np.argsort(kind.ravel(), kind="stable")  # equal n-grams beside each other, in the order of the text
  same = kind.ravel()[order[1:]] == kind.ravel()[order[:-1]]
  found[order[1:][same] + ngram - 1] = (order[1:] - order[:-1])[same]
  return found


def recovered(window: np.ndarray, model: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  """Returns R (see above) of losses, or of sums of losses over the same tokens; NaN where the teacher gains nothing."""
  gain = np.asarray(window - teacher, np.float64)
  return np.divide(window - model, gain, out=np.full(gain.shape, np.nan), where=gain > 0)


def read_losses(
  models: Mapping[str, Reader],
  rows: np.ndarray,
  *,
  batch_size: int = 1,
  advance: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
  """Returns the losses of each model on every token but the first, {name: float32 [D, T - 1]}.

  Args:
    models: the models, by name.
    rows: token ids [D, T], one document a row.
    batch_size: rows that a model reads at a time.
    advance: called with the number of tokens after each batch of each model.
  """
  found: dict[str, list[np.ndarray]] = {name: [] for name in models}
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    for name, reader in models.items():
      found[name].append(reader.losses(batch))
      advance(batch.size)
  return {name: np.concatenate(parts) for name, parts in found.items()}


def summary(
  rows: np.ndarray, losses: Losses, windows: Mapping[str, int], *, ngram: int = NGRAM, nats: float = NATS
) -> dict[str, Any]:
  """Returns what losses say about memory, as plain numbers.

  Args:
    rows: token ids [D, T], one document a row.
    losses: {name: losses [D, T - 1]} of the models, as `read_losses` returns them; one of them is TEACHER.
    windows: {name of a model that is the teacher with a window: number of last tokens that the window holds}.
    ngram: tokens of a repeat.
    nats: least advantage of the teacher over a window at a token that `teacher_gains` counts.

  Returns:
    A dict with the keys
      all: mean losses over all tokens;
      by_position: mean losses by the token's position in the document;
      by_repeat: mean losses on tokens that end a repeated n-gram, by the distance of the latest earlier occurrence;
      against: {name of a window: {far_repeats, teacher_gains}}, see `compared`. The far repeats are further back than
        the window holds. The tokens of `teacher_gains` are chosen by the losses of the window and the teacher, so that
        a model unlike both has an R above 0 by chance: see there also what R the other window has.
  """
  back = np.stack([repeat_distances(row, ngram) for row in rows])[:, 1:]
  position = np.broadcast_to(np.arange(1, rows.shape[1]), back.shape)
  against = {}
  for name, window in windows.items():
    gains = losses[name] - losses[TEACHER] > nats
    against[name] = {
      "window": window,
      "far_repeats": compared(losses, name, back > window),
      "teacher_gains": compared(losses, name, gains),
    }
  return {
    "documents": len(rows),
    "length": rows.shape[1],
    "ngram": ngram,
    "all": _means(losses, np.ones(back.shape, bool)),
    "by_position": list(_by_octave(losses, position)),
    "by_repeat": list(_by_octave(losses, back)),
    "against": against,
  }


def compared(losses: Losses, window: str, chosen_DT: np.ndarray) -> dict[str, Any]:
  """Returns mean losses on the chosen tokens; and of each model but `window` and TEACHER what it has beyond the window.

  Args:
    losses: {name: losses [D, T]}.
    window: name of the model that is the window alone.
    chosen_DT: bool, the tokens that count.

  Returns:
    `_means`, and under "R" and "saved" {name: {value, interval}}: R, and the nats per token by which the loss is less
    than the window's. R is NaN where the teacher is no better than the window. The interval is of 95 %, over documents.
  """
  result = _means(losses, chosen_DT) | {"R": {}, "saved": {}}
  for name in [name for name in losses if name not in (window, TEACHER)]:
    sums = np.stack([(losses[key].astype(np.float64) * chosen_DT).sum(1) for key in (window, name, TEACHER)], axis=1)
    sums_DN = np.column_stack([sums, chosen_DT.sum(1)])
    for what, statistic in (("R", _recovered_of_sums), ("saved", _saved_of_sums)):
      value = float(statistic(sums_DN.sum(0)))
      result[what][name] = {"value": value, "interval": interval(statistic, sums_DN)}
  return result


def _recovered_of_sums(sums: np.ndarray) -> np.ndarray:
  return recovered(sums[..., 0], sums[..., 1], sums[..., 2])


def _saved_of_sums(sums: np.ndarray) -> np.ndarray:
  tokens = sums[..., 3]
  return np.divide(sums[..., 0] - sums[..., 1], tokens, out=np.full(tokens.shape, np.nan), where=tokens > 0)


def _means(losses: Losses, chosen_DT: np.ndarray) -> dict[str, Any]:
  count = int(chosen_DT.sum())
  return {
    "tokens": count,
    "documents": int(chosen_DT.any(1).sum()),
    "loss": {name: float(x[chosen_DT].mean(dtype=np.float64)) if count else None for name, x in losses.items()},
  }


def _by_octave(losses: Losses, values_DT: np.ndarray) -> Iterator[dict[str, Any]]:
  """Yields `_means` of the tokens whose value is in [1, 16), [16, 32), [32, 64) and so on, where there are any."""
  low, high = 1, 16
  while low <= values_DT.max(initial=0):
    chosen = (values_DT >= low) & (values_DT < high)
    if chosen.any():
      yield {"from": low, "to": high} | _means(losses, chosen)
    low, high = high, 2 * high
