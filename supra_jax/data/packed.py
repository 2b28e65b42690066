"""Packed directories: rows of tokens in ArrayRecord files, and a meta.json that describes them.

DIR/meta.json                  the fields of a PackedInfo
DIR/rows-00000.array_record    the first rows; each record is one row, [1 to 3, T + 1] little-endian integers: tokens,
                               with documents=separate segment ids, and of conversations target weights
DIR/rows-00001.array_record    the next rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from supra_jax.core import bucket
from supra_jax.core.files import TEMPORARY, AnyPath, place
from supra_jax.core.plain_json import to_json
from supra_jax.core.schema import AtLeast, check, from_mapping

# How documents share a row. `join`: one after another, as a single text. `separate`: in addition each token has a
# segment id, the number of its document in the row, so that a model resets its state between documents. Recipes and
# flags call this option `documents`; in meta.json, where `documents` is a count, the option's key is `join`.
Documents = Literal["join", "separate"]
Dtype = Literal["<u2", "<i4"]

META_FILE = "meta.json"
FORMAT_VERSION = 2

# Text that tokenizers encode differently: digits, runs of spaces, case, contractions, accents, scripts, emoji, code.
_PROBE = (
  "The quick brown fox jumps over the lazy dog; it's 7 o'clock, isn't it? Supercalifragilisticexpialidocious.",
  "3.14159 1000000 2405.06640 1,234,567 0x1F 50% $9.99\n\n7. Seventh\n\n\n8. Eighth",
  "def f(x):\n    return {'a': [x ** 2, -x]}\n\tif x != None and __name__ == '__main__':   # trailing   blanks   ",
  "Über naïve façades, señor: œuvre, Straße, ångström. Привет, мир. مرحبا שלום नमस्ते 你好世界 안녕 こんにちは",
  "HELLO World helloWorld <|endoftext|> <s></s> [INST] http://example.org/a?b=c&d=e \u00a0\u2014\u2019 ∑∫√ 🙂🔬",
)


class TextEncoder(Protocol):
  """What packing needs of a tokenizer; `data.tokenizer.Tokenizer` implements this interface."""

  @property
  def eos_ids(self) -> Sequence[int]: ...

  @property
  def bos_id(self) -> int | None: ...

  def encode(self, text: str, *, bos: bool | None = None) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of rows.

  Attributes:
    file, rows: name of the file, and number of rows in it.
    bytes, sha256: size of the file in bytes, and its hexadecimal digest.
  """

  file: str
  rows: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class PackedInfo:
  """Description of a packed directory; the fields are the keys of meta.json.

  Attributes:
    sequence_length: T; a row has T + 1 tokens, the last of which is the first of the next row.
    rows, tokens: number of rows, and rows * T, the number of positions with a next token to predict.
    dropped_tokens: number of tokens at the end of the text that did not fill a row, and in rows without an answer.
    documents: number of documents that have at least one token.
    join: how documents share a row, see `Documents`.
    bos: whether each document starts with the tokenizer's begin-of-text id.
    vocab_size: number of rows of the model's embedding; all ids are below this number.
    dtype: numpy dtype of the stored integers, `<u2` or `<i4`.
    tokenizer_sha256: what `tokenizer_fingerprint` returns for the tokenizer.
    shards: the files of rows, in order.
    format_version: version of the layout of the directory.
    learned_tokens: number of positions whose next token a model is to learn, where rows have `target_weights`, 1 for
      tokens to learn and 0 for others; None: all are learned.
  """

  sequence_length: Annotated[int, AtLeast(1)]
  rows: int
  tokens: int
  dropped_tokens: int
  documents: int
  join: Documents
  bos: bool
  vocab_size: int
  dtype: Dtype
  tokenizer_sha256: str
  shards: tuple[Shard, ...]
  format_version: int = FORMAT_VERSION
  learned_tokens: int | None = None

  def __post_init__(self):
    check(self)
    if self.rows != sum(shard.rows for shard in self.shards):
      raise ValueError(f"rows={self.rows}: wanted the sum of the rows of all shards.")
    if self.tokens != self.rows * self.sequence_length:
      raise ValueError(f"tokens={self.tokens}: wanted rows={self.rows} times sequence_length={self.sequence_length}.")

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the arrays of a row, in the order in which a record stores them."""
    return leaves_of(self.join, masked=self.learned_tokens is not None)


def leaves_of(documents: Documents, *, masked: bool) -> tuple[str, ...]:
  """Returns the names of the arrays [T + 1] that make up a row.

  Args:
    documents: how documents share a row.
    masked: whether rows say which of their tokens are to be learned.
  """
  return "tokens", *["segment_ids"] * (documents == "separate"), *["target_weights"] * masked


def tokenizer_fingerprint(tokenizer: TextEncoder) -> str:
  """Returns a sha256 of the ids that a tokenizer gives a fixed probe text, and of its begin- and end-of-text ids.

  The hash is one of behaviour, not of files: the same tokenizer may come as tokenizer.json, tokenizer.model or GGUF.
  """
  encoded = [tokenizer.encode(text, bos=False) for text in _PROBE]
  said = to_json([[list(map(int, ids)) for ids in encoded], list(tokenizer.eos_ids), tokenizer.bos_id])
  return hashlib.sha256(said.encode()).hexdigest()


def load_info(path: str | os.PathLike[str]) -> PackedInfo:
  """Reads the meta.json of a packed directory, and checks that all files of rows are there and have the right size.

  Args:
    path: a packed directory, local or gs://.

  Raises:
    FileNotFoundError: meta.json or a file of rows is missing.
    ValueError: meta.json was not written by this version of `packing.prepare`, the size of a file of rows is not the
      one in meta.json, or `core.files.place` rejects `path`.
  """
  directory = place(path)
  meta = directory / META_FILE
  if not meta.is_file():
    raise FileNotFoundError(
      f"{path} is no packed dataset: {META_FILE} is missing. Make one with `python -m supra_jax.bin.prepare_data`; "
      "the rows are then in its `train` and `heldout`."
    )
  try:
    values = json.loads(meta.read_text())
    version = values["format_version"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{meta}: not the meta.json of a packed dataset: {error!r}.") from error
  if version != FORMAT_VERSION:
    raise ValueError(f"{meta}: format version {version}; this program reads version {FORMAT_VERSION}. Pack again.")
  try:
    info = from_mapping(PackedInfo, values, "keys")
  except ValueError as error:
    raise ValueError(f"{meta}: not the meta.json of a packed dataset: {error}") from error
  sizes = _sizes(directory)
  for shard in info.shards:
    file = directory / shard.file
    if shard.file not in sizes:
      raise FileNotFoundError(f"{file} is missing; {META_FILE} names it. Bring it back, or pack again.")
    if sizes[shard.file] != shard.bytes:
      raise ValueError(
        f"{file} has {sizes[shard.file]} bytes; {META_FILE} says {shard.bytes}. Bring it back, or pack again."
      )
  return info


def local_files(path: str | os.PathLike[str], info: PackedInfo) -> list[Path]:
  """Returns local paths of the files of rows; copies files in a bucket to the local cache directory first.

  ArrayRecord reads local files only.

  Args:
    path: the packed directory, local or gs://.
    info: what `load_info(path)` returns.

  Raises:
    ValueError: a file copied from a bucket does not have the sha256 that meta.json gives.
    OSError: a file cannot be copied.
  """
  directory = place(path)
  if isinstance(directory, Path):
    return [directory / shard.file for shard in info.shards]
  # The cache names files by their sha256, so that a cached file is right whichever run copied it.
  cache = bucket.cache_directory()
  files = [cache / f"{shard.sha256}.array_record" for shard in info.shards]
  for shard, file in zip(info.shards, files, strict=True):
    if not file.exists():
      partial = file.with_name(f"{file.name}.{os.getpid()}{TEMPORARY}")
      try:
        bucket.download(directory / shard.file, partial)
        if sha256_of(partial) != shard.sha256:
          raise ValueError(f"{directory / shard.file}: not the bytes that were written. Bring it back, or pack again.")
        os.replace(partial, file)
      finally:
        partial.unlink(missing_ok=True)
  return files


def _sizes(directory: AnyPath) -> dict[str, int]:
  """Returns {file name: size in bytes} of the files of a directory."""
  if not isinstance(directory, Path):
    return bucket.sizes(directory)
  return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}


def check_packed(
  path: str | os.PathLike[str],
  *,
  sequence_length: int | None = None,
  vocab_size: int | None = None,
  tokenizer: TextEncoder | None = None,
  documents: Documents | None = None,
  bos: bool | None = None,
) -> PackedInfo:
  """Checks that a packed directory was packed as a run needs, and returns what `load_info` returns for the directory.

  Args:
    path: a packed directory, local or gs://.
    sequence_length: T of the run. None: not checked.
    vocab_size: number of rows of the model's embedding; the directory's vocab_size must not be larger. None: not
      checked.
    tokenizer: the model's tokenizer, compared by `tokenizer_fingerprint`. None: not checked.
    documents: how documents have to share a row. None: not checked.
    bos: whether documents have to start with the begin-of-text id. None: not checked.

  Raises:
    FileNotFoundError: as `load_info`.
    ValueError: the directory was packed in another way; the message names all differences. Or as `load_info`.
  """
  info = load_info(path)
  differs = []
  if sequence_length not in (None, info.sequence_length):
    differs.append(f"its sequence_length is {info.sequence_length}, not {sequence_length}")
  if vocab_size is not None and info.vocab_size > vocab_size:
    differs.append(f"its vocab_size is {info.vocab_size}, above the model's {vocab_size}")
  if documents not in (None, info.join):
    differs.append(f"it was packed with documents={info.join!r}, not {documents!r}")
  if bos not in (None, info.bos):
    differs.append(f"it was packed with bos={info.bos}, not {bos}")
  if tokenizer is not None and tokenizer_fingerprint(tokenizer) != info.tokenizer_sha256:
    differs.append("it was made with another tokenizer")
  if differs:
    raise ValueError(f"{path} does not fit: {'; '.join(differs)}. Pack the text again.")
  return info


def verify(path: str | os.PathLike[str]) -> PackedInfo:
  """Checks the sha256 of all files of rows, and returns what `load_info(path)` returns.

  Raises:
    FileNotFoundError: as `load_info`.
    ValueError: files do not have the sha256 that meta.json gives; the message names all of them. Or as `load_info`.
  """
  info = load_info(path)
  wrong = [shard.file for shard in info.shards if sha256_of(place(path) / shard.file) != shard.sha256]
  if wrong:
    raise ValueError(f"{path}: {', '.join(wrong)}: not the bytes that were written. Bring them back, or pack again.")
  return info


def sha256_of(path: AnyPath) -> str:
  """Returns the hexadecimal sha256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
