"""Reads documents from files of text, JSON, CSV and parquet, and `pydoc:topics`.

Reading has two halves, so that many processes can share the expensive half, `parse`: `read_pieces` reads, decompresses
and splits files into lines; `parse` turns lines into texts.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from supra_jax.core.files import local
from supra_jax.data.conversations import Talk, messages_of
from supra_jax.data.text_formats import (
  ENDINGS,
  JSON_ENDINGS,
  LINE_ENDINGS,
  PYDOC_TOPICS,
  ROW_ENDINGS,
  items_of,
  loaded,
  topics,
)

_Document = TypeVar("_Document")

# Files of a directory that describe the others.
_ABOUT = re.compile(
  r"(readme|licen[cs]e|notice|changelog|contributing|dataset_infos?|dataset_dict|state)(\.\w+)?", re.IGNORECASE
)
PIECE_BYTES = 2**18


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
    first: number of the first item; lines are numbered from 1, rows and topics from 0.
    items: lines, rows, topics or one whole file, each as bytes that should be UTF-8; None is a null of parquet. A row
      is a text or, of .json files and of messages, JSON.
    bytes_read: number of bytes of the file up to the end of this piece; approximate for compressed and parquet files.
  """

  path: str
  first: int
  items: list[bytes | None]
  bytes_read: int


def find_files(pattern: str, *, messages: bool = False) -> list[InputFile]:
  """Returns the files that match a pattern, sorted by path.

  Args:
    pattern: a glob of .txt and .md files (a document per file), .jsonl, .jsonl.gz and .jsonl.zst files (a document per
      line), .json files (an array with a document per entry), .csv files (a document per row below the names of
      columns) and .parquet files (a document per row); or a directory, of which all such files are taken but hidden
      ones and those that describe the others, such as README.md; or several of these, with commas between; or
      `pydoc:topics`, the standard library's `pydoc_data.topics` (a document per topic; PSF licence).
    messages: whether documents are conversations: files of a directory that cannot hold any are left out.

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: a file has another ending, or the pattern is empty, between commas too, or is a URL.
  """
  parts = _parts(pattern)
  if not all(parts):
    raise ValueError(f"{pattern!r} names no files{', or has a comma too many' if ',' in pattern else ''}.")
  endings = (*JSON_ENDINGS, ".parquet") if messages else ENDINGS
  paths = sorted({path for part in parts for path in _matching(part, endings)})
  for path in paths:
    if path != PYDOC_TOPICS and not path.endswith(ENDINGS):
      raise ValueError(f"{path}: wanted a name that ends in {', '.join(ENDINGS)}.")
  return [_described(path) for path in paths]


def _described(path: str) -> InputFile:
  if path == PYDOC_TOPICS:
    return InputFile(path, sum(map(len, topics())), 0)
  stat = os.stat(path)
  return InputFile(path, stat.st_size, stat.st_mtime_ns)


def directories_of(pattern: str) -> list[str]:
  """Returns those parts of a pattern, as `find_files` takes it, that are directories."""
  return [part for part in _parts(pattern) if os.path.isdir(part)]


def _parts(pattern: str) -> list[str]:
  """Returns the parts between the commas of a pattern; files that have commas in their names are one part."""
  if "," not in pattern or glob.glob(str(local(pattern))):
    return [pattern if pattern.strip() else ""]
  return [part.strip() for part in pattern.split(",")]


def _matching(pattern: str, endings: tuple[str, ...]) -> list[str]:
  """Returns the files that one file, glob or directory names; of a directory those with the given endings."""
  if pattern == PYDOC_TOPICS:
    return [pattern]
  pattern = str(local(pattern))
  if os.path.isfile(pattern):
    return [pattern]
  if os.path.isdir(pattern):
    found = glob.glob(os.path.join(glob.escape(pattern), "**"), recursive=True)
    found = [path for path in found if path.endswith(endings) and not _ABOUT.fullmatch(os.path.basename(path))]
  else:
    found = glob.glob(pattern, recursive=True)
  if files := [path for path in found if os.path.isfile(path)]:
    return files
  raise FileNotFoundError(
    f"{pattern} has no files that end in {', '.join(endings)}."
    if os.path.isdir(pattern)
    else f"No file matches {pattern!r}."
  )


