"""Loads batches of packed rows with grain: sources mixed by weight, shuffled, sharded over processes, resumable.

`_order` alone determines the order of rows, both for loading the rows and for naming them.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np

from supra_jax.data.packed import META_FILE, load_info, local_files

# (packed directory, weight). The weight divided by the sum of all weights is the directory's share of the rows drawn,
# to within 1 %.
Source = tuple[str, float]
Batch = dict[str, np.ndarray]
# A loader: an iterator of batches with get_state and set_state. An alias, so that other modules need not import grain.
Batches: TypeAlias = grain.DatasetIterator

# Fields of PackedInfo that all sources have to agree on -> name of the field in recipes.
_SHARED = {name: name for name in ("sequence_length", "join", "bos", "vocab_size", "tokenizer_sha256")}
_SHARED["join"] = "documents"


class PackedDataset:
  """A sequence of the rows of a packed directory.

  A row is {"tokens": int32 [T + 1]}, with "segment_ids" and "target_weights", int32 [T + 1], if the directory stores
  them. Reading a damaged row raises ValueError.

  Attributes:
    info: contents of the directory's meta.json.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens the files of rows; copies them to the local cache directory first if `path` is in a bucket.

    Args:
      path: a packed directory, local or gs://.

    Raises:
      FileNotFoundError: meta.json or a file of rows is missing.
      ValueError: meta.json or a file of rows is damaged, or `core.files.place` rejects `path`.
      OSError: a file cannot be copied from a bucket.
    """
    self.info = load_info(path)
    self._files = [str(file) for file in local_files(path, self.info)]
    self._ends = list(itertools.accumulate(shard.rows for shard in self.info.shards))
    try:
      self._source = grain.sources.ArrayRecordDataSource(self._files)
    except RuntimeError as error:
      raise ValueError(f"{path}: rows cannot be opened: {error}") from error
    if len(self._source) != self.info.rows:
      raise ValueError(f"{path}: its files hold {len(self._source)} rows; {META_FILE} says {self.info.rows}.")

  def __len__(self) -> int:
    return self.info.rows

  def __getitem__(self, index: int) -> Batch:
    names = self.info.leaves
    try:
      numbers = np.frombuffer(self._source[index], self.info.dtype).astype(np.int32)
      return dict(zip(names, numbers.reshape(len(names), self.info.sequence_length + 1), strict=True))
    except (RuntimeError, ValueError) as error:
      file = self._files[bisect.bisect_right(self._ends, index)]
      raise ValueError(f"{file}: row {index} of the directory cannot be read: {error}") from error


def parse_sources(text: str) -> tuple[Source, ...]:
  """Parses sources, written as in recipes and flags: `data/a/train:0.7,data/b/train:0.3`.

  A path without a weight has the weight 1. The text after a path's last colon is its weight if it is a number, and a
  part of the path otherwise; a path that itself ends in a colon and a number needs a weight. A path cannot hold commas.

  Raises:
    ValueError: a path or a weight is empty.
  """
  sources = []
  for part in text.split(","):
    path, colon, weight = part.strip().rpartition(":")
    try:
      source = (path, float(weight)) if colon else (weight, 1.0)
    except ValueError:
      source = (part.strip(), 1.0)
    if not source[0] or part.strip().endswith(":"):
      raise ValueError(f"sources={text!r}: wanted PATH:WEIGHT,PATH:WEIGHT,...; got {part!r} for one of them.")
    sources.append(source)
  return tuple(sources)


def make_loader(
  sources: Sequence[Source],
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  shard_count: int = 1,
  prefetch: int = 4,
) -> Batches:
  """Makes an endless, resumable iterator of batches.

  Each source is shuffled as a whole, in another order in each epoch. The iterator's state, {"global_next_index": N}, is
  the number of rows drawn so far, by all shards together. The global batches do not depend on shard_count, and neither
  does the state: a loader with another shard_count that is given the state continues with the next rows.

  Args:
    sources: packed directories and their weights.
    batch_size: rows in a global batch; a shard yields batch_size / shard_count of them.
    seed: seeds the shuffle of each source; at least 0 and below 2**32.
    shard_index: index of the part of each batch to yield, from 0; one per process.
    shard_count: number of parts of each batch.
    prefetch: number of batches that are read ahead, by as many threads; 0 reads a batch when it is asked for.

  Returns:
    An iterator of {"tokens": int32 [batch_size / shard_count, T + 1]}, with "segment_ids" of the same shape and dtype
    if the sources store them, and "target_weights" if one of them does: rows of the others then have the weight 1.

  Raises:
    FileNotFoundError: a source, or a file of a source, is missing.
    ValueError: a source is damaged; the sources differ in how they were packed, or together hold fewer rows than a
      batch; or an argument is out of range.
    OSError: a file cannot be copied from a bucket.
  """
  _check_shard(batch_size, shard_index, shard_count)
  datasets = _open(sources)
  rows = sum(map(len, datasets))
  if rows < batch_size:
    raise ValueError(f"{', '.join(path for path, _ in sources)}: {rows} rows are fewer than one batch of {batch_size}.")
  masked = any(dataset.info.learned_tokens is not None for dataset in datasets)

  def row(place: tuple[int, int]) -> Batch:
    found = datasets[place[0]][place[1]]
    return {**found, "target_weights": np.ones_like(found["tokens"])} | found if masked else found

  ordered = _order(sources, datasets, seed).map(row)
  return iter(
    grain.experimental.ElasticIterator(
      ordered,
      batch_size,
      grain.sharding.ShardOptions(shard_index, shard_count),
      read_options=grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch),
    )
  )


def rows_of_batch(sources: Sequence[Source], *, batch_size: int, seed: int, step: int) -> list[str]:
  """Returns the names of the rows of a global batch, so that a user can look at the rows of a bad batch.

  Args:
    sources, batch_size, seed: what `make_loader` was called with, the same from the start of the run.
    step: index of the batch, from 0.

  Returns:
    batch_size names, such as `data/a, row 123`; shard i of n loads the rows with the names i, i + n, i + 2n, ...

  Raises:
    FileNotFoundError, ValueError, OSError: as `make_loader`.
  """
  order = _order(sources, _open(sources), seed)
  places = [order[index] for index in range(step * batch_size, (step + 1) * batch_size)]
  return [f"{sources[source][0]}, row {row}" for source, row in places]


def heldout_batches(
  path: str | os.PathLike[str], *, batch_size: int, max_rows: int = 0, shard_index: int = 0, shard_count: int = 1
) -> Iterator[Batch]:
  """Yields batches of all rows of a packed directory, once and in order.

  A global batch is cut into `shard_count` consecutive blocks of rows; shard i yields the i-th block.

  Args:
    path: a packed directory, local or gs://.
    batch_size: rows in a global batch.
    max_rows: number of rows to read, from the first on; 0 means all rows.
    shard_index: index of the part of each batch to yield, from 0; one per process.
    shard_count: number of parts of each batch.

  Yields:
    {"tokens": int32 [batch_size / shard_count, T + 1]}, with "segment_ids" and "target_weights" of the same shape and
    dtype if the directory stores them, and "row_weights" float32 [batch_size / shard_count]: 1, or 0 for the copies of
    the last row that fill up the last batch.

  Raises:
    FileNotFoundError: the directory, or a file in the directory, is missing.
    ValueError: a file is damaged, batch_size is not a positive multiple of shard_count, or shard_index is out of range.
    OSError: a file cannot be copied from a bucket.
  """
  _check_shard(batch_size, shard_index, shard_count)
  dataset = PackedDataset(path)
  rows = min(len(dataset), max_rows or len(dataset))
  local = batch_size // shard_count
  for first in range(shard_index * local, math.ceil(rows / batch_size) * batch_size, batch_size):
    numbers = range(first, first + local)
    read = [dataset[min(number, rows - 1)] for number in numbers]
    batch = {name: np.stack([row[name] for row in read]) for name in read[0]}
    yield {**batch, "row_weights": np.array([number < rows for number in numbers], np.float32)}


def _check_shard(batch_size: int, shard_index: int, shard_count: int) -> None:
  if batch_size < 1 or batch_size % shard_count or not 0 <= shard_index < shard_count:
    raise ValueError(f"batch_size={batch_size} cannot be cut for shard {shard_index} of {shard_count}.")


def _open(sources: Sequence[Source]) -> list[PackedDataset]:
  if not sources or not all(math.isfinite(weight) and weight > 0 for _, weight in sources):
    raise ValueError(f"sources={list(sources)}: wanted at least one, with weights above 0.")
  datasets = [PackedDataset(path) for path, _ in sources]
  first, *others = [dataclasses.asdict(dataset.info) for dataset in datasets]
  differ = [
    f"{called} is {first[name]} in {sources[0][0]} and {other[name]} in {path}"
    for (path, _), other in zip(sources[1:], others, strict=True)
    for name, called in _SHARED.items()
    if other[name] != first[name]
  ]
  if differ:
    apart = " Pack text beside conversations with --documents=separate." if "documents" in " ".join(differ) else ""
    raise ValueError(f"Sources do not fit each other: {'; '.join(differ)}.{apart}")
  return datasets


def _order(sources: Sequence[Source], datasets: Sequence[PackedDataset], seed: int) -> grain.MapDataset:
  """Returns an endless dataset of (index of a source, index of a row in that source), in the order of drawing."""

  def endless(number: int, rows: int) -> grain.MapDataset:
    # A seed per source, since sources of the same length would be shuffled alike otherwise.
    shuffled = grain.MapDataset.range(rows).shuffle(seed=(seed + number) % 2**32)
    return shuffled.repeat().map(lambda row: (number, int(row)))

  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: wanted a number from 0 to {2**32 - 1}.")
  weights = [weight for _, weight in sources]
  return grain.MapDataset.mix([endless(number, len(data)) for number, data in enumerate(datasets)], weights)
