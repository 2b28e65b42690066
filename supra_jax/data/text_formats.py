"""Reads the items of a file: the lines, rows or the whole of text, JSON, CSV and parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from supra_jax.core.plain_json import to_json

PYDOC_TOPICS = "pydoc:topics"
LINE_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_ENDINGS = (".txt", ".md")
ROW_ENDINGS = (".json", ".csv", ".parquet")
ENDINGS = (*TEXT_ENDINGS, *LINE_ENDINGS, *ROW_ENDINGS)
JSON_ENDINGS = (*LINE_ENDINGS, ".json")

# Rows read at a time: few, since a row of a parquet file may hold a book.
_PARQUET_ROWS = 64
csv.field_size_limit(2**31 - 1)  # a field is a whole document


def loaded(item: bytes | None, where: str) -> Any:
  """Parses JSON; `where` says in the ValueError where it is from."""
  try:
    return json.loads(item or b"")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON: {error}.") from error


def topics() -> list[str]:
  """Returns the texts of the standard library's `pydoc_data.topics`, in order of their names."""
  from pydoc_data import topics as module

  return [module.topics[name] for name in sorted(module.topics)]


def items_of(path: str, text_key: str, skip: int, messages: bool) -> Iterator[tuple[bytes | None, int]]:
  """Yields (item, number of bytes of the file read so far), without the first `skip` items; see `text.read_pieces`."""
  if path.endswith(".parquet"):
    yield from _parquet_rows(path, text_key, skip, messages)
    return
  if messages and not path.endswith(JSON_ENDINGS):
    raise ValueError(f"{path}: wanted conversations, which are in {', '.join((*JSON_ENDINGS, '.parquet'))}.")
  if path.endswith((".json", ".csv")):
    read = _json_rows(path) if path.endswith(".json") else _csv_rows(path, text_key)
  else:
    read = _lines(path)
  for number, (item, bytes_read) in enumerate(read):
    if number >= skip:
      yield item, bytes_read


def _lines(path: str) -> Iterator[tuple[bytes, int]]:
  if path == PYDOC_TOPICS:
    read = 0
    for topic in topics():
      read += len(topic)
      yield topic.encode(), read
    return
  if path.endswith(TEXT_ENDINGS):
    contents = Path(path).read_bytes()
    yield contents, len(contents)
    return
  try:
    with open(path, "rb") as file:
      if path.endswith(".gz"):
        with gzip.open(file) as unzipped:
          for line in unzipped:
            yield line, file.tell()
      elif path.endswith(".zst"):
        pending = b""
        for chunk in _decompress_zstd(file):
          *lines, pending = (pending + chunk).split(b"\n")
          for line in lines:
            yield line, file.tell()
        if pending:
          yield pending, file.tell()
      else:
        for line in file:
          yield line, file.tell()
  except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
    raise ValueError(f"{path}: {error}.") from error


def _json_rows(path: str) -> Iterator[tuple[bytes, int]]:
  contents = Path(path).read_bytes()
  try:
    records = loaded(contents, path)
  except ValueError as error:
    raise ValueError(f"{error} The name of JSON lines ends in .jsonl.") from error
  if not isinstance(records, list):
    raise ValueError(f"{path}: wanted an array of records, [{{...}}, ...]; the name of JSON lines ends in .jsonl.")
  for number, record in enumerate(records, start=1):
    yield to_json(record).encode(), len(contents) * number // len(records)


def _csv_rows(path: str, text_key: str) -> Iterator[tuple[bytes | None, int]]:
  with open(path, "rb") as file:
    rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
      names = next(rows, [])
      if names.count(text_key) != 1:
        raise ValueError(f"wanted one column {text_key!r}; its columns are {', '.join(names) or 'none'}")
      column = names.index(text_key)
      for row in rows:
        if row:  # a blank line is none
          yield row[column].encode() if len(row) == len(names) else None, file.tell()
    except (ValueError, csv.Error) as error:
      raise ValueError(f"{path}: {error}; its first {rows.line_num} lines were read.") from error


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
  # Frame by frame, since zstandard's stream_reader does not notice that a file is cut short.
  frame = None
  while chunk := file.read(2**18):
    while chunk:
      frame = frame or zstandard.ZstdDecompressor().decompressobj()
      yield frame.decompress(chunk)
      chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
  if frame is not None:
    raise ValueError("the file is cut short")


def _parquet_rows(path: str, text_key: str, skip: int, messages: bool) -> Iterator[tuple[bytes | None, int]]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(f"{path}: parquet files need pyarrow: `pip install 'supra_jax[parquet]'`.") from error
  size, row = os.path.getsize(path), 0
  try:
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
      _check_column(file.schema_arrow, text_key, path, messages)
      groups = list(range(file.num_row_groups))
      while groups and row + file.metadata.row_group(groups[0]).num_rows <= skip:
        row += file.metadata.row_group(groups.pop(0)).num_rows
      for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[text_key]):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
          column = column.dictionary_decode()
        if messages:
          values = column.to_pylist()
          items = [v.encode() if isinstance(v, str) else None if v is None else to_json(v).encode() for v in values]
        else:
          # As bytes, so that `parse` finds invalid UTF-8 and can name its row.
          items = column.cast(pyarrow.large_binary()).to_pylist()
        for item in items:
          row += 1
          if row > skip:
            yield item, size * row // file.metadata.num_rows
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path}: cannot be read from row {row} on: {error}.") from error


def _check_column(schema: Any, text_key: str, path: str, messages: bool) -> None:
  from pyarrow import types

  if schema.names.count(text_key) != 1:
    raise ValueError(f"{path}: wanted one column {text_key!r}; its columns are {', '.join(schema.names)}.")
  kind = schema.field(text_key).type
  if messages:
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_string(kind) or types.is_large_string(kind)):
      raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not lists of messages.")
    return
  text = kind.value_type if types.is_dictionary(kind) else kind
  if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
    raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not text, from row 0 on.")