def read_pieces(path: str, text_key: str = "text", *, skip: int = 0, messages: bool = False) -> Iterator[Piece]:
  """Yields the items of a file in pieces of at least PIECE_BYTES; the last piece may be smaller.

  Args:
    path: path of a file that `find_files` returned.
    text_key: the column of a .csv or .parquet file that holds the text.
    skip: number of items at the start of the file to leave out.
    messages: whether the column holds messages in place of a text.

  Raises:
    ValueError: the file is damaged, is no array of JSON, lacks the column, or can hold no messages; or is a parquet
      file and pyarrow is not installed. The message names the file and, for a damaged parquet file, the first row that
      cannot be read.
  """
  first_number = int(path.endswith(LINE_ENDINGS))
  items: list[bytes | None] = []
  size = bytes_read = number = 0
  for number, (item, bytes_read) in enumerate(items_of(path, text_key, skip, messages), start=skip + 1):
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
    text_key: the key of a JSON record, or the column, that holds the text.
    bad: a list; items without a valid text are skipped, and an error message for each is appended to it. None: the
      first such item raises ValueError.

  Raises:
    ValueError: an item has no valid text, and `bad` is None; the message names the file and the line or row.
  """
  is_json = piece.path.endswith(JSON_ENDINGS)
  return _parsed(piece, bad, lambda item, where: (_json_text if is_json else _plain_text)(item, text_key, where))


def parse_messages(piece: Piece, key: str, bad: list[str] | None = None) -> Iterator[tuple[str, Talk]]:
  """Yields (location, conversation) of each conversation of a piece, as `parse` yields texts.

  Of a JSON record `tools` are taken too.

  Raises:
    ValueError: `conversations.messages_of` refuses an item, and `bad` is None; the message names file and line or row.
  """

  def talk(item: bytes | None, where: str) -> Talk:
    if item is None:
      raise ValueError(f"{where}: null under {key!r}.")
    record = loaded(item, where)
    record = {key: record} if piece.path.endswith(".parquet") else record
    if not isinstance(record, dict) or key not in record:
      held = f"its keys are {', '.join(record) or 'none'}" if isinstance(record, dict) else "it is no object"
      raise ValueError(f"{where}: nothing under {key!r}; {held}.")
    try:
      return Talk(messages_of(record[key]), record.get("tools") or None)
    except ValueError as error:
      raise ValueError(f"{where}: no conversation under {key!r}: {error}.") from error

  return _parsed(piece, bad, talk)


def _parsed(
  piece: Piece, bad: list[str] | None, parsed: Callable[[bytes | None, str], _Document]
) -> Iterator[tuple[str, _Document]]:
  kind = "row" if piece.path.endswith(ROW_ENDINGS) else "line" if piece.path.endswith(LINE_ENDINGS) else ""
  for number, item in enumerate(piece.items, start=piece.first):
    where = f"{piece.path}, {kind} {number}" if kind else piece.path
    if item and kind != "row":
      item = item.removeprefix(codecs.BOM_UTF8)  # some Windows editors start files with it
    if kind == "line" and not (item and item.strip()):
      continue
    try:
      document = parsed(item, where)
    except ValueError as error:
      if bad is None:
        raise
      bad.append(str(error))
    else:
      yield where, document


def read_documents(pattern: str, text_key: str = "text") -> Iterator[str]:
  """Yields the texts of all files that match a pattern, in order of path and line.

  Args:
    pattern: a glob, or `pydoc:topics`, as `find_files` takes it.
    text_key: the key of a JSON record, or the column, that holds the text.

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
    raise ValueError(f"{where}: null under {text_key!r}, or another number of fields than the header has.")
  try:
    return item.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: not UTF-8 text: {error}.") from error


def _under(record: Any, key: str) -> Any:
  return record.get(key) if isinstance(record, dict) else None


def _json_text(line: bytes | None, text_key: str, where: str) -> str:
  record = loaded(line, where)
  text = _under(record, text_key)
  if not isinstance(text, str):
    others = isinstance(record, dict) and text_key not in record
    has = f" (text_key); its keys are {', '.join(map(repr, record))[:200]}" if others else ""
    raise ValueError(f"{where}: no text under {text_key!r}{has}.")
  try:
    # JSON can escape half a surrogate pair, which has no encoding in UTF-8.
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: no valid Unicode under {text_key!r}: {error}.") from error
  return text
