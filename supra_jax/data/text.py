"""Reads documents from text files: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet and `pydoc:topics`.

Reading has two halves, so that many processes can share the expensive half, `parse`: `read_pieces` reads, decompresses
and splits files into lines; `parse` turns lines into texts.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from supra_jax.core.files import local

PYDOC_TOPICS = "pydoc:topics"
LINE_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (".txt", *LINE_ENDINGS, ".parquet")
PIECE_BYTES = 2**18

# Rows read at a time: few, since a row of a parquet file may hold a book.
_PARQUET_ROWS = 64


@dataclasses.dataclass(frozen=True)
class InputFile:
  """A file of documents.

  Attributes:
    path: path of the file, or `pydoc:topics`.
    size: size of the file in bytes.
    changed: time of the file's last change, in nanoseconds since 1970.
  """

  path: str
  size: int
  changed: int


@dataclasses.dataclass(frozen=True)
class Piece:
  """Consecutive items of a file, unparsed.

  Attributes:
    path: path of the file.
    first: number of the first item; lines are numbered from 1, rows of parquet and topics from 0.
    items: lines, rows, topics or one whole file, each as bytes that should be UTF-8; None is a parquet null.
    bytes_read: number of bytes of the file up to the end of this piece; approximate for compressed and parquet files.
  """

  path: str
  first: int
  items: list[bytes | None]
  bytes_read: int


def find_files(pattern: str) -> list[InputFile]:
  """Returns the files that match a pattern, sorted by path.

  Args:
    pattern: a glob of .txt files (a document per file), .jsonl, .jsonl.gz and .jsonl.zst files (a document per line)
      and .parquet files (a document per row); or `pydoc:topics`, the standard library's `pydoc_data.topics` (a document
      per topic; PSF licence).

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: a file has another ending, or the pattern is a URL.
  """
  if pattern == PYDOC_TOPICS:
    return [InputFile(PYDOC_TOPICS, sum(map(len, _topics())), 0)]
  paths = sorted(path for path in glob.glob(str(local(pattern)), recursive=True) if os.path.isfile(path))
  if not paths:
    raise FileNotFoundError(f"No file matches {pattern!r}.")
  for path in paths:
    if not path.endswith(ENDINGS):
      raise ValueError(f"{path}: wanted a name that ends in {', '.join(ENDINGS)}.")
  stats = [os.stat(path) for path in paths]
  return [InputFile(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]


def read_pieces(path: str, text_key: str = "text", *, skip: int = 0) -> Iterator[Piece]:
  """Yields the items of a file in pieces of at least PIECE_BYTES; the last piece may be smaller.

  Args:
    path: path of a file that `find_files` returned.
    text_key: the column of a parquet file that holds the text.
    skip: number of items at the start of the file to leave out.

  Raises:
    ValueError: the file is damaged, is a parquet file without a text column `text_key`, or is a parquet file and
      pyarrow is not installed. The message names the file and, for a damaged parquet file, the first row that cannot be
      read.
  """
  first_number = int(path.endswith(LINE_ENDINGS))
  items: list[bytes | None] = []
  size = bytes_read = number = 0
  for number, (item, bytes_read) in enumerate(_items(path, text_key, skip), start=skip + 1):
    items.append(item)
    size += len(item or b"")
    if size >= PIECE_BYTES:
      yield Piece(path, first_number + number - len(items), items, bytes_read)
      items, size = [], 0
  if items:
    yield Piece(path, first_number + number - len(items), items, bytes_read)


def parse(piece: Piece, text_key: str = "text", bad: list[str] | None = None) -> Iterator[tuple[str, str]]:
  """Yields (location, text) of each document of a piece; skips blank lines of .jsonl files.

  Args:
    piece: a piece that `read_pieces` yielded.
    text_key: the key of a JSON line, or the column of a parquet file, that holds the text.
    bad: a list; items without a valid text are skipped, and an error message for each is appended to it. None: the
      first such item raises ValueError.

  Raises:
    ValueError: an item has no valid text, and `bad` is None; the message names the file and the line or row.
  """
  kind = "row" if piece.path.endswith(".parquet") else "line" if piece.path.endswith(LINE_ENDINGS) else ""
  for number, item in enumerate(piece.items, start=piece.first):
    where = f"{piece.path}, {kind} {number}" if kind else piece.path
    if item and kind != "row":
      item = item.removeprefix(codecs.BOM_UTF8)  # some Windows editors start files with it
    if kind == "line" and not (item and item.strip()):
      continue
    try:
      text = (_json_text if kind == "line" else _plain_text)(item, text_key, where)
    except ValueError as error:
      if bad is None:
        raise
      bad.append(str(error))
    else:
      yield where, text


def read_documents(pattern: str, text_key: str = "text") -> Iterator[str]:
  """Yields the texts of all files that match a pattern, in order of path and line.

  Args:
    pattern: a glob, or `pydoc:topics`, as `find_files` takes it.
    text_key: the key of a JSON line, or the column of a parquet file, that holds the text.

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: `find_files` rejects the pattern, or a file, line or row cannot be read; the message names the path and
      the line or row.
  """
  for file in find_files(pattern):
    yield from documents_of(file, text_key)


def documents_of(file: InputFile, text_key: str = "text") -> Iterator[str]:
  """Yields the texts of one file; for `text_key` and the ValueErrors see `read_documents`."""
  for piece in read_pieces(file.path, text_key):
    yield from (text for _, text in parse(piece, text_key))


def documents_in_turns(pattern: str, text_key: str = "text") -> Iterator[str]:
  """Yields the texts of all files that match a pattern, one from each file in turn (round robin).

  For the arguments and errors see `read_documents`.
  """
  readers = [documents_of(file, text_key) for file in find_files(pattern)]
  while readers:
    for reader in list(readers):
      if (text := next(reader, None)) is None:
        readers.remove(reader)
      else:
        yield text


def _plain_text(item: bytes | None, text_key: str, where: str) -> str:
  if item is None:
    raise ValueError(f"{where}: null under {text_key!r}.")
  try:
    return item.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: not UTF-8 text: {error}.") from error


def _json_text(line: bytes | None, text_key: str, where: str) -> str:
  try:
    record = json.loads(line or b"")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON: {error}.") from error
  text = record.get(text_key) if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise ValueError(f"{where}: no text under {text_key!r}.")
  try:
    # JSON can escape half a surrogate pair, which has no encoding in UTF-8.
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: no valid Unicode under {text_key!r}: {error}.") from error
  return text


def _topics() -> list[str]:
  from pydoc_data.topics import topics

  return [topics[name] for name in sorted(topics)]


def _items(path: str, text_key: str, skip: int) -> Iterator[tuple[bytes | None, int]]:
  """Yields (item, number of bytes of the file read so far), without the first `skip` items."""
  if path.endswith(".parquet"):
    yield from _parquet_rows(path, text_key, skip)
    return
  for number, (item, bytes_read) in enumerate(_lines(path)):
    if number >= skip:
      yield item, bytes_read


def _lines(path: str) -> Iterator[tuple[bytes, int]]:
  if path == PYDOC_TOPICS:
    read = 0
    for topic in _topics():
      read += len(topic)
      yield topic.encode(), read
    return
  if path.endswith(".txt"):
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


def _parquet_rows(path: str, text_key: str, skip: int) -> Iterator[tuple[bytes | None, int]]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(f"{path}: parquet files need pyarrow: `pip install 'supra_jax[parquet]'`.") from error
  size, row = os.path.getsize(path), 0
  try:
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
      _check_column(file.schema_arrow, text_key, path)
      groups = list(range(file.num_row_groups))
      while groups and row + file.metadata.row_group(groups[0]).num_rows <= skip:
        row += file.metadata.row_group(groups.pop(0)).num_rows
      for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[text_key]):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
          column = column.dictionary_decode()
        # As bytes, so that `parse` finds invalid UTF-8 and can name its row.
        for item in column.cast(pyarrow.large_binary()).to_pylist():
          row += 1
          if row > skip:
            yield item, size * row // file.metadata.num_rows
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path}: cannot be read from row {row} on: {error}.") from error


def _check_column(schema: Any, text_key: str, path: str) -> None:
  from pyarrow import types

  if schema.names.count(text_key) != 1:
    raise ValueError(f"{path}: wanted one column {text_key!r}; its columns are {', '.join(schema.names)}.")
  kind = schema.field(text_key).type
  text = kind.value_type if types.is_dictionary(kind) else kind
  if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
    raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not text, from row 0 on.")
