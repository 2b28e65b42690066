"""What an RNN remembers, in one report: loss where memory counts, what each part of the state is worth, recall."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from supra_jax.core.progress import Progress
from supra_jax.data.planted import KINDS, Planted, plant
from supra_jax.evaluation import ablation, memory_loss
from supra_jax.evaluation.by_distance import DISTANCES, by_distance
from supra_jax.evaluation.readers import EQUAL, MODEL, OWN, TEACHER, described, last_tokens, readers
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
  encode = None if lm.tokenizer is None else functools.partial(lm.tokenizer.encode, continues=True)
  chosen = kinds or (KINDS if encode else ("repeat",))
  return {
    kind: {distance: plant(kind, distance, filler, encode=encode, **how) for distance in distances} for kind in chosen
  }


def as_text(found: Mapping[str, Any]) -> str:
  """Returns a report as Markdown tables."""
  return "\n".join([*_models(found), *_losses(found["loss"]), *_parts(found["parts"]), *_recall(found["recall"])])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
  yield from (f"\n{title}\n", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}")
  yield from (f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None, form: str = ".3f") -> str:
  return "-" if value is None or not np.isfinite(value) else f"{value:{form}}"


def _with_interval(entry: Mapping[str, Any], form: str = ".3f", key: str = "value") -> str:
  low_high = entry["interval"]
  spread = " (any)" if low_high is None else f" ({low_high[0]:{form}} to {low_high[1]:{form}})"
  return _number(entry[key], form) + spread


def _models(found: Mapping[str, Any]) -> Iterator[str]:
  rows = []
  for name, about in found["models"].items():
    held = ", ".join(f"{count} {mixer}" for mixer, count in about["mixers"].items())
    window = " and ".join(map(str, about["windows"])) or "-"
    rows.append([name, f"{about['state_bytes']:,}", about["keys_and_values"], held, window, str(about["reach"] or "-")])
  yield from _table("State", ["model", "bytes", "keys and values", "layers", "window", "layers x window"], rows)


def _losses(loss: Mapping[str, Any]) -> Iterator[str]:
  names = list(loss["all"]["loss"])
  lines = [("all", loss["all"])]
  lines += [(f"position {x['from']} to {x['to'] - 1}", x) for x in loss["by_position"]]
  lines += [(f"repeat after {x['from']} to {x['to'] - 1}", x) for x in loss["by_repeat"]]
  for window, against in loss["against"].items():
    lines += [(f"repeat further than the {window}, {against['window']}", against["far_repeats"])]
    lines += [(f"teacher beats the {window} by {memory_loss.NATS:g} nat", against["teacher_gains"])]
  rows = [[what, f"{x['tokens']:,}", *(_number(x["loss"][name]) for name in names)] for what, x in lines]
  title = f"Loss in nats per token, {loss['documents']} documents of {loss['length']} tokens"
  yield from _table(title, ["tokens that", "number", *names], rows)
  rows = [
    [name, window, what.replace("_", " "), _with_interval(against[what]["R"][name], ".2f"), _with_interval(saved)]
    for window, against in loss["against"].items()
    for what in ("far_repeats", "teacher_gains")
    for name, saved in against[what]["saved"].items()
  ]
  title = "R: share of the teacher's advantage over a window that a model has; 95 % intervals over documents"
  yield from _table(title, ["model", "beside the", "tokens", "R", "nats saved"], rows)


def _parts(parts: Mapping[str, Any]) -> Iterator[str]:
  rows = []
  for name, about in parts.items():
    for how in ("nothing", "another"):
      later = ", ".join(f"{x['from']}+ {_number(x['added'])}" for x in about[how]["by_distance"])
      earned = about[how]["added"] / max(about["bytes"] / 2**20, 1e-9)
      replaced = {"nothing": "nothing", "another": "another document's"}[how]
      rows.append(
        [name, f"{about['bytes']:,}", replaced, _with_interval(about[how], key="added"), _number(earned), later]
      )
  head = ["part", "bytes", "replaced by", "loss added", "added per MiB", "by tokens since"]
  yield from _table("Parts of the state", head, rows)


def _recall(recall: Mapping[str, Any]) -> Iterator[str]:
  for kind, distances in recall.items():
    names = list(distances[0]["models"]) if distances else []
    rows = []
    for line in distances:
      notes = ["the teacher fails"] * line["teacher_fails"]
      notes += [f"beyond layers x window: {', '.join(line['beyond_reach'])}"] * bool(line["beyond_reach"])
      shares = [_with_interval(line["models"][name], ".2f", "right") for name in names]
      rows.append([f"{line['distance']:,}", *shares, "; ".join(notes)])
    chance = distances[0]["models"][TEACHER]["chance"] if distances else 0
    yield from _table(
      f"Recall of {kind}: share of right answers; chance is {chance:.2f}", ["distance", *names, ""], rows
    )
