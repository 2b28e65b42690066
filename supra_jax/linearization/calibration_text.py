"""Reads the rows for calibration: from packed directories, or from as much of a text as is needed."""

from __future__ import annotations

import itertools

import numpy as np
from jax.sharding import Mesh

from supra_jax.core.files import place
from supra_jax.core.sharding import batch_shards, process_shard
from supra_jax.data.loading import Batch, make_loader, parse_sources
from supra_jax.data.packed import META_FILE, check_packed
from supra_jax.data.text import documents_in_turns
from supra_jax.data.tokenizer import Tokenizer
from supra_jax.linearization.starts import Reading


def read_batches(
  start: Reading, tokenizer: Tokenizer | None, vocab_size: int, mesh: Mesh, more: int = 0
) -> list[Batch]:
  """Reads the batches for calibration; each process gets its rows of each batch.

  Args:
    start: the start, which says what to read and how many tokens.
    tokenizer: tokenizer of the model; needed for text, not for packed rows.
    vocab_size: number of rows of the model's embedding.
    mesh: device mesh that batches are cut over.
    more: number of further tokens to read, for `set_apart`.

  Returns:
    ceil(start.tokens / n) + ceil(more / n) batches, n being the tokens of a batch; fewer, at least one, if a text is
    too short. Packed rows are repeated as needed. A batch has "tokens" int32 [rows, T + 1], and "segment_ids" of the
    same shape if the packed directories have them.

  Raises:
    FileNotFoundError: no file matches, or a packed directory is missing.
    ValueError: no data are named; the packed rows do not fit the model, the text does not fill one batch or cannot be
      read, or there is no tokenizer to read the text with.
  """

  def count_batches(tokens: int) -> int:
    return -(-start.tokens // tokens) - (-more // tokens)

  if not start.data.strip():
    raise ValueError("The text to calibrate on has no name: wanted files, a directory, or rows as packed.")
  shards = batch_shards(mesh)
  rows = -(-start.batch_size // shards) * shards
  sources = parse_sources(start.data)
  index, count = process_shard(mesh)
  if (place(sources[0][0]) / META_FILE).exists():
    for path, _ in sources:
      check_packed(path, vocab_size=vocab_size, tokenizer=tokenizer)
    loader = make_loader(sources, batch_size=rows, seed=start.seed, shard_index=index, shard_count=count)
    first = next(loader)
    length = first["tokens"].shape[1] - 1
    return [first, *itertools.islice(loader, count_batches(rows * length) - 1)]
  if tokenizer is None:
    raise ValueError(
      f"There is no tokenizer to read {start.data} with: convert the source of the model with one (in Python pass "
      "tokenizer=lm.tokenizer), or give rows that prepare_data packed. The start Window (--method=window) reads none."
    )
  wanted = count_batches(rows * start.sequence_length) * rows
  texts = rows_of_text(start.data, tokenizer, rows=wanted, length=start.sequence_length + 1, text_key=start.text_key)
  whole = len(texts) // rows * rows
  if not whole:
    raise ValueError(
      f"{start.data} has {len(texts)} rows of {start.sequence_length} tokens for calibration; wanted at least {rows}. "
      "Give more text."
    )
  return [{"tokens": texts[at + index : at + rows : count]} for at in range(0, whole, rows)]


def rows_of_text(pattern: str, tokenizer: Tokenizer, *, rows: int, length: int, text_key: str = "text") -> np.ndarray:
  """Reads the documents of a text until they fill the rows asked for, and returns the rows.

  Documents are taken from all files in turn (round robin), and at most one row of tokens from each, so that rows
  differ. The first end-of-text id, if the tokenizer has one, follows each document.

  Args:
    pattern: glob of text files, or `pydoc:topics`, as `data.text.find_files` takes it.
    tokenizer: encodes the documents.
    rows: number of rows wanted.
    length: number of tokens per row.
    text_key: the key of a JSON line, or the column of a parquet file, that holds the text.

  Returns:
    int32 [R, length]: R is `rows`, or less if the text is too short.

  Raises:
    FileNotFoundError: no file matches.
    ValueError: a file cannot be read.
  """
  end = list(tokenizer.eos_ids[:1])
  ids: list[int] = []
  for text in documents_in_turns(pattern, text_key):
    # No tokenizer has 16 characters a token on average.
    ids += [*tokenizer.encode(text[: 16 * length], bos=False)[: length - 1], *end]
    if len(ids) >= rows * length:
      break
  found = min(len(ids) // length, rows)
  return np.asarray(ids[: found * length], np.int32).reshape(found, length)
