"""Cuts documents into rows and writes them as a packed directory (`data.packed`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from supra_jax.core.files import into_place
from supra_jax.core.plain_json import to_json
from supra_jax.data.packed import META_FILE, Documents, Dtype, PackedInfo, Shard, leaves_of, sha256_of


class Pending(NamedTuple):
  """Tokens that are in no file of rows yet.

  Attributes:
    ids: integers [n], the tokens.
    starts: bool [n], whether each is the first of its document.
    learned: bool [n], whether a model is to learn each.
  """

  ids: np.ndarray
  starts: np.ndarray
  learned: np.ndarray


class RowsWriter:
  """Cuts documents into rows and writes a packed directory.

  Attributes:
    documents: number of documents added so far.
    shards: the files written so far.
    learned: number of positions in them whose next token a model is to learn.
    passed_over: number of tokens in rows that are not written, since nothing in them is to be learned.
  """

  def __init__(
    self,
    directory: Path,
    *,
    sequence_length: int,
    documents: Documents,
    masked: bool,
    dtype: Dtype,
    shard_bytes: int,
  ):
    """Makes a writer without documents; writes no file.

    Args:
      directory: local directory of the files; has to exist when the first file is written.
      sequence_length: T; a row has T + 1 tokens.
      documents: how documents share a row.
      masked: whether rows say which of their tokens are to be learned.
      dtype: numpy dtype of the stored integers.
      shard_bytes: approximate size of a file of rows in bytes, before compression.
    """
    self._directory, self._length, self._how, self._dtype = directory, sequence_length, documents, dtype
    self._leaves, self._masked = leaves_of(documents, masked=masked), masked
    record = len(self._leaves) * (sequence_length + 1) * np.dtype(dtype).itemsize
    self._rows_per_shard = max(1, shard_bytes // record)
    self.documents = 0
    self.shards: list[Shard] = []
    self._pieces = [Pending(np.zeros(0, dtype), np.zeros(0, bool), np.zeros(0, bool))]
    self._size = self.learned = self.passed_over = 0

  @property
  def pending(self) -> Pending:
    """The tokens that are in no file yet."""
    # Concatenated here and not in `add`, which would copy all of them for each piece.
    self._pieces = [Pending(*map(np.concatenate, zip(*self._pieces, strict=True)))]
    return self._pieces[0]

  def add(self, ids: np.ndarray, learned: np.ndarray, lengths: np.ndarray) -> None:
    """Adds documents, to be written by `write_full` and `finish`.

    Args:
      ids: integers [n], the tokens of all documents, one document after the other.
      learned: bool [n], whether a model is to learn each.
      lengths: integers [documents], number of tokens of each document; documents of length 0 are not counted.
    """
    lengths = lengths[lengths > 0]
    starts = np.zeros(len(ids), bool)
    starts[np.cumsum(lengths) - lengths] = True
    self._append(Pending(ids, starts, learned))
    self.documents += len(lengths)

  def restore(
    self, shards: Sequence[Shard], pending: Pending, *, documents: int, learned: int, passed_over: int
  ) -> None:
    """Continues where another writer stopped; the arguments are that writer's attributes."""
    self.documents, self.shards, self.learned, self.passed_over = documents, list(shards), learned, passed_over
    self._append(pending)

  def write_full(self) -> bool:
    """Writes each file that has all its rows; returns whether any file was written.

    Raises:
      OSError: a file cannot be written.
    """
    before = len(self.shards)
    while self._full_rows >= self._rows_per_shard:
      self._write(self._rows_per_shard)
    return len(self.shards) > before

  def finish(self, *, bos: bool, vocab_size: int, tokenizer_sha256: str) -> PackedInfo:
    """Writes the remaining rows and meta.json, and returns the contents of meta.json.

    Drops the tokens at the end that do not fill a row. Rows in which nothing is to be learned are dropped too.

    Args:
      bos: whether each document starts with the begin-of-text id.
      vocab_size: number of rows of the model's embedding.
      tokenizer_sha256: what `tokenizer_fingerprint` returns for the tokenizer.

    Raises:
      ValueError: the tokens do not fill a single row.
      OSError: a file cannot be written.
    """
    self.write_full()
    if self._full_rows:
      self._write(self._full_rows)
    if not self.shards and self.passed_over:
      raise ValueError(f"in no row of the {self.documents} documents is anything to learn.")
    if not self.shards:
      raise ValueError(
        f"{self.documents} documents gave {self._size} tokens, too few for one row of {self._length + 1}."
      )
    rows = sum(shard.rows for shard in self.shards)
    info = PackedInfo(
      sequence_length=self._length,
      rows=rows,
      tokens=rows * self._length,
      dropped_tokens=self._size - 1 + self.passed_over,
      documents=self.documents,
      join=self._how,
      bos=bos,
      vocab_size=vocab_size,
      dtype=self._dtype,
      tokenizer_sha256=tokenizer_sha256,
      shards=tuple(self.shards),
      learned_tokens=self.learned if self._masked else None,
    )
    with into_place(self._directory / META_FILE) as temporary:
      temporary.write_text(to_json(dataclasses.asdict(info), indent=2) + "\n")
    return info

  @property
  def _full_rows(self) -> int:
    return max(self._size - 1, 0) // self._length

  def _append(self, pending: Pending) -> None:
    self._pieces.append(pending)
    self._size += len(pending.ids)

  def _write(self, rows: int) -> None:
    ids, starts, learned = self.pending
    file = self._directory / f"rows-{len(self.shards):05}.array_record"
    done = rows * self._length
    kept: list[np.ndarray] = []
    for first in range(0, done, self._length):
      row = slice(first, first + self._length + 1)
      targets = self._targets(starts[row], learned[row])
      self.learned += targets
      if self._masked and not targets:
        self.passed_over += self._length
        continue
      said = {
        "tokens": ids[row],
        "segment_ids": np.cumsum(starts[row]) - starts[first] + 1,
        "target_weights": learned[row],
      }
      kept.append(np.stack([said[name].astype(self._dtype) for name in self._leaves]))
    if kept:
      try:
        with into_place(file) as temporary:
          writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
          for record in kept:
            writer.write(record.tobytes())
          writer.close()
      except RuntimeError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
      self.shards.append(Shard(file.name, len(kept), file.stat().st_size, sha256_of(file)))
    self._pieces, self._size = [Pending(ids[done:], starts[done:], learned[done:])], self._size - done

  def _targets(self, starts: np.ndarray, learned: np.ndarray) -> int:
    """Returns how many tokens of a row are to be learned, but for the first, and for those that begin a text apart."""
    return int((learned[1:] & ~(starts[1:] & (self._how == "separate"))).sum())
