"""Text to rows of tokens on disk, and the grain pipeline that reads them.

DIR/meta.json            the PackedInfo
DIR/rows.array_record    one record a row: [1 or 2, sequence_length + 1] little-endian integers, tokens first
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, Protocol

import grain
import numpy as np
import zstandard
from array_record.python import array_record_module
from tqdm import tqdm

from supra_jax.checkpoint import new_directory

Join = Literal["join", "separate"]
Part = Literal["train", "heldout"]
PARTS: tuple[Part, Part] = ("train", "heldout")
# What `iter` of a loader gives: batches, get_state and set_state. Named here so that others need not import grain.
Batches = grain.DatasetIterator

META_FILE = "meta.json"
ROWS_FILE = "rows.array_record"
FORMAT_VERSION = 1
PYDOC_TOPICS = "pydoc:topics"

# What tokenizers disagree on: digits, runs of blanks, case, contractions, accents, scripts, emoji, code.
_PROBE = (
  "The quick brown fox jumps over the lazy dog; it's 7 o'clock, isn't it? Supercalifragilisticexpialidocious.",
  "3.14159 1000000 2405.06640 1,234,567 0x1F 50% $9.99\n\n7. Seventh\n\n\n8. Eighth",
  "def f(x):\n    return {'a': [x ** 2, -x]}\n\tif x != None and __name__ == '__main__':   # trailing   blanks   ",
  "Über naïve façades, señor: œuvre, Straße, ångström. Привет, мир. مرحبا שלום नमस्ते 你好世界 안녕 こんにちは",
  "HELLO World helloWorld <|endoftext|> <s></s> [INST] http://example.org/a?b=c&d=e \u00a0\u2014\u2019 ∑∫√ 🙂🔬",
)


class TextEncoder(Protocol):
  """What packing needs of a tokenizer; `supra_jax.tokenizer.Tokenizer` has it."""

  @property
  def eos_ids(self) -> Sequence[int]: ...

  @property
  def bos_id(self) -> int | None: ...

  def encode(self, text: str, *, bos: bool | None = None) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class PackedInfo:
  """What a packed directory holds.

  Attributes:
    sequence_length: T; a row has T + 1 tokens, the last of which is the first of the next row.
    rows: number of rows.
    tokens: rows * T, the number of targets.
    dropped_tokens: tokens at the end that did not fill a row.
    documents: documents read that were not empty.
    join: `join` runs documents together; `separate` stores which document each token is of.
    bos: each document starts with the tokenizer's begin-of-text id.
    vocab_size: every id is below it.
    dtype: how a number is stored, `<u2` or `<i4`.
    tokenizer_sha256: `tokenizer_fingerprint` of the tokenizer.
    format_version: of this layout.
  """

  sequence_length: int
  rows: int
  tokens: int
  dropped_tokens: int
  documents: int
  join: Join
  bos: bool
  vocab_size: int
  dtype: str
  tokenizer_sha256: str
  format_version: int = FORMAT_VERSION


def read_documents(pattern: str, text_key: str = "text") -> Iterator[str]:
  """Yields the documents of the files that match, in order of path and line.

  Args:
    pattern: a glob of .txt files (a file is a document) and .jsonl, .jsonl.gz or .jsonl.zst files (a line is one), or
      `pydoc:topics`, the standard library's `pydoc_data.topics` (a topic is a document; PSF licence).
    text_key: the key of a JSON line that holds the text.

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: a file or line cannot be read, by name and number.
  """
  if pattern == PYDOC_TOPICS:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    return
  paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
  if not paths:
    raise FileNotFoundError(f"No file matches {pattern!r}.")
  for path in paths:
    if path.endswith(".txt"):
      try:
        yield Path(path).read_text(encoding="utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}.") from error
    else:
      yield from _read_json_lines(path, text_key)


def split_documents(documents: Iterable[str], *, every: int, part: Part) -> Iterator[str]:
  """Yields each `every`-th document (`heldout`) or all the others (`train`)."""
  if every < 2:
    raise ValueError(f"every={every}: wanted at least 2, so that documents are left to train on.")
  if part not in PARTS:
    raise ValueError(f"part={part!r}: wanted 'train' or 'heldout'.")
  for number, document in enumerate(documents, start=1):
    if (number % every == 0) == (part == "heldout"):
      yield document


def pack(
  documents: Iterable[str],
  tokenizer: TextEncoder,
  output: str | os.PathLike[str],
  *,
  vocab_size: int,
  sequence_length: int,
  join: Join = "join",
  bos: bool = False,
) -> PackedInfo:
  """Writes documents as rows of sequence_length + 1 tokens, whole or not at all.

  Each document is followed by the first of the tokenizer's end-of-text ids; documents that give no token are passed
  over. Rows overlap by one token, so every token but the very first is a target once. The same documents and tokenizer
  give the same bytes.

  Args:
    documents: texts, read once.
    tokenizer: what encodes them.
    output: a directory that does not exist yet, or is empty.
    vocab_size: rows of the embedding that will read the ids.
    sequence_length: T.
    join: `separate` stores, beside each token, the number of its document in the row, from 1.
    bos: start each document with the begin-of-text id.

  Raises:
    FileExistsError: `output` holds something already.
    ValueError: no row is filled, an id is not below vocab_size, or the tokenizer lacks an id that is needed.
  """
  if sequence_length < 1 or join not in ("join", "separate"):
    raise ValueError(
      f"sequence_length={sequence_length}, join={join!r}: wanted a positive number, 'join' or 'separate'."
    )
  if not tokenizer.eos_ids:
    raise ValueError("The tokenizer has no end-of-text id to put between documents.")
  if bos and tokenizer.bos_id is None:
    raise ValueError("bos=True, but the tokenizer has no begin-of-text id.")
  dtype = "<u2" if max(vocab_size - 1, sequence_length + 1) < 2**16 else "<i4"
  width = sequence_length + 1
  rows = count = 0
  # [2, n]: ids, and the number of the document that each is of.
  pending = np.zeros((2, 0), np.int64)
  # disable=None: silent where stderr is no terminal.
  progress = tqdm(desc="pack", unit=" tokens", unit_scale=True, disable=None)
  with new_directory(output) as directory, progress:
    writer = array_record_module.ArrayRecordWriter(str(directory / ROWS_FILE), "group_size:1")
    for ids in _encode_all(documents, tokenizer, bos):
      if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"The tokenizer gives ids from {ids.min()} to {ids.max()}; vocab_size is {vocab_size}.")
      count += 1
      progress.update(len(ids))
      pending = np.concatenate([pending, [ids, np.full(len(ids), count)]], axis=1)
      full = (pending.shape[1] - 1) // sequence_length
      for start in range(0, full * sequence_length, sequence_length):
        row = pending[:, start : start + width]
        record = np.stack([row[0], row[1] - row[1, 0] + 1]) if join == "separate" else row[:1]
        writer.write(record.astype(dtype).tobytes())
      rows += full
      pending = pending[:, full * sequence_length :]
    writer.close()
    if not rows:
      raise ValueError(f"{count} documents gave {pending.shape[1]} tokens, too few for one row of {width}.")
    info = PackedInfo(
      sequence_length=sequence_length,
      rows=rows,
      tokens=rows * sequence_length,
      dropped_tokens=pending.shape[1] - 1,
      documents=count,
      join=join,
      bos=bos,
      vocab_size=vocab_size,
      dtype=dtype,
      tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
    (directory / META_FILE).write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
  return info


def tokenizer_fingerprint(tokenizer: TextEncoder) -> str:
  """The sha256 of how a tokenizer encodes a fixed probe, and of its special ids.

  Of behaviour and not of files, since one tokenizer comes as tokenizer.json, tokenizer.model or inside a GGUF.
  """
  encoded = [tokenizer.encode(text, bos=False) for text in _PROBE]
  said = json.dumps([[list(map(int, ids)) for ids in encoded], list(tokenizer.eos_ids), tokenizer.bos_id])
  return hashlib.sha256(said.encode()).hexdigest()


def load_info(path: str | os.PathLike[str]) -> PackedInfo:
  """Reads the meta.json of a packed directory.

  Raises:
    FileNotFoundError: it, or the rows, are missing.
    ValueError: it is not what `pack` writes.
  """
  for name in (META_FILE, ROWS_FILE):
    if not (Path(path) / name).is_file():
      raise FileNotFoundError(f"{path} is no packed dataset: {name} is missing. Make one with `supra_jax.data.pack`.")
  meta = Path(path) / META_FILE
  try:
    values = json.loads(meta.read_text())
    version = values["format_version"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{meta}: not the meta.json of a packed dataset: {error!r}.") from error
  if version != FORMAT_VERSION:
    raise ValueError(f"{meta}: format version {version}; this program reads version {FORMAT_VERSION}. Pack again.")
  # Annotations are strings in this file.
  kinds = {"int": int, "bool": bool, "str": str, "Join": str}
  wanted = {field.name: kinds[str(field.type)] for field in dataclasses.fields(PackedInfo)}
  if {name: type(value) for name, value in values.items()} != wanted or values["dtype"] not in ("<u2", "<i4"):
    raise ValueError(f"{meta}: wanted the keys {', '.join(wanted)}, each of its type; got {values}.")
  return PackedInfo(**values)


def check_packed(
  path: str | os.PathLike[str],
  *,
  sequence_length: int | None = None,
  vocab_size: int | None = None,
  tokenizer: TextEncoder | None = None,
  join: Join | None = None,
  bos: bool | None = None,
) -> PackedInfo:
  """Returns the info of a packed directory if it is what is wanted; None asks for nothing.

  Raises:
    ValueError: it was packed otherwise; names the directory and all that differs.
  """
  info = load_info(path)
  differs = []
  if sequence_length not in (None, info.sequence_length):
    differs.append(f"its sequence_length is {info.sequence_length}, not {sequence_length}")
  if vocab_size is not None and info.vocab_size > vocab_size:
    differs.append(f"its vocab_size is {info.vocab_size}, above the model's {vocab_size}")
  if join not in (None, info.join):
    differs.append(f"its documents are packed with join={info.join!r}, not {join!r}")
  if bos not in (None, info.bos):
    differs.append(f"it was packed with bos={info.bos}, not {bos}")
  if tokenizer is not None and tokenizer_fingerprint(tokenizer) != info.tokenizer_sha256:
    differs.append("it was made with another tokenizer")
  if differs:
    raise ValueError(f"{path} does not fit: {'; '.join(differs)}. Pack the text again.")
  return info


class PackedDataset:
  """The rows of a packed directory, by number: {"tokens": int32 [T + 1]}, and "segment_ids" where stored."""

  def __init__(self, path: str | os.PathLike[str]):
    self.info = load_info(path)
    self._file = str(Path(path) / ROWS_FILE)
    try:
      self._source = grain.sources.ArrayRecordDataSource([self._file])
    except RuntimeError as error:
      raise ValueError(f"{self._file}: cannot be opened: {error}") from error
    if len(self._source) != self.info.rows:
      raise ValueError(f"{self._file}: holds {len(self._source)} rows; {META_FILE} says {self.info.rows}.")

  def __len__(self) -> int:
    return self.info.rows

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    names = ("tokens", "segment_ids") if self.info.join == "separate" else ("tokens",)
    try:
      numbers = np.frombuffer(self._source[index], self.info.dtype).astype(np.int32)
      return dict(zip(names, numbers.reshape(len(names), self.info.sequence_length + 1), strict=True))
    except (RuntimeError, ValueError) as error:
      raise ValueError(f"{self._file}: row {index} cannot be read: {error}") from error


def make_loader(
  path: str | os.PathLike[str],
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  num_epochs: int | None = None,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.IterDataset:
  """A grain dataset of batches of rows; `iter` of it has get_state and set_state.

  Rows are reshuffled each epoch and batches run across epochs; what does not fill the last batch is dropped. The
  shards of one step make up the same global batch whatever their number.

  Args:
    path: what `pack` wrote.
    batch_size: rows in a global batch; a shard yields batch_size / shard_count of them.
    seed: of the order, below 2**32.
    shuffle: False keeps the order on disk.
    num_epochs: None repeats for ever.
    shard_index, shard_count: which part of each batch to yield; one a process.

  Returns:
    A dataset of {"tokens": int32 [B, T + 1]}, and "segment_ids" alike where stored.
  """
  if batch_size < 1 or batch_size % shard_count or not 0 <= shard_index < shard_count:
    raise ValueError(f"batch_size={batch_size} cannot be cut for shard {shard_index} of {shard_count}.")
  source = PackedDataset(path)
  if len(source) < batch_size:
    raise ValueError(f"{path}: {len(source)} rows are fewer than one batch of {batch_size}.")
  rows = grain.MapDataset.source(source)
  if shuffle:
    rows = rows.shuffle(seed=seed)
  rows = rows.repeat(num_epochs)
  if num_epochs is not None:
    rows = rows[: len(rows) // batch_size * batch_size]
  if shard_count > 1:
    rows = rows[shard_index::shard_count]
  return rows.to_iter_dataset().batch(batch_size // shard_count, drop_remainder=True)


def _encode_all(documents: Iterable[str], tokenizer: TextEncoder, bos: bool) -> Iterator[np.ndarray]:
  for document in documents:
    ids = tokenizer.encode(document, bos=bos)
    if len(ids) > bos:
      yield np.array([*ids, tokenizer.eos_ids[0]])


def _read_json_lines(path: str, text_key: str) -> Iterator[str]:
  for number, line in enumerate(_lines(path), start=1):
    if line.strip():
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {error}.") from error
      if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        raise ValueError(f"{path}, line {number}: no text under {text_key!r}.")
      yield record[text_key]


def _lines(path: str) -> Iterator[bytes]:
  try:
    if path.endswith(".jsonl"):
      with open(path, "rb") as file:
        yield from file
    elif path.endswith(".jsonl.gz"):
      with gzip.open(path, "rb") as file:
        yield from file
    elif path.endswith(".jsonl.zst"):
      with open(path, "rb") as file:
        pending = b""
        for chunk in _decompress_zstd(file):
          *lines, pending = (pending + chunk).split(b"\n")
          yield from lines
        yield pending
    else:
      raise ValueError("wanted a name in .txt, .jsonl, .jsonl.gz or .jsonl.zst")
  except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
    raise ValueError(f"{path}: {error}.") from error


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
  # Frame by frame, since zstandard's stream_reader takes a cut file for a whole one.
  frame = None
  while chunk := file.read(2**18):
    while chunk:
      frame = frame or zstandard.ZstdDecompressor().decompressobj()
      yield frame.decompress(chunk)
      chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
  if frame is not None:
    raise ValueError("the file is cut short")
