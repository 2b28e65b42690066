"""The rows that calibration reads: packed ones, or as many rows of a text as are needed."""

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
from supra_jax.linearization.starts import Calibrated


def read_batches(
  start: Calibrated, tokenizer: Tokenizer | None, vocab_size: int, mesh: Mesh, more: int = 0
) -> list[Batch]:
  """Whole batches that hold `start.tokens` tokens, and others that hold `more`; this process' part of them.

  Raises:
    ValueError: the packed rows do not fit the model, the text is too short, or there is no tokenizer to read it with.
  """

  def count_batches(tokens: int) -> int:
    return -(-start.tokens // tokens) - (-more // tokens)

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
    raise ValueError(f"The model has no tokenizer to read {start.data} with.")
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
  """Reads no more of some text than it takes to fill rows.

  Files take turns, and no document gives more than a row, so that rows differ; documents are joined by the end-of-text
  id.

  Args:
    pattern, text_key: as `data.text.find_files` and `read_documents` take them.
    tokenizer: that encodes.
    rows: at most so many.
    length: tokens of each.

  Returns:
    int32 [rows or fewer, length].
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
