"""What an RNN remembers, in one report: loss where memory counts, what each part of the state is worth, recall."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from supra_jax.core.progress import Progress
from supra_jax.data.planted import KINDS, Planted, plant
from supra_jax.evaluation import ablation, memory_loss
from supra_jax.evaluation.by_distance import DISTANCES, by_distance
from supra_jax.evaluation.readers import EQUAL, MODEL, OWN, described, last_tokens, readers
from supra_jax.inference.lm import LM


def report(
  lm: LM,
  teacher: LM,
  documents: Iterable[Sequence[int]],
  *,
  length: int = 2048,
  max_documents: int = 64,
  distances: Sequence[int] = DISTANCES,
  kinds: Sequence[str] | None = None,
  items: int = 16,
  split: str = "test",
  seed: int = 0,
  state_dtype: Any = "bfloat16",
  sinks: int | None = None,
  ngram: int = memory_loss.NGRAM,
  batch_size: int = 2,
  progress: bool = False,
) -> dict[str, Any]:
  """Measures what a model remembers, beside its teacher and beside windows of the teacher's softmax attention.

  Args:
    lm: the model.
    teacher: the transformer that it was made of.
    documents: token ids of documents, as the models read them, with a begin-of-text token where they want one; no more
      are taken than are needed, see `long_rows`.
    length: tokens that are read of a document, at least 2.
    max_documents: most documents to read.
    distances: distances of planted facts in tokens; empty: no planted texts.
    kinds: kinds of planted facts (`data.planted.KINDS`); None: all, or without a tokenizer
      random strings alone.
    items: planted texts of each kind and distance.
    split: wording of the planted texts, "train" or "test".
    seed: determines the planted texts.
    state_dtype: dtype in which all models hold keys and values, and in which their bytes are counted.
    sinks: first tokens that the window of equal bytes holds; None: as many as the model does.
    ngram: tokens of a repeat.
    batch_size: documents or texts that are read at a time.
    progress: whether to show progress on stderr.

  Returns:
    A dict of plain numbers: `models` ({name: `readers.described`}), `loss` (`memory_loss.summary`), `parts`
    (`ablation.ablate`) and `recall` ({kind: `by_distance`}).

  Raises:
    NotFiniteError: logits are not finite.
    ValueError: fewer than two documents are long enough, the teacher does not fit, or facts do not fit a distance.
  """
  rows, filler = long_rows(documents, length, max_documents)
  models = readers(lm, teacher, length, state_dtype=state_dtype, sinks=sinks)
  planted = texts(lm, filler, distances, kinds, count=items, split=split, seed=seed)
  windows = {name: last_tokens(models[name]) for name in (EQUAL, OWN) if name in models}
  total = rows.size * len(models) + ablation.readings(models[MODEL], rows)
  total += sum(len(text.context) for found in planted.values() for of in found.values() for text in of) * len(models)
  with Progress(total, "recall, {share:.0%} of {total:,} tokens", enabled=progress, desc="recall", unit="tok") as bar:
    how: dict[str, Any] = {"batch_size": batch_size, "advance": bar.advance}
    losses = memory_loss.read_losses(models, rows, **how)
    return {
      "models": {name: described(reader, length) for name, reader in models.items()},
      "loss": memory_loss.summary(rows, losses, windows, ngram=ngram),
      "parts": ablation.ablate(models[MODEL], rows, **how),
      "recall": {kind: by_distance(models, found, **how) for kind, found in planted.items()},
    }


def long_rows(documents: Iterable[Sequence[int]], length: int, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows of the documents that are long enough, and a text of all documents up to the last of these.

  Args:
    documents: token ids of documents, taken one after another until there are enough rows.
    length: tokens of a row, the first ones of a document.
    most: most rows.

  Returns:
    (rows, int32 [D, length]; token ids of all that was read, int32 [N], as filler of planted texts).

  Raises:
    ValueError: fewer than two documents have so many tokens.
  """
  rows: list[Sequence[int]] = []
  read: list[np.ndarray] = []
  for document in documents:
    read.append(np.asarray(document, np.int32))
    if len(document) >= length:
      rows.append(document[:length])
    if len(rows) == most:
      break
  if len(rows) < 2 or length < 2:
    raise ValueError(f"{len(rows)} of {len(read)} documents have {length} tokens: wanted 2 documents, of 2 or more.")
  return np.asarray(rows, np.int32), np.concatenate(read)


def texts(
  lm: LM, filler: np.ndarray, distances: Sequence[int], kinds: Sequence[str] | None = None, **how: Any
) -> dict[str, dict[int, list[Planted]]]:
  """Returns {kind: {distance: planted texts}}; for `filler` and `how` see `data.planted.plant`."""
  if not distances:
    return {}
  encode = None if lm.tokenizer is None else functools.partial(lm.tokenizer.encode, continues=True)
  chosen = kinds or (KINDS if encode else ("repeat",))

  def of(kind: str, distance: int) -> list[Planted]:
    try:
      return plant(kind, distance, filler, encode=encode, **how)
    except ValueError as error:
      raise ValueError(f"{kind} at a distance of {distance}: {error}") from error

  return {kind: {distance: of(kind, distance) for distance in distances} for kind in chosen}
